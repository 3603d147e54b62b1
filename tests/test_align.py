"""Float tensors at multiples of 64 bytes: a loaded model decodes as it did before it was saved, to the bit."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import taut
from taut.contract.tiny import inputs, tiny
from taut.contract.workers import bits_equal
from taut.surgery.align import ALIGNMENT, align_tensors

# 96 x 7 floats and 24 x 7 floats end at no multiple of 64 bytes.
RECIPE = {"embedding": {"method": "low_rank", "rank": 7}, "projection": {"method": "low_rank", "rank": 7}}


def stepwise(model: PreTrainedModel) -> Tensor:
    """Logits of greedy decoding, one token at a time."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs(model), max_new_tokens=12, **options).logits)


def test_tensors_are_moved_and_ties_kept() -> None:
    model = tiny("llama")
    memory = torch.empty(96 * 32 + 1)
    model.model.embed_tokens.weight.data = memory[1:].view(96, 32).copy_(model.model.embed_tokens.weight.detach())
    before = model.model.embed_tokens.weight.detach().clone()
    assert model.lm_head.weight.data_ptr() % ALIGNMENT
    align_tensors(model)
    assert model.lm_head.weight.data_ptr() % ALIGNMENT == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bits_equal(model.lm_head.weight.detach(), before)


def test_decoding_is_the_same_to_the_bit(tmp_path: Path) -> None:
    model = taut.apply(tiny("llama"), RECIPE, tmp_path / "light")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "light").eval()
    assert not any(tensor.data_ptr() % ALIGNMENT for tensor in again.parameters())
    assert bits_equal(stepwise(again), stepwise(model))
