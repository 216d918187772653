"""One look per method in every figure, and figures that name the tables they are drawn from."""

import importlib
import inspect
import pkgutil
import re

import divmerge_book.figures
import divmerge_book.studies
import matplotlib
import pandas as pd
import pytest
from divmerge_book.figures import behaviour, landscapes, scaling, title
from divmerge_book.figures.styles import LOOKS, style
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

matplotlib.use("Agg")
FIGURES = [module.name for module in pkgutil.iter_modules(divmerge_book.figures.__path__)]
STUDIES = [module.name for module in pkgutil.iter_modules(divmerge_book.studies.__path__)]
CITED = re.compile(r"(?:table|marks|intervals|scores): of `(?:studies\.)?(?:\w+\.)?(\w+)`")


def test_no_two_methods_look_alike():
    looks = [(to_rgb(style(spec)["color"]), style(spec)["marker"]) for spec in LOOKS]
    assert len(set(looks)) == len(LOOKS) == 14


def test_methods_of_one_family_share_a_colour_and_no_other_family_has_it():
    shades = {}
    for spec in LOOKS:
        shades.setdefault(to_rgb(style(spec)["color"]), set()).add(spec.partition("/")[0])
    for family in ("divmerge", "adamerging"):
        assert {family} in shades.values()


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def artists(ax) -> dict[str, tuple]:
    """Colour and marker of every labelled line, without what its label says beside the method."""
    return {
        line.get_label().split(" (")[0]: (to_rgb(line.get_color()), line.get_marker())
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }


def behaving(ax):
    row = {"part": 1, "lost": 0.1, "margin": 0.5, "auc": 0.6}
    behaviour.loss_by_margin(ax, pd.DataFrame([{"model": m, **row} for m in behaviour.LOOKS]))


def layered(ax):
    rows = [{"model": m, "layer": n, "cka": 0.5} for m in behaviour.LOOKS for n in (0, 1)]
    behaviour.similarity_by_layer(ax, pd.DataFrame(rows), "cka")


def on_a_plane(ax):
    rows = [{"method": m, "step": 0, "l1": 0.5, "l2": 0.5} for m in landscapes.MARKS]
    landscapes.end_points(ax, pd.DataFrame(rows))


def against_t(ax):
    row = {"T": 2, "value": 0.9, "low": 0.8, "high": 1.0}
    scaling.score_curve(ax, pd.DataFrame([{"method": spec, **row} for spec in LOOKS]))


@pytest.mark.parametrize("draw", [behaving, layered, on_a_plane, against_t])
def test_a_method_looks_the_same_in_every_figure(ax, draw):
    draw(ax)
    expected = {title(s): (to_rgb(style(s)["color"]), style(s)["marker"]) for s in LOOKS}
    found = artists(ax)
    assert len(found) >= 4
    assert found == {name: expected[name] for name in found}


@pytest.mark.parametrize("name", FIGURES)
def test_the_tables_that_figures_name_are_made_by_functions_that_exist(name):
    functions = {
        found
        for module in STUDIES
        for found, _ in inspect.getmembers(
            importlib.import_module(f"divmerge_book.studies.{module}"), inspect.isfunction
        )
    }
    module = importlib.import_module(f"divmerge_book.figures.{name}")
    for function, _ in inspect.getmembers(module, inspect.isfunction):
        for cited in CITED.findall(inspect.getdoc(getattr(module, function)) or ""):
            assert cited in functions, f"{name}.{function} is drawn from `{cited}`, which is not"
