"""What users read about a wrong value: our words, never those that pydantic puts around them."""

from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from taut.core.errors import TautError
from taut.core.strict import Strict, first_problem, parse_options


class Inner(Strict):
    steps: int = Field(1, ge=1)
    former = {"count": "steps"}


class Outer(Strict):
    name: str
    shape: Literal["cosine", "linear"] = "cosine"
    share: float = Field(0.5, gt=0, lt=1)
    ends: tuple[int, ...] = ()
    inner: Inner = Inner()

    @field_validator("ends")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(value):
            raise ValueError("expected ascending numbers")
        return value

    @model_validator(mode="after")
    def _together(self) -> "Outer":
        if self.name == "none":
            raise ValueError("a name is needed")
        return self


WRONG = [
    ({"name": "a", "shape": "cosin"}, "shape = 'cosin': did you mean 'cosine'? (choices: cosine, linear)"),
    ({"name": "a", "shape": 3}, "shape = 3: Input should be 'cosine' or 'linear'"),
    ({"name": "a", "share": 2}, "share = 2: Input should be less than 1"),
    ({"name": "a", "ends": [2, 1]}, "ends = [2, 1]: expected ascending numbers"),
    ({"name": "a", "inner": {"stps": 1}}, "inner: unknown key 'stps': did you mean 'steps'? (choices: steps)"),
    ({"name": "a", "inner": {"count": 1}}, "inner: the key 'count' is now called 'steps'"),
    ({"name": "a", "inner": {"steps": 0}}, "inner.steps = 0: Input should be greater than or equal to 1"),
    ({}, "name: Field required"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_both_readers_say_the_same(content: dict, message: str) -> None:
    with pytest.raises(TautError) as caught:
        Outer.checked(content, "file.yaml")
    assert str(caught.value) == f"file.yaml: {message}"
    with pytest.raises(TautError) as caught:
        parse_options(Outer, content, "file.yaml", "linear.any", "knob")
    assert str(caught.value) == f"file.yaml: {message}"


def test_what_is_wrong_with_the_whole_names_the_owner() -> None:
    with pytest.raises(TautError, match=r"^file\.yaml: a name is needed$"):
        Outer.checked({"name": "none"}, "file.yaml")
    with pytest.raises(TautError, match=r"^file\.yaml: linear\.any: a name is needed$"):
        parse_options(Outer, {"name": "none"}, "file.yaml", "linear.any", "knob")
    with pytest.raises(TautError, match=r"^file\.yaml: linear\.any has no knob 'nam': did you mean 'name'\?"):
        parse_options(Outer, {"nam": "a"}, "file.yaml", "linear.any", "knob")


def test_a_message_that_begins_like_pydantics_stays_whole() -> None:
    class One(BaseModel):
        x: int

        @field_validator("x")
        @classmethod
        def _never(cls, value: int) -> int:
            raise ValueError("Value error, as we say it")

    with pytest.raises(ValidationError) as caught:
        One(x=1)
    assert first_problem(caught.value) == "x = 1: Value error, as we say it"
