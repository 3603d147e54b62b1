"""Checks for devices other than the CPU: a model must work there as it does on the CPU."""

from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from taut.contract.case import Case
from taut.contract.checks import assert_close
from taut.contract.conditions import Check, is_decoder, named
from taut.contract.tiny import inputs, logits, padded_inputs, stepwise
from taut.contract.workers import bits_equal


def answers_as_on_the_cpu(case: Case) -> None:
    """A model moved from the CPU gives the same output up to rounding. Moved back, it has the same tensors."""
    model = _on_the_cpu(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = padded_inputs(model)
    expected = logits(model, **batch)
    # Outputs at padding mean nothing. The outputs of an encoder-decoder are at other tokens, which are not padded.
    real = batch["attention_mask"].bool() | model.config.is_encoder_decoder
    moved = model.to(case.device)
    assert_close(moved, logits(moved, **padded_inputs(moved)).cpu()[real], expected[real], atol=1e-4)
    after = model.to("cpu").state_dict()
    assert all(bits_equal(after[name], tensor) for name, tensor in before.items())


def decodes_as_on_the_cpu(case: Case) -> None:
    """Decoding a prompt, then single tokens, gives the CPU's output, even if it may differ from that of a full pass."""
    model = _on_the_cpu(case)
    chunks = [6, *[1] * 8]
    expected, _ = stepwise(model, chunks, **inputs(model, length=14))
    moved = model.to(case.device)
    outputs, _ = stepwise(moved, chunks, **inputs(moved, length=14))
    assert_close(moved, outputs.cpu(), expected, atol=1e-4)


def generates(case: Case) -> None:
    """Plain ``generate`` with left padding and beams gives the requested number of tokens."""
    model = case.compressed()
    batch = {name: tensor for name, tensor in padded_inputs(model).items() if name != "decoder_input_ids"}
    ids = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, num_beams=2, do_sample=False)
    assert ids.device == model.device
    assert ids.shape[1] == 6 + (1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1])


def opens_on_the_device(case: Case) -> None:
    """All tensors are on the device. Saved and opened there again, the model gives the same output to the bit."""
    model = case.compressed()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {torch.device(case.device).type}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        opened = type(model).from_pretrained(folder, device_map=case.device).eval()
    assert bits_equal(case.answer(opened), case.answer(model))


def learns_in_bfloat16(case: Case) -> None:
    """A training step under autocast, with weights in float32, gives finite gradients and then a finite output."""
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


DEVICE_CHECKS = named(
    Check(answers_as_on_the_cpu),
    Check(decodes_as_on_the_cpu, (is_decoder,)),
    Check(generates, (is_decoder,)),
    Check(opens_on_the_device),
    Check(learns_in_bfloat16),
)
