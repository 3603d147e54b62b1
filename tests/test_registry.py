"""The folder is the list: a method is a file, or a folder with ``method.py``; ``_`` in front is neither."""

from pathlib import Path

import pytest

from taut.core import registry
from taut.core.errors import TautError
from taut.core.registry import Registry

CLASS = "class {name}:\n    id = {id!r}\n"


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of two kinds, over files that are written here."""
    package = tmp_path / "taut_things"
    written = {
        "small/plain.py": CLASS.format(name="Plain", id="small.plain"),
        "small/roomy/method.py": CLASS.format(name="Roomy", id="small.roomy"),
        "small/roomy/kernel.py": CLASS.format(name="Kernel", id="small.kernel"),
        "small/_shared.py": CLASS.format(name="Shared", id="small._shared"),
        "small/_folder/method.py": CLASS.format(name="Folder", id="small._folder"),
        "small/no_method/other.py": CLASS.format(name="Other", id="small.no_method"),
        "large/wrong.py": CLASS.format(name="Wrong", id="large.right"),
    }
    for name, text in written.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent, path.parent.parent):
            if folder != tmp_path:
                (folder / "__init__.py").touch()
        path.write_text(text)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "core" / "registry.py"))
    return Registry("thing", "taut_things", "taut.things.of.nobody", ("small", "large"))


def test_files_and_folders_are_the_list(things: Registry) -> None:
    assert things.ids() == ("large.wrong", "small.plain", "small.roomy")
    assert things.ids("small") == ("small.plain", "small.roomy")


def test_the_class_is_the_one_that_says_the_id(things: Registry) -> None:
    assert things.get("small.plain").__name__ == "Plain"
    assert things.get("small.roomy").__name__ == "Roomy"
    with pytest.raises(TautError, match=r"large\.wrong defines no class with id = 'large\.wrong'"):
        things.get("large.wrong")
    with pytest.raises(TautError, match="unknown small thing 'rommy': did you mean 'roomy'"):
        things.get("small.rommy")
