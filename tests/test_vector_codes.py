"""Codes of sentence vectors: every one against its plain formula, searches of bits against brute force."""

import math

import pytest
import torch
from torch.nn import functional as F
from vector_rows import ODD, mean_squared_gap, units

from taut.retrieval.codes import FEW_QUERIES, QUERIES_AT_ONCE, Binary, Int8, ProductQuantized, hamming
from taut.retrieval.index import Index


@pytest.mark.parametrize("width", [ODD, 64])
def test_int8_is_within_half_a_step(width: int):
    vectors = units(300, width).double().float()
    code = Int8.fit(vectors, None, 0)
    step = (vectors.amax(0) - vectors.amin(0)).double() / 254
    error = (code.decode(code.encode(vectors)).double() - vectors.double()).abs()
    assert (error <= step * 0.5001 + 1e-7).all()
    assert code.encode(vectors).dtype == torch.int8


def test_int8_outside_the_fitted_range_is_clipped_to_its_ends():
    code = Int8.fit(units(50, 16), None, 0)
    far = code.encode(torch.full((1, 16), 9.0))
    assert (far == 127).all()


@pytest.mark.parametrize("count", [1, 3, 40])
def test_int8_scores_are_those_of_the_decoded_rows(count: int):
    vectors, queries = units(200, ODD), units(count, ODD, 1)
    code = Int8.fit(vectors, None, 0)
    rows = code.encode(vectors)
    plain = queries.double() @ code.decode(rows).double().T
    # A query is rounded to 16 bits: half a unit for each number of a row, which is at most 127.
    unit = (queries * code.fitted["step"]).abs().amax(1, keepdim=True).double() / (127 * 255)
    assert ((code.scores(queries, rows).double() - plain).abs() <= unit * 127 * ODD / 2 + 1e-6).all()
    torch.testing.assert_close(code.scores(queries, rows).double(), plain, atol=3e-4, rtol=0)


def test_int8_survives_one_huge_dimension():
    """Mean-pooled decoder states have dimensions in which all texts are large and alike."""
    vectors = units(200, 32) * 0.05
    vectors[:, 3] = 1 + 0.01 * vectors[:, 4]
    vectors = F.normalize(vectors, dim=1)
    index = Index.build(vectors, "int8")
    full = Index.build(vectors, "float")
    order = index.scores(vectors).argsort(1, descending=True)[:, :3]
    assert (order == full.scores(vectors).argsort(1, descending=True)[:, :3]).float().mean() > 0.9


@pytest.mark.parametrize("width", [8, ODD, 64, 100])
def test_hamming_is_brute_force(width: int):
    vectors, queries = units(150, width), units(7, width, 1)
    code = Binary.fit(vectors, None, 0)
    bits, asked = (side > code.fitted["threshold"] for side in (vectors, queries))
    brute = torch.stack([(one != bits).sum(1) for one in asked])
    rows = code.encode(vectors)
    assert rows.shape == (150, math.ceil(width / 8))
    assert (hamming(code.encode(queries), rows) == brute).all()
    torch.testing.assert_close(code.quick_scores(queries, rows), 1 - 2 * brute / width)


@pytest.mark.parametrize("count", [1, FEW_QUERIES, QUERIES_AT_ONCE + 3])
@pytest.mark.parametrize("width", [ODD, 64])
def test_a_float_query_meets_plus_and_minus_one(width: int, count: int):
    vectors, queries = units(150, width), units(count, width, 1)
    code = Binary.fit(vectors, None, 0)
    threshold = vectors.median(0).values
    signs = torch.where(vectors > threshold, 1.0, -1.0).double()
    expected = (queries - threshold).double() @ signs.T / width**0.5
    torch.testing.assert_close(code.scores(queries, code.encode(vectors)).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(code.decode(code.encode(vectors)).double(), signs / width**0.5, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("count", [1, FEW_QUERIES, QUERIES_AT_ONCE + 3])
@pytest.mark.parametrize("places", [7, 14, ODD])
def test_product_scores_are_those_of_the_decoded_rows(places: int, count: int):
    vectors, queries = units(300, ODD), units(count, ODD, 1)
    code = ProductQuantized.fit(vectors, places, 0)
    rows = code.encode(vectors)
    assert rows.shape == (300, places)
    expected = queries.double() @ code.decode(rows).double().T
    torch.testing.assert_close(code.scores(queries, rows).double(), expected, atol=1e-6, rtol=1e-5)


def test_product_rows_are_their_nearest_centroids():
    vectors = units(300, 24)
    code = ProductQuantized.fit(vectors, 6, 0)
    codebooks = code.fitted["codebooks"].double()
    parts = vectors.double().view(300, 6, 1, 4)
    brute = (parts - codebooks).square().sum(-1).argmin(-1)
    chosen = code.encode(vectors).long()
    gap = (parts - codebooks).square().sum(-1)
    assert (gap.gather(2, chosen[..., None]) - gap.gather(2, brute[..., None]) < 1e-6).all()


def test_more_bytes_are_nearer():
    vectors = units(600, 48)
    errors = [
        mean_squared_gap(code.decode(code.encode(vectors)), vectors)
        for code in (ProductQuantized.fit(vectors, places, 0) for places in (6, 12, 24))
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_fewer_vectors_than_centroids_come_back_exactly():
    vectors = units(20, 16)
    code = ProductQuantized.fit(vectors, 4, 0)
    torch.testing.assert_close(code.decode(code.encode(vectors)), vectors, atol=1e-6, rtol=0)
