"""The ledger: whole or nothing, never edited, one runner a trial."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from sample_records import record, spec

from taut.core.errors import TautError
from taut.core.record import Quantity
from taut.core.spec import TrialSpec
from taut.studies.ledger import Ledger


def test_a_record_comes_back_equal(tmp_path: Path) -> None:
    ledger, written = Ledger(tmp_path / "runs" / "one"), record()
    path = ledger.write(written)
    assert ledger.records() == [written]
    assert ledger.has(written.id)
    assert path.name == f"{written.id}.json"
    assert [one.name for one in ledger.path.iterdir()] == [path.name], "no draft may stay"


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "nothing")
    assert (ledger.records(), ledger.damaged(), ledger.has("ab")) == ([], [], False)
    assert not ledger.path.exists(), "reading creates nothing"


def test_records_are_never_overwritten(tmp_path: Path) -> None:
    ledger, written = Ledger(tmp_path), record()
    path = ledger.write(written)
    before = path.read_bytes()
    with pytest.raises(TautError, match=f"{written.id}.*none is overwritten"):
        ledger.write(record(seconds=9.0))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOF"),
        (b'{"id": "abc", "tr', "EOF"),
        (b"\xff\xfe\x00", "not text"),
        (b"[1, 2]", "object"),
        (b"{}", "id: Field required"),
    ],
)
def test_damaged_records_are_named_and_kept(tmp_path: Path, content: bytes, reason: str) -> None:
    ledger, good = Ledger(tmp_path), record()
    ledger.write(good)
    bad = tmp_path / "0123456789abcdef.json"
    bad.write_bytes(content)
    assert ledger.records() == [good]
    ((path, why),) = ledger.damaged()
    assert path == bad
    assert reason in why
    assert not ledger.has("0123456789abcdef")
    assert bad.read_bytes() == content


def test_a_newer_version_is_damaged_and_not_guessed_at(tmp_path: Path) -> None:
    written = json.loads(record().model_dump_json()) | {"version": 2}
    (tmp_path / f"{written['id']}.json").write_text(json.dumps(written))
    assert "version" in Ledger(tmp_path).damaged()[0][1]


def test_a_renamed_record_is_damaged(tmp_path: Path) -> None:
    path = Ledger(tmp_path).write(record())
    path.rename(tmp_path / "other.json")
    assert "other but holds" in Ledger(tmp_path).damaged()[0][1]


def test_a_damaged_record_is_written_again_beside_itself(tmp_path: Path) -> None:
    ledger, again = Ledger(tmp_path), record()
    broken = tmp_path / f"{again.id}.json"
    broken.write_text("{")
    assert ledger.write(again).name == f"{again.id}-2.json"
    assert ledger.records() == [again]
    assert broken.read_text() == "{"
    with pytest.raises(TautError):
        ledger.write(again)


def test_a_record_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    bad = record(costs={"latency_prefill": Quantity(value=1.0, unit="s", how="", samples=(float("nan"),))})
    with pytest.raises(TautError, match="latency_prefill"):
        Ledger(tmp_path).write(bad)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TautError, match="a ledger is a folder"):
        Ledger(tmp_path / "file")
    with pytest.raises(TautError, match="cannot write"):
        Ledger(tmp_path / "file" / "below").write(record())


def test_a_lease_keeps_others_out_until_it_is_given_back(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    with first.lease("ab") as mine:
        assert mine is None
        with second.lease("ab") as holder:
            assert str(os.getpid()) in holder
        with second.lease("cd") as other:
            assert other is None
        assert (tmp_path / "ab.lease").exists(), "who is refused must not remove the lease of another"
    with second.lease("ab") as holder:
        assert holder is None
    assert not list(tmp_path.iterdir())


def test_a_lease_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Ledger(tmp_path).lease("ab"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def lease_of(pid: int, start: float, host: str | None = None) -> str:
    return json.dumps({"pid": pid, "host": host or socket.gethostname(), "start": start})


def test_the_lease_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time; from taut.studies.ledger import Ledger\n"
        "with Ledger(sys.argv[1]).lease('ab'): print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as child:
        child.stdout.read(1)
        with Ledger(tmp_path).lease("ab") as holder:
            assert str(child.pid) in holder
        child.kill()
        child.wait()
    assert (tmp_path / "ab.lease").exists()
    with Ledger(tmp_path).lease("ab") as holder:
        assert holder is None


def test_a_process_id_used_again_does_not_hold_a_lease(tmp_path: Path) -> None:
    me = psutil.Process()
    (tmp_path / "ab.lease").write_text(lease_of(me.pid, me.create_time() - 1000))
    with Ledger(tmp_path).lease("ab") as holder:
        assert holder is None


@pytest.mark.parametrize(("off", "held"), [(0.9, True), (-0.9, True), (1.1, False), (-1.1, False)])
def test_a_start_within_a_second_is_the_same_process(tmp_path: Path, off: float, held: bool) -> None:
    me = psutil.Process()
    (tmp_path / "ab.lease").write_text(lease_of(me.pid, me.create_time() + off))
    with Ledger(tmp_path).lease("ab") as holder:
        assert holder == (f"process {me.pid} on this machine" if held else None)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"pid": 1}', '{"pid": "x", "host": "h", "start": 0}'])
@pytest.mark.parametrize(("age", "held"), [(5.0, True), (15.0, False)])
def test_an_unreadable_lease_counts_for_ten_seconds(tmp_path: Path, text: str, age: float, held: bool) -> None:
    path = tmp_path / "ab.lease"
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)
    with Ledger(tmp_path).lease("ab") as holder:
        assert holder == ("a runner that is just starting" if held else None)
    assert path.exists() == held


def test_records_come_oldest_first(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for seed, day in ((0, 3), (1, 1), (2, 2)):
        ledger.write(record(spec(seed=seed), started=f"2026-01-0{day}"))
    assert [one.seed for one in ledger.records()] == [1, 2, 0]


def test_the_third_file_of_a_trial_and_drafts(tmp_path: Path) -> None:
    ledger, again = Ledger(tmp_path), record()
    for name in (f"{again.id}.json", f"{again.id}-2.json", ".hidden.json"):
        (tmp_path / name).write_text("{")
    assert ledger.write(again).name == f"{again.id}-3.json"
    assert [path.name for path, _ in ledger.damaged()] == [f"{again.id}-2.json", f"{again.id}.json"]
    (tmp_path / f"{again.id}-3.json").rename(tmp_path / f"{again.id}-x.json")
    assert not ledger.has(again.id)


def test_a_lease_of_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / "ab.lease").write_text(lease_of(1, 0.0, "elsewhere"))
    with Ledger(tmp_path).lease("ab") as holder:
        assert "elsewhere" in holder
    assert (tmp_path / "ab.lease").exists()


def test_an_empty_lease_is_respected_only_while_it_is_fresh(tmp_path: Path) -> None:
    path = tmp_path / "ab.lease"
    path.touch()
    with Ledger(tmp_path).lease("ab") as holder:
        assert "starting" in holder
    os.utime(path, (0, 0))
    with Ledger(tmp_path).lease("ab") as holder:
        assert holder is None


def test_ids_ignore_names_and_limits_and_nothing_else() -> None:
    base = spec("a", {"embedding": {"method": "low_rank", "keep": 0.5}})
    same = (
        {"recipe_name": "b"},
        {"study": "other"},
        {"study_digest": "ff"},
        {"ram": 1},
        {"seconds": 1.0},
        {"expect": "failed"},
    )
    other = (
        {"recipe": {"embedding": {"method": "low_rank", "keep": 0.25}}},
        {"model": "another"},
        {"model_digest": "ff"},
        {"seed": 1},
        {"tasks": ({"name": "docs_retrieval", "limit": 5},)},
        {"measure": {"latency": {"batch": 2}}},
        {"device": "cuda"},
        {"dtype": "bfloat16"},
        {"text": "my.txt"},
        {"heal": 200},
        {"heal": 300},
    )
    assert set(TrialSpec.model_fields) == {name for change in (*same, *other) for name in change}
    assert {base.model_copy(update=change).id for change in same} == {base.id}
    ids = {base.model_copy(update=change).id for change in other}
    assert len(ids) == len(other)
    assert base.id not in ids


def test_text_and_healing_count_only_with_a_recipe() -> None:
    changes = ({"text": "my.txt"}, {"heal": 200}, {"text": "my.txt", "heal": 200})
    assert {spec("dense", **change).id for change in changes} == {spec("dense").id}
    recipe = {"embedding": {"method": "low_rank"}}
    assert len({spec("a", recipe, **change).id for change in changes} | {spec("a", recipe).id}) == 4


@pytest.mark.parametrize(
    ("recipe", "fields", "text"),
    [
        (
            {},
            {"text": "my.txt", "heal": 5},
            '{"device": "cpu", "dtype": "float32", "measure": {}, "model": "minilm", "model_digest": null, '
            '"recipe": {}, "seed": 0, "tasks": []}',
        ),
        (
            {"embedding": {"method": "low_rank", "keep": 0.5}},
            {"text": "my.txt", "heal": 5, "seed": 3, "model_digest": "ff", "measure": {"memory": True}},
            '{"device": "cpu", "dtype": "float32", "heal": 5, "measure": {"memory": true}, "model": "minilm", '
            '"model_digest": "ff", "recipe": {"embedding": {"keep": 0.5, "method": "low_rank"}}, "seed": 3, '
            '"tasks": [], "text": "my.txt"}',
        ),
    ],
)
def test_an_id_is_the_hash_of_what_decides_the_outcome(recipe: dict, fields: dict, text: str) -> None:
    """Ledgers written earlier stay valid only as long as this text stays the same."""
    assert spec("a", recipe, tasks=(), **fields).id == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_record_of_a_spec_repeats_it() -> None:
    recipe = {"embedding": {"method": "low_rank", "keep": 0.5}}
    trial = spec("a", recipe, seed=3, heal=5, text="my.txt", expect="failed", study_digest="ff")
    made = trial.record("failed", reason="why")
    expected = {
        **{"id": trial.id, "study": "sample", "study_digest": "ff", "trial": "minilm · a · seed 3", "model": "minilm"},
        **{"recipe_name": "a", "recipe": recipe, "seed": 3, "text": "my.txt", "heal": 5, "status": "failed"},
        **{"expect": "failed", "reason": "why"},
        # Of the recipe alone, with sorted keys.
        "recipe_digest": hashlib.sha256(b'{"embedding": {"keep": 0.5, "method": "low_rank"}}').hexdigest()[:16],
    }
    assert {name: getattr(made, name) for name in expected} == expected


def test_an_id_is_the_same_in_every_process() -> None:
    code = "from sample_records import spec; print(spec().id)"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert process.stdout.strip() == spec().id
