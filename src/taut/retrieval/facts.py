"""What the folder of an index says about it, read without torch."""

import json
from pathlib import Path
from typing import Any

from taut.core.errors import TautError

FORMAT = 1
FACTS = "index.json"


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of the folder's facts. Raises TautError for a folder that is no index or one of another format."""
    if not (folder / FACTS).is_file():
        raise TautError(f"{folder}: no {FACTS} found; expected a folder that `taut index` or Index.save wrote")
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise TautError(f"{folder}: an index of format {facts['format']}; this taut reads format {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TautError(f"{folder}: damaged index: {type(error).__name__}: {error}") from None
    return facts
