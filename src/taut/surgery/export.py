"""Exports a compressed model to a plain dense checkpoint, for tools without taut (vLLM, llama.cpp, ONNX)."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from taut.methods.base import PartMethod
from taut.methods.part import Part
from taut.surgery.apply import copy_companions, surgery_of
from taut.surgery.folders import whole_folder
from taut.surgery.install import SharedHead, dense_module


def densify(model: PreTrainedModel) -> tuple[PreTrainedModel, list[tuple[str, str]]]:
    """Return a plain model with every part merged into dense weights, and the sites without a dense equivalent.

    Such a site is given as (name, reason). There, transformers' own attention or memory runs, so outputs differ.
    ``model`` stays unchanged. Raises TautError when it is not compressed.
    """
    surgery = surgery_of(model)
    config = type(model.config).from_dict(model.config.to_dict())
    if "quantization_config" in vars(config):
        del config.quantization_config
    config._attn_implementation = None
    dtype = model.dtype
    dense = type(model)._from_config(config, dtype=dtype)
    parts = {name for name, module in model.named_modules() if isinstance(module, Part | SharedHead)}
    plain = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{part}.") for part in parts)
    }
    with torch.no_grad():
        dense.load_state_dict(plain, strict=False)
        for name, module in model.named_modules():
            if isinstance(module, SharedHead) and module.bias is not None:
                dense.get_submodule(name).bias.copy_(module.bias)
        for step in surgery.steps:
            if isinstance(step.method, PartMethod):
                part = model.get_submodule(step.site.path)
                dense_module(step.site, part, dense.get_submodule(step.site.path))
        # Merging gave the table a new tensor, so the heads and copies are tied to it again.
        dense.tie_weights()
    kept = [
        (step.site.name, f"{step.method.id} has no dense equivalent: transformers' own runs instead")
        for step in surgery.steps
        if not isinstance(step.method, PartMethod) and not step.method.id.endswith(".identity")
    ]
    return dense.eval(), kept


def export(model: PreTrainedModel, out: str | Path, source: Path | None = None) -> list[tuple[str, str]]:
    """Write the dense equivalent as a complete plain folder. Returns the sites without one, as ``densify`` does."""
    dense, kept = densify(model)
    with whole_folder(out) as folder:
        if source is not None:
            copy_companions(source, folder)
        dense.save_pretrained(folder)
    return kept
