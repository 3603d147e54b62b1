"""Healing: train the parts that a recipe installed, on unlabelled text, to give the outputs of the original.

Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) of last hidden states and logits at temperature 1.
Changed: by default only the new parts are trained. The learning rate of a tensor is relative to its size and to the
distance of its part from the original.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.architectures.locate import locate
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.site import AttentionSite
from taut.healing.batches import predicts_masked, text_batches
from taut.healing.distil import Comparison, Distillation
from taut.healing.layerwise import blocks_of, heal_by_layer
from taut.healing.losses import parse_targets
from taut.healing.settings import Healing
from taut.healing.trainer import optimizer, train
from taut.healing.unpack import Snapshot, learners, unpacked
from taut.surgery.apply import compress, surgery_of
from taut.surgery.loading import open_model
from taut.surgery.prepare import Prepared

HELD = 8
"""The most batches that measure the result."""
RUN = "run.json"
"""The file that says which run a folder of checkpoints belongs to."""


def heal(
    model: PreTrainedModel,
    original: PreTrainedModel,
    texts: Iterable[str] = (),
    choices: "int | Mapping[str, Any] | Healing" = 200,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batches: Sequence[dict[str, Tensor]] = (),
    text: str = "given",
    state: str | Path | None = None,
    seconds: float = 30.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the parts installed in ``model``, in place, to give the outputs of ``original``. Return what is recorded.

    Give ``texts`` and their ``tokenizer``, or ``batches`` of model inputs. ``text`` is their name in the record, which
    the model's config keeps. ``choices``: a number of steps, or a Healing. The loss is measured before and after, on
    held-out batches if there is enough text. If healing raises it, the fitted values are restored (``kept`` is False).

    With the folder ``state``, an interrupted run continues there and reaches the same bits. A checkpoint is written
    every ``seconds`` (0: after every step). The folder is removed at the end.

    The model computes in float32 during healing and has its dtypes back afterwards. Both models end in evaluation mode.
    After a failure the model is as before. Once more than the parts was trained, ``taut.undo`` is refused. Raises
    TautError if the model is not compressed, if nothing in it can be trained, for too little text, and if ``state``
    belongs to another run.
    """
    chosen = Healing.parse(choices)
    surgery_of(model)
    if chosen.steps == 0:
        return {}
    if not batches:
        if tokenizer is None:
            raise TautError("heal: give texts and their tokenizer=, or batches= of model inputs")
        batches = text_batches(tokenizer, texts, model, size=chosen.batch, length=chosen.length, seed=chosen.seed)
    targets = _targets(model, original, chosen.target, batches[0])
    # Only the name of a file is recorded, so that a checkpoint holds no path of this machine.
    text = Path(text).name if Path(text).is_file() else text
    facts: dict[str, Any] = {"steps": chosen.steps, "seed": chosen.seed, "text": text}
    facts |= {"target": "+".join(targets), "train": chosen.train, "by": chosen.by}
    config = model.hf_quantizer.quantization_config
    belongs = {"recipe": config.recipe, "original": config.original, "batches": _digest(batches)}
    run = facts | chosen.model_dump() | belongs
    if chosen.by == "layer":
        blocks_of(original)
    original.eval()
    comparison = Comparison(model, original, batches, targets)
    learned, held_out = _split(len(batches))
    with _state(state, run) as folder:
        facts["loss_first"] = comparison.mean(held_out)
        fitted = Snapshot(learners(model, original, chosen.train))
        with unpacked(model, original, chosen.train, chosen.rank, chosen.seed) as trained:
            if chosen.by == "layer":
                training = [batches[number] for number in learned]
                heal_by_layer(model, original, training, trained, chosen, folder, seconds, progress)
            else:
                task = Distillation(comparison, trained, learned, chosen.seed)
                train(task, optimizer(trained, chosen.learning_rate), chosen, folder, seconds, progress)
        facts["loss_last"] = comparison.mean(held_out)
    facts["kept"] = facts["loss_last"] <= facts["loss_first"]
    if not facts["kept"]:
        fitted.put_back()
    elif chosen.train != "parts":
        surgery_of(model).reversible = False
    config.healed = facts
    return facts


