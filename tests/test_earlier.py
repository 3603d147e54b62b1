"""What earlier versions wrote still opens: folders, ledgers, training records, prefixes, indexes. Their keys do not."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import taut
from taut.contract.tiny import inputs, logits
from taut.core.errors import TautError
from taut.core.spec import TrialSpec
from taut.generation.prefix import Prefix
from taut.methods.part import LinearPart
from taut.reporting.page import write
from taut.retrieval.index import Index
from taut.studies.ledger import Ledger
from taut.studies.protocol import summary
from taut.studies.study import Study
from taut.training.run import train
from taut.training.spec import TrainSpec

EARLIER = Path(__file__).parent / "fixtures" / "earlier"
STUDIES = Path(__file__).parent.parent / "studies" / "records"
CLASSES = {
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}
SMALL = {"model": "llama:hidden_size=16", "text": "builtin", "budget": {"steps": 1}}


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.filterwarnings("ignore:taut. tuned on")
def test_a_folder_opens_and_answers_as_it_did(family: str) -> None:
    model = CLASSES[family].from_pretrained(EARLIER / "models" / family).eval()
    answer = load_file(EARLIER / "answers.safetensors")[family]
    assert (logits(model, **inputs(model)) - answer).abs().max() < 1e-4
    assert taut.show(EARLIER / "models" / family)["compressed"]


def test_what_was_called_calibrated_is_tuned(tmp_path: Path) -> None:
    shown = taut.show(EARLIER / "models" / "llama")
    assert shown["tuned"]["processor"] == "another processor"
    assert shown["healed"]["steps"] == 2
    with pytest.warns(UserWarning, match="tuned on another processor"):
        model = taut.load(EARLIER / "models" / "llama")
    assert not any(part.dense_ranges for part in model.modules() if isinstance(part, LinearPart))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["tuned"] == shown["tuned"]
    assert "calibrated" not in written


def test_a_ledger_opens_and_is_drawn(tmp_path: Path) -> None:
    ledger = Ledger(EARLIER / "ledger")
    assert ledger.damaged() == []
    records = ledger.records()
    assert [record.status for record in records].count("failed") == 1
    assert all("compress_seconds" in record.costs for record in records if record.status == "done")
    assert not any("tighten_seconds" in record.costs for record in records)
    assert {row.recipe_name for row in summary(records)} == {"dense", "identity", "int8", "healed int8", "no cache"}
    assert "healed int8" in write(ledger, tmp_path / "report.html").read_text()


@pytest.mark.parametrize("folder", [path.name for path in sorted(STUDIES.iterdir())])
def test_committed_ledgers_open(folder: str) -> None:
    ledger = Ledger(STUDIES / folder)
    assert ledger.damaged() == []
    assert any("compress_seconds" in record.costs for record in ledger.records())


def test_trials_keep_their_ids() -> None:
    """Otherwise an earlier ledger would be run again. Written down from the earlier version."""
    spec = TrialSpec(
        study="s",
        model="minilm",
        recipe_name="r",
        recipe={"embedding": {"method": "low_bit", "bits": 4}},
        heal=3,
        text="wikitext2:train",
        tasks=({"name": "docs_retrieval", "limit": 5},),
        measure={"latency": {"length": 16}, "memory": True},
        seed=2,
        ram=5,
    )
    assert spec.id == "6a31fa16a622c2b2"
    dense = TrialSpec(study="s", model="minilm", recipe_name="dense", recipe={}, tasks=({"name": "sts"},))
    assert dense.id == "e152e93277f035e2"


def test_a_finished_training_run_is_recognised(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "trained", tmp_path / "trained")
    spec = json.loads((EARLIER / "trained" / "training.json").read_text())["spec"]
    assert spec.pop("lanes") is True
    spec |= {"carry_memory": True, "budget": {"steps": 2}}
    done = train(spec, tmp_path / "trained")
    assert (done.status, done.record["spec"]["lanes"]) == ("done", True)
    with pytest.raises(TautError, match="carry_memory was True, now False"):
        train(spec | {"carry_memory": False}, tmp_path / "trained")
    assert AutoModel.from_pretrained(tmp_path / "trained").config.hidden_size == 16


def test_a_prefix_and_an_index_open() -> None:
    model = taut.load(EARLIER / "models" / "gpt2")
    prefix = Prefix.load(EARLIER / "prefix.safetensors", model)
    assert len(prefix.ids) == 12
    index = Index.load(EARLIER / "index")
    hits = taut.search(index, ["one two"], 1, model=EARLIER / "models" / "bert")
    assert hits[0][0]["id"] in range(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrainSpec.parse(SMALL | {"lanes": True}), "the key 'lanes' is now called 'carry_memory'"),
        (
            lambda: Study.parse({"models": ["m"], "recipes": {}, "limits": {"memory": "8GB"}}),
            "the key 'memory' is now called 'ram'",
        ),
    ],
)
def test_an_earlier_key_names_the_new_word(call: object, message: str) -> None:
    with pytest.raises(TautError, match=message):
        call()
