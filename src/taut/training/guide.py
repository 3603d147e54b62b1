"""Self-guided training: a dense weight beside each structured part, trained with it and faded out.

Wei et al. 2024 (arXiv 2406.16450). Changed: every guide starts as what its part computes, block_shuffle's with its
permutations (the published code leaves them out); the draws of stochastic guides follow from seed, step and map.
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
    """One dense weight W (outputs, inputs) for each of ``parts``, by name; float, in the part's own dtype.

    While guided, in training mode, a part answers o = a W x + (1 - a) S(x) + bias, where S is the part without its bias
    and a = ``weight``, the same for all. A ``stochastic`` guide is computed with probability a at each call of its
    part; otherwise the answer is S(x) + bias, unweighted. In evaluation mode a part answers for itself.

    The parts know nothing of it: the sum is made by a hook. So the model's own tensors keep their names, and this
    module, which the trainer must see beside the model, holds the guides alone.
    """

    def __init__(self, parts: Mapping[str, LinearPart], stochastic: bool = True, seed: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.names = tuple(parts)
        self.maps = nn.ParameterList(part.merged().detach().to(part.dtype).clone() for part in parts.values())
        self.stochastic, self.seed, self.rank = stochastic, seed, rank
        self.weight = 0.0
        """a, between 0 and 1; at 0 the guides are not computed and receive no gradient."""
        self.flops = 0.0
        """Training FLOPs spent on guides so far, by this process."""
        self.uses = self.calls = 0
        """How often a guide was computed, of how many chances in the guided phase."""
        self._step = self._piece = 0
        self._hooks = [
            part.register_forward_hook(partial(self._mix, index)) for index, part in enumerate(parts.values())
        ]

    def begin(self, step: int, weight: float) -> None:
        """Optimizer step number ``step`` starts, with a = ``weight``."""
        self._step, self._piece, self.weight = step, -1, weight

    def next_piece(self) -> None:
        """Another forward pass of the step starts: it draws for itself."""
        self._piece += 1

    def remove(self) -> None:
        """Take the guides off their parts, for good."""
        for hook in self._hooks:
            hook.remove()

    def drawn(self, index: int) -> bool:
        """Whether guide ``index`` is computed in this pass."""
        if not self.stochastic:
            return True
        place = f"{self.seed}/{self._step}/{self._piece}/{self.rank}/{index}"
        return random.Random(place).random() < self.weight

    def _mix(self, index: int, part: LinearPart, given: tuple[Any, ...], answer: Tensor) -> Tensor | None:
        if not part.training or self.weight == 0.0:
            return None
        self.calls += 1
        if not self.drawn(index):
            return None
        (x,), guide = given, self.maps[index]
        self.uses += 1
        self.flops += TRAINING * 2.0 * guide.numel() * (x.numel() // x.shape[-1])
        return self.weight * F.linear(x, guide, part.bias) + (1.0 - self.weight) * answer


def guided_parts(model: PreTrainedModel, slots: Sequence[str]) -> dict[str, LinearPart]:
    """The linear parts in ``slots``, by the names of their sites. Raises TautError where there is none, and for a part
    whose weights are not float parameters: beside it a guide could teach nobody."""
    found: dict[str, LinearPart] = {}
    for step in steps_of(model) if is_compressed(model) else ():
        module = model.get_submodule(step.site.path)
        if step.site.slot not in slots or not isinstance(module, LinearPart):
            continue
        factors = [name for name, _ in module.named_parameters() if name != "bias"]
        # Indices of permutations are wider.
        codes = [name for name, tensor in module.named_buffers() if tensor.itemsize == 1]
        if not factors or codes:
            raise TautError(
                f"guide: {step.site.name} ({step.method.id}) keeps {codes[0] if codes else 'nothing'} that no gradient "
                "reaches, so a guide has nobody to teach; leave its slot out of guide.slots, or store floats there"
            )
        found[step.site.name] = module
    if not found:
        raise TautError(f"guide: the recipe puts no linear part into {' or '.join(slots)}; see guide.slots")
    return found
