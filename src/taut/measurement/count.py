"""Counts parameters, bytes and FLOPs on the model itself: shared tensors once, packed tensors at their real size."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taut.core.errors import TautError
from taut.core.numbers import scaled
from taut.core.record import Quantity
from taut.core.safetensors_header import read_header
from taut.core.site import Site
from taut.core.table import Table, data_frame

REST = "rest"
"""The slot name for tensors that belong to no site: norms, position tables, untied heads, poolers."""
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Share:
    """The size of a set of tensors.

    ``parameters``: the numbers that the tensors represent (a 4-bit table has as many as the dense one). ``stored``:
    bytes of the tensors in a file. ``resident``: bytes of memory that they occupy, including buffers that are not
    saved; None for a model on the meta device.
    """

    parameters: int
    stored: int
    resident: int | None


@dataclass(frozen=True)
class Footprint(Share):
    """The size of a whole model and of its ``slots``, which add up to the whole. ``str`` gives it in one line.

    ``slots`` has those of the five slots and ``rest`` that contain tensors. ``header``: bytes that a safetensors file
    needs for names and shapes in addition to the tensors. ``model`` is the name of its class, ``recipe`` what it was
    compressed with, or None.
    """

    header: int
    slots: dict[str, Share]
    model: str = ""
    recipe: dict[str, Any] | None = None

    @property
    def file(self) -> int:
        """Bytes of the model as one safetensors file."""
        return self.stored + self.header

    def __str__(self) -> str:
        """One line: class, parameters, stored bytes of each slot, bits per parameter, recipe."""
        slots = ", ".join(f"{slot} {scaled(share.stored, 'B')}" for slot, share in self.slots.items() if share.stored)
        return (
            f"{self.model} {self.parameters / 1e6:.2f} M parameters in {scaled(self.stored, 'B')} "
            f"({_bits(self)} bits each): {slots}; "
            + (f"recipe {self.recipe}" if self.recipe is not None else "not compressed")
        )

    def table(self) -> Table:
        """A row for each slot, and the whole model."""
        rows = [(slot, *_cells(share)) for slot, share in self.slots.items()]
        names = ("slot", "parameters", "stored", "bits each", "resident")
        return Table(names, rows, ("together", *_cells(self)), title=str(self))

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def to_dict(self) -> dict[str, Any]:
        """The footprint as one dictionary, for scripts."""
        return asdict(self) | {"file": self.file}

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row for each slot. Raises TautError if pandas is not installed."""
        rows = [{"slot": slot, **vars(share)} for slot, share in self.slots.items()]
        return data_frame(rows, ("slot", *(entry.name for entry in fields(Share))))

    def quantities(self) -> dict[str, Quantity]:
        return {
            "parameters": Quantity(value=self.parameters, unit="parameters", how="counted, shared tensors once"),
            "stored": Quantity(value=self.stored, unit="bytes", how="tensors of the state dict, shared ones once"),
            "resident": Quantity(value=self.resident, unit="bytes", how="storages of all tensors held, each once"),
        }


def count(model: nn.Module, sites: Iterable[Site] = (), logical: Mapping[str, int] | None = None) -> Footprint:
    """The footprint of ``model``, split by the slots of ``sites``; a tensor belongs to the innermost site around it.

    ``logical`` maps the paths of modules with packed tensors to the number of parameters that they represent (a plan's
    ``Cost.parameters``, bias included). Elsewhere the elements of the parameters are counted. Memory outside tensors
    (a library's packed weights) is not counted; ``memory.peak_memory`` includes it.
    """
    slot_of = {site.path: site.slot for site in sites if site.slot != "memory"}
    logical = dict(logical or {})
    saved = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    tied, in_memory = _by_identity(saved), _by_storage(_held(model))

    parameters: dict[str, int] = {}
    stored: dict[str, int] = {}
    for path, number in logical.items():
        _add(parameters, _slot([path], slot_of), number)
    for names, tensor in tied:
        slot = _slot(names, slot_of)
        _add(stored, slot, tensor.nbytes)
        if isinstance(tensor, nn.Parameter) and not any(_inside(name, logical) for name in names):
            _add(parameters, slot, tensor.numel())
    resident: dict[str, int] | None = None if any(tensor.is_meta for _, tensor in in_memory) else {}
    if resident is not None:
        for names, tensor in in_memory:
            _add(resident, _slot(names, slot_of), tensor.untyped_storage().nbytes())

    slots = {
        slot: Share(parameters.get(slot, 0), stored.get(slot, 0), None if resident is None else resident.get(slot, 0))
        for slot in dict.fromkeys([*slot_of.values(), *parameters, *stored, *(resident or ())])
    }
    total = None if resident is None else sum(resident.values())
    header = _header_bytes({names[0]: tensor for names, tensor in tied})
    return Footprint(sum(parameters.values()), sum(stored.values()), total, header, slots, model=type(model).__name__)


