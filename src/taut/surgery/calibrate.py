"""What running text through the original shows about each site: input Grams and token counts."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.core.site import LinearSite, Site, TableSite
from taut.methods.part import Calibration


def calibrate(
    model: PreTrainedModel, needs: dict[Site, frozenset[str]], batches: Iterable[dict[str, Tensor]]
) -> dict[str, Calibration]:
    """Statistics by site name, from one pass over ``batches`` (dicts of model inputs; ``attention_mask`` marks the
    real tokens). Empty when nothing is needed or there is no batch.

    Grams are accumulated in float64 and averaged over real tokens, so the result does not depend on batching
    beyond rounding.
    """
    batches = list(batches)
    if not needs or not batches:
        return {}
    tally = _Tally()
    handles = []
    for site, fields in needs.items():
        module = model.get_submodule(site.path)
        if isinstance(site, LinearSite) and "gram" in fields:
            handles.append(module.register_forward_pre_hook(partial(tally.linear, site.name)))
        elif isinstance(site, TableSite) and "frequency" in fields:
            for path in (site.path, *site.copies):
                hook = partial(tally.table, site.name, site.rows)
                handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                tally.mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return tally.result()


def token_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], model: PreTrainedModel, size: int = 8, length: int = 128
) -> list[dict[str, Tensor]]:
    """Model inputs from texts: full sequences of ``length`` tokens (no padding), ``size`` at a time.

    Encoder-decoders get the same tokens on both sides.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=True, truncation=True, max_length=length)["input_ids"]
    rows = len(ids) // length
    table = torch.tensor(ids[: rows * length], dtype=torch.long, device=model.device).view(rows, length)
    batches = [{"input_ids": chunk} for chunk in table.split(size)]
    if model.config.is_encoder_decoder:
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


class _Tally:
    """Running sums, filled by hooks."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.grams: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.frequencies: dict[str, Tensor] = {}

    def linear(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (x,) = arguments
        rows = self._real(x).reshape(-1, x.shape[-1])
        # Products in float32 and sums in float64: a batch is short, a corpus is not.
        gram = (rows.t() @ rows).double()
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram
        self.counts[name] = self.counts.get(name, 0) + rows.shape[0]

    def table(self, name: str, rows: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (ids,) = arguments
        counts = torch.bincount(self._real(ids).reshape(-1), minlength=rows).double()
        self.frequencies[name] = self.frequencies[name] + counts if name in self.frequencies else counts

    def _real(self, x: Tensor) -> Tensor:
        """Only the real tokens, where the mask speaks about this tensor's positions."""
        if self.mask is not None and x.shape[:2] == self.mask.shape:
            return x[self.mask.bool()]
        return x

    def result(self) -> dict[str, Calibration]:
        linear = {name: Calibration(gram=gram / self.counts[name]) for name, gram in self.grams.items()}
        return linear | {name: Calibration(frequency=counts) for name, counts in self.frequencies.items()}
