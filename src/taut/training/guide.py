"""Self-guided training: a dense weight beside each structured part, trained with it and faded out.

Wei et al. 2024 (arXiv 2406.16450). Changed: every guide starts as the dense equivalent of its part. For block_shuffle
that includes the permutations, which the published code leaves out. The random choices of stochastic guides depend only
on seed, step, forward pass, process and map.
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from taut.core.errors import TautError
from taut.methods.part import LinearPart
from taut.surgery.apply import is_compressed, steps_of
from taut.training.flops import TRAINING


class Guides(nn.Module):
    """One dense weight W (outputs, inputs) for each of ``parts``, by name; float, in the dtype of the part.

    In training mode, a guided part returns o = a W x + (1 - a) S(x) + bias. S is the part without its bias, and a =
    ``weight`` is the same for all parts. A ``stochastic`` guide is computed with probability a at each call of its
    part; otherwise the part returns S(x) + bias, unweighted. In evaluation mode, a part returns its own output.

    A hook computes the sum, so the model's own tensors keep their names. This module holds only the guides. The trainer
    must see it beside the model.
    """

    def __init__(self, parts: Mapping[str, LinearPart], stochastic: bool = True, seed: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.names = tuple(parts)
        self.maps = nn.ParameterList(part.merged().detach().to(part.dtype).clone() for part in parts.values())
        self.stochastic, self.seed, self.rank = stochastic, seed, rank
        self.weight = 0.0
        """a, between 0 and 1; at 0 the guides are not computed and receive no gradient."""
        self.flops = 0.0
        """Training FLOPs of guides in this process, since ``trainer.together`` last collected them."""
        self.uses = self.calls = 0
        """How often a guide was computed, and how often a part was called in the guided phase."""
        self._step = self._piece = 0
        self._hooks = [
            part.register_forward_hook(partial(self._mix, index)) for index, part in enumerate(parts.values())
        ]

    def begin(self, step: int, weight: float) -> None:
        """Start optimizer step number ``step``, with a = ``weight``."""
        self._step, self._piece, self.weight = step, -1, weight

    def next_piece(self) -> None:
        """Start another forward pass of the step. It has its own random numbers."""
        self._piece += 1

    def remove(self) -> None:
        """Remove the guides from their parts permanently."""
        for hook in self._hooks:
            hook.remove()

    def drawn(self, index: int) -> bool:
        """Whether guide ``index`` is computed in this pass."""
        if not self.stochastic:
            return True
        place = f"{self.seed}/{self._step}/{self._piece}/{self.rank}/{index}"
        return random.Random(place).random() < self.weight

    def _mix(self, index: int, part: LinearPart, arguments: tuple[Any, ...], answer: Tensor) -> Tensor | None:
        if not part.training or self.weight == 0.0:
            return None
        self.calls += 1
        if not self.drawn(index):
            return None
        (x,), guide = arguments, self.maps[index]
        self.uses += 1
        self.flops += TRAINING * 2.0 * guide.numel() * (x.numel() // x.shape[-1])
        return self.weight * F.linear(x, guide, part.bias) + (1.0 - self.weight) * answer


def guided_parts(model: PreTrainedModel, slots: Sequence[str]) -> dict[str, LinearPart]:
    """The linear parts in ``slots``, by the names of their sites.

    Raises TautError if there is none, and for a part that a guide cannot train: its weights are not float parameters.
    """
    parts: dict[str, LinearPart] = {}
    for step in steps_of(model) if is_compressed(model) else ():
        module = model.get_submodule(step.site.path)
        if step.site.slot not in slots or not isinstance(module, LinearPart):
            continue
        factors = [name for name, _ in module.named_parameters() if name != "bias"]
        # Codes have one byte. Indices of permutations have more.
        codes = [name for name, tensor in module.named_buffers() if tensor.itemsize == 1]
        if not factors or codes:
            raise TautError(
                f"guide: {step.site.name} ({step.method.id}) keeps {codes[0] if codes else 'nothing'} that no gradient "
                "reaches, so a guide cannot train it; leave its slot out of guide.slots, or store floats there"
            )
        parts[step.site.name] = module
    if not parts:
        raise TautError(f"guide: the recipe puts no linear part into {' or '.join(slots)}; see guide.slots")
    return parts
