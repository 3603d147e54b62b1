"""A site: a place in a model where a part can be exchanged. It holds shapes and ties, no tensors."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from taut.core.cost import BYTES_OF_DTYPE, Cost
from taut.core.slot import KIND_OF_SLOT


@dataclass(frozen=True, kw_only=True)
class Site(ABC):
    """Abstract: what all sites have.

    ``name`` (``feedforward.3.up``, ``projection.decoder.0.q``, ``embedding``) does not depend on the head that the
    model is loaded with. ``path`` is the path of the module in this model.
    """

    slot: str
    path: str
    dtype: str = "float32"
    layer: int | None = None
    stack: str = ""
    role: str = ""

    @property
    def kind(self) -> str:
        return KIND_OF_SLOT[self.slot]

    @property
    def name(self) -> str:
        layer = "" if self.layer is None else str(self.layer)
        return ".".join(part for part in (self.slot, self.stack, layer, self.role) if part)

    @property
    def width_in_bytes(self) -> int:
        return BYTES_OF_DTYPE[self.dtype]

    @abstractmethod
    def dense(self) -> Cost:
        """The cost of the original part at this site."""


@dataclass(frozen=True, kw_only=True)
class TableSite(Site):
    """The token table (V rows x D columns), all other modules that share it, and the heads tied to it.

    ``scale`` multiplies the result of a lookup (BART, Gemma 3). ``copies`` are other lookups of the same table (T5
    encoder and decoder). ``heads`` are tied output projections; their own bias, if any, is not replaced.
    """

    rows: int
    width: int
    scale: float = 1.0
    padding_row: int | None = None
    copies: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def dense(self) -> Cost:
        numbers = self.rows * self.width
        return Cost(numbers, numbers * self.width_in_bytes, 2.0 * numbers * len(self.heads))


@dataclass(frozen=True, kw_only=True)
class LinearSite(Site):
    """One linear map y = W x + b with W of ``outputs`` x ``inputs``.

    ``role`` is q, k, v, o, qkv (``fused`` = 3), up, gate, down, gate_up; cross-attention roles start with ``cross_``.
    ``transposed`` marks GPT-2's Conv1D, which stores W as inputs x outputs.
    """

    inputs: int
    outputs: int
    bias: bool = False
    transposed: bool = False
    fused: int = 1

    def dense(self) -> Cost:
        numbers = self.outputs * self.inputs + (self.outputs if self.bias else 0)
        return Cost(numbers, numbers * self.width_in_bytes, 2.0 * self.outputs * self.inputs)


@dataclass(frozen=True, kw_only=True)
class AttentionSite(Site):
    """One self-attention: H heads of width K over ``length`` positions (the declared n).

    ``position`` says how positions enter: ``rope``, ``learned``, ``bias`` (T5: a bias added to the scores) or ``none``.
    ``positions`` are the paths of the modules that do this, rotary ones or tables, for all layers of the stack; empty
    if they cannot be removed. ``window`` is the model's own sliding window, if any. ``softcap`` is its cap on the
    scores (Gemma 2).
    """

    heads: int
    key_heads: int
    head_width: int
    causal: bool
    position: str
    length: int
    window: int | None = None
    softcap: float | None = None
    positions: tuple[str, ...] = ()

    def flops(self, pairs: float) -> float:
        """FLOPs per token when ``pairs`` of the n x n score pairs are computed: q.k and a.v, two per multiply-add."""
        return 4.0 * self.heads * self.head_width * pairs / self.length

    def dense(self) -> Cost:
        return Cost(flops_per_token=self.flops(float(self.length) ** 2))


@dataclass(frozen=True, kw_only=True)
class MemorySite(Site):
    """The key/value cache of a decoder: ``layers`` layers, ``key_heads`` heads of width ``head_width``, ``length``
    positions.

    ``window`` is the model's own sliding window, if any layer has one. ``softcap`` is its cap on the scores (Gemma 2).
    """

    layers: int
    key_heads: int
    head_width: int
    position: str
    length: int
    window: int | None = None
    softcap: float | None = None

    @property
    def entry_bytes(self) -> int:
        """Bytes of the keys and values of one position, in all layers together."""
        return 2 * self.layers * self.key_heads * self.head_width * self.width_in_bytes

    def dense(self) -> Cost:
        return Cost(cache_bytes_per_token=float(self.entry_bytes))
