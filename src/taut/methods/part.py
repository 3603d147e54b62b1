"""The contract of a method, and of the part it installs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.errors import TautError, nearest
from taut.core.site import AttentionSite, LinearSite, MemorySite, Site, TableSite


class Knobs(BaseModel):
    """The choices of a method. Every field has a description, a default where one makes sense, and a range."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Calibration:
    """What running text through the original showed at one site. Either field may be missing.

    ``gram``: (N, N) float64, the mean of x x^T over the inputs x of a linear map. ``frequency``: (V,) float64,
    how often each token id was seen.
    """

    gram: Tensor | None = None
    frequency: Tensor | None = None


class Part(nn.Module, ABC):
    """What takes the place of a table or a linear map.

    It keeps one tensor named ``weight`` whose *shape* differs from the original's, so that a checkpoint opened
    without taut raises. Tensors are parameters (floating, trainable) or persistent buffers (codes, tables,
    permutations): the skeleton is built on the meta device and nothing else survives loading. Values that must not
    follow ``.half()`` (scales) live as bytes inside a uint8 buffer.
    """

    @abstractmethod
    def merged(self) -> Tensor:
        """The dense float equivalent: (V, D) of a table, (outputs, inputs) of a map. Computed, not stored."""


class TablePart(Part):
    """Abstract token table. ``rows`` V, ``width`` D; ``scale`` multiplies lookups, never logits."""

    def __init__(self, site: TableSite) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = site.rows, site.width
        self.padding_idx, self.scale = site.padding_row, site.scale

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """(...) integer ids -> (..., D) vectors, times ``scale``."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) scores of the tied head, without its bias."""


class LinearPart(Part):
    """Abstract linear map, with ``bias`` (outputs,) as a parameter or None."""

    def __init__(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = site.inputs, site.outputs
        bias = torch.zeros(site.outputs, device=device, dtype=dtype) if site.bias else None
        self.bias = nn.Parameter(bias) if bias is not None else None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""


class Method(ABC):
    """One published way to fill one kind of slot. Subclasses are final; their folder and file name are the id."""

    id: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Knobs: ClassVar[type[Knobs]] = Knobs
    dial: ClassVar[str | None] = None
    """The knob that ``keep`` stands for. None: the method has no dial and refuses ``keep``."""

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
        if keep is None and cls.dial is not None and knobs.get(cls.dial, _default(cls, cls.dial)) is None:
            raise TautError(f"{where}: {cls.id}: give keep or {cls.dial}")
        try:
            return cls(cls.Knobs(**knobs))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(step) for step in first["loc"]) or "knobs"
            raise TautError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from None

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


def _default(method: type[Method], knob: str) -> Any:
    return method.Knobs.model_fields[knob].get_default()


class PartMethod(Method):
    """Abstract: a method that installs a module with tensors of its own."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """The calibration fields that ``fit`` makes use of: ``gram``, ``frequency``."""
    uncounted: ClassVar[str | None] = None
    """Why PyTorch's FLOP counter cannot see this part's kernel; None when it can, and then the two must agree."""
    approximate: ClassVar[bool] = False
    """Whether the forward rounds activations, so that it differs from its own dense equivalent."""

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

    @abstractmethod
    def cache(self, layers: int) -> Any:
        """A fresh transformers.Cache, one layer object per decoder layer."""

    @abstractmethod
    def pattern(self) -> Any:
        """Who may see whom (kernels.patterns.Pattern), so that a full forward equals decoding step by step; None
        for everybody."""

    @abstractmethod
    def entries(self, site: MemorySite) -> int:
        """The most cache entries (positions) held at ``site.length`` tokens."""
