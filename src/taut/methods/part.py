"""The modules that replace a token table or a linear map."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.site import LinearSite, TableSite
from taut.methods.store import Store

TokenRanges = Mapping[int, tuple[tuple[int, int], ...]]
"""By number of threads: the ranges of token counts, first to last (-1: no end), in which a dense copy is faster."""


class Part(nn.Module, ABC):
    """Abstract: a module that replaces a token table or a linear map.

    It has a tensor named ``weight`` whose *shape* differs from the original's, so that opening the checkpoint without
    taut raises an error. Tensors are parameters (floating, trainable) or persistent buffers (codes, tables,
    permutations): models are loaded into a skeleton on the meta device, and nothing else survives that. Values that
    must not follow ``.half()`` (scales) are bytes inside a uint8 buffer.

    A float tensor that a recipe's ``store:`` may put in fewer bits is declared with ``hold`` and read with ``held``
    or ``held_rows``. ``unpack`` turns everything that healing may change into float parameters; ``repack`` puts it back
    into its stored form. An unpacked part computes what it will compute once repacked, and for gradients the rounding
    is the identity.
    """

    packed_dtype: ClassVar[torch.dtype] = torch.uint8
    """The dtype under which the bytes of a stored tensor are registered."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        """The dtype of outputs. It follows ``.to()``, ``.half()`` and the like, although codes do not."""
        self.random_step = 0
        """The number of the next random step in training mode. The same step gives the same random numbers."""
        self._held: dict[str, tuple[tuple[int, ...], Store | None]] = {}

    def hold(self, name: str, shape: tuple[int, ...], store: Store | None, device: torch.device) -> None:
        """Declare a float tensor of ``shape``: a parameter, or with ``store`` a buffer of packed rows.

        A row lies along the last axis. The values are undefined until ``fill``.
        """
        self._held[name] = (shape, store)
        if store is None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=self.dtype)))
        else:
            self.register_buffer(name, torch.empty(store.packed_shape(shape), device=device, dtype=self.packed_dtype))

    @torch.no_grad()
    def fill(self, name: str, value: Tensor) -> None:
        """Set the values of a held tensor, in any float dtype and the declared shape."""
        shape, store = self._held[name]
        packed = value.reshape(shape) if store is None else store.pack(value.reshape(shape))
        (self.get_parameter(name) if store is None else self._packed(name)).copy_(packed)

    def held(self, name: str) -> Tensor:
        """Return a held tensor in its declared shape and the part's dtype, expanded if it is stored in few bits."""
        shape, store = self._held[name]
        unpacked = self._parameters.get(f"{name}_unpacked")
        if unpacked is not None:
            return store.straight_through(unpacked).to(self.dtype)
        return self.get_parameter(name) if store is None else store.unpack(self._packed(name), shape, self.dtype)

    def held_rows(self, name: str, ids: Tensor, padding: int | None = None) -> Tensor:
        """Look up rows of a held tensor, its leading axes flattened into one: (...) ids -> (..., width).

        Expands no other row. The row ``padding`` receives no gradient.
        """
        shape, store = self._held[name]
        unpacked = self._parameters.get(f"{name}_unpacked")
        if unpacked is not None:
            return store.straight_through(F.embedding(ids, unpacked.reshape(-1, shape[-1]), padding)).to(self.dtype)
        if store is None:
            return F.embedding(ids, self.get_parameter(name).reshape(-1, shape[-1]), padding)
        return store.lookup(self._packed(name), ids, shape[-1], self.dtype)

    def _packed(self, name: str) -> Tensor:
        return self.get_buffer(name).view(torch.uint8)

    def unpack(self, original: Tensor | None = None) -> None:
        """Make tensors stored in few bits trainable, as float parameters named ``<name>_unpacked``.

        ``original`` is the dense weight the part was fitted to, if available: a better start for parts that store a row
        for each of its rows. Does nothing in parts without such tensors.
        """
        for name, (shape, store) in self._held.items():
            if store is not None:
                dense = store.unpack(self._packed(name), shape, torch.float32)
                self.register_parameter(f"{name}_unpacked", nn.Parameter(dense))

    def repack(self) -> None:
        """Undo ``unpack``: put what was trained into its stored form. Does nothing when the part is packed."""
        for name in self._held:
            unpacked = self._parameters.pop(f"{name}_unpacked", None)
            if unpacked is not None:
                self.fill(name, unpacked.detach())

    def numbers(self) -> int:
        """Count the parameters that the part represents: all its floats, including those stored in few bits.

        Parts whose codes represent a whole row or map return the dense count instead.
        """
        count = sum(math.prod(shape) for shape, _ in self._held.values())
        return count + sum(parameter.numel() for name, parameter in self.named_parameters() if name not in self._held)

    @abstractmethod
    def merged(self) -> Tensor:
        """Compute the dense float equivalent: (V, D) of a table, (outputs, inputs) of a map. It is not stored."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Part":
        super()._apply(fn, recurse)
        tensor = next(itertools.chain(self.parameters(), self.buffers()))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=tensor.device)).dtype
        return self


class TablePart(Part):
    """Abstract: a token table, V x D. ``scale`` multiplies lookups, never logits."""

    def __init__(self, site: TableSite, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim = site.rows, site.width
        self.padding_idx, self.scale = site.padding_row, site.scale

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """Look up (...) integer ids -> (..., D) vectors, times ``scale``."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the tied head: (..., D) hidden states -> (..., V) logits, without its bias."""


class LinearPart(Part):
    """Abstract: a linear map, with ``bias`` (outputs,) as a parameter or None.

    After ``keep_dense_copy``, a dense copy is used instead of ``product`` for the given numbers of tokens, but only
    while gradients are disabled. Training mode drops the copy.
    """

    # T5 casts its hidden states to the dtype of a map's weight unless that is int8.
    packed_dtype = torch.int8
    may_keep_dense_copy: ClassVar[bool] = False
    """Whether a dense copy can be faster; true of maps computed from float factors."""

    def __init__(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.in_features, self.out_features = site.inputs, site.outputs
        bias = torch.zeros(site.outputs, device=device, dtype=dtype) if site.bias else None
        self.bias = nn.Parameter(bias) if bias is not None else None
        self.dense_ranges: TokenRanges = {}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map: (..., inputs) -> (..., outputs)."""
        if self.dense_ranges and not torch.is_grad_enabled():
            tokens = x.numel() // x.shape[-1]
            if self.uses_copy(tokens, _threads()):
                return F.linear(x, self.copy, self.bias)
        return self.product(x)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Apply the map, bias included, from the stored form: (..., inputs) -> (..., outputs)."""

    @torch.no_grad()
    def keep_dense_copy(self, dense_ranges: TokenRanges) -> None:
        """Keep a dense copy for the numbers of tokens in ``dense_ranges``; empty ones drop it. It is never saved."""
        self.dense_ranges = dense_ranges
        copy = self.merged().detach().to(self.dtype).contiguous() if dense_ranges else None
        self.register_buffer("copy", copy, persistent=False)

    def train(self, mode: bool = True) -> Self:
        if mode and self.dense_ranges:
            self.keep_dense_copy({})
        return super().train(mode)

    def uses_copy(self, tokens: int, threads: int) -> bool:
        """Return whether the dense copy is used for this many tokens."""
        ranges = self.dense_ranges.get(threads, ())
        return any(first <= tokens and (last < 0 or tokens <= last) for first, last in ranges)


@torch.compiler.assume_constant_result
def _threads() -> int:
    """Return the number of threads. A compiled model keeps the number it was compiled with."""
    return torch.get_num_threads()
