"""The folder is the list: a method is a file, or a folder with ``method.py``; ``_`` in front is neither."""

from pathlib import Path

import pytest

from taut.core import registry
from taut.core.declared import fields
from taut.core.errors import TautError
from taut.core.registry import METHODS, TASKS, Registry, check_task

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
        "large/plain.py": CLASS.format(name="Plain", id="large.plain"),
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
    return Registry("thing", "taut_things", "taut.things.of.nobody", "Settings", "setting", ("small", "large"))


def test_files_and_folders_are_the_list(things: Registry) -> None:
    assert things.ids() == ("large.plain", "large.wrong", "small.plain", "small.roomy")
    assert things.ids("small") == ("small.plain", "small.roomy")


def test_the_class_is_the_one_that_says_the_id(things: Registry) -> None:
    assert things.get("small.plain").__name__ == "Plain"
    assert things.get("small.roomy").__name__ == "Roomy"
    with pytest.raises(TautError, match=r"large\.wrong defines no class with id = 'large\.wrong'"):
        things.get("large.wrong")
    with pytest.raises(TautError, match="unknown small thing 'rommy': did you mean 'roomy'"):
        things.get("small.rommy")


def test_a_name_that_only_one_has_is_enough(things: Registry) -> None:
    assert things.resolve("roomy") == "small.roomy"
    assert things.resolve("large.plain") == "large.plain"
    assert METHODS.resolve("block_dense") == "linear.block_dense"
    assert TASKS.resolve("sts") == "sts"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", "thing 'plain' is one of several: write large.plain or small.plain"),
        ("plane", "unknown thing 'plane': did you mean 'plain'? (choices: plain, roomy, wrong)"),
        ("small.plane", "unknown small thing 'plane': did you mean 'plain'? (choices: plain, roomy)"),
        (
            "smal.plain",
            "unknown thing 'smal.plain': did you mean 'small.plain'? "
            "(choices: large.plain, large.wrong, small.plain, small.roomy)",
        ),
    ],
)
def test_another_name_is_answered_with_candidates(things: Registry, name: str, message: str) -> None:
    with pytest.raises(TautError) as caught:
        things.resolve(name)
    assert str(caught.value) == message


@pytest.mark.parametrize("key", METHODS.built_in())
def test_the_source_of_a_method_shows_its_knobs(key: str) -> None:
    method = METHODS.get(key)
    assert set(fields(method.__module__, key, "Knobs")) == set(method.Knobs.model_fields)


@pytest.mark.parametrize("key", TASKS.built_in())
def test_the_source_of_a_task_shows_its_options(key: str) -> None:
    task = TASKS.get(key)
    assert set(fields(task.__module__, key, "Options")) == set(task.Options.model_fields)


def test_a_wrong_option_is_found_by_its_name() -> None:
    check_task({"name": "sts", "limit": 5})
    with pytest.raises(TautError, match="task sts: sts has no option 'limt': did you mean 'limit'"):
        check_task({"name": "sts", "limt": 5})
    METHODS.check_names("memory.attention_score", ("entries", "score"), "recipe")
    with pytest.raises(TautError, match="recipe: memory.key_norm has no knob 'score'"):
        METHODS.check_names("memory.key_norm", ("entries", "score"), "recipe")
