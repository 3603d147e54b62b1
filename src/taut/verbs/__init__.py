"""One function per verb, for ``taut.X`` and for the command line alike. No logic lives here: rooms do the work."""

from taut.verbs.given import use_threads
from taut.verbs.models import (
    anchor_token,
    apply,
    calibrate,
    export,
    footprint,
    heal,
    load,
    methods,
    plan,
    show,
    train,
    undo,
)
from taut.verbs.studies import check, compare, context, evaluate, measure, report
from taut.verbs.text import generate, prefix
from taut.verbs.vectors import index, search, vectors

__all__ = (
    "anchor_token",
    "apply",
    "calibrate",
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
    "undo",
    "use_threads",
    "vectors",
)
