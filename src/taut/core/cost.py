"""The predicted cost of a part: parameters, bytes, FLOPs and cache bytes."""

from dataclasses import dataclass, fields

BYTES_OF_DTYPE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class Cost:
    """Parameters and stored bytes are exact; FLOPs and cache bytes are per token at the site's declared length.

    ``parameters`` counts the numbers that the part represents: a 4-bit table has as many as the dense one. ``bytes`` is
    the size of what it stores. ``flops_per_token`` counts a multiply-add as two. ``cache_bytes_per_token`` is the mean
    over the ``length`` tokens of a full context.
    """

    parameters: int = 0
    bytes: int = 0
    flops_per_token: float = 0.0
    cache_bytes_per_token: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))
