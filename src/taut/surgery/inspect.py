"""Describes a model folder from its config and safetensors headers."""

import json
from pathlib import Path
from typing import Any

from taut.core.errors import TautError
from taut.core.safetensors_header import read_header
from taut.surgery.folders import check_folder


def inspect(folder: Path) -> dict[str, Any]:
    """Describe a model folder without reading any tensor.

    Returns ``folder``, ``model_type``, ``architectures``, ``compressed``, ``taut_version``, ``original``, ``recipe``,
    ``healed``, ``tuned``, ``steps``, ``tensors`` and ``file_bytes``. Raises TautError when it is not a model folder.
    """
    check_folder(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise TautError(f"{folder}/config.json: not JSON: {error}") from None
    quantization = config.get("quantization_config") or {}
    compressed = quantization.get("quant_method") == "taut"
    tensors = [
        {"name": name, "shape": entry["shape"], "dtype": entry["dtype"]}
        for path in sorted(folder.glob("*.safetensors"))
        for name, entry in read_header(path).tensors.items()
    ]
    return {
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "compressed": compressed,
        "taut_version": quantization.get("taut_version") if compressed else None,
        "original": quantization.get("original") if compressed else None,
        "recipe": quantization.get("recipe", {}) if compressed else {},
        "healed": quantization.get("healed", {}) if compressed else {},
        "tuned": quantization.get("tuned", quantization.get("calibrated", {})) if compressed else {},
        "steps": quantization.get("plan", []) if compressed else [],
        "tensors": tensors,
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }
