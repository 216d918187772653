"""One look per method in every figure, and figures that name the tables they are drawn from."""

import importlib
import inspect
import pkgutil
import re
from itertools import combinations

import divmerge_book.figures
import divmerge_book.studies
import numpy as np
import pandas as pd
import pytest
from divmerge_book.figures import behaviour, landscapes, scaling, title
from divmerge_book.figures.primitives import annotate
from divmerge_book.figures.styles import LOOKS, style
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

FIGURES = [module.name for module in pkgutil.iter_modules(divmerge_book.figures.__path__)]
STUDIES = [module.name for module in pkgutil.iter_modules(divmerge_book.studies.__path__)]
CITED = re.compile(r"(?:table|marks|intervals|scores): of `(?:studies\.)?(?:\w+\.)?(\w+)`")


def test_no_two_methods_look_alike_and_families_share_a_colour_of_their_own():
    looks = {spec: (to_rgb(style(spec)["color"]), style(spec)["marker"]) for spec in LOOKS}
    assert len(set(looks.values())) == len(LOOKS) == 15
    families: dict[tuple, set] = {}
    for spec, (shade, _) in looks.items():
        families.setdefault(shade, set()).add(spec.partition("/")[0].rstrip("+"))
    assert {"divmerge"} in families.values() and {"adamerging"} in families.values()


# Machado, Oliveira and Fernandes 2009: colours as people without one kind of cone see them.
MISSING = {
    "long": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "middle": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "short": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = [[0.4339, 0.3763, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]  # over white's


def lab(shade, cones: list[list[float]]) -> np.ndarray:
    """CIE L*a*b* of a colour, seen with these cones: equal distances look equally far apart."""
    rgb = np.array(to_rgb(shade))
    light = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(np.array(XYZ) @ np.clip(np.array(cones) @ light, 0, 1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", MISSING.values(), ids=MISSING)
def test_methods_of_one_marker_differ_in_colour_for_the_colour_blind(cones):
    for one, other in combinations(LOOKS, 2):
        here, there = style(one), style(other)
        apart = np.linalg.norm(lab(here["color"], cones) - lab(there["color"], cones))
        assert here["marker"] != there["marker"] or apart > 12, f"{one}, {other}: {apart:.0f}"


def tables(names, **columns) -> pd.DataFrame:
    return pd.DataFrame({"method": list(names), "model": list(names)}).assign(**columns)


NUMBERS = {"part": 1, "lost": 0.1, "margin": 0.5, "auc": 0.6, "layer": 0, "cka": 0.5}
STATES = tables(behaviour.LOOKS, **NUMBERS)
PLANE = {"step": 0, "l1": 0.5, "l2": 0.5}
AGAINST_T = {"T": 2, "value": 0.9, "low": 0.8, "high": 1.0}
DRAWN = {
    "margins": lambda ax: behaviour.loss_by_margin(ax, STATES),
    "layers": lambda ax: behaviour.similarity_by_layer(ax, STATES, "cka"),
    "plane": lambda ax: landscapes.end_points(ax, tables(landscapes.MARKS, **PLANE)),
    "against T": lambda ax: scaling.score_curve(ax, tables(LOOKS, **AGAINST_T)),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_method_looks_the_same_in_every_figure(draw):
    expected = {title(s): (to_rgb(style(s)["color"]), style(s)["marker"]) for s in LOOKS}
    found = {
        line.get_label().split(" (")[0]: (to_rgb(line.get_color()), line.get_marker())
        for line in draw(Figure().subplots()).get_lines()
        if not line.get_label().startswith("_")
    }
    assert len(found) >= 4
    assert found == {name: expected[name] for name in found}


@pytest.mark.parametrize("name", FIGURES)
def test_the_tables_that_figures_name_are_made_by_functions_that_exist(name):
    modules = (importlib.import_module(f"divmerge_book.studies.{study}") for study in STUDIES)
    functions = {found for m in modules for found, _ in inspect.getmembers(m, inspect.isfunction)}
    module = importlib.import_module(f"divmerge_book.figures.{name}")
    for function, thing in inspect.getmembers(module, inspect.isfunction):
        for cited in CITED.findall(inspect.getdoc(thing) or ""):
            assert cited in functions, f"{name}.{function} is drawn from `{cited}`, which is not"


def test_names_cover_neither_each_other_nor_another_point(ax):
    """Three points close by, one at the right end; names as long as a third of the figure."""
    points = [(0, 0, "the first of all"), (0.1, 0.001, "b"), (0.15, 0.06, "c"), (1, 0.05, "end")]
    for x, y, _ in points:
        ax.plot(x, y, "o")
    ax.margins(y=2)
    annotate(ax, points)
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    for number, box in enumerate(boxes):
        assert box.count_overlaps(boxes) == 1 and ax.bbox.count_contains(box.get_points()) == 2
        places = [ax.transData.transform(point[:2]) for point in points]
        assert not box.count_contains(places), points[number]
