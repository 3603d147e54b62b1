"""The shell completes commands and values, without importing torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_early_errors import RUN

ASK = ("--show-completion", "bash")
TASKS = ["agreement", "classify", "docs_retrieval", "key_value_recall", "loss_by_position", "multiple_choice"]


def completions(words: str, models: Path) -> list[str]:
    """What bash is told for the last of ``words``, which may be empty."""
    asked = {"_TAUT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("cli.main()", "sys.argv[0] = 'taut'; cli.main()")],
        capture_output=True,
        text=True,
        env={**os.environ, **asked, "TAUT_MODELS": str(models)},
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("taut ev", ["evaluate"]),
        ("taut methods ", ["embedding", "linear", "attention", "memory"]),
        ("taut check linear.block", ["linear.block_dense", "linear.block_shuffle"]),
        ("taut check block", ["block_dense", "block_shuffle"]),
        ("taut check low_b", []),
        ("taut evaluate min", ["minilm", "mine"]),
        ("taut evaluate mine --task ", [*TASKS, "perplexity", "sts"]),
        ("taut evaluate mine --task sts --data sts", ["stsb", "sts12", "sts13", "sts14"]),
        ("taut evaluate mine --task sts --dtype f", ["float32", "float16", "float64"]),
        ("taut plan mine table_int", ["table_int4", "table_int8"]),
        ("taut compare mine --recipes li", ["light", "linears_int8"]),
    ],
)
def test_words_are_completed(tmp_path: Path, words: str, expected: list[str]) -> None:
    for name in ("mine", "unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "config.json").touch()
    assert sorted(completions(words, tmp_path)) == sorted(expected)


def test_a_script_for_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("cli.main()", "sys.argv[0] = 'taut'; cli.main()"), *ASK],
        capture_output=True,
        text=True,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert done.stderr == ""
    assert "_TAUT_COMPLETE=complete_bash" in done.stdout
