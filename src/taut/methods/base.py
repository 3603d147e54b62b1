"""The contract of a method: what it says of a site, what it costs there, and how it is installed."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import AttentionSite, LinearSite, MemorySite, Site, TableSite
from taut.core.strict import parse_options
from taut.methods.part import LinearPart, Part, TablePart
from taut.methods.store import Knobs, Store


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


LEARNED = "taut"
"""What a module calls the child that an attention or a memory method learns with."""


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
        default = None if cls.dial is None else cls.Knobs.model_fields[cls.dial].get_default()
        if keep is None and cls.dial is not None and knobs.get(cls.dial, default) is None:
            raise TautError(f"{where}: {cls.id}: give keep or {cls.dial}")
        return cls(parse_options(cls.Knobs, knobs, where, cls.id, "knob"))

    def with_tokenizer(self, tokenizer: Callable[[], Any]) -> "Method":
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

    def learned(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """For attention and memory: what the method learns beside the model's own tensors, a module that joins the one
        at the site under the name LEARNED; None when there is nothing. Only shapes on meta, a sound start elsewhere,
        which follows from torch's seed."""
        return None

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

    own_positions: ClassVar[bool] = False
    """Whether it brings its own idea of order. Then the positions of the model (``AttentionSite.positions``) are taken
    out, and every layer of a stack must have such a method."""

    @abstractmethod
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: Any, **options: Any) -> Tensor:
        """(B, H, T, K), (B, H', S, K), (B, H', S, K) -> (B, T, H, K). ``view`` says who may see whom
        (ops.attention.masks.View); ``options`` are ``scaling``, ``dropout`` and, for T5, ``position_bias``. What the
        method learns is a child of ``module``."""

    @abstractmethod
    def pairs(self, site: AttentionSite) -> int:
        """How many score pairs remain of length x length."""


class MemoryMethod(Method):
    """Abstract: replaces the KV cache of a decoder (MemorySite) and says which keys stay visible."""

    carried: ClassVar[bool] = False
    """Whether training may carry the cache from one batch to the next (``carry_memory: true``)."""
    makes_keys: ClassVar[bool] = False
    """Whether the cache makes keys of its own, so that a pass that is to keep none gets one, too."""
    reconstructs: ClassVar[bool] = False
    """Whether what it learns can learn from what attention misses of compressed entries (``reconstruction:`` of a
    training spec): then ``learned`` has a context manager ``reconstructing``, as ops.caches.pooling.Compressor has."""
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
        """Who may see whom (ops.attention.masks.Pattern), so that a full forward equals decoding step by step; None
        for everybody."""

    def marks(self, incoming: Any) -> Any:
        """The marks (B, T) of a text read at once, without a cache (ops.caches.base.Incoming); None unless the pattern
        is a Marked one. Raises TautError when they follow from ids and there are none."""
        return None

    @abstractmethod
    def entries(self, site: MemorySite) -> int:
        """The most cache entries (positions) held at ``site.length`` tokens."""
