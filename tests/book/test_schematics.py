"""Schematics can be read: no word leaves the drawing or its box, and none lies on another."""

from itertools import combinations

import pytest
from divmerge_book.figures import schematics
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.task_vectors import Layout

DRAWINGS = {"method": 3.6, "groupings": 2.9, "arrows": 3.2, "midpoint": 2.7, "objective": 2.1}


@pytest.mark.parametrize("name", DRAWINGS)
def test_words_stay_apart_and_within_their_boxes(name):
    figure = Figure(figsize=(7.5, DRAWINGS[name]), layout="constrained")
    ax = getattr(schematics, name)(figure.subplots())
    figure.canvas.draw()
    found = {text.get_text(): text.get_window_extent() for text in ax.texts if text.get_text()}
    assert len(found) > 4
    for (one, here), (other, there) in combinations(found.items(), 2):
        assert not here.overlaps(there), f"{one!r} lies on {other!r}"
    boxes = [p.get_window_extent() for p in ax.patches if isinstance(p, FancyBboxPatch)]
    for text, extent in found.items():
        assert figure.bbox.count_contains(extent.corners()) == 4, f"{text!r} is cut"
        for place in boxes:
            inside = place.count_contains(extent.corners())
            assert inside == 4 or not place.overlaps(extent), f"{text!r} crosses a box"


def test_the_drawn_groups_are_those_of_the_core():
    kinds = "attention.self.query", "output.dense"
    blocks = [f"encoder.layer.{n}.{kind}.weight" for n in (0, 1) for kind in kinds]
    layout = Layout(("embeddings.weight", *blocks), ((1,),) * 5)
    for grouping, groups in schematics.GROUPS.items():
        assert list(groups_of(layout, grouping)[1]) == groups


def test_a_schematic_becomes_vector_graphics_of_a_pages_width(tmp_path):
    schematics.save(schematics.method, tmp_path / "method.svg", height=3.6)
    assert 'width="540pt"' in (tmp_path / "method.svg").read_text()  # 7.5 inches
