"""Figures of bases and objectives; tables of `studies.bases`, scored by `predictions.compared`."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures.styles import mark
from divmerge_book.studies.predictions import WORDS, of_score

OBJECTIVES: Mapping[str, tuple[str, Mapping]] = {
    "none": ("none: the start", mark(7, "s")),
    "entropy": ("entropy (AdaMerging)", mark(0, "^")),
    "js": ("JS (DivMerge)", mark(2, "o")),
}
BASES: Mapping[str, str] = {
    "raw": "task vectors",
    "ties": "TIES entries",
    "svd": "own directions",
    "essential": "essential subspaces",
    "isotropic": "TSV, equal values",
    "tsv": "TSV directions",
}


def name_of(spec: str) -> str:
    """`TSV directions, 3 bands` for `tsv:3`."""
    name, _, number = spec.partition(":")
    return BASES[name] + (f", {number} {'kept' if name == 'ties' else 'bands'}" if number else "")


def ablation(ax: Axes, table: pd.DataFrame, *, score: str) -> Axes:
    """A score of every basis, a mark per objective, with 95 % intervals."""
    order = sorted(set(table.basis), key=lambda s: (list(BASES).index(s.partition(":")[0]), s))
    rows = {spec: name_of(spec) for spec in order}
    plot.forest(ax, of_score(table, score), rows, OBJECTIVES, row="basis", group="objective",
                value="score")  # fmt: skip
    return plot.finish(ax, f"{WORDS[score]}, %", percent="x")


def by_count(ax: Axes, table: pd.DataFrame, *, score: str) -> Axes:
    """A score over the number of tasks, a line per basis, with 95 % intervals."""
    looks = {"raw": (name_of("raw"), mark(7, "s")), "tsv:3": (name_of("tsv:3"), mark(2, "o"))}
    ends, found = ("low", "high"), of_score(table, score)
    plot.lines(ax, found, "tasks", "score", looks, by="basis", ends=ends, step=0.1)
    plot.ticks(ax, sorted(set(table.tasks)))
    return plot.finish(ax, "tasks merged, $T$", f"{WORDS[score]}, %", percent="y")


def overlap(ax: Axes, products: pd.DataFrame, *, title: str) -> Axes:
    """Sizes of the inner products of two tasks' leading directions."""
    limits = {"vmin": 0, "vmax": 1, "cmap": "rocket_r", "annot": False}
    plot.heat_map(ax, products.abs(), label="size of the inner product", rotation=0, **limits)
    return plot.finish(ax, title=title)
