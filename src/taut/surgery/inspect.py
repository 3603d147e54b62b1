"""What lies in a folder, read from its config and safetensors headers."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from taut.core.errors import TautError
from taut.surgery.loading import check_folder


def inspect(folder: Path) -> dict[str, Any]:
    """``model_type``, ``architectures``, ``compressed``, ``recipe``, ``healed``, ``tuned``,
    ``steps``, ``tensors``, ``file_bytes``.

    Raises TautError when the folder is not a model folder. No tensor is read.
    """
    check_folder(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise TautError(f"{folder}/config.json: not JSON: {error}") from None
    quantization = config.get("quantization_config") or {}
    compressed = quantization.get("quant_method") == "taut"
    tensors = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                tensors.append({"name": name, "shape": list(piece.get_shape()), "dtype": piece.get_dtype()})
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
