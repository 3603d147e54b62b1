"""Products with block-diagonal matrices: B small maps, each from its share of the inputs to its share of the outputs.

Features are divided among blocks in one of two ways. In *runs*, block b has the b-th run of neighbours. *Interleaved*,
it has every B-th feature: b, b + B, b + 2 B, and so on. A product in runs followed by an interleaved one gives
BlockShuffle's permutations, without ever permuting anything.

A matrix kernel reads and writes a share in place if one of its two axes is contiguous. Runs always are. Interleaved
shares are if the memory is ordered feature by feature (*feature-major*, strides (1, T)) instead of token by token. Then
nothing is copied, and elementwise functions keep that order for the next product.
"""

from typing import Any

import torch
from torch import Tensor

FEW = 32
"""Up to this many tokens, the results of the blocks are copied into place. Above, they are written there directly."""
LONG = 1024
"""Rows of at least this many numbers are read by a matrix-vector product as fast as the memory allows."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """The formula of ``block_product``, block by block."""
    blocks = len(weight)
    if interleaved:
        shares = [x[:, block::blocks] @ weight[block] for block in range(blocks)]
        y = torch.stack(shares, dim=2).flatten(1)
    else:
        y = torch.cat([part @ one for part, one in zip(x.chunk(blocks, 1), weight, strict=True)], dim=1)
    return y if bias is None else y + bias


def block_product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, interleaved: bool = False, feature_major: bool = False
) -> Tensor:
    """x (T, N), weight (B, N / B, M / B), bias (M,) -> (T, M), all of one dtype. Inputs and outputs are in runs or
    both interleaved.

    ``feature_major`` sets the memory order of the result. Compilers see one opaque operator, because their own code for
    a batch of small products takes three times as long. Under autocast everything is cast to its dtype first.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _product(x, weight, bias, interleaved, feature_major)
    # A custom operator costs about 20 microseconds, as much as a small map with one token.
    return _forward(x, weight, bias, interleaved, feature_major)


@torch.library.custom_op("taut::block_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, bias: Tensor | None, interleaved: bool, feature_major: bool) -> Tensor:
    return _forward(x, weight, bias, interleaved, feature_major)


@_product.register_fake
def _product_shape(x: Tensor, weight: Tensor, bias: Tensor | None, interleaved: bool, feature_major: bool) -> Tensor:
    outputs = weight.shape[0] * weight.shape[2]
    return x.new_empty(outputs, x.shape[0]).T if feature_major else x.new_empty(x.shape[0], outputs)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.interleaved, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    interleaved, blocks = ctx.interleaved, len(weight)
    if interleaved:
        gradient = _feature_major(gradient)
    to_x = to_weight = to_bias = None
    if ctx.needs_input_grad[0]:
        # In the layout of x, because the backward of the preceding operation reads both together. ``_product`` and not
        # ``block_product``, because a compiler that traces this must see the opaque operator.
        feature_major = interleaved or x.stride(0) < x.stride(1)
        to_x = _product(gradient, weight.transpose(1, 2), None, interleaved, feature_major)
    if ctx.needs_input_grad[1]:
        shares = _shares(_feature_major(x) if interleaved else x, blocks, interleaved)
        to_weight = torch.bmm(shares.transpose(1, 2), _shares(gradient, blocks, interleaved))
    if ctx.needs_input_grad[2]:
        to_bias = gradient.sum(dim=0)
    return to_x, to_weight, to_bias, None, None


_product.register_autograd(_backward, setup_context=_keep_for_backward)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, interleaved: bool, feature_major: bool) -> Tensor:
    if len(x) <= FEW:
        return _few_tokens(x, weight, bias, interleaved, feature_major)
    (tokens, _), (blocks, _, width) = x.shape, weight.shape
    if interleaved or feature_major:
        y = x.new_empty(blocks * width, tokens).T
        x = _feature_major(x) if interleaved else x
    else:
        y = x.new_empty(tokens, blocks * width)
    sources, targets = _shares(x, blocks, interleaved), _shares(y, blocks, interleaved)
    if bias is None:
        torch.bmm(sources, weight, out=targets)
    else:
        torch.baddbmm(_shares(bias[None], blocks, interleaved), sources, weight, out=targets)
    return y if feature_major else y.contiguous()


def _few_tokens(x: Tensor, weight: Tensor, bias: Tensor | None, interleaved: bool, feature_major: bool) -> Tensor:
    """Tokens are the rows of each product, and the results are copied into place afterwards. Copying a few tokens costs
    almost nothing. With so few tokens as columns, MKL takes up to four times as long."""
    tokens, (blocks, _, width) = len(x), weight.shape
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and weight.is_contiguous()
    if tokens == 1 and plain and width < LONG:
        y = _one_token(x, weight, interleaved)
    else:
        y = torch.bmm(_shares(x, blocks, interleaved), weight)
        y = (y.permute(1, 2, 0) if interleaved else y.transpose(0, 1)).reshape(tokens, blocks * width)
    y = y if bias is None else y + bias
    return _feature_major(y) if feature_major else y


def _one_token(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    """(1, N) -> (1, M), each block as a weighted sum of rows. FBGEMM prefetches short rows, so it reads them twice as
    fast as a matrix-vector product does."""
    blocks, inputs, outputs = weight.shape
    weights = (x.view(inputs, blocks).T if interleaved else x).reshape(-1)
    rows = torch.arange(blocks * inputs, dtype=torch.int32)
    bags = torch.arange(0, blocks * inputs, inputs, dtype=torch.int32)
    sums = torch.embedding_bag(weight.view(-1, outputs), rows, bags, False, 0, False, weights)[0]
    return (sums.T if interleaved else sums).reshape(1, blocks * outputs)


def _shares(x: Tensor, blocks: int, interleaved: bool) -> Tensor:
    """(T, N) -> (B, T, N / B), a view: the share of each block."""
    tokens, width = x.shape[0], x.shape[1] // blocks
    if interleaved:
        return x.view(tokens, width, blocks).permute(2, 0, 1)
    return x.view(tokens, blocks, width).transpose(0, 1)


def _feature_major(x: Tensor) -> Tensor:
    """(T, N) with strides (1, T); the same tensor if it already has them."""
    return x.T.contiguous().T
