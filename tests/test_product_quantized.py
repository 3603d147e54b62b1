"""Codes and codebooks: short gathers, k-means, the search for codes, and the table made of them."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.product_quantized import ProductQuantizedEmbedding, ProductTable
from taut.ops.codebooks.gather import gather_rows
from taut.ops.codebooks.kmeans import kmeans, means, nearest
from taut.ops.codebooks.product_codes import CodeLayout, decode_lengths, encode_lengths, lookup, scores
from taut.ops.codebooks.search import assign, decode, refine, search, weighted_error

CPU, META = torch.device("cpu"), torch.device("meta")
LAYOUTS = [
    CodeLayout(width=12, subvector=subvector, stages=stages, centroids=centroids, shared=shared)
    for subvector, stages, centroids, shared in itertools.product((1, 4, 12), (1, 2), (16, 256), (False, True))
]
SETTINGS = [
    {"subvector": 4},
    {"subvector": 8, "stages": 2, "norms": False},
    {"subvector": 2, "shared": True},
    {"subvector": 8, "stages": 3, "shared": True, "store": {"bits": 8}},
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(width: int, seed: int = 3) -> Tensor:
    """Far from the identity, of full rank."""
    root = numbers(width, width, seed=seed) / torch.arange(1.0, width + 1, dtype=torch.float64)
    return root @ root.T + 0.05 * torch.eye(width, dtype=torch.float64)


def table(rows: int = 60, width: int = 16, **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", dtype="float64", rows=rows, width=width, **fields)


def product(**knobs) -> ProductQuantizedEmbedding:
    return ProductQuantizedEmbedding.parse({"centroids": 16, **knobs})


def fitted(method, site, weight: Tensor, calibration: Calibration | None = None) -> ProductTable:
    part = method.build(site, CPU, torch.float64)
    method.fit(part, weight, calibration or Calibration())
    return part


def random_codes(layout: CodeLayout, rows: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(layout.centroids, (rows, layout.stages, layout.positions), generator=draw)
    return codes, numbers(layout.stages, layout.books, layout.centroids, layout.subvector)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_gathered_rows_are_the_rows_and_their_gradients_add_up(dtype, width):
    rows = numbers(50, width).to(dtype).requires_grad_()
    for kind in (torch.uint8, torch.int32, torch.int64):
        codes = torch.randint(50, (77,), generator=torch.Generator().manual_seed(2)).to(kind)
        assert torch.equal(gather_rows(codes, rows), rows[codes.long()])
    moved = numbers(50 * width + 1).to(dtype)[1:].view(50, width)
    assert torch.equal(gather_rows(codes, moved), moved[codes])
    assert gather_rows(codes[:0], rows).shape == (0, width)
    for outside in (50, -1):
        with pytest.raises(IndexError, match="50 rows"):
            gather_rows(torch.tensor([0, outside]), rows)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda values: gather_rows(codes[:9], values), rows)


def test_nearest_is_brute_force_and_distances_are_true():
    points, centroids = numbers(3, 500, 5), numbers(3, 16, 5, seed=1)
    codes, distances = nearest(points, centroids)
    every = (points[:, :, None] - centroids[:, None]).square().sum(3)
    assert torch.equal(codes, every.argmin(2))
    torch.testing.assert_close(distances, every.amin(2), rtol=1e-9, atol=1e-12)


def test_kmeans_never_rises_and_ends_where_means_and_codes_agree():
    points, weight = numbers(2, 400, 3), torch.rand(400, generator=torch.Generator().manual_seed(4)).double()
    centroids, codes, sums = kmeans(points, weight, points[:, :16].clone(), 200)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(sums))
    assert sums[-1] < 0.9 * sums[0]
    spread = (points - centroids.gather(1, codes[..., None].expand(-1, -1, 3))).square().sum(2) @ weight
    assert spread.sum().item() == pytest.approx(sums[-1], rel=1e-9)


def test_weights_are_repetitions():
    points = numbers(2, 80, 3)
    counts = torch.randint(1, 5, (80,), generator=torch.Generator().manual_seed(5))
    start = points[:, :8].clone()
    weighted, codes, _ = kmeans(points, counts.double(), start)
    repeated = points.repeat_interleave(counts, dim=1)
    plain, repeated_codes, _ = kmeans(repeated, torch.ones(repeated.shape[1], dtype=torch.float64), start)
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-9)
    assert torch.equal(codes.repeat_interleave(counts, dim=1), repeated_codes)


def test_as_many_centroids_as_different_points_are_exact_from_any_start():
    different = numbers(2, 16, 3)
    points = different[:, torch.arange(160) % 16]
    for start in (points[:, :1].expand(-1, 16, -1).clone(), points[:, 8:24].clone(), numbers(2, 16, 3, seed=9)):
        _, _, sums = kmeans(points, torch.ones(160, dtype=torch.float64), start, 40)
        assert sums[-1] < 1e-12


def test_a_code_without_points_keeps_its_centroid():
    kept = numbers(1, 3, 2, seed=1)
    codes = torch.tensor([[0, 0, 2, 2]])
    mean, total = means(numbers(1, 4, 2), codes, torch.ones(4, dtype=torch.float64), kept)
    assert torch.equal(mean[0, 1], kept[0, 1])
    assert total.tolist() == [[2, 0, 2]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_codes_come_back_and_the_lookup_is_the_plain_formula(layout):
    codes, books = random_codes(layout, 600)
    packed = layout.pack(codes)
    assert packed.shape == (600, layout.stages, layout.stage_bytes)
    assert torch.equal(layout.codes(packed), codes)
    rows, ids = decode(codes, books), torch.randint(600, (700,), generator=torch.Generator().manual_seed(6))
    lengths = torch.rand(700, dtype=torch.float64)
    torch.testing.assert_close(lookup(packed, ids, books, layout), rows[ids], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        lookup(packed, ids.int(), books, layout, lengths), rows[ids] * lengths[:, None], rtol=0, atol=1e-12
    )
    hidden = numbers(20, 12, seed=7)
    torch.testing.assert_close(scores(hidden, packed, books, layout), hidden @ rows.T, rtol=0, atol=1e-10)
    with pytest.raises((IndexError, RuntimeError), match="range|bounds"):
        lookup(packed, torch.tensor([600]), books, layout)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[9], LAYOUTS[12]], ids=str)
def test_lookup_gradients_agree_with_finite_differences(layout):
    codes, books = random_codes(layout, 9)
    packed, ids = layout.pack(codes), torch.tensor([1, 8, 1, 0])
    lengths = torch.rand(4, dtype=torch.float64).requires_grad_()
    books = books[..., :16, :].contiguous().requires_grad_() if layout.centroids == 16 else books.requires_grad_()

    def run(books: Tensor, lengths: Tensor) -> Tensor:
        return lookup(packed, ids, books, layout, lengths)

    if layout.centroids == 16:
        assert torch.autograd.gradcheck(run, (books, lengths))
    direction = numbers(4, 12, seed=8)
    gradients = torch.autograd.grad((run(books, lengths) * direction).sum(), (books, lengths))
    plain = decode(codes, books)[ids] * lengths[:, None]
    wanted = torch.autograd.grad((plain * direction).sum(), (books, lengths))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_one_id_does_not_see_the_rest_of_the_batch():
    layout = LAYOUTS[4]
    codes, books = random_codes(layout, 700)
    packed, books = layout.pack(codes), books.float()
    whole = lookup(packed, torch.arange(700), books, layout)
    assert torch.equal(torch.cat([lookup(packed, torch.tensor([one]), books, layout) for one in range(700)]), whole)


def test_lengths_keep_two_percent_over_fourteen_octaves_and_zero():
    lengths = torch.exp2(torch.linspace(-14.8, 0.9, 1000, dtype=torch.float64))
    close = decode_lengths(encode_lengths(lengths), torch.float64)
    assert ((close / lengths).log2().abs() <= 0.5 / 16 + 1e-9).all()
    edge = torch.tensor([0.0, -1.0, 5.0, 1e-20], dtype=torch.float64)
    assert decode_lengths(encode_lengths(edge), torch.float64)[:3].tolist() == [0.0, 0.0, 2.0]
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_lengths(decode_lengths(codes, torch.float64)), codes)


@pytest.mark.parametrize("stages", [1, 2])
def test_rounds_lower_the_error_that_the_metric_sees(stages):
    layout = CodeLayout(12, 4, stages, 16, shared=False)
    rows, weight, seen = numbers(300, 12), torch.rand(300, dtype=torch.float64) + 0.1, metric(12)
    weight = weight / weight.sum()

    def lost(codes: Tensor, books: Tensor) -> float:
        return float((weighted_error(rows - decode(codes, books), seen) * weight).sum())

    plain = search(rows, weight, None, layout, torch.Generator().manual_seed(0))
    path = [lost(*plain)]
    for _ in range(6):
        plain = refine(rows, weight, seen, layout, *plain, update=True, rounds=1)
        path.append(lost(*plain))
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(path))
    assert path[-1] < 0.8 * path[0]
    aware = search(rows, weight, seen, layout, torch.Generator().manual_seed(0))
    assert lost(*aware) < 0.8 * path[0]
    only_codes, same_books = refine(rows, weight, seen, layout, *aware, update=False)
    assert torch.equal(same_books, aware[1])
    assert lost(only_codes, same_books) <= lost(*aware) * (1 + 1e-9)


def test_residual_error_falls_with_every_stage():
    weight, lost = numbers(300, 16), []
    for stages in (1, 2, 3, 4):
        part = fitted(product(subvector=8, stages=stages), table(300), weight)
        lost.append((weight - part.merged()).square().sum().item())
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(lost))


@pytest.mark.parametrize("norms", [False, True])
def test_rows_of_few_different_subvectors_are_exact(norms):
    pool, draw = numbers(4, 16, 4), torch.Generator().manual_seed(3)
    # Signs: rows of one length, whose subvectors are equal to the bit wherever they are equal.
    pool = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4).expand(4, -1, -1) if norms else pool
    chosen = torch.randint(16, (200, 4), generator=draw)
    weight = torch.stack([pool[place, chosen[:, place]] for place in range(4)], 1).flatten(1)
    # On the scale of lengths.
    lengths = torch.exp2(torch.randint(-4, 1, (200, 1), generator=draw).double()) if norms else 1.0
    part = fitted(product(subvector=4, norms=norms), table(200), weight * lengths)
    torch.testing.assert_close(part.merged(), weight * lengths, rtol=0, atol=1e-9)


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_lookup_and_tied_head_are_those_of_the_merged_table(knobs):
    site = table(scale=4.0, padding_row=3, heads=("head",))
    part = fitted(product(**knobs), site, numbers(60, 16))
    ids, hidden = torch.tensor([[0, 3, 59], [7, 7, 1]]), numbers(2, 40, 16, seed=5)
    torch.testing.assert_close(part(ids), part.merged()[ids] * 4.0, rtol=0, atol=1e-12)
    wanted = hidden @ part.merged().T
    with torch.no_grad():
        torch.testing.assert_close(part.logits(hidden), wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(part.logits(hidden[0, 0]), wanted[0, 0], rtol=0, atol=1e-10)
    seen = hidden.requires_grad_()
    torch.testing.assert_close(part.logits(seen), wanted, rtol=0, atol=1e-10)
    direction = numbers(2, 40, 60, seed=6)
    part.unpack()
    trained = [seen, *part.parameters()]
    gradients = torch.autograd.grad((part.logits(seen) * direction).sum(), trained)
    wanted = torch.autograd.grad((seen @ part.merged().T * direction).sum(), trained)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert part(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 16)


def test_a_row_of_zeros_stays_zero_and_padding_learns_nothing():
    weight = numbers(60, 16)
    weight[3] = 0
    part = fitted(product(subvector=4), table(padding_row=3), weight)
    assert part(torch.tensor(3)).abs().max() == 0
    part.unpack()
    part(torch.tensor([3, 3])).sum().backward()
    assert all(one.grad is None or one.grad.abs().max() == 0 for one in part.parameters())
    part(torch.tensor([3, 5])).sum().backward()
    assert part.norms_unpacked.grad.nonzero().view(-1).tolist() == [5]


def test_weights_serve_the_rows_that_are_used_and_the_metric_the_directions_that_count():
    weight, site = numbers(300, 16), table(300)
    frequency = torch.where(torch.arange(300) < 30, 1000.0, 0.0).double()
    plain, aware = fitted(product(subvector=8), site, weight), None
    calibration = Calibration(frequency=frequency, metric=metric(16))
    used = fitted(product(subvector=8, metric=False), site, weight, calibration)
    lost = [(weight - one.merged()).square().sum(1)[:30].sum().item() for one in (used, plain)]
    assert lost[0] < 0.5 * lost[1]
    aware = fitted(product(subvector=8, weighted=False), site, weight, calibration)
    lost = [weighted_error(weight - one.merged(), metric(16)).sum().item() for one in (aware, plain)]
    assert lost[0] < 0.8 * lost[1]
    assert product(subvector=8).needs == {"frequency", "metric"}
    assert product(subvector=8, metric=False, weighted=False).needs == set()


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    weight = numbers(300, 16)
    first, again, other = (
        fitted(product(subvector=4), table(300), weight, Calibration(seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["weight"], other["weight"])


@pytest.mark.parametrize("knobs", [*SETTINGS, {"subvector": 16}, {"subvector": 1, "centroids": 256}], ids=str)
def test_predicted_cost_is_counted_cost(knobs):
    method, site = product(**knobs), table(301, heads=("head",))
    part, cost = method.build(site, CPU, torch.float64), method.predict(site)
    assert cost.parameters == part.numbers() == 301 * 16
    assert cost.bytes == sum(one.nbytes for one in part.state_dict().values())
    skeleton = method.build(site, META, torch.float64).state_dict()
    assert {name: one.shape for name, one in skeleton.items()} == {k: v.shape for k, v in part.state_dict().items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part(torch.arange(16))
        part.logits(numbers(16, 16))
    assert counter.get_total_flops() == 16 * cost.flops_per_token


def test_keep_takes_the_shortest_subvectors_within_the_bytes():
    site, sizes = table(5000, 48), []
    for keep in (0.01, 0.02, 0.03, 0.2):
        method = ProductQuantizedEmbedding.parse({"centroids": 16}, keep).solve(site, keep)
        stored, dense = method.predict(site).bytes, site.dense().bytes
        assert stored <= keep * dense
        shorter = [width for width in range(1, method.subvector) if 48 % width == 0]
        assert all(product(subvector=width).predict(site).bytes > keep * dense for width in shorter)
        sizes.append(stored)
    assert sizes == sorted(sizes)
    with pytest.raises(TautError, match="the least is"):
        ProductQuantizedEmbedding.parse({"centroids": 16}, 0.001).solve(site, 0.001)


@pytest.mark.parametrize("relearn", ["codebooks", "codes"])
@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_unpacking_changes_nothing_until_something_is_learned_and_learning_helps(knobs, relearn):
    weight, wanted = numbers(60, 16), numbers(60, 16, seed=8)
    calibration = Calibration(metric=metric(16))
    part = fitted(product(relearn=relearn, **knobs), table(), weight, calibration)
    before, stands = {name: one.clone() for name, one in part.state_dict().items()}, part.merged()
    part.unpack(weight)
    torch.testing.assert_close(part.merged(), stands, rtol=1e-5, atol=1e-6)
    part.repack()
    after = part.state_dict()
    assert list(after) == list(before)
    assert all((after[name].shape, after[name].dtype) == (one.shape, one.dtype) for name, one in before.items())
    torch.testing.assert_close(part.merged(), stands, rtol=1e-5, atol=1e-2)
    part.unpack(weight)
    adam = torch.optim.Adam(part.parameters(), 0.01)
    for _ in range(60):
        adam.zero_grad()
        (part.merged() - wanted).square().sum().backward()
        adam.step()
    unpacked = part.merged()
    part.repack()
    torch.testing.assert_close(part.merged(), unpacked, rtol=1e-5, atol=1e-6)
    lost = [(wanted - one).square().sum().item() for one in (part.merged(), stands)]
    assert lost[0] < 0.9 * lost[1]
    assert (relearn == "codes") == (not torch.equal(before["weight"], part.weight))


def test_a_table_learned_from_nothing_reaches_its_target_and_keeps_it_as_codes():
    torch.manual_seed(0)
    target = numbers(60, 16, seed=4) * 0.02
    part = product(subvector=4, relearn="codes").build(table(padding_row=0), CPU, torch.float64)
    assert part.merged()[0].abs().max() == 0
    assert part.merged()[1:].std().item() == pytest.approx(0.02, rel=0.15)
    first = (part.merged() - target)[1:].square().sum().item()
    part.unpack()
    adam = torch.optim.Adam(part.parameters(), 2e-3)
    ids = torch.arange(1, 60)
    for _ in range(200):
        adam.zero_grad()
        (part(ids) - target[1:]).square().sum().backward()
        adam.step()
    trained = part(ids).detach()
    part.repack()
    assert {name: one.dtype for name, one in part.state_dict().items() if name != "codebooks"} == {
        "weight": torch.uint8,
        "norms": torch.uint8,
    }
    torch.testing.assert_close(part(ids), trained, rtol=0, atol=1e-8)
    assert (trained - target[1:]).square().sum().item() < 0.4 * first


def test_assigning_a_sum_of_centroids_finds_it_where_there_is_one_stage():
    layout = CodeLayout(12, 4, 1, 16, shared=True)
    codes, books = random_codes(layout, 50)
    assert torch.equal(assign(decode(codes, books), books, layout), codes)


def test_wrong_input_is_refused_with_the_reason():
    assert "the nearest that does is 4" in product(subvector=5).fits(table())
    assert "use centroids: 16" in ProductQuantizedEmbedding.parse({"subvector": 4}).fits(table())
    assert "do not reduce a table of 9 rows" in product(subvector=4).fits(table(9))
    line = LinearSite(slot="feedforward", path="a.b", role="up", inputs=4, outputs=4)
    assert "not a token table" in product(subvector=4).fits(line)
    assert product(subvector=4).fits(table()) is None
    with pytest.raises(TautError, match="give keep or subvector"):
        product()
    with pytest.raises(TautError, match="not both"):
        ProductQuantizedEmbedding.parse({"subvector": 4}, 0.5)
    for knobs in ({"subvector": 0}, {"subvector": 4, "centroids": 32}, {"subvector": 4, "stages": 9}):
        with pytest.raises(TautError, match="recipe"):
            product(**knobs)
    weight = numbers(60, 16)
    weight[5, 5] = torch.nan
    with pytest.raises(TautError, match="not finite"):
        fitted(product(subvector=4), table(), weight)
    part = fitted(product(subvector=4), table(), numbers(60, 16))
    with pytest.raises(IndexError):
        part(torch.tensor([60]))
