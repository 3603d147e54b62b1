"""Gradients of products with a packed weight: the inputs' and the bias's. The packed weight itself has none."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.library import CustomOpDef


def register_gradients(operator: CustomOpDef, input_gradient: Callable[..., Tensor], *, bias: bool) -> None:
    """Teach autograd ``operator(x, packed, *settings)``, or ``operator(x, bias, packed, *settings)`` with ``bias``.

    ``input_gradient(gradient, packed, *settings)`` gives the gradient of ``x``; it gets the settings that are no
    tensors. Only the packed weight is kept for the backward pass: autograd alone would keep what is expanded from it.
    """
    place = 2 if bias else 1

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[place])
        ctx.settings = [value for value in inputs[place + 1 :] if isinstance(value, int | str)]
        ctx.count = len(inputs)

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * ctx.count
        if ctx.needs_input_grad[0]:
            gradients[0] = input_gradient(gradient, *ctx.saved_tensors, *ctx.settings)
        if bias and ctx.needs_input_grad[1]:
            gradients[1] = gradient.flatten(0, -2).sum(dim=0)
        return tuple(gradients)

    operator.register_autograd(backward, setup_context=keep)