@dataclass(frozen=True)
class FolderBytes:
    """The bytes of a folder's weights on disk: ``total`` = ``tensors`` + ``headers`` over all ``files``."""

    total: int
    tensors: int
    headers: int
    files: tuple[str, ...]


def folder_bytes(folder: str | Path) -> FolderBytes:
    """The bytes of a saved model's safetensors files. Raises TautError if there is none or if one is damaged."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise TautError(f"{folder}: no *.safetensors file; expected the folder of a saved model")
    read = [read_header(path) for path in paths]
    tensors, headers = sum(header.data_bytes for header in read), sum(header.header_bytes for header in read)
    return FolderBytes(tensors + headers, tensors, headers, tuple(path.name for path in paths))


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a key/value cache occupies: the storages of all its tensors, each counted once."""
    return sum(tensor.untyped_storage().nbytes() for _, tensor in _by_storage(_inner(cache, set())))


def flops_per_token(
    model: nn.Module, inputs: Mapping[str, Tensor], predicted: Mapping[tuple[str, ...], float] | None = None
) -> Quantity:
    """FLOPs of one forward pass, divided by the positions of ``input_ids`` (B, T); a multiply-add counts as two.

    Counts matrix products, convolutions and attention, as torch does. A fused attention counts all pairs, masked or
    not. Element-wise work and operators without a formula (int8 kernels) count as zero. ``predicted`` are FLOPs per
    token of parts that may use such operators, by the paths of their modules. They replace what is counted there: how
    much torch sees depends on the number of tokens and on the processor.
    """
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(**inputs)
    how = f"torch's FLOP counter, one forward pass of {tuple(inputs['input_ids'].shape)} tokens"
    value = counter.get_total_flops() / inputs["input_ids"].numel()
    if predicted:
        root, seen = type(model).__name__, counter.get_flop_counts()
        paths = (path for group in predicted for path in group)
        inside = sum(sum(seen.get(f"{root}.{path}", {}).values()) for path in paths)
        value += sum(predicted.values()) - inside / inputs["input_ids"].numel()
        how += f"; {len(predicted)} parts that it cannot see as predicted"
    return Quantity(value=value, unit="FLOPs/token", how=how)


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """FLOPs of q.k and a.v, for the shapes (B, H, T, K), (B, H', S, K), (B, H', S, K)."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a model keeps in memory, including tensors in plain attributes."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}", value


def _inner(value: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors inside a cache, its layers and their containers, but not those of a model that it refers to."""
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _inner(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _inner(item, seen)
    else:
        for item in getattr(value, "__dict__", {}).values():
            yield from _inner(item, seen)


def _by_identity(named: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Each distinct tensor with all its names."""
    groups: dict[Any, tuple[list[str], Tensor]] = {}
    for name, tensor in named.items():
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        key = id(tensor) if tensor.is_meta or not tensor.numel() else view
        groups.setdefault(key, ([], tensor))[0].append(name)
    return list(groups.values())


def _by_storage(named: Iterable[tuple[str, Tensor]]) -> list[tuple[list[str], Tensor]]:
    """Each distinct storage with the names of the tensors in it, and one of these tensors."""
    groups: dict[Any, tuple[list[str], Tensor]] = {}
    for name, tensor in named:
        key = id(tensor) if tensor.is_meta else (tensor.device, tensor.untyped_storage().data_ptr())
        groups.setdefault(key, ([], tensor))[0].append(name)
    return list(groups.values())


def _slot(names: Iterable[str], slot_of: Mapping[str, str]) -> str:
    owners = (_inside(name, slot_of) for name in names)
    return next((slot_of[owner] for owner in owners if owner is not None), REST)


def _inside(name: str, paths: Mapping[str, Any]) -> str | None:
    """The longest of ``paths`` that is ``name`` or a module around it; None if there is none."""
    while name not in paths:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def _add(totals: dict[str, int], key: str, number: int) -> None:
    totals[key] = totals.get(key, 0) + number


def _header_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that safetensors writes before the data: 8 bytes of length, then JSON padded to a multiple of 8."""
    order = list(SAFETENSORS_DTYPES)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8


def _cells(share: Share) -> tuple[str, ...]:
    resident = "-" if share.resident is None else scaled(share.resident, "B")
    return scaled(share.parameters), scaled(share.stored, "B"), _bits(share), resident


def _bits(share: Share) -> str:
    """Stored bits for each parameter."""
    return f"{8 * share.stored / share.parameters:.2f}" if share.parameters else "-"
