"""One function per command, shared by ``taut.X`` and the command line. No logic: other packages do the work."""

from taut.api.models import (
    anchor_token,
    apply,
    export,
    footprint,
    heal,
    load,
    methods,
    plan,
    show,
    train,
    tune,
    undo,
)
from taut.api.sources import use_threads
from taut.api.studies import check, compare, context, evaluate, measure, report
from taut.api.text import generate, prefix
from taut.api.vectors import index, search, vectors

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
    "methods",
    "plan",
    "prefix",
    "report",
    "search",
    "show",
    "train",
    "tune",
    "undo",
    "use_threads",
    "vectors",
)
