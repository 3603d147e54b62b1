"""Distillation: the loss of a compressed model against its original, and the module that trains it."""

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
"""The most bytes of teacher outputs to cache for repeated batches."""


class Comparison:
    """The loss of ``student`` against ``teacher`` on ``batches`` of model inputs, for ``targets`` (see healing.losses).

    A batch may hold ``labels`` (B, T), -100 where nothing is predicted. Without them the target ``labels`` is the next
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
        """The loss of one batch, float32 scalar."""
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
        """The mean loss over some batches."""
        losses = [self.loss(index).item() for index in indices]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _taught(self, index: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's outputs for a batch, cached if they fit, because every epoch repeats all batches."""
        if index in self._cache:
            return {name: tensor.to(self.student.device) for name, tensor in self._cache[index].items()}
        if set(self.targets) == {"labels"}:
            return {}
        outputs = answers(self.teacher(**batch, output_hidden_states=True), real_tokens(batch)[0], self.targets)
        size = sum(tensor.nbytes for tensor in outputs.values())
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[index] = {name: tensor.cpu() for name, tensor in outputs.items()}
            self._cached_bytes += size
        return outputs


def real_tokens(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which tokens are real, (B, T) bool, and their ids (B, T): those of the decoder, if there is one."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool(), ids


class Distillation(nn.Module):
    """The module that transformers.Trainer trains. Its only parameters are ``trained``, so checkpoints are small.

    They are the student's own tensors, so the student is trained in place. Trainer cannot train the model itself: it
    refuses models without a head, switches dropout on and rewrites the config.
    """

    accepts_loss_kwargs = False
    """Tells Trainer that ``forward`` returns the mean over the batch."""

    def __init__(
        self, comparison: Comparison, trained: Iterable[nn.Parameter], order: Sequence[int], seed: int = 0
    ) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self.comparison, self.order, self.seed = comparison, order, seed
        self._parts = [module for module in comparison.student.modules() if isinstance(module, Part)]

    def forward(self, step: int) -> dict[str, Tensor]:
        """Compute ``loss`` of step number ``step``, float32 scalar.

        A step depends only on its number and the seed. Every epoch has all batches of ``order`` once, in its own order.
        The parts are in training mode, because some learn with random steps. The rest of the student is not, because
        the parts would learn to compensate for dropout.
        """
        epoch, place = divmod(step, len(self.order))
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
        shuffled = torch.randperm(len(self.order), generator=generator)
        with self._random_steps(step):
            return {"loss": self.comparison.loss(self.order[int(shuffled[place])])}

    @contextmanager
    def _random_steps(self, step: int) -> Iterator[None]:
        for part in self._parts:
            part.random_step = step_seed(self.seed, step)
            part.train()
        try:
            yield
        finally:
            for part in self._parts:
                part.eval()
