"""The fenced blocks of README and docs, so that tests can hold them to what they say."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """``mark`` is what the HTML comment on the line above says: ``run``, ``file: NAME``, ``recipe`` or ``study``."""

    language: str
    text: str
    mark: str = ""

    @property
    def commands(self) -> list[str]:
        """The lines behind a ``$``, each with its continuation lines."""
        joined = self.text.replace("\\\n", "")
        return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def blocks(path: Path) -> list[Block]:
    matches = FENCE.finditer(path.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["mark"] or "") for match in matches]


def files(path: Path) -> dict[str, str]:
    """The blocks marked ``file: NAME``, by name."""
    marked = (block for block in blocks(path) if block.mark.startswith("file: "))
    return {block.mark.removeprefix("file: "): block.text for block in marked}
