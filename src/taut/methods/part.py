"""The contract of a method, and of the part it installs."""

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError, nearest
from taut.core.site import AttentionSite, LinearSite, MemorySite, Site, TableSite
from taut.methods.store import Knobs, Store

TokenRanges = Mapping[int, tuple[tuple[int, int], ...]]
"""By threads, the numbers of tokens, first to last (-1: any more), at which a dense copy is faster."""


@dataclass(frozen=True)
class Calibration:
    """What running text through the original showed at one site. Any field may be missing.

    Of the inputs x of a linear map, N numbers each. ``gram``: (N, N) float64, the mean of x x^T. ``least`` and
    ``greatest``: (N,) float32, the range of each of the N.

    Of a token table, V rows of width D. ``frequency``: (V,) float64, how often each token id was seen.
    ``gradient``: (V,) float64, the sum over a row's occurrences of |g|, g the gradient of the loss by the looked-up
    vector. ``sensitivity``: (V,) float64, the same sum of |g|^2 / D (empirical Fisher); a tied head adds its own
    share, position by position. ``metric``: (D, D) float64, the mean of g g^T over all occurrences: which directions
    of a vector matter. ``seed`` is the trial's, for fits that start at random.
    """

    gram: Tensor | None = None
    least: Tensor | None = None
    greatest: Tensor | None = None
    frequency: Tensor | None = None
    gradient: Tensor | None = None
    sensitivity: Tensor | None = None
    metric: Tensor | None = None
    seed: int = 0


class Part(nn.Module, ABC):
    """What takes the place of a table or a linear map.

    It keeps one tensor named ``weight`` whose *shape* differs from the original's, so that a checkpoint opened
    without taut raises. Tensors are parameters (floating, trainable) or persistent buffers (codes, tables,
    permutations): the skeleton is built on the meta device and nothing else survives loading. Values that must not
    follow ``.half()`` (scales) live as bytes inside a uint8 buffer.

    A float tensor that a recipe's ``store:`` may put in fewer bits is declared with ``hold`` and read with ``held``
    or ``held_rows``. ``loosen`` makes everything that healing may change a float parameter, ``tighten`` puts it back
    into its stored form; a loosened part computes what it will compute once tightened, and gradients pass straight
    through the rounding.
    """

    packed_dtype: ClassVar[torch.dtype] = torch.uint8
    """What the bytes of a stored tensor call themselves."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        """What the part answers in. Follows ``.to()``, ``.half()`` and their like, though codes do not."""
        self.draws = 0
        """The number of the next random draw of parts that draw in training mode: the same number, the same draw."""
        self._held: dict[str, tuple[tuple[int, ...], Store | None]] = {}

    def hold(self, name: str, shape: tuple[int, ...], store: Store | None, device: torch.device) -> None:
        """Declare a float tensor of ``shape``: a parameter, or with ``store`` a buffer of packed rows, where a
        row is what lies along the last axis. Its values are undefined until ``fill``."""
        self._held[name] = (shape, store)
        if store is None:
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=self.dtype)))
        else:
            self.register_buffer(name, torch.empty(store.packed_shape(shape), device=device, dtype=self.packed_dtype))

    @torch.no_grad()
    def fill(self, name: str, value: Tensor) -> None:
        """Give a held tensor its values, any float dtype, in the shape it was declared with."""
        shape, store = self._held[name]
        packed = value.reshape(shape) if store is None else store.pack(value.reshape(shape))
        (self.get_parameter(name) if store is None else self._packed(name)).copy_(packed)

    def held(self, name: str) -> Tensor:
        """A held tensor in its declared shape and the part's dtype, expanded where it is stored in few bits."""
        shape, store = self._held[name]
        loose = self._parameters.get(f"{name}_loose")
        if loose is not None:
            return store.straight_through(loose).to(self.dtype)
        return self.get_parameter(name) if store is None else store.unpack(self._packed(name), shape, self.dtype)

    def held_rows(self, name: str, ids: Tensor, padding: int | None = None) -> Tensor:
        """Rows of a held tensor, its leading axes seen as one: (...) ids -> (..., width). Expands no other row; the
        row ``padding`` receives no gradient."""
        shape, store = self._held[name]
        loose = self._parameters.get(f"{name}_loose")
        if loose is not None:
            return store.straight_through(F.embedding(ids, loose.reshape(-1, shape[-1]), padding)).to(self.dtype)
        if store is None:
            return F.embedding(ids, self.get_parameter(name).reshape(-1, shape[-1]), padding)
        return store.lookup(self._packed(name), ids, shape[-1], self.dtype)

    def _packed(self, name: str) -> Tensor:
        return self.get_buffer(name).view(torch.uint8)

    def loosen(self, original: Tensor | None = None) -> None:
        """Make what is stored in few bits trainable, as float parameters under the names ``<name>_loose``.

        ``original`` is the dense weight the part was fitted to, where it is at hand: a better start for parts that
        keep a row of their own for each row of it. Parts without such tensors have nothing to do.
        """
        for name, (shape, store) in self._held.items():
            if store is not None:
                dense = store.unpack(self._packed(name), shape, torch.float32)
                self.register_parameter(f"{name}_loose", nn.Parameter(dense))

    def tighten(self) -> None:
        """Undo ``loosen``: put what was trained into its stored form. Does nothing when the part is tight."""
        for name in self._held:
            loose = self._parameters.pop(f"{name}_loose", None)
            if loose is not None:
                self.fill(name, loose.detach())

    def numbers(self) -> int:
        """How many parameters the part stands for: every float it holds, also where it is stored in few bits. Parts
        whose codes stand for a whole row or map answer with the dense count instead."""
        held = sum(math.prod(shape) for shape, _ in self._held.values())
        return held + sum(own.numel() for name, own in self.named_parameters() if name not in self._held)

    @abstractmethod
    def merged(self) -> Tensor:
        """The dense float equivalent: (V, D) of a table, (outputs, inputs) of a map. Computed, not stored."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Part":
        super()._apply(fn, recurse)
        tensor = next(itertools.chain(self.parameters(), self.buffers()))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=tensor.device)).dtype
        return self


class TablePart(Part):
    """Abstract token table. ``rows`` V, ``width`` D; ``scale`` multiplies lookups, never logits."""

    def __init__(self, site: TableSite, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim = site.rows, site.width
        self.padding_idx, self.scale = site.padding_row, site.scale

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """(...) integer ids -> (..., D) vectors, times ``scale``."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) scores of the tied head, without its bias."""


