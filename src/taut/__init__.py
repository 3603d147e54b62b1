"""taut: efficient parts for any Hugging Face transformer, and an honest account of what each part costs.

``import taut`` is light (no torch) and still makes ``AutoModel.from_pretrained`` open compressed folders.
"""

from importlib import import_module
from typing import Any

from taut import _plugin

__all__ = (
    "anchor_token",
    "apply",
    "check",
    "compare",
    "context",
    "evaluate",
    "export",
    "footprint",
    "generate",
    "heal",
    "index",
    "load",
    "measure",
    "plan",
    "prefix",
    "report",
    "search",
    "show",
    "TautError",
    "train",
    "tune",
    "undo",
    "vectors",
)


def __getattr__(name: str) -> Any:
    if name == "TautError":
        return import_module("taut.core.errors").TautError
    if name in __all__:
        return getattr(import_module("taut.api"), name)
    raise AttributeError(f"module 'taut' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)


_plugin.arm()
