"""The contract of a method: whether it fits a site, what it costs there, and how it is built."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.registry import check_names
from taut.core.site import AttentionSite, LinearSite, MemorySite, Site, TableSite
from taut.core.strict import parse_options
from taut.methods.part import LinearPart, Part, TablePart
from taut.methods.store import Knobs, Store


@dataclass(frozen=True)
class Calibration:
    """Statistics of one site, from running text through the original model. Any field may be missing.

    For a linear map with inputs x of N numbers. ``gram``: (N, N) float64, the mean of x x^T. ``least`` and
    ``greatest``: (N,) float32, the range of each input.

    For a token table with V rows of width D. ``frequency``: (V,) float64, how often each token id was seen.
    ``gradient``: (V,) float64, the sum of |g| over a row's occurrences, where g is the gradient of the loss with
    respect to the looked-up vector. ``sensitivity``: (V,) float64, the same sum of |g|^2 / D (empirical Fisher); a tied
    head adds its own share, position by position. ``metric``: (D, D) float64, the mean of g g^T over all occurrences:
    it shows which directions of a vector matter.

    ``seed``: the seed of the trial, for fits that start at random.
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
"""The name of the child module that holds the learned tensors of an attention or memory method."""


class Method(ABC):
    """One published way to fill one kind of slot. Subclasses are final; their id is their folder and file name."""

    id: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Knobs: ClassVar[type[Knobs]] = Knobs
    dial: ClassVar[str | None] = None
    """The knob that ``keep`` sets. None: the method has no dial and refuses ``keep``."""
    spares_first_layer: ClassVar[bool] = False
    """Whether layer 0 of a feed-forward stack stays unchanged when a recipe's entry does not name ``layers``."""
    approximate: ClassVar[float] = 0.0
    """Tolerated relative difference between two equivalent computations (a part and its dense form, or one text cut in
    different ways) due to rounded activations; 0 if none are rounded."""

    def __init__(self, knobs: Knobs | None = None) -> None:
        self.knobs = self.Knobs() if knobs is None else knobs

    @classmethod
    def parse(cls, knobs: dict[str, Any], keep: float | None = None, where: str = "recipe") -> "Method":
        """Check the knobs of a recipe and return the method.

        Raises TautError for an unknown knob (naming the nearest valid one), for a wrong value, for a ``keep`` without a
        dial or beside it, and for a dial without a value.
        """
        if keep is not None and cls.dial is None:
            raise TautError(f"{where}: {cls.id} has no dial, so it takes no keep")
        if keep is not None and cls.dial in knobs:
            raise TautError(f"{where}: give keep or {cls.dial}, not both")
        check_names(cls.Knobs.model_fields, knobs, where, cls.id, "knob")
        default = None if cls.dial is None else cls.Knobs.model_fields[cls.dial].get_default()
        if keep is None and cls.dial is not None and knobs.get(cls.dial, default) is None:
            raise TautError(f"{where}: {cls.id}: give keep or {cls.dial}")
        return cls(parse_options(cls.Knobs, knobs, where, cls.id, "knob"))

    def with_tokenizer(self, tokenizer: Callable[[], Any]) -> "Method":
        """Return this method with what it needs from the model's tokenizer. Calling ``tokenizer`` opens it."""
        return self

    @abstractmethod
    def fits(self, site: Site) -> str | None:
        """Return None when the method can be used at this site, else the reason in words."""

    def solve(self, site: Site, keep: float) -> "Method":
        """Return this method with its dial set so that the site costs at most ``keep`` of its dense cost.

        What ``keep`` counts depends on the method. Raises TautError when no legal value is that small. Called only
        when ``dial`` is set.
        """
        raise TautError(f"{self.id} takes no keep")

    @abstractmethod
    def predict(self, site: Site) -> Cost:
        """Return the cost at this site; parameters and bytes are exact."""

    def learned(self, site: Site, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """For attention and memory: return a module with the tensors that the method learns, or None.

        It becomes a child of the module at the site under the name LEARNED. On the meta device it has shapes only;
        elsewhere it has a sound start, which follows from torch's seed.
        """
        return None

    def note(self, site: Site) -> str | None:
        """Return a remark for the plan about this site: a choice made for the user, or a request that was reduced."""
        return None


class PartMethod(Method):
    """Abstract: a method that installs a module with tensors of its own."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """The fields of Calibration that ``fit`` uses, except ``seed``."""
    uncounted: ClassVar[str | None] = None
    """Why PyTorch's FLOP counter cannot count this part's kernel. None: it can, and it must agree with ``predict``."""

    @abstractmethod
    def build(self, site: Any, device: torch.device, dtype: torch.dtype) -> Part:
        """Build the part from shapes alone: no values on the meta device, a sound random start elsewhere."""

    @abstractmethod
    def fit(self, part: Any, weight: Tensor, calibration: Calibration) -> None:
        """Fill ``part`` in place from the trained dense weight, (V, D) or (outputs, inputs), float.

        The caller copies biases. Deterministic: the same weight gives the same bits.
        """


class EmbeddingMethod(PartMethod):
    """Abstract: a method for a TableSite."""

    @abstractmethod
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> TablePart: ...

    def greatest(self, site: TableSite, keep: float, choices: range) -> Self:
        """For ``solve``: return this method with its dial at the greatest of ``choices`` (ascending) that fits.

        It stores at most ``keep`` of the dense table's bytes, and no more parameters than the dense table. Raises
        TautError, naming the least possible ``keep`` or the reason, when there is none.
        """

        def at(choice: int) -> Self:
            return type(self)(self.knobs.model_copy(update={self.dial: choice}))

        def too_much(choice: int) -> bool:
            cost = at(choice).predict(site)
            return cost.bytes > keep * dense.bytes or cost.parameters > dense.parameters

        dense = site.dense()
        position = bisect_left(choices, True, key=too_much)
        while position and at(choices[position - 1]).fits(site) is not None:
            position -= 1
        if not position:
            smallest = at(choices.start)
            share = smallest.predict(site).bytes / dense.bytes
            reason = smallest.fits(site) or f"the least is {share:.2g}"
            raise TautError(
                f"{self.id}: keep = {keep} leaves no {self.dial} at {site.name} ({site.rows} x {site.width}): {reason}"
            )
        return at(choices[position - 1])


class LinearMethod(PartMethod):
    """Abstract: a method for a LinearSite."""

    @abstractmethod
    def build(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> LinearPart: ...


class AttentionMethod(Method):
    """Abstract: replaces the function from queries, keys and values to outputs at an AttentionSite."""

    own_positions: ClassVar[bool] = False
    """Whether the method encodes positions itself. Then the model's own (``AttentionSite.positions``) are removed, and
    every layer of a stack must have such a method."""

    @abstractmethod
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: Any, **options: Any) -> Tensor:
        """Attend: (B, H, T, K), (B, H', S, K), (B, H', S, K) -> (B, T, H, K).

        ``view`` is the mask (ops.attention.masks.View). ``options`` are ``scaling``, ``dropout`` and, for T5,
        ``position_bias``. What the method learns is a child of ``module``.
        """

    @abstractmethod
    def pairs(self, site: AttentionSite) -> int:
        """Count the score pairs that remain of length x length."""


class MemoryMethod(Method):
    """Abstract: replaces the key/value cache of a decoder (MemorySite) and sets which keys stay visible."""

    carried: ClassVar[bool] = False
    """Whether training may carry the cache from one batch to the next (``carry_memory: true``)."""
    makes_keys: ClassVar[bool] = False
    """Whether the cache makes keys of its own. Then a forward pass that requests no cache gets one too."""
    reconstructs: ClassVar[bool] = False
    """Whether training can use the error of attention to compressed entries (``reconstruction:`` of a training spec).
    Then ``learned`` has a context manager ``reconstructing``, as ops.caches.pooling.Compressor has."""
    unequal: ClassVar[str | None] = None
    """Why reading a text in steps differs from one pass without a cache. None: both must agree."""

    @property
    def store(self) -> Store | None:
        """How keys and values are stored; passes without a cache round them likewise. None: in their own dtype."""
        return None

    @property
    def approximate(self) -> float:
        """A difference in a float's last bit may round to another code of the store: a step of 2^-bits."""
        return 0.0 if self.store is None else 2.0**-self.store.bits

    def entry_bytes(self, site: MemorySite) -> int:
        """Count the bytes of one position's stored keys and values, in all layers together; exact."""
        row = site.head_width * site.width_in_bytes if self.store is None else self.store.bytes((site.head_width,))
        return 2 * site.layers * site.key_heads * row

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, MemorySite):
            return "not a cache"
        capped = "the model caps its attention scores (softcap), which fused attention cannot do"
        return capped if site.softcap else None

    def predict(self, site: MemorySite) -> Cost:
        return Cost(cache_bytes_per_token=self.entry_bytes(site) * self.entries(site) / site.length)

    def within(self, site: MemorySite, keep: float, *, besides: int = 0, least: int = 0, problem: str) -> Self:
        """For ``solve``: this method with the largest value of its dial that keeps at most ``keep`` of the entries.

        ``besides`` entries are held whatever the dial says, and the dial is at least ``least``. Raises TautError when
        that is too much, with ``problem`` as the reason and the least ``keep``.
        """
        entries = int(keep * site.length + 1e-9)
        if entries - besides < least:
            raise TautError(
                f"{self.id}: keep = {keep} of {site.length} entries is {entries}: {problem}; the least keep is "
                f"{(besides + least) / site.length:.4f}"
            )
        return type(self)(self.knobs.model_copy(update={self.dial: entries - besides}))

    @abstractmethod
    def cache(self, layers: int) -> Any:
        """Return a new transformers.Cache with one layer object per decoder layer."""

    @abstractmethod
    def pattern(self) -> Any:
        """Return the mask pattern (ops.attention.masks.Pattern) with which a full forward pass equals decoding step by
        step. None: all entries stay visible."""

    def marks(self, incoming: Any) -> Any:
        """Return the marks (B, T) of a text read at once, without a cache (ops.caches.base.Incoming).

        None unless the pattern is a Marked one. Raises TautError when marks depend on ids and there are none.
        """
        return None

    @abstractmethod
    def entries(self, site: MemorySite) -> int:
        """Return the greatest number of cache entries (positions) held at ``site.length`` tokens."""
