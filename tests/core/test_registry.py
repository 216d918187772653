"""Registries: a name is taken once, and a wrong name is answered with the choices."""

import pytest
from helpers import refuses

from divmerge_core.registry import Registry, UnknownName


@pytest.fixture
def shapes() -> Registry:
    shapes = Registry("shape")
    shapes.register("circle", corners=0)("a circle")
    shapes.register("square", corners=4)("a square")
    return shapes


def test_an_entry_comes_back_as_it_was_registered_under_a_name_that_is_taken_once(shapes):
    def draw(): ...

    assert Registry("verb").register("draw")(draw) is draw
    assert list(shapes) == ["circle", "square"] and shapes.facts["square"] == {"corners": 4}
    with refuses("'circle' is registered already"):
        shapes.register("circle")
    assert shapes["circle"] == "a circle"


@pytest.mark.parametrize("kind", [KeyError, ValueError, UnknownName])
def test_an_unknown_name_lists_the_choices_and_the_nearest_and_registers_nothing(shapes, kind):
    with pytest.raises(kind) as error:
        shapes["sqare"]
    message = str(error.value)
    assert all(part in message for part in ("unknown shape 'sqare'", "circle, square"))
    assert "did you mean 'square'?" in message and "sqare" not in shapes
    with pytest.raises(kind, match="circle, square$"):  # a name like no other gets no suggestion
        shapes["xyz"]
