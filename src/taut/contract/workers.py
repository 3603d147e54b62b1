"""New processes that open saved folders: one with taut imported, and one without.

A process takes seconds to start. So each is started once and answers one request per line.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

OPENER = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
for line in sys.stdin:
    request = json.loads(line)
    try:
        model = getattr(transformers, request["model_class"]).from_pretrained(request["folder"]).eval()
        with torch.no_grad():
            output = model(**load_file(request["inputs"]))
        save_file({"answer": output[0].contiguous()}, request["answer"])
        if request.get("resave"):
            model.save_pretrained(request["resave"])
        reply = {"opened": True}
    except Exception as error:
        reply = {"opened": False, "error": type(error).__name__ + ": " + str(error)[:2000]}
    print("REPLY " + json.dumps(reply), flush=True)
"""


class Worker:
    """A process that opens model folders with transformers, with or without ``import taut``."""

    def __init__(self, with_taut: bool) -> None:
        code = ("import taut\n" if with_taut else "") + OPENER
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def open(self, folder: Path, inputs: Path, model_class: str, resave: Path | None = None) -> dict[str, Any]:
        """Open a folder, run the model on ``inputs``, and save the model in ``resave`` if given.

        Returns ``{"opened": True, "answer": Tensor}`` or ``{"opened": False, "error": str}``. Raises RuntimeError if
        the process ended.
        """
        answer = folder / "answer.safetensors.out"
        request = {"folder": str(folder), "inputs": str(inputs), "answer": str(answer), "model_class": model_class}
        if resave is not None:
            request["resave"] = str(resave)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("REPLY "):
                reply = json.loads(line.removeprefix("REPLY "))
                if reply["opened"]:
                    reply["answer"] = _take(answer)
                return reply
        raise RuntimeError(f"the process that opens folders ended with exit code {self._process.wait()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _take(path: Path) -> Tensor:
    answer = load_file(path)["answer"].clone()
    path.unlink()
    return answer


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (NaNs included)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
    )
