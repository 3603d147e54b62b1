"""Language modelling as a module: what transformers.Trainer trains, with or without guides."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from taut.core.seeds import step_seed
from taut.healing.losses import IGNORED
from taut.healing.runs import Diverged
from taut.methods.part import Part
from taut.training.carried_memory import CarriedMemory
from taut.training.guide import Guides
from taut.training.reconstruction import Reconstruction

RANKS_APART = 1 << 8


class LanguageModelling(nn.Module):
    """A model with a head over its vocabulary, its loss, and the guides of its parts.

    ``weight_at`` gives a, the weight of the guides, by the step. Trainer wraps this module, not the model, so that
    distributed training sees the guides and the model keeps the names of its tensors.
    """

    accepts_loss_kwargs = True
    """For Trainer: ``forward`` divides by the targets of the whole step, all pieces and processes together."""

    def __init__(
        self,
        model: PreTrainedModel,
        guides: Guides | None = None,
        weight_at: Callable[[int], float] = lambda step: 0.0,
        seed: int = 0,
        rank: int = 0,
        carried: CarriedMemory | None = None,
        reconstruction: Reconstruction | None = None,
    ) -> None:
        super().__init__()
        self.model, self.guides, self.carried, self.reconstruction = model, guides, carried, reconstruction
        self.weight_at, self.seed, self.rank = weight_at, seed, rank
        self._parts = [module for module in model.modules() if isinstance(module, Part)]

    def begin(self, step: int) -> None:
        """Optimizer step number ``step`` starts. Whatever it draws (dropout, guides, parts that learn by drawing)
        follows from seed, step and process alone, so that a resumed run draws the same."""
        draw = step_seed(self.seed, step)
        torch.manual_seed(draw * RANKS_APART + self.rank)
        for part in self._parts:
            part.random_step = draw
        if self.carried is not None:
            self.carried.begin()
        if self.guides is not None:
            self.guides.begin(step, self.weight_at(step))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        restart: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Ids and labels (B, T) int64, a label for the very position it belongs to, ``IGNORED`` where none; a mask
        (B, T) where rows are padded; with lanes, where one begins anew: (B,) bool. ``loss``: the cross-entropies' sum
        in nats over ``num_items_in_batch`` targets (of this batch, for None), float32 scalar. With a reconstruction
        its gradient has that of what attention misses in it, the value has not."""
        if self.guides is not None:
            self.guides.next_piece()
        with self.reconstructing() as errors:
            total = self.total(input_ids, labels, attention_mask, restart, self.carried)
        targets = (labels != IGNORED).sum()
        if errors:
            total = total + self.reconstruction.beside(errors).to(total.dtype) * targets
        count = targets if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    def reconstructing(self) -> AbstractContextManager[list[Tensor]]:
        """What attention misses in the passes made meanwhile, a float scalar for each layer that compresses something;
        none where there is no reconstruction."""
        return nullcontext([]) if self.reconstruction is None else self.reconstruction.compressor.reconstructing()

    def total(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        restart: Tensor | None = None,
        carried: CarriedMemory | None = None,
    ) -> Tensor:
        """The sum of the cross-entropies of all targets, float32 scalar."""
        if carried is None:
            # Models that generate would keep a cache that nobody reads.
            given = {"use_cache": False} if self.model.can_generate() else {}
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **given).logits
        else:
            logits = carried.read(self.model, input_ids, attention_mask, restart)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def check_finite(self) -> None:
        """Raises ``Diverged`` before numbers that are none could be saved over good ones."""
        for name, tensor in self.model.named_parameters():
            if not torch.isfinite(tensor).all():
                raise Diverged(f"{name} is no longer finite")