def compress_and_heal(
    prepared: Prepared,
    texts: Iterable[str],
    choices: "int | Mapping[str, Any] | Healing",
    *,
    device: str = "cpu",
    seed: int = 0,
    text: str = "given",
    state: str | Path | None = None,
    progress: Progress | None = None,
    healing: Progress | None = None,
) -> PreTrainedModel:
    """Compress a model (``surgery.apply.compress``), then ``heal`` it on the same texts with a copy of the original.

    ``seed`` applies to both unless ``choices`` has its own. The text is checked before any weight is read. Raises
    TautError as both functions do, and for a source without a tokenizer.
    """
    chosen = Healing.parse(choices, seed)
    if not chosen.steps:
        return compress(prepared, texts, device=device, seed=seed, progress=progress)
    texts = list(texts)
    tokenizer = prepared.tokenizer()
    if tokenizer is None:
        raise TautError(f"{prepared.source.name}: no tokenizer there, and healing needs one")
    sizes = {"size": chosen.batch, "length": chosen.length, "seed": chosen.seed}
    batches = text_batches(tokenizer, texts, prepared.skeleton, **sizes)
    model = compress(prepared, texts, device=device, seed=seed, progress=progress)
    # Healing by layer is for models that do not fit into memory twice, so the original stays on disk.
    place = "disk" if chosen.by == "layer" else device
    original = open_model(prepared.source, prepared.dtype, place, seed)
    heal(model, original, choices=chosen, batches=batches, text=text, state=state, progress=healing)
    return model


def _split(count: int) -> tuple[range, range]:
    """Which batches to train on, and which to measure the result on: different ones if there is enough text."""
    held = min(HELD, count // 8)
    return range(held, count), range(held or min(HELD, count))


def _targets(
    model: PreTrainedModel, original: PreTrainedModel, target: str, batch: dict[str, Tensor]
) -> tuple[str, ...]:
    """The targets, with ``auto`` resolved. Raises TautError for logits or labels of a model that has none."""
    inputs = {name: tensor[:1].to(model.device) for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).get("logits")
    if target == "auto":
        if logits is not None:
            return ("hidden", "logits")
        return ("hidden",) if _causal(original) else ("hidden", "vectors")
    chosen = parse_targets(target)
    if logits is None and {"logits", "labels"} & set(chosen):
        raise TautError(f"heal: target = {target}, but {type(model).__name__} has no head; use hidden or vectors")
    if "labels" in chosen and "labels" not in batch and (logits.dim() != 3 or predicts_masked(model)):
        raise TautError(f"heal: target = {target}, but no labels come with the text of {type(model).__name__}")
    return chosen


def _causal(model: PreTrainedModel) -> bool:
    """Whether some attention is causal. Then a mean over tokens does not represent the text."""
    return any(site.causal for site in locate(model).sites if isinstance(site, AttentionSite))


def _digest(batches: Sequence[dict[str, Tensor]]) -> str:
    """A hash of all inputs. A checkpoint is valid only for the same text in the same order."""
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            total.update(name.encode() + batch[name].cpu().numpy().tobytes())
    return total.hexdigest()


@contextmanager
def _state(folder: str | Path | None, run: dict[str, Any]) -> Iterator[Path]:
    """The folder of checkpoints: ``folder``, which stays if the block fails, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="taut-") as temporary:
            yield Path(temporary)
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    file = path / RUN
    if file.is_file() and json.loads(file.read_text()) != run:
        other = json.loads(file.read_text())
        change = next(key for key in {**other, **run} if other.get(key) != run.get(key))
        raise TautError(
            f"{path}: holds another healing run ({change} {other.get(change)!r}, now {run.get(change)!r}); remove it "
            "to start again"
        )
    file.write_text(json.dumps(run, sort_keys=True))
    yield path
    shutil.rmtree(path)
