"""FLOPs of a record: the same multiply-adds count the same, whichever kernel did them and whatever the counter sees."""

import pytest
import torch

import taut
from taut.contract.tiny import tiny
from taut.measurement.count import flops_per_token
from taut.studies.costs import flops_of, sample_inputs


@pytest.mark.parametrize("tokens", [1, 4, 100])
@pytest.mark.parametrize("entry", [{"bits": 8}, {"bits": 4, "group": 8}, {"bits": 3, "group": 10}], ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_low_bit_maps_do_what_dense_ones_do(family: str, entry: dict, tokens: int) -> None:
    """Few tokens of four bits go through lookups, which the counter cannot see; many through products, which it can."""
    dense = tiny(family)
    inputs = sample_inputs(dense, 1, tokens)
    light = tiny(family)
    line = {"method": "low_bit", **entry}
    taut.apply(light, {"projection": line, "feedforward": {**line, "layers": ":"}})
    assert flops_of(light, inputs).value == pytest.approx(flops_per_token(dense, inputs).value, rel=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_table_with_hot_rows_counts_as_predicted(family: str) -> None:
    """Its lookups, its copies and its head are replaced by the prediction; everything else is as counted before."""
    model = tiny(family)
    inputs = sample_inputs(model, 1, 32)
    dense = flops_per_token(model, inputs).value
    head = 2.0 * model.config.hidden_size * model.config.vocab_size
    taut.apply(model, {"embedding": {"method": "tensor_train", "rank": 6, "hot": 5}}, batches=[inputs])
    (step,) = model.hf_quantizer.surgery.steps
    assert step.method.uncounted
    assert len(step.site.heads) == 1
    assert flops_of(model, inputs).value == pytest.approx(dense - head + step.cost.flops_per_token, rel=1e-12)


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("bits", [8, 4])
def test_flops_of_a_low_bit_model_by_hand(bits: int, tokens: int) -> None:
    """Tiny BERT: 2 layers of width 32 with 64 in the middle, and a head of one 32 x 32 and one 32 x 96 map."""
    model = tiny("bert")
    line = {"method": "low_bit", "bits": bits}
    taut.apply(model, {"projection": line, "feedforward": line})
    maps = 2 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    head = 2 * (32 * 32 + 32 * 96)
    pairs = 2 * 2 * 2 * 32 * tokens
    counted = flops_of(model, sample_inputs(model, 1, tokens))
    assert counted.value == pytest.approx(maps + head + pairs, rel=1e-12)
    assert counted.how.endswith("; 12 parts that it cannot see as predicted")


def test_an_untouched_model_is_counted_alone() -> None:
    model = tiny("llama")
    inputs = sample_inputs(model, 1, 8)
    assert flops_of(model, inputs) == flops_per_token(model, inputs)
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == 8