class LinearPart(Part):
    """Abstract linear map, with ``bias`` (outputs,) as a parameter or None.

    Where ``premerge`` was told to, a dense copy answers instead of ``product``: only where no gradient is asked for,
    and only until the part is put into training mode, which drops it.
    """

    # T5 casts its hidden states to the dtype of a map's weight unless that is int8.
    packed_dtype = torch.int8
    premerges: ClassVar[bool] = False
    """Whether a dense copy can be the faster form: that of a map which is computed from float factors."""

    def __init__(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.in_features, self.out_features = site.inputs, site.outputs
        bias = torch.zeros(site.outputs, device=device, dtype=dtype) if site.bias else None
        self.bias = nn.Parameter(bias) if bias is not None else None
        self.crossovers: TokenRanges = {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if self.crossovers and not torch.is_grad_enabled():
            tokens = x.numel() // x.shape[-1]
            if self.uses_copy(tokens, _threads()):
                return F.linear(x, self.copy, self.bias)
        return self.product(x)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), bias included, from what the part stores."""

    @torch.no_grad()
    def premerge(self, crossovers: TokenRanges) -> None:
        """Keep a dense copy for the numbers of tokens in ``crossovers``; none at all drops it. It is never saved."""
        self.crossovers = crossovers
        copy = self.merged().detach().to(self.dtype).contiguous() if crossovers else None
        self.register_buffer("copy", copy, persistent=False)

    def train(self, mode: bool = True) -> Self:
        if mode and self.crossovers:
            self.premerge({})
        return super().train(mode)

    def uses_copy(self, tokens: int, threads: int) -> bool:
        """Whether the dense copy answers for so many tokens."""
        ranges = self.crossovers.get(threads, ())
        return any(first <= tokens and (last < 0 or tokens <= last) for first, last in ranges)


@torch.compiler.assume_constant_result
def _threads() -> int:
    """A compiled model stays with the number of threads that it was compiled under."""
    return torch.get_num_threads()


class Method(ABC):
    """One published way to fill one kind of slot. Subclasses are final; their folder and file name are the id."""

    id: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Knobs: ClassVar[type[Knobs]] = Knobs
    dial: ClassVar[str | None] = None
    """The knob that ``keep`` stands for. None: the method has no dial and refuses ``keep``."""
    spares_first_layer: ClassVar[bool] = False
    """Whether layer 0 of a feed-forward stack stays as it is when a recipe's entry does not name ``layers``."""
    approximate: ClassVar[float] = 0.0
    """How far, relative, rounding of activations may take an answer from that of an equivalent computed otherwise (a
    part's dense form, the same text in other pieces); 0 where none are rounded."""

    def __init__(self, knobs: Knobs | None = None) -> None:
        self.knobs = self.Knobs() if knobs is None else knobs

    @classmethod
    def parse(cls, knobs: dict[str, Any], keep: float | None = None, where: str = "recipe") -> "Method":
        """Check knobs from a recipe. Raises TautError naming the knob and the nearest valid one."""
        if keep is not None and cls.dial is None:
            raise TautError(f"{where}: {cls.id} has no dial, so it takes no keep")
        if keep is not None and cls.dial in knobs:
            raise TautError(f"{where}: give keep or {cls.dial}, not both")
        for key in knobs:
            if key not in cls.Knobs.model_fields:
                raise TautError(f"{where}: {cls.id} has no knob {key!r}: {nearest(key, cls.Knobs.model_fields)}")
        default = None if cls.dial is None else cls.Knobs.model_fields[cls.dial].get_default()
        if keep is None and cls.dial is not None and knobs.get(cls.dial, default) is None:
            raise TautError(f"{where}: {cls.id}: give keep or {cls.dial}")
        try:
            return cls(cls.Knobs(**knobs))
        except ValidationError as error:
            first = error.errors()[0]
            key, words = ".".join(str(step) for step in first["loc"]), first["msg"].removeprefix("Value error, ")
            given = f"{key} = {first['input']!r}" if key else cls.id
            raise TautError(f"{where}: {given}: {words}") from None

    def reads(self, tokenizer: Callable[[], Any]) -> "Method":
        """This method with what it needs to know of the model's ``tokenizer``, which opens when it is called."""
        return self

    @abstractmethod
    def fits(self, site: Site) -> str | None:
        """None when the method can sit here, else the reason in words."""

    def solve(self, site: Site, keep: float) -> "Method":
        """This method with its dial set so that the site costs at most ``keep`` of its dense cost (see design: what
        ``keep`` counts). Raises TautError when nothing legal is that small. Called only when ``dial`` is set."""
        raise TautError(f"{self.id} takes no keep")

    @abstractmethod
    def predict(self, site: Site) -> Cost:
        """The cost of the part at this site; parameters and bytes are exact."""

    def note(self, site: Site) -> str | None:
        """What else a plan should say about this site: a choice made for the user, or a wish that was cut down."""
        return None


class PartMethod(Method):
    """Abstract: a method that installs a module with tensors of its own."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """The fields of Calibration that ``fit`` makes use of, ``seed`` aside."""
    uncounted: ClassVar[str | None] = None
    """Why PyTorch's FLOP counter cannot see this part's kernel; None when it can, and then the two must agree."""

    @abstractmethod
    def build(self, site: Any, device: torch.device, dtype: torch.dtype) -> Part:
        """The part from shapes alone: meaningless values on meta, a sound random start elsewhere."""

    @abstractmethod
    def fit(self, part: Any, weight: Tensor, calibration: Calibration) -> None:
        """Fill ``part`` in place from the trained dense weight, (V, D) or (outputs, inputs), float. Biases are
        copied by the caller. Deterministic: the same weight gives the same bits."""


class EmbeddingMethod(PartMethod):
    """Abstract: fills a TableSite."""

    @abstractmethod
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> TablePart: ...

    def greatest(self, site: TableSite, keep: float, choices: range) -> Self:
        """For ``solve``: this method with the greatest of ``choices`` (ascending) for its dial that stores at most
        ``keep`` of the dense table's bytes, no more numbers than it, and fits. Raises TautError naming the least."""

        def at(choice: int) -> Self:
            return type(self)(self.knobs.model_copy(update={self.dial: choice}))

        def too_much(choice: int) -> bool:
            cost = at(choice).predict(site)
            return cost.bytes > keep * dense.bytes or cost.parameters > dense.parameters

        dense = site.dense()
        found = bisect_left(choices, True, key=too_much)
        while found and at(choices[found - 1]).fits(site) is not None:
            found -= 1
        if not found:
            smallest = at(choices.start)
            share = smallest.predict(site).bytes / dense.bytes
            reason = smallest.fits(site) or f"the least is {share:.2g}"
            raise TautError(
                f"{self.id}: keep = {keep} leaves no {self.dial} at {site.name} ({site.rows} x {site.width}): {reason}"
            )
        return at(choices[found - 1])


class LinearMethod(PartMethod):
    """Abstract: fills a LinearSite."""

    @abstractmethod
    def build(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> LinearPart: ...


class AttentionMethod(Method):
    """Abstract: replaces the function from queries, keys and values to outputs at an AttentionSite."""

    @abstractmethod
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: Any, **options: Any) -> Tensor:
        """(B, H, T, K), (B, H', S, K), (B, H', S, K) -> (B, T, H, K). ``view`` says who may see whom
        (kernels.patterns.View); ``options`` are ``scaling``, ``dropout`` and, for T5, ``position_bias``."""

    @abstractmethod
    def pairs(self, site: AttentionSite) -> int:
        """How many score pairs remain of length x length."""


class MemoryMethod(Method):
    """Abstract: replaces the KV cache of a decoder (MemorySite) and says which keys stay visible."""

    carried: ClassVar[bool] = False
    """Whether training may carry the cache from one batch to the next (``lanes: true``)."""
    makes_keys: ClassVar[bool] = False
    """Whether the cache makes keys of its own, so that a pass that is to keep none gets one, too."""
    unequal: ClassVar[str | None] = None
    """Why a text read in steps is not answered as in one pass without a cache; None: both must agree."""

    @property
    def store(self) -> Store | None:
        """How keys and values are kept, and rounded in passes without a cache too; None: as they come."""
        return None

    @property
    def approximate(self) -> float:
        """Rounding may turn the last bit of a float into another code of the store."""
        return 0.0 if self.store is None else 2.0**-self.store.bits

    def entry_bytes(self, site: MemorySite) -> int:
        """Bytes of the keys and values of one position as they are kept, all layers together; exact."""
        row = site.head_width * site.width_in_bytes if self.store is None else self.store.bytes((site.head_width,))
        return 2 * site.layers * site.key_heads * row

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, MemorySite):
            return "not a cache"
        capped = "the model caps its attention scores (softcap), which fused attention cannot do"
        return capped if site.softcap else None

    def predict(self, site: MemorySite) -> Cost:
        return Cost(cache_bytes_per_token=self.entry_bytes(site) * self.entries(site) / site.length)

    @abstractmethod
    def cache(self, layers: int) -> Any:
        """A fresh transformers.Cache, one layer object per decoder layer."""

    @abstractmethod
    def pattern(self) -> Any:
        """Who may see whom (kernels.patterns.Pattern), so that a full forward equals decoding step by step; None
        for everybody."""

    def marks(self, incoming: Any) -> Any:
        """The marks (B, T) of a text read at once, without a cache (kernels.cache.Incoming); None unless the pattern
        is a Marked one. Raises TautError when they follow from ids and there are none."""
        return None

    @abstractmethod
    def entries(self, site: MemorySite) -> int:
        """The most cache entries (positions) held at ``site.length`` tokens."""
