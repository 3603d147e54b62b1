"""Codes and codebooks for given rows: k-means stage by stage, then rounds that adapt each codebook to all the others.

The error of a row is e^T M e, where M (D, D) says which directions matter. With all other codes fixed, it is smallest
when a subvector's centroid is nearest to a target, in the metric of M's block for that subvector. The target
compensates for the errors of all other subvectors. The best centroid is the mean of its targets. So no step raises the
sum of errors.
"""

import torch
from torch import Tensor

from taut.ops.codebooks.kmeans import ITERATIONS, TOLERANCE, kmeans, means, nearest
from taut.ops.codebooks.product_codes import CodeLayout

ROUNDS = 10


def search(
    rows: Tensor, weight: Tensor, metric: Tensor | None, layout: CodeLayout, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes (N, S, P) int64 and codebooks (S, books, C, w) for ``rows`` (N, D), with ``weight`` (N,) on their errors.

    ``metric``: (D, D) positive definite, or None for the identity. The first centroids are rows sampled by weight with
    ``generator``, on the CPU. Source: Jegou et al. 2011 (TPAMI 33) for one stage, Chen et al. 2010 (Sensors 10) for
    several. The rounds follow Besag 1986 (iterated conditional modes), as in Babenko and Lempitsky 2014 (CVPR).
    """
    count = rows.shape[0]
    weight = weight / weight.sum()
    rest = rows.clone()
    codes, books = [], []
    chances = (weight.cpu().double() + 1e-12).float()
    for _ in range(layout.stages):
        parts = rest.view(count, layout.positions, layout.subvector).transpose(0, 1)
        chosen = torch.multinomial(chances, layout.centroids, generator=generator).to(rows.device)
        if layout.shared:
            place = torch.randint(layout.positions, (layout.centroids,), generator=generator).to(rows.device)
            pooled = parts.reshape(1, -1, layout.subvector)
            book, code, _ = kmeans(pooled, weight.repeat(layout.positions), parts[place, chosen][None])
        else:
            book, code, _ = kmeans(parts.contiguous(), weight, parts[:, chosen].clone(), ITERATIONS)
        codes.append(code.view(layout.positions, count).T)
        books.append(book)
        rest = rest - decode(codes[-1][:, None], book[None])
    all_codes, codebooks = torch.stack(codes, 1), torch.stack(books)
    if metric is None and layout.stages == 1:
        return all_codes, codebooks
    return refine(rows, weight, metric, layout, all_codes, codebooks, update=not layout.shared)


def refine(
    rows: Tensor,
    weight: Tensor,
    metric: Tensor | None,
    layout: CodeLayout,
    codes: Tensor,
    books: Tensor,
    update: bool,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Better codes (N, S, P), and with ``update`` better codebooks too. See the module's docstring for the method.

    Do not set ``update`` for shared codebooks. Shapes as in ``search``; the arguments are not changed. Stops early when
    a round no longer helps.
    """
    codes, books = codes.clone(), books.clone()
    error = rows - decode(codes, books)
    blocks = [slice(start, start + layout.subvector) for start in range(0, layout.width, layout.subvector)]
    # ``pulls`` map a whole error to a subvector's correction. ``roots`` turn distances in M's block into plain ones.
    pulls, roots = [], []
    for block in blocks if metric is not None else ():
        square = metric[block, block]
        pulls.append(torch.linalg.solve(square, metric[block]).T.contiguous())
        roots.append(torch.linalg.cholesky(square))
    before = float("inf")
    for _ in range(rounds):
        for stage in range(layout.stages):
            for place, block in enumerate(blocks):
                book = books[stage, 0 if layout.shared else place]
                now = book[codes[:, stage, place]]
                target = now + (error[:, block] if metric is None else error @ pulls[place])
                root = roots[place] if roots else None
                pair = (target, book) if root is None else (target @ root, book @ root)
                chosen, _ = nearest(pair[0][None], pair[1][None])
                if update:
                    book = means(target[None], chosen, weight, book[None])[0][0]
                    books[stage, place] = book
                codes[:, stage, place] = chosen[0]
                error[:, block] += now - book[chosen[0]]
        after = float((weighted_error(error, metric) * weight).sum())
        if after > (1 - TOLERANCE) * before:
            break
        before = after
    return codes, books


def assign(rows: Tensor, books: Tensor, layout: CodeLayout) -> Tensor:
    """The nearest centroids, stage by stage: rows (N, D), codebooks (S, books, C, w) -> codes (N, S, P) int64."""
    count = rows.shape[0]
    codes = []
    for stage in range(layout.stages):
        parts = rows.view(count, layout.positions, layout.subvector).transpose(0, 1)
        if layout.shared:
            parts = parts.reshape(1, -1, layout.subvector)
        code, _ = nearest(parts, books[stage])
        codes.append(code.view(layout.positions, count).T)
        rows = rows - decode(codes[-1][:, None], books[stage : stage + 1])
    return torch.stack(codes, 1)


def decode(codes: Tensor, books: Tensor) -> Tensor:
    """(N, S, P) codes and (S, books, C, w) -> (N, D): the plain formula, which the fast lookup must equal."""
    stages, positions = codes.shape[1:]
    every = books.expand(stages, positions, *books.shape[2:])
    stage, place = torch.arange(stages, device=codes.device)[:, None], torch.arange(positions, device=codes.device)
    return every[stage, place, codes].sum(1).flatten(1)


def weighted_error(error: Tensor, metric: Tensor | None) -> Tensor:
    """The error e^T M e of each row of ``error`` (N, D): (N,)."""
    return (error * (error if metric is None else error @ metric)).sum(1)
