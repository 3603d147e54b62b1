"""Apply a recipe: to a model in memory, or from folder to folder."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import _plugin
from taut.architectures.locate import locate
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import Site
from taut.methods.base import PartMethod
from taut.surgery.align import align_tensors
from taut.surgery.calibration import calibrate, token_batches
from taut.surgery.folders import whole_folder
from taut.surgery.install import Surgery, fitted, started
from taut.surgery.loading import open_model
from taut.surgery.plan import Plan, Step, make_plan, refuse_other_quantization
from taut.surgery.prepare import Prepared
from taut.surgery.quantizer import TautConfig, TautQuantizer

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


def apply(
    model: PreTrainedModel,
    recipe: Recipe | Plan,
    batches: Iterable[dict[str, torch.Tensor]] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_originals: bool = True,
    original: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Compress ``model`` in place and return the plan.

    ``batches`` are model inputs (dicts of tensors) for methods that calibrate. Without them, those methods fit the
    weights alone. ``tokenizer`` is for methods that read the vocabulary, ``seed`` for fits that start at random.
    With ``keep_originals`` the change can be undone to the bit, and the dense weights stay in memory until then.
    Raises TautError for a model that is compressed already, and for a Recipe as ``make_plan`` does.
    """
    refuse_other_quantization(model.config)
    plan = recipe if isinstance(recipe, Plan) else make_plan(model, recipe, tokenizer=lambda: tokenizer)
    needs = {step.site: step.method.needs for step in plan.steps if isinstance(step.method, PartMethod)}
    calibration = calibrate(model, needs, batches, seed)
    total, done = len(needs), 0

    def build(step: Any, module: torch.nn.Module) -> Any:
        nonlocal done
        if not isinstance(step.method, PartMethod):
            return started(step, model.device, seed)
        part = fitted(step, module, calibration)
        done += 1
        if progress is not None:
            progress(done, total)
        return part

    _plugin.arm()
    config = TautConfig(
        [step.to_dict() for step in plan.steps], plan.recipe.to_dict(), family=plan.family, original=original
    )
    quantizer = TautQuantizer(config, pre_quantized=True)
    quantizer.surgery = Surgery(model, plan.steps, build, keep_originals)
    align_tensors(model)
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    return plan


def compress(
    prepared: Prepared,
    texts: Iterable[str] = (),
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Open a prepared model and apply its plan.

    ``texts`` are for calibration. They are read only when a method calibrates and there is a tokenizer.
    """
    plan = prepared.plan
    model = open_model(prepared.source, prepared.dtype, device, seed)
    batches: Iterable[dict[str, torch.Tensor]] = ()
    calibrates = any(isinstance(step.method, PartMethod) and step.method.needs for step in plan.steps)
    if calibrates and (tokenizer := prepared.tokenizer()) is not None:
        batches = token_batches(tokenizer, texts, model)
    apply(model, plan, batches, keep_originals=False, original=prepared.source.name, seed=seed, progress=progress)
    return model


def undo(model: PreTrainedModel) -> None:
    """Restore the original to the bit. Raises TautError if the model is not compressed or was loaded compressed."""
    surgery_of(model).undo()
    del model.hf_quantizer
    del model.config.quantization_config


def is_compressed(model: PreTrainedModel) -> bool:
    """Whether taut compressed this model, in memory or before it was loaded."""
    return isinstance(vars(model).get("hf_quantizer"), TautQuantizer)


def surgery_of(model: PreTrainedModel) -> Surgery:
    """Return the changes made to a compressed model. Raises TautError when it is not compressed."""
    if not is_compressed(model):
        raise TautError(f"this {type(model).__name__} is not compressed by taut")
    return model.hf_quantizer.surgery


def steps_of(model: PreTrainedModel) -> tuple[Step, ...]:
    """Return the steps of a compressed model, with the sites of this model. Raises TautError if not compressed."""
    return surgery_of(model).steps


def untouched(model: PreTrainedModel) -> PreTrainedModel:
    """Build a skeleton of the original model on the meta device: same class, configuration and dtype, no values."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        return type(model)._from_config(config, dtype=model.dtype)


def sites_of(model: PreTrainedModel) -> tuple[Site, ...]:
    """Return the sites of a model, compressed or not."""
    return locate(untouched(model) if is_compressed(model) else model).sites


def save(model: PreTrainedModel, out: str | Path, source: Path | None = None) -> Path:
    """Write a complete folder, which appears whole or not at all.

    It holds the weights, the config, and what else is beside the original's weights in ``source``: tokenizer, chat
    template, generation config, sentence-transformers' folders.
    """
    with whole_folder(out) as folder:
        if source is not None:
            copy_companions(source, folder)
        model.save_pretrained(folder)
    return Path(out)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy all but weights and config: tokenizer, chat template, sentence-transformers' folders."""
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns(*WEIGHTS, ".git", "onnx", "openvino"), dirs_exist_ok=True
    )
    for config in source.glob("*/config.json"):
        # A module folder of sentence-transformers (1_Pooling) keeps its own config.
        target = folder / config.relative_to(source)
        if target.parent.is_dir():
            shutil.copy2(config, target)
