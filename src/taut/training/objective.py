"""Language modelling as the module that transformers.Trainer trains, with or without guides."""

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

    ``weight_at`` maps the step to a, the weight of the guides. Trainer wraps this module, not the model, so that
    distributed training sees the guides and the model keeps the names of its tensors.
    """

    accepts_loss_kwargs = True
    """Tells Trainer that ``forward`` divides by the targets of the whole step, of all pieces and processes."""

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
        """Start optimizer step number ``step``.

        Its random numbers (dropout, guides, parts with random steps) depend only on seed, step and process, so a
        resumed run has the same ones.
        """
        random_step = step_seed(self.seed, step)
        torch.manual_seed(random_step * RANKS_APART + self.rank)
        for part in self._parts:
            part.random_step = random_step
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
        """Compute ``loss``, float32 scalar: the sum of the cross-entropies, in nats, over ``num_items_in_batch``.

        Ids and labels (B, T) int64. A label stands at the position that predicts it; ``IGNORED`` is no label. The mask
        is (B, T), if rows are padded. With carried memory, ``restart`` (B,) bool marks the streams that restart.
        ``num_items_in_batch`` counts the targets; None means those of this batch. A reconstruction adds its gradient to
        that of the loss, but does not change the value.
        """
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
        """A context that lists the attention errors of its forward passes, for ``Reconstruction``.

        Each is a float scalar, one for each layer that compresses something. Without a reconstruction there are none.
        """
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
            # Models that generate would otherwise fill a cache, which is not needed here.
            options = {"use_cache": False} if self.model.can_generate() else {}
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
        else:
            logits = carried.read(self.model, input_ids, attention_mask, restart)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def check_finite(self) -> None:
        """Raises ``Diverged`` if a parameter is not finite, so that it does not replace a good checkpoint."""
        for name, tensor in self.model.named_parameters():
            if not torch.isfinite(tensor).all():
                raise Diverged(f"{name} is no longer finite")
