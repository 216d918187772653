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
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

matplotlib.use("Agg")
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


def tables(names, **columns) -> pd.DataFrame:
    return pd.DataFrame({"method": list(names), "model": list(names)}).assign(**columns)


BEHAVIOUR = {"part": 1, "lost": 0.1, "margin": 0.5, "auc": 0.6, "layer": 0, "cka": 0.5}
PLANE = {"step": 0, "l1": 0.5, "l2": 0.5}
AGAINST_T = {"T": 2, "value": 0.9, "low": 0.8, "high": 1.0}
DRAWN = {
    "margins": lambda ax: behaviour.loss_by_margin(ax, tables(behaviour.LOOKS, **BEHAVIOUR)),
    "layers": lambda ax: behaviour.similarity_by_layer(
        ax, tables(behaviour.LOOKS, **BEHAVIOUR), "cka"
    ),
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
