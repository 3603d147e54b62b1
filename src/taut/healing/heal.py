"""Healing: what a recipe installed learns, on unlabelled text, to answer as the original did.

Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) of last hidden states and logits at temperature 1.
Changed: nothing but the new parts learns unless asked, and the rate of a tensor is relative to its size and to how far
its part is from the original.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
"""Batches that judge the result."""
RUN = "run.json"
"""What a folder of checkpoints belongs to."""


def heal(
    model: PreTrainedModel,
    original: PreTrainedModel,
    texts: Iterable[str] = (),
    choices: "int | dict[str, Any] | Healing" = 200,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batches: Sequence[dict[str, Tensor]] = (),
    text: str = "given",
    state: str | Path | None = None,
    seconds: float = 30.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train what was installed in ``model``, in place, to answer as ``original``; returns what its config records.

    ``texts`` need the ``tokenizer``; or give ``batches`` of model inputs. ``text`` is what the record calls them.
    ``choices``: a number of steps, or a Healing. The loss is measured before and after, on batches that nothing was
    learned from where there is text for that; what was fitted is put back when healing did not lower it (``kept``).

    With the folder ``state`` a run that was cut off goes on there to the bits it would have had, a checkpoint every
    ``seconds`` (0: after every step); the folder is removed at the end.

    The model computes in float32 meanwhile and has its dtypes back afterwards; both models end in evaluation mode. When
    anything fails the model is as before. Once more than the parts has learned, ``taut.undo`` is refused. Raises
    TautError when the model is not compressed, when nothing in it can learn, for too little text, and when ``state``
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
    # A file is called by its name alone: a checkpoint holds no path of the machine it was made on.
    text = Path(text).name if Path(text).is_file() else text
    facts: dict[str, Any] = {"steps": chosen.steps, "seed": chosen.seed, "text": text}
    facts |= {"target": "+".join(targets), "train": chosen.train, "by": chosen.by}
    known = model.hf_quantizer.quantization_config
    belongs = {"recipe": known.recipe, "original": known.original, "batches": _digest(batches)}
    run = facts | chosen.model_dump() | belongs
    if chosen.by == "layer":
        blocks_of(original)
    original.eval()
    comparison = Comparison(model, original, batches, targets)
    learned, held = _split(len(batches))
    with _state(state, run) as folder:
        facts["loss_first"] = comparison.mean(held)
        fitted = Snapshot(learners(model, original, chosen.train))
        with unpacked(model, original, chosen.train, chosen.rank, chosen.seed) as trained:
            if chosen.by == "layer":
                own = [batches[number] for number in learned]
                heal_by_layer(model, original, own, trained, chosen, folder, seconds, progress)
            else:
                task = Distillation(comparison, trained, learned, chosen.seed)
                train(task, optimizer(trained, chosen.learning_rate), chosen, folder, seconds, progress)
        facts["loss_last"] = comparison.mean(held)
    facts["kept"] = facts["loss_last"] <= facts["loss_first"]
    if not facts["kept"]:
        fitted.put_back()
    elif chosen.train != "parts":
        surgery_of(model).reversible = False
    known.healed = facts
    return facts


def compress_and_heal(
    prepared: Prepared,
    texts: Iterable[str],
    choices: "int | dict[str, Any] | Healing",
    *,
    device: str = "cpu",
    seed: int = 0,
    text: str = "given",
    state: str | Path | None = None,
    progress: Progress | None = None,
    healing: Progress | None = None,
) -> PreTrainedModel:
    """``surgery.apply.compress``, then ``heal`` on the same texts, beside a second copy of the original.

    ``seed`` counts for both unless ``choices`` has its own. The text is checked before any weight is read. Raises
    TautError as the two do, and for a source without a tokenizer.
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
    # Healing by layer is for models of which two do not fit: the second one stays on disk.
    place = "disk" if chosen.by == "layer" else device
    original = open_model(prepared.source, prepared.skeleton.dtype, place, seed)
    heal(model, original, choices=chosen, batches=batches, text=text, state=state, progress=healing)
    return model


def _split(count: int) -> tuple[range, range]:
    """Which batches are learned from, and which judge the result: others where there is enough text."""
    held = min(HELD, count // 8)
    return range(held, count), range(held or min(HELD, count))


def _targets(
    model: PreTrainedModel, original: PreTrainedModel, target: str, batch: dict[str, Tensor]
) -> tuple[str, ...]:
    """What is imitated, with ``auto`` settled. Raises TautError for logits or labels of a model that has none."""
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
    """Whether any of its tokens is kept from seeing later ones: then a mean over tokens is no vector of the text."""
    return any(site.causal for site in locate(model).sites if isinstance(site, AttentionSite))


def _digest(batches: Sequence[dict[str, Tensor]]) -> str:
    """A hash of all inputs: a checkpoint is only good for the same text in the same order."""
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            total.update(name.encode() + batch[name].cpu().numpy().tobytes())
    return total.hexdigest()


@contextmanager
def _state(folder: str | Path | None, run: dict[str, Any]) -> Iterator[Path]:
    """Where checkpoints lie: ``folder``, kept when the block fails, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="taut-") as temporary:
            yield Path(temporary)
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    known = path / RUN
    if known.is_file() and json.loads(known.read_text()) != run:
        other = json.loads(known.read_text())
        change = next(key for key in {**other, **run} if other.get(key) != run.get(key))
        raise TautError(
            f"{path}: holds another healing run ({change} {other.get(change)!r}, now {run.get(change)!r}); remove it "
            "to start anew"
        )
    known.write_text(json.dumps(run, sort_keys=True))
    yield path
    shutil.rmtree(path)
