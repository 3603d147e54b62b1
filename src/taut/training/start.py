"""The model that a training run starts with: from scratch, from a checkpoint, or from an interrupted run."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.architectures.locate import locate
from taut.architectures.positions import position_limit
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import AttentionSite
from taut.methods.base import MemoryMethod, PartMethod
from taut.surgery.apply import compress, steps_of
from taut.surgery.loading import Source, open_model, open_skeleton, resolve
from taut.surgery.plan import make_plan
from taut.surgery.prepare import prepare
from taut.training.carried_memory import NO_MEMORY
from taut.training.reconstruction import NO_COMPRESSOR
from taut.training.spec import TrainSpec

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def resolve_objective(spec: TrainSpec) -> tuple[Source, bool]:
    """Find the source of the model, and whether training is masked. Only the configuration is read.

    Raises TautError for an encoder-decoder, a model without a head over its vocabulary, an objective that does not fit
    its attention, rows longer than its positions, a recipe that fits nowhere, carry_memory without a memory, and
    reconstruction without a memory that learns to compress.
    """
    source = resolve(spec.model)
    skeleton = open_skeleton(source, torch.float32)
    if skeleton.config.is_encoder_decoder:
        raise TautError(f"{source.name}: an encoder-decoder; taut train supports causal and masked models")
    causal = all(site.causal for site in locate(skeleton).sites if isinstance(site, AttentionSite))
    if spec.objective == "causal" and not causal:
        raise TautError(f"objective = 'causal': {source.name} attends to later tokens; use masked")
    masked = spec.objective == "masked" or (spec.objective == "auto" and not causal)
    if masked and causal:
        raise TautError(
            f"objective = 'masked': {source.name} is causal and does not attend to later tokens; use causal"
        )
    if masked and source.scratch is not None:
        mapping = transformers.AutoModelForMaskedLM._model_mapping
        if type(source.scratch) not in mapping:
            raise TautError(f"{source.name}: transformers has no masked language model of this architecture")
        source.scratch.architectures = [mapping[type(source.scratch)].__name__]
        skeleton = open_skeleton(source, torch.float32)
    if skeleton.get_output_embeddings() is None:
        raise TautError(
            f"{source.name}: {type(skeleton).__name__} has no head over its vocabulary, so there is nothing to "
            "predict. To train compressed parts on the original's outputs, use taut apply --heal"
        )
    positions = position_limit(skeleton.config)
    if positions is not None and spec.length > positions:
        raise TautError(f"length = {spec.length}: {source.name} has {positions} positions")
    plan = make_plan(skeleton, Recipe.load(spec.recipe)) if spec.recipe else None
    methods = [] if plan is None else [step.method for step in plan.steps]
    if spec.carry_memory and not any(isinstance(method, MemoryMethod) and method.carried for method in methods):
        raise TautError(NO_MEMORY)
    if spec.reconstruction and not any(isinstance(method, MemoryMethod) and method.reconstructs for method in methods):
        raise TautError(f"reconstruction = {spec.reconstruction:g}: {NO_COMPRESSOR}")
    return source, masked


def begin(spec: TrainSpec, source: Source, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> PreTrainedModel:
    """The model before its first step, float32, with the recipe applied.

    A scratch model whose vocabulary size is not given gets that of the tokenizer. Its trainable parts start as their
    method initialises them, not as fits to random weights. Raises TautError for a vocabulary smaller than that of the
    tokenizer.
    """
    if source.scratch is not None:
        source = _fitted_to(source, tokenizer)
    vocabulary = source.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise TautError(f"{source.name}: a vocabulary of {vocabulary}, but the tokenizer has {len(tokenizer)} entries")
    if not spec.recipe:
        return open_model(source, torch.float32, seed=spec.seed)
    # Planned again, because only now the vocabulary and the tokenizer of the run are known.
    prepared = prepare(source, Recipe.load(spec.recipe), dtype=torch.float32, tokenizer=tokenizer)
    model = compress(prepared, texts, seed=spec.seed)
    if source.scratch is not None:
        torch.manual_seed(spec.seed)
        _start_parts(model)
    return model


def resumed(checkpoint: Path) -> PreTrainedModel:
    """Open the model of a checkpoint, float32."""
    return open_model(Source(checkpoint.name, checkpoint), torch.float32)


def _fitted_to(source: Source, tokenizer: PreTrainedTokenizerBase) -> Source:
    config = source.config
    if "vocab_size=" not in source.name:
        config.get_text_config().vocab_size = len(tokenizer)
    for name in TOKENS:
        setattr(config, name, getattr(tokenizer, name))
    return replace(source, scratch=config)


def _start_parts(model: PreTrainedModel) -> None:
    """Initialise parts with the ``build`` of their method. Parts with codes, which are not trained, stay as fitted."""
    for step in steps_of(model):
        if isinstance(step.method, PartMethod):
            part = model.get_submodule(step.site.path)
            initial = step.method.build(step.site, torch.device("cpu"), part.dtype)
            if all(tensor.is_floating_point() for tensor in initial.state_dict().values()):
                part.load_state_dict(initial.state_dict())
