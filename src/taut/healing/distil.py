"""A compressed model beside its original: one number to lower, and the tensors that may lower it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taut.core.seeds import epoch_seed, step_seed
from taut.healing.batches import next_tokens
from taut.healing.losses import answers, imitation, text_loss
from taut.methods.part import Part

CACHE_BYTES = 512 * 2**20
"""What the teacher's answers to batches that come again may take."""


class Comparison:
    """How far ``student`` is from ``teacher`` on ``batches`` of model inputs, by ``targets`` (see healing.losses).

    A batch may hold ``labels`` (B, T), -100 where nothing is asked; without them the target ``labels`` is the next
    token.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Sequence[dict[str, Tensor]],
        targets: Sequence[str],
    ) -> None:
        self.student, self.teacher, self.batches, self.targets = student, teacher, batches, targets
        self._cache: dict[int, dict[str, Tensor]] = {}
        self._cached_bytes = 0

    def loss(self, index: int) -> Tensor:
        """Of one batch, float32 scalar."""
        batch = {name: tensor.to(self.student.device) for name, tensor in self.batches[index].items()}
        labels = batch.pop("labels", None)
        real, ids = real_tokens(batch)
        output = self.student(**batch, output_hidden_states=True)
        taught = self._taught(index, batch)
        loss = imitation(answers(output, real, self.targets), taught) if taught else 0.0
        if "labels" not in self.targets:
            return loss
        return loss + text_loss(output["logits"], next_tokens(ids, real) if labels is None else labels)

    @torch.no_grad()
    def mean(self, indices: Iterable[int]) -> float:
        """Over some batches."""
        losses = [self.loss(index).item() for index in indices]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _taught(self, index: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's answers to a batch: computed once where they fit, as batches come again in every epoch."""
        if index in self._cache:
            return {name: tensor.to(self.student.device) for name, tensor in self._cache[index].items()}
        if set(self.targets) == {"labels"}:
            return {}
        found = answers(self.teacher(**batch, output_hidden_states=True), real_tokens(batch)[0], self.targets)
        size = sum(tensor.nbytes for tensor in found.values())
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[index] = {name: tensor.cpu() for name, tensor in found.items()}
            self._cached_bytes += size
        return found


def real_tokens(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which tokens are real (B, T), and their ids: the decoder's where there is one."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool(), ids


class Distillation(nn.Module):
    """What transformers.Trainer trains. Its parameters are ``trained`` and nothing else, so checkpoints are small; they
    are the student's own tensors, so it learns in place.

    A model by itself would not do: Trainer refuses those without a head, switches dropout on and rewrites the config.
    """

    accepts_loss_kwargs = False
    """For Trainer: ``forward`` gives the mean over the batch."""

    def __init__(
        self, comparison: Comparison, trained: Iterable[nn.Parameter], order: Sequence[int], seed: int = 0
    ) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self.comparison, self.order, self.seed = comparison, order, seed
        self._parts = [module for module in comparison.student.modules() if isinstance(module, Part)]

    def forward(self, step: int) -> dict[str, Tensor]:
        """The loss of step number ``step``, float32 scalar under ``loss``. What a step does follows from its number:
        every epoch has all batches of ``order`` once, in an order of its own. The parts are in training mode, as some
        learn by drawing; the rest of the student is not, since dropout would have the parts make up for it."""
        epoch, place = divmod(step, len(self.order))
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        shuffled = torch.randperm(len(self.order), generator=generator)
        with self._drawing(step):
            return {"loss": self.comparison.loss(self.order[int(shuffled[place])])}

    @contextmanager
    def _drawing(self, step: int) -> Iterator[None]:
        for part in self._parts:
            part.random_step = step_seed(self.seed, step)
            part.train()
        try:
            yield
        finally:
            for part in self._parts:
                part.eval()
