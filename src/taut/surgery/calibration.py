"""Statistics of sites from text: Gram matrices and ranges of maps' inputs, token counts and gradients of tables."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.core.errors import TautError
from taut.core.site import LinearSite, Site, TableSite
from taut.methods.base import Calibration
from taut.surgery.gradients import GRADIENT_FIELDS, table_gradients
from taut.surgery.modes import evaluating

TOKENS = 1 << 16
"""The most tokens that pass through the model. Token counts use the whole text."""
READ = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
"""The model inputs that a token table looks up, and the masks that mark their real tokens."""


def calibrate(
    model: PreTrainedModel, needs: dict[Site, frozenset[str]], batches: Iterable[dict[str, Tensor]], seed: int = 0
) -> dict[str, Calibration]:
    """Compute the statistics in ``needs`` from ``batches``, by site name.

    A batch is a dict of model inputs; its ``attention_mask`` marks the real tokens. ``seed`` is stored in every result,
    and without batches it is all that a result holds.

    Token counts need no pass through the model, Gram matrices and ranges one forward pass, gradients a forward and a
    backward pass. For a long text, the passes use evenly spaced batches, ``TOKENS`` tokens in all, and sums over
    occurrences are scaled up to the whole text. Sums are accumulated in float64 and Gram matrices averaged over real
    tokens, so batching changes the result only by rounding. The model stays unchanged, gradients included. Raises
    TautError for token ids outside the table.
    """
    batches = list(batches)
    statistics: dict[str, dict[str, Tensor]] = {site.name: {} for site in needs}
    if batches:
        tables = {site: fields for site, fields in needs.items() if isinstance(site, TableSite)}
        for site, fields in tables.items():
            if "frequency" in fields:
                statistics[site.name]["frequency"] = frequency(site, batches)
        selected = [site for site, fields in tables.items() if fields & GRADIENT_FIELDS]
        passed = _spread(batches)
        if selected:
            for site, gradients in zip(selected, table_gradients(model, selected, passed, seed).values(), strict=True):
                statistics[site.name] |= gradients if passed is batches else _scaled(site, gradients, passed, batches)
        maps = {site: fields for site, fields in needs.items() if isinstance(site, LinearSite) and fields}
        if maps:
            statistics |= _inputs(model, maps, passed)
    return {name: Calibration(**fields, seed=seed) for name, fields in statistics.items()}


def _spread(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return all batches, or evenly spaced ones with about ``TOKENS`` tokens in all."""
    total = sum(batch["input_ids"].numel() for batch in batches)
    kept = max(1, len(batches) * TOKENS // max(total, 1))
    return batches if kept >= len(batches) else [batches[index * len(batches) // kept] for index in range(kept)]


def _scaled(
    site: TableSite, gradients: dict[str, Tensor], part: list[dict[str, Tensor]], whole: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Scale sums over occurrences in a part of the text up to the whole text.

    A row that occurs only in the rest of the text gets at least the mean per occurrence.
    """
    seen, used = frequency(site, part), frequency(site, whole)
    scaled = dict(gradients)
    for name in ("gradient", "sensitivity"):
        sums = gradients[name] * (used.sum() / seen.sum())
        missed = (seen == 0) & (used > 0)
        scaled[name] = torch.where(missed, torch.maximum(sums, used * (sums.sum() / used.sum())), sums)
    return scaled


def token_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], model: PreTrainedModel, size: int = 8, length: int = 128
) -> list[dict[str, Tensor]]:
    """Turn texts into batches of ``size`` full sequences of ``length`` tokens, without padding.

    Fewer tokens than ``length`` make one shorter sequence; no tokens make no batch. Encoder-decoders get the same
    tokens on both sides.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=True, truncation=True, max_length=length)["input_ids"]
    if not ids:
        return []
    length = min(length, len(ids))
    rows = len(ids) // length
    table = torch.tensor(ids[: rows * length], dtype=torch.long, device=model.device).view(rows, length)
    batches = [{"input_ids": chunk} for chunk in table.split(size)]
    if model.config.is_encoder_decoder:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


def frequency(site: TableSite, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Count how often ``batches`` look up each row, (V,) float64. Raises TautError for an id outside the table."""
    counts = torch.zeros(site.rows, dtype=torch.float64)
    for batch in batches:
        for name in READ.keys() & batch.keys():
            mask = batch.get(READ[name])
            ids = (batch[name].reshape(-1) if mask is None else batch[name][mask.bool()]).cpu()
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < site.rows:
                outside = int(ids.max()) if int(ids.max()) >= site.rows else int(ids.min())
                raise TautError(f"calibration text holds token id {outside}; {site.name} has ids 0 to {site.rows - 1}")
            counts += torch.bincount(ids, minlength=site.rows)
    return counts


def _inputs(
    model: PreTrainedModel, needs: dict[LinearSite, frozenset[str]], batches: Iterable[dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Compute the Gram matrices and ranges in ``needs`` from the maps' inputs at real tokens, by site name."""
    tallies = {site: _Tally("gram" in fields, bool(fields & {"least", "greatest"})) for site, fields in needs.items()}
    handles = [model.get_submodule(site.path).register_forward_pre_hook(tally.see) for site, tally in tallies.items()]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                for tally in tallies.values():
                    tally.mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {site.name: tally.result() for site, tally in tallies.items()}


class _Tally:
    """Running sums and ranges of one map's inputs, filled by a hook."""

    def __init__(self, gram: bool, ranges: bool) -> None:
        self.mask: Tensor | None = None
        self.wants_gram, self.wants_ranges = gram, ranges
        self.gram: Tensor | None = None
        self.ranges: tuple[Tensor, Tensor] | None = None
        self.count = 0

    def see(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (x,) = arguments
        rows = self._real(x).reshape(-1, x.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.count += rows.shape[0]
        if self.wants_gram:
            # Products in at least float32 and sums in float64: a batch is short, but a corpus is long.
            gram = (rows.t() @ rows).double()
            self.gram = gram if self.gram is None else self.gram + gram
        if self.wants_ranges and len(rows):
            low, high = rows.float().aminmax(dim=0)
            if self.ranges is not None:
                low, high = torch.minimum(low, self.ranges[0]), torch.maximum(high, self.ranges[1])
            self.ranges = low, high

    def result(self) -> dict[str, Tensor]:
        """Return the statistics as fields of Calibration. They are missing if no token passed through this map."""
        fields = {"gram": self.gram / self.count} if self.gram is not None and self.count else {}
        return fields if self.ranges is None else fields | dict(zip(("least", "greatest"), self.ranges, strict=True))

    def _real(self, x: Tensor) -> Tensor:
        """Return only the real tokens, if the mask has this tensor's batch and length; else all of ``x``."""
        if self.mask is not None and x.shape[:2] == self.mask.shape:
            return x[self.mask.bool()]
        return x
