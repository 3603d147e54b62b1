"""The command line: every verb, its --json, and what wrong input gets."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from folders import tiny_folder

from taut import cli

Run = Callable[..., tuple[int, str, str]]
LIGHT = {"embedding": {"method": "low_bit"}, "feedforward": {"method": "low_rank", "rank": 8}}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["taut", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "light.yaml"
    path.write_text(yaml.safe_dump(LIGHT))
    return path


def last(out: str) -> dict:
    return json.loads(out.strip().splitlines()[-1])


def test_help_needs_no_torch() -> None:
    code = "import sys; from taut import cli; sys.argv = ['taut', '--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "print(sorted(name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "compare" in done.stdout


def test_import_taut_needs_no_torch() -> None:
    code = "import sys, taut; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("first", ["import taut, transformers", "import transformers, taut"])
def test_registration_in_either_order(first: str) -> None:
    code = first + "\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('taut' in m)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


def test_version(run: Run) -> None:
    assert run("--version")[1].startswith("taut ")


def test_methods(run: Run) -> None:
    code, out, _ = run("methods", "--json")
    assert code == 0
    rows = {row["id"]: row for row in last(out)["methods"]}
    assert "embedding.low_bit" in rows
    assert all(row["source"] and row["summary"] for row in rows.values())
    assert "linear.low_rank" in run("methods", "linear")[1].replace("\n", "")


def test_plan_apply_show_export(run: Run, llama: Path, light: Path, tmp_path: Path) -> None:
    code, out, _ = run("plan", llama, light, "--json")
    plan = last(out)
    assert code == 0
    assert plan["after"]["bytes"] < plan["before"]["bytes"]
    assert "not touched" in run("plan", llama, light)[1]
    code, out, _ = run("apply", llama, light, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert last(out)["compressed"]
    assert last(run("show", tmp_path / "out", "--json")[1])["recipe"] == LIGHT
    assert "compressed by taut" in run("show", tmp_path / "out")[1].replace("\n", " ")
    code, out, _ = run("export", tmp_path / "out", "--dense", "--out", tmp_path / "dense", "--json")
    assert (code, last(out)["not_merged"]) == (0, [])
    assert not last(run("show", tmp_path / "dense", "--json")[1])["compressed"]


def test_evaluate(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    data = tmp_path / "words.txt"
    code, out, err = run("evaluate", llama, "--task", "perplexity", "--data", data, "--option", "limit=2", "--json")
    assert code == 0, err
    scores = last(out)["scores"]
    assert scores[0]["quantity"]["value"] > 1
    assert scores[0]["baselines"]


def test_measure(run: Run, llama: Path) -> None:
    words = ("measure", llama, "--length", 16, "--decode", 2, "--repeats", 2, "--threads", 1, "--json")
    code, out, err = run(*words)
    assert code == 0, err
    quantities = last(out)["quantities"]
    assert quantities["file_bytes"]["value"] >= quantities["stored_bytes"]["value"] > 0
    assert quantities["latency_decode"]["value"] > 0
    assert len(quantities["latency_prefill"]["samples"]) == 2


def test_compare_and_report(
    run: Run, llama: Path, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("compare", llama, "--recipes", light, "--ledger", tmp_path / "runs", "--report", tmp_path / "a.html")
    words += ("--task", "perplexity")
    code, out, err = run(*words, "--json")
    assert code == 0, err
    assert len(last(out)["ran"]) == 3
    page = (tmp_path / "a.html").read_text()
    assert "light" in page
    code, out, err = run(*words, "--json")
    assert (code, len(last(out)["ran"]), len(last(out)["skipped"])) == (0, 0, 3)
    code, out, err = run("report", tmp_path / "runs", "--out", tmp_path / "b.html", "--json")
    assert code == 0, err
    assert (tmp_path / "b.html").exists()


def test_run_imports_taut(run: Run, llama: Path, light: Path, tmp_path: Path) -> None:
    run("apply", llama, light, "--out", tmp_path / "out")
    code = (
        f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'out')!r}); print('ok')"
    )
    exit_code, out, err = run("run", "--", sys.executable, "-c", code)
    assert (exit_code, out.strip().splitlines()[-1]) == (0, "ok"), err
    assert run("run", "--", sys.executable, "-c", "import sys; sys.exit(7)")[0] == 7


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("plan", "{llama}", "nowhere.yaml"), "no such recipe file"),
        (("plan", "{llama}", "{bad}"), "did you mean 'feedforward'"),
        (("apply", "{llama}", "{light}", "--out", "{llama}"), "not an empty folder"),
        (("show", "{empty}"), "no config.json"),
        (("evaluate", "{llama}", "--task", "perplxity"), "did you mean 'perplexity'"),
        (("evaluate", "{llama}", "--task", "perplexity", "--data", "nowhere.txt"), "nowhere.txt"),
        (("evaluate", "{llama}", "--task", "perplexity", "--option", "limit"), "key=value"),
        (("compare", "{bad}"), "bad.yaml"),
        (("check", "embedding.lowbit"), "did you mean 'low_bit'"),
        (("check", "embedding.low_bit", "--family", "lama"), "did you mean 'llama'"),
        (("report", "{empty}/nothing"), "nothing"),
        (("run", "--", "no-such-command-anywhere"), "no such command"),
        (("apply", "{llama}", "{light}", "--out", "x", "--dtype", "float33"), "float33"),
        (("export", "{llama}", "--dense", "--out", "x"), "not compressed"),
    ],
)
def test_wrong_input(
    run: Run, llama: Path, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad.yaml"
    bad.write_text("feedforwrd: {method: low_bit}\n")
    filled = [word.format(llama=llama, light=light, bad=bad, empty=tmp_path / "empty") for word in words]
    code, out, err = run(*filled)
    assert code == 2
    assert expected in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.yaml", "empty"]
    if words[0] != "run":
        code, out, _ = run(*filled, "--json")
        assert (code, expected in last(out)["error"]) == (2, True)
