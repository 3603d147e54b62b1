"""The header of a safetensors file, read without the tensors."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taut.core.errors import TautError


@dataclass(frozen=True)
class SafetensorsHeader:
    """``tensors`` holds ``dtype``, ``shape`` and ``data_offsets`` by name.

    ``header_bytes`` includes the length field. ``header_bytes`` and ``data_bytes`` add up to the size of the file.
    """

    tensors: dict[str, dict[str, Any]]
    header_bytes: int
    data_bytes: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read the header of a file. Raises TautError if it is not a safetensors file or is truncated."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= size - 8:
            raise TautError(f"{path}: not a safetensors file (no readable header)")
        try:
            tensors: dict[str, Any] = json.loads(file.read(length))
            tensors.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise TautError(f"{path}: not a safetensors file (its header is damaged)") from None
    if 8 + length + end != size:
        raise TautError(f"{path}: truncated: {size:,} bytes, but its header describes {8 + length + end:,}")
    return SafetensorsHeader(tensors, 8 + length, end)
