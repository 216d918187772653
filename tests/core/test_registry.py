"""Registries: a name is taken once, and a wrong name is answered with the choices."""

import pytest

from divmerge_core.registry import Registry, UnknownName


@pytest.fixture
def shapes() -> Registry:
    shapes = Registry("shape")
    shapes.register("circle", corners=0)("a circle")
    shapes.register("square", corners=4)("a square")
    return shapes


def test_an_entry_comes_back_as_it_was_registered(shapes):
    assert shapes["circle"] == "a circle"
    assert list(shapes) == ["circle", "square"]
    assert shapes.facts["square"] == {"corners": 4}


def test_the_decorator_returns_the_function_itself():
    def draw(): ...

    assert Registry("verb").register("draw")(draw) is draw


@pytest.mark.parametrize("kind", [KeyError, ValueError])
def test_an_unknown_name_lists_the_choices_and_the_nearest(shapes, kind):
    with pytest.raises(kind) as error:
        shapes["sqare"]
    message = str(error.value)
    assert "unknown shape 'sqare'" in message
    assert "circle, square" in message
    assert "did you mean 'square'?" in message


def test_a_name_like_no_other_gets_no_suggestion(shapes):
    with pytest.raises(UnknownName, match="circle, square$"):
        shapes["xyz"]


def test_a_name_is_taken_once(shapes):
    with pytest.raises(ValueError, match="'circle' is registered already"):
        shapes.register("circle")
    assert shapes["circle"] == "a circle"


def test_asking_for_an_unknown_name_registers_nothing(shapes):
    with pytest.raises(UnknownName):
        shapes["triangle"]
    assert "triangle" not in shapes
