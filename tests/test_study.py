"""Studies: what is read, what is refused, and which trials come out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taut.core.errors import TautError
from taut.core.recipe import shipped
from taut.studies.study import DENSE, IDENTITY, Study, fingerprint

ROOT = Path(__file__).parent.parent
TEXT = """
name: small
models: [minilm, other]
recipes:
  dense: {}
  halves: {embedding: {method: low_rank, keep: 0.5}}
  fails: {expect: failed, memory: window_sink}
tasks:
  - docs_retrieval
  - {name: sts, limit: 10}
seeds: [0, 1]
measure: {latency: {length: 64, repeats: 6}}
limits: {ram: 8GB, seconds: 30}
"""


def load(tmp_path: Path, text: str = TEXT) -> Study:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return Study.load(path)


def test_a_study_is_models_times_recipes_times_seeds(tmp_path: Path) -> None:
    study = load(tmp_path)
    trials = study.trials()
    assert len(trials) == 2 * 4 * 2
    assert [trial.recipe_name for trial in trials[:8:2]] == ["identity", "dense", "halves", "fails"]
    assert {trial.seed for trial in trials} == {0, 1}
    assert len({trial.id for trial in trials}) == 16
    one = trials[4]
    assert one.recipe == {"embedding": {"method": "low_rank", "keep": 0.5}}
    assert one.tasks == ({"name": "docs_retrieval"}, {"name": "sts", "limit": 10})
    assert one.measure["latency"] == {"batch": 1, "length": 64, "repeats": 6, "threads": None, "decode": 0}
    assert (one.ram, one.seconds, one.study) == (8 * 10**9, 30.0, "small")
    assert {trial.expect for trial in trials if trial.recipe_name == "fails"} == {"failed"}
    assert {trial.study_digest for trial in trials} == {study.digest}


def test_ids_do_not_depend_on_the_process(tmp_path: Path) -> None:
    ids = [trial.id for trial in load(tmp_path).trials()]
    code = "import sys; from taut.studies.study import Study; print(*[t.id for t in Study.load(sys.argv[1]).trials()])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small.yaml")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "11"},
    )
    assert done.stdout.split() == ids


def test_a_study_needs_no_torch() -> None:
    rooms = "taut.studies.study, taut.studies.ledger, taut.studies.runner, taut.reporting.page"
    code = f"import sys; import {rooms}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_dense_and_identity_are_always_there() -> None:
    study = Study.parse({"models": ["minilm"], "recipes": {"halves": {"embedding": {"method": "low_rank"}}}})
    assert [(name, one.recipe) for name, one in study.recipes.items()][:2] == [("dense", DENSE), ("identity", IDENTITY)]


def test_controls_under_other_names_are_not_doubled() -> None:
    study = Study.parse({"models": "minilm", "recipes": {"as it was": None, "control": IDENTITY}})
    assert list(study.recipes) == ["as it was", "control"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [0, 1]", "sead: [0]"), "small.yaml: unknown key 'sead': did you mean 'seeds'"),
        (("length: 64", "lenght: 64"), "small.yaml: measure.latency: unknown key 'lenght': did you mean 'length'"),
        (("length: 64", "length: 0"), r"small.yaml: measure.latency.length = 0: .*greater than or equal to 1"),
        (("8GB", "8 bananas"), "small.yaml: limits.ram = '8 bananas': expected an amount of memory"),
        (("seeds: [0, 1]", "seeds: [zero]"), "small.yaml: seeds.0 = 'zero'"),
        (("models: [minilm, other]", "models: []"), "small.yaml: models"),
        (("models: [minilm, other]", ""), "small.yaml: models: Field required"),
        (("- docs_retrieval", "- doc_retrieval"), "tasks: unknown task 'doc_retrieval': did you mean 'docs_retrieval'"),
        (("- docs_retrieval", "- {limit: 3}"), "tasks: expected a name"),
        (("embedding:", "embeding:"), "recipes.halves: unknown slot 'embeding': did you mean 'embedding'"),
        (
            ("low_rank", "low_rang"),
            "halves: embedding: unknown embedding method 'low_rang': did you mean 'low_rank'",
        ),
        (("keep: 0.5", "keep: 5"), "recipes.halves: embedding: keep = 5 is out of range"),
        (("expect: failed", "expect: fail"), "recipes.fails: expect = 'fail': did you mean 'failed'"),
        (("dense: {}", "dense: {embedding: low_rank}"), "recipes.dense: reserved for {}"),
        (("dense: {}", "halves: {}"), "the key 'halves' is there twice"),
        (("dense: {}", "dense: 3"), "recipes.dense: expected a recipe"),
        (("dense: {}", "more: nowhere.yaml"), "recipes.more: nowhere.yaml: no such recipe file"),
        ((TEXT, "- 1"), "a study is a mapping with models"),
        ((TEXT, "a: [1"), "small.yaml: not readable as YAML"),
    ],
)
def test_wrong_input_names_file_key_and_remedy(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = TEXT.replace(*change)
    assert text != TEXT
    with pytest.raises(TautError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "small.yaml" in str(caught.value)


def test_a_missing_study_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TautError, match=r"none\.yaml: cannot read the study: No such file"):
        Study.load(tmp_path / "none.yaml")


def test_two_trials_with_one_id_are_refused_by_name(tmp_path: Path) -> None:
    study = load(tmp_path, TEXT.replace("dense: {}", "twice: {embedding: {keep: 0.5, method: low_rank}}"))
    with pytest.raises(TautError, match="minilm · twice · seed 0.*minilm · halves · seed 0.*same trial"):
        study.trials()
    with pytest.raises(TautError, match="same trial"):
        load(tmp_path, TEXT.replace("[0, 1]", "[1, 1]")).trials()


def test_recipe_files_lie_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("embedding: {method: low_rank, keep: 0.25}")
    study = load(tmp_path, TEXT.replace("dense: {}", "own: mine.yaml"))
    assert study.recipes["own"].recipe["embedding"]["keep"] == 0.25


def test_what_a_study_is_without_a_word_about_it() -> None:
    study = Study.parse({"models": "m", "measure": {"latency": {}}})
    assert (study.name, study.models, study.seeds, study.tasks) == ("study", ("m",), (0,), ())
    assert (study.text, study.device, study.dtype) == ("builtin", "cpu", "float32")
    assert (study.limits.ram, study.limits.seconds) == (None, None)
    assert study.measure.model_dump() == {
        "latency": {"batch": 1, "length": 128, "repeats": 20, "threads": None, "decode": 0},
        **{"memory": False, "energy": False},
    }
    assert study.recipes["dense"].model_dump() == {"recipe": {}, "expect": "done", "heal": 0}
    assert set(IDENTITY) == {"embedding", "projection", "attention", "feedforward"}


def test_healing_is_part_of_a_trial() -> None:
    recipes = {f"h{heal}": {"embedding": "low_rank", "heal": heal} for heal in (0, 100, 200)}
    trials = {one.recipe_name: one for one in Study.parse({"models": ["m"], "recipes": recipes}).trials()}
    assert [trials[name].heal for name in recipes] == [0, 100, 200]
    assert len({trials[name].id for name in recipes}) == 3
    for wrong in (-1, True, "many", 1.5):
        with pytest.raises(TautError, match="heal"):
            Study.parse({"models": ["m"], "recipes": {"x": {"embedding": "low_rank", "heal": wrong}}})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3", 3),
        ("3b", 3),
        ("3KB", 3e3),
        ("3MB", 3e6),
        ("3GB", 3e9),
        ("3KiB", 3 * 2**10),
        ("3GiB", 3 * 2**30),
        ("3TiB", 3 * 2**40),
    ],
)
def test_every_unit_of_memory(text: str, size: float) -> None:
    assert Study.parse({"models": ["m"], "limits": {"ram": text}}).limits.ram == size
    assert Study.parse({"models": ["m"], "limits": {"ram": 7}}).limits.ram == 7


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("at", [0, 50_000, -1])
def test_a_fingerprint_sees_every_part_of_a_small_file(tmp_path: Path, name: str, at: int) -> None:
    """64 blocks of 4096 bytes overlap in a file of 100,000 bytes, so that one changed byte anywhere shows."""
    content = bytearray(100_000)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    before = fingerprint(str(tmp_path))
    assert len(before) == 16
    content[at] = 1
    (tmp_path / name).write_bytes(content)
    changed = fingerprint(str(tmp_path))
    (tmp_path / name).write_bytes(bytes(100_001))
    longer = fingerprint(str(tmp_path))
    (tmp_path / name).write_bytes(bytes(100_000))
    (tmp_path / name).rename(tmp_path / f"other_{name}")
    assert len({before, changed, longer, fingerprint(str(tmp_path))}) == 4
    assert fingerprint(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 * 2**20), ("1.5gb", 1.5e9), ("100", 100), ("2 TB", 2e12)])
def test_amounts_of_memory(text: str, size: float) -> None:
    assert Study.parse({"models": ["m"], "limits": {"ram": text}}).limits.ram == size


def test_a_model_trained_further_is_another_trial(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 4000)
    study = Study.parse({"models": [str(model)]})
    before = [trial.id for trial in study.trials()]
    assert before == [trial.id for trial in study.trials()]
    (model / "notes.txt").write_text("not part of the model")
    assert before == [trial.id for trial in study.trials()]
    weights.write_bytes(bytes(reversed(range(256))) * 4000)
    assert not set(before) & {trial.id for trial in study.trials()}
    assert fingerprint("minilm") is None


def test_from_arguments(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(f"embedding: {{method: low_rank, rank: {len(name) + ord(name[0])}}}")
    by_file = Study.from_arguments(
        "minilm", [str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")], ["sts"], seeds=[3]
    )
    assert list(by_file.recipes) == ["dense", "identity", "one", "two"]
    assert (by_file.name, by_file.seeds, by_file.tasks) == ("minilm", (3,), ({"name": "sts"},))
    by_folder = Study.from_arguments(["minilm"], [str(tmp_path)], ["sts"], seeds=[3])
    assert [one.id for one in by_folder.trials()] == [one.id for one in by_file.trials()]
    with pytest.raises(TautError, match="did you mean 'light'"):
        Study.from_arguments("minilm", ["ligth"])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.yaml").write_text("embedding: low_rank")
    with pytest.raises(TautError, match="same name 'one'"):
        Study.from_arguments("minilm", [str(tmp_path / "one.yaml"), str(tmp_path / "sub" / "one.yaml")])


def test_narrowed_keeps_the_controls(tmp_path: Path) -> None:
    study = load(tmp_path).narrowed(["halves"], device="cuda", threads=3)
    assert list(study.recipes) == ["identity", "dense", "halves"]
    assert study.device == "cuda"
    assert study.measure.latency.threads == 3
    with pytest.raises(TautError, match="no recipe 'halfs': did you mean 'halves'"):
        study.narrowed(["halfs"])


def test_every_shipped_recipe_is_sound() -> None:
    study = Study.from_arguments("minilm", ["light"])
    assert len(study.trials()) == 2 + sum(path.parent.name == "light" for path in shipped().values())
    assert len(study.trials()) >= 7


def test_the_quickstart_is_sound() -> None:
    trials = Study.load(ROOT / "studies" / "quickstart.yaml").trials()
    assert len({trial.id for trial in trials}) == len(trials) >= 15
    assert [trial.recipe_name for trial in trials if trial.expect == "failed"] == ["cache of an encoder"]
