"""Checks for another device than the CPU: what a model does there is what it does here."""

from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from taut.contract.case import Case
from taut.contract.checks import assert_close
from taut.contract.tiny import inputs, logits, padded_inputs, stepwise
from taut.contract.workers import bits_equal


def answers_as_on_the_cpu(case: Case) -> None:
    """Compressed on the CPU and moved: the same answer up to rounding. Moved back: the same tensors."""
    model = _on_the_cpu(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = padded_inputs(model)
    expected = logits(model, **given)
    # What stands in the padding of a decoder means nothing; an encoder-decoder answers with other tokens.
    real = given["attention_mask"].bool() | model.config.is_encoder_decoder
    moved = model.to(case.device)
    assert_close(moved, logits(moved, **padded_inputs(moved)).cpu()[real], expected[real], atol=1e-4)
    after = model.to("cpu").state_dict()
    assert all(bits_equal(after[name], tensor) for name, tensor in before.items())


def decodes_as_on_the_cpu(case: Case) -> None:
    """A prompt of several tokens, then one at a time through the cache, also where no full pass gives the same."""
    case.need_decoder()
    model = _on_the_cpu(case)
    chunks = [6, *[1] * 8]
    expected, _ = stepwise(model, chunks, **inputs(model, length=14))
    moved = model.to(case.device)
    found, _ = stepwise(moved, chunks, **inputs(moved, length=14))
    assert_close(moved, found.cpu(), expected, atol=1e-4)


def generates(case: Case) -> None:
    """Plain ``generate`` with left padding and beams ends with as many tokens as asked for."""
    case.need_decoder()
    model = case.compressed()
    given = {name: each for name, each in padded_inputs(model).items() if name != "decoder_input_ids"}
    found = model.generate(**given, max_new_tokens=6, min_new_tokens=6, num_beams=2, do_sample=False)
    assert found.device == model.device
    assert found.shape[1] == 6 + (1 if model.config.is_encoder_decoder else given["input_ids"].shape[1])


def opens_on_the_device(case: Case) -> None:
    """Saved from the device and opened onto it: every tensor lies there, and the answer is the same to the bit."""
    model = case.compressed()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {torch.device(case.device).type}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened = type(model).from_pretrained(folder, device_map=case.device).eval()
    assert bits_equal(case.answer(opened), case.answer(model))


def learns_in_bfloat16(case: Case) -> None:
    """A step of training under autocast, weights in float32: gradients are finite, and the model still answers."""
    model = case.compressed().train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with torch.autocast(torch.device(case.device).type, torch.bfloat16):
        output = model(**inputs(model))
    answer = output["logits"] if "logits" in output else output["last_hidden_state"]
    answer.float().square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    adam.step()
    assert case.answer(model.eval()).isfinite().all()


def _on_the_cpu(case: Case) -> PreTrainedModel:
    return Case(case.method, case.family, case.entry).compressed()


DEVICE_CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        answers_as_on_the_cpu,
        decodes_as_on_the_cpu,
        generates,
        opens_on_the_device,
        learns_in_bfloat16,
    )
}
