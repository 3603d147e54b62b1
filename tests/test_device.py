"""Every method on a GPU: its contract there, and that what happens there is what happens on the CPU.

Without a GPU all of this is skipped but the wrong input.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tiny_folder
from runs import LOW_RANK, small

import taut
from taut.contract.case import Case, cases
from taut.contract.checks import CHECKS
from taut.contract.device_checks import DEVICE_CHECKS
from taut.contract.suite import run
from taut.contract.tiny import REPRESENTATIVES
from taut.core.errors import TautError
from taut.core.registry import METHODS
from taut.surgery.loading import check_device
from taut.training.run import train
from taut.training.trainer import Moment

HERE = torch.cuda.is_available()
QUICK = ("bert", "llama")
RECIPES = {
    "dense": {},
    "low rank": LOW_RANK,
    "anchors": {"memory": {"method": "anchor", "every": 5}},
    "relative": {"attention": {"method": "relative"}},
}
need_gpu = pytest.mark.skipif(not HERE, reason="no GPU here")


def jobs() -> list:
    """What is particular to a device, on an encoder and a decoder; the whole contract is for ``make test-all``."""
    if not HERE:
        return []
    params = []
    for case in (case for method in METHODS.built_in() for case in cases(method, REPRESENTATIVES, device="cuda")):
        for name, check in (CHECKS | DEVICE_CHECKS).items():
            quick = name in DEVICE_CHECKS and case.family in QUICK
            if check.obstacle(case) is None:
                marks = () if quick else pytest.mark.full
                params.append(pytest.param(name, case, id=f"{name}-{case.label}", marks=marks))
    return params


@need_gpu
@pytest.mark.parametrize(("check", "case"), jobs())
def test_contract_on_the_device(check: str, case: Case) -> None:
    (CHECKS | DEVICE_CHECKS)[check].run(case)


@pytest.mark.parametrize("method", ["embedding.low_rank", "linear.low_bit", "attention.relative", "memory.anchor"])
@pytest.mark.parametrize("check", DEVICE_CHECKS)
def test_the_checks_run_without_a_gpu(check: str, method: str) -> None:
    """Where the other device is the CPU itself they show nothing, but they cannot rot."""
    DEVICE_CHECKS[check].run(cases(method, ("llama",))[0])


@need_gpu
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_training_there_is_training_here(recipe: dict[str, Any], tmp_path: Path) -> None:
    spec = small(tmp_path, recipe=recipe)
    here, there = (train(spec, tmp_path / kind, device=kind).record["evaluations"] for kind in ("cpu", "cuda"))
    assert [evaluation["loss"] for evaluation in there] == pytest.approx(
        [evaluation["loss"] for evaluation in here], abs=1e-3
    )


@need_gpu
def test_training_there_goes_on_after_an_interruption(tmp_path: Path) -> None:
    spec = small(tmp_path, precision="bfloat16", recipe=RECIPES["anchors"], save={"steps": 2})
    whole = train(spec, tmp_path / "whole", device="cuda").record

    def interrupt(moment: Moment) -> None:
        if moment.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    assert train(spec, tmp_path / "cut", device="cuda", progress=interrupt).status == "interrupted"
    again = train(spec, tmp_path / "cut", device="cuda").record
    assert again["evaluations"][-1]["loss"] == pytest.approx(whole["evaluations"][-1]["loss"], abs=1e-2)


def test_a_device_has_a_name_or_is_one(tmp_path: Path) -> None:
    for device in ("cpu", torch.device("cpu")):
        assert check_device(device) == torch.device("cpu")
        assert taut.load(tiny_folder(tmp_path / str(type(device)), "llama"), device=device).device.type == "cpu"


def test_another_accelerator_is_a_device_but_nothing_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert check_device("mps") == torch.device("mps")
    with pytest.raises(TautError, match="expected cpu or mps or mps:0"):
        check_device("cuda")
    with pytest.raises(TautError, match=r"expected cpu$"):
        check_device("mps", ("cpu", "cuda"))


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
def test_a_device_that_is_not_here(device: str) -> None:
    with pytest.raises(TautError, match="not on this machine; expected cpu"):
        check_device(device)
    with pytest.raises(TautError, match="not on this machine; expected cpu"):
        run("embedding.low_rank", device=device)
