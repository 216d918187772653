"""Drawings of ideas: the method, its coefficients, and one idea for each of the first chapters.

They hold no measurement. Each draws on the Axes it is given, in units of its own.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.transforms import Bbox

from divmerge_book.figures.primitives import Number
from divmerge_book.figures.styles import BLUE, GREEN, GREY, PALETTE

ORANGE, RED = PALETTE[1], PALETTE[3]
P, M, Q = (0.5, 0.32, 0.1, 0.08), (0.34, 0.22, 0.16, 0.28), (0.18, 0.12, 0.22, 0.48)  # M: mean
TENSORS = ("embedding", *(f"block {n}, {kind}" for n in (1, 2) for kind in ("attention", "MLP")))
GROUPS = {"task": [0] * 5, "block": [0, 1, 1, 2, 2], "layer": [0, 1, 2, 3, 4]}  # by tensor


def canvas(ax: Axes, width: Number, height: Number) -> Axes:
    """Axes without ticks that hold the whole drawing in equal units."""
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return ax


def save(draw: Callable[[Axes], Axes], file: Path, *, height: Number) -> None:
    """Write a drawing as SVG of a page's width; height in inches."""
    fig, ax = plt.subplots(figsize=(7.5, height), layout="constrained")
    draw(ax)
    with plt.rc_context({"svg.hashsalt": file.name}):  # the same drawing, the same file
        fig.savefig(file, metadata={"Date": None})
    plt.close(fig)


def words(ax: Axes, x: Number, y: Number, text: str, **how) -> None:
    """Text whose middle stands at a point."""
    look = {"ha": "center", "va": "center", "fontsize": 8, "linespacing": 1.4}
    ax.text(x, y, text, **{**look, **how})


def box(ax: Axes, place: tuple[Number, ...], text: str, hue) -> Bbox:
    """Words in a rounded box of a hue; place: left, bottom, width, height. Returns its extent."""
    found = Bbox.from_bounds(*place)
    shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "edgecolor": hue, "linewidth": 1.3}
    ax.add_patch(FancyBboxPatch(found.min, *found.size, facecolor=(*hue, 0.14), **shape))
    words(ax, *(found.min + found.size / 2), text, fontsize=9)
    return found


def path(ax: Axes, *points: tuple[Number, Number], hue="black", head: bool = True, **how) -> None:
    """A line through points, with an arrow's head at the last."""
    ax.plot(*zip(*points, strict=True), **{"color": hue, "linewidth": 1.3, **how})
    if head:
        style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": hue, "linewidth": 0}
        ax.annotate("", points[-1], points[-2], arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def method(ax: Axes) -> Axes:
    """DivMerge, from base and experts to the merged model, and the one thing that is learned."""
    canvas(ax, 10, 4.7)
    box(ax, (0, 2.8, 1.6, 1), "experts\n" + r"$\theta_1, \dots, \theta_T$", BLUE)
    box(ax, (0, 0.8, 1.6, 1), "base\n" + r"$\theta_0$", GREY)
    box(ax, (2.1, 0.8, 1.8, 1), "task vectors\n" + r"$\tau_t = \theta_t - \theta_0$", BLUE)
    box(ax, (4.3, 0.8, 1.6, 1), "coefficients\n" + r"$\Lambda$, $[T, G]$", GREEN)
    text = "merged model\n" + r"$\theta_0 + \Sigma_t\, \Lambda_t \tau_t$"
    box(ax, (6.3, 0.8, 1.8, 1), text, GREEN)
    box(ax, (2.9, 2.8, 1.8, 1), "inputs of\nevery task,\nwithout labels", GREY)
    box(ax, (6.3, 2.8, 1.8, 1), "answers $p$ of\nthe experts,\ncached", BLUE)
    box(ax, (8.6, 1.8, 1.4, 1), "divergence\n$D(p, q)$,\nsummed", RED)
    path(ax, (0.8, 2.8), (0.8, 1.8), hue="0.4", linestyle=":", head=False)
    words(ax, 0.7, 2.3, "fine-\ntuned", ha="right", color="0.3")
    path(ax, (1.6, 1.3), (2.1, 1.3))
    path(ax, (1.5, 2.8), (2.6, 1.8))
    path(ax, (3.9, 1.3), (4.3, 1.3))
    path(ax, (5.9, 1.3), (6.3, 1.3))
    path(ax, (2.9, 3.3), (1.6, 3.3))
    path(ax, (0.8, 3.8), (0.8, 4.2), (7.2, 4.2), (7.2, 3.8))
    words(ax, 4, 4.42, "each expert answers the inputs of its own task, once")
    path(ax, (4.6, 2.8), (6.6, 1.8))
    path(ax, (8.1, 3.3), (9.3, 3.3), (9.3, 2.8))
    path(ax, (8.1, 1.3), (9.1, 1.3), (9.1, 1.8))
    words(ax, 8.65, 1.1, "answers $q$")
    path(ax, (9.6, 1.8), (9.6, 0.4), (5.1, 0.4), (5.1, 0.8), hue=GREEN, linestyle="--")
    words(ax, 7.3, 0.18, r"gradient in $\Lambda$, which alone is learned", color=GREEN)
    return ax


def groupings(ax: Axes) -> Axes:
    """The coefficients `[T, G]` of three tasks under three groupings of five tensors."""
    canvas(ax, 10, 3.9)
    for row, name in enumerate(TENSORS):
        words(ax, 2.0, 2.85 - 0.5 * row, name, ha="right")
    for left, (grouping, groups) in zip((2.3, 4.9, 7.5), GROUPS.items(), strict=True):
        shape = rf"per {grouping}, $G = {max(groups) + 1}$"
        words(ax, left + 1.05, 3.7, shape, fontsize=9)
        for task, hue in enumerate((BLUE, ORANGE, PALETTE[4])):
            at = left + 0.7 * task
            words(ax, at + 0.35, 3.3, f"task {task + 1}", color=hue)
            for group in dict.fromkeys(groups):
                count, first = groups.count(group), groups.index(group)
                low, height = 3.1 - 0.5 * (first + count), 0.5 * count
                shade = 0.18 + 0.14 * ((2 * group + task) % 4)
                look = {"facecolor": (*hue, shade), "edgecolor": "white", "linewidth": 2}
                ax.add_patch(Rectangle((at, low), 0.7, height, **look))
                text = rf"$\lambda_{{{task + 1},{group + 1}}}$"
                words(ax, at + 0.35, low + height / 2, text, fontsize=9)
    words(ax, 5.9, 0.25, "one cell, one coefficient: it scales that task's vector in these tensors")
    return ax


def arrows(ax: Axes) -> Axes:
    """Models as points, fine-tuning as arrows, and a merge as a sum of scaled arrows."""
    canvas(ax, 10, 4.2)
    base, first, second = np.array([1.8, 0.6]), np.array([4.6, 0.7]), np.array([1.2, 3.0])
    merged = base + 0.6 * first + 0.7 * second
    for vector, hue, share in ((first, BLUE, 0.6), (second, ORANGE, 0.7)):
        path(ax, tuple(base), tuple(base + vector), hue=hue, alpha=0.45)
        path(ax, tuple(base), tuple(base + share * vector), hue=hue, linewidth=2.6)
        path(ax, tuple(base + share * vector), tuple(merged), hue="0.4", linestyle=":", head=False)
    marks = {"color": "black", "markersize": 7}
    for point, hue in ((base, "black"), (base + first, BLUE), (base + second, ORANGE)):
        ax.plot(*point, "o", **{**marks, "color": hue})
    ax.plot(*merged, "D", **{**marks, "color": GREEN, "markersize": 9})
    words(ax, *(base - (0.2, 0)), "base\n" + r"$\theta_0$", ha="right", fontsize=9)
    one, two = "expert 1\n" + r"$\theta_0 + \tau_1$", "expert 2, " + r"$\theta_0 + \tau_2$"
    words(ax, *(base + first + (0.2, 0)), one, ha="left", fontsize=9)
    words(ax, *(base + second + (0.2, 0.1)), two, ha="left", fontsize=9)
    text = "merged model\n" + r"$\theta_0 + \lambda_1 \tau_1 + \lambda_2 \tau_2$"
    words(ax, *(merged + (0.25, 0.05)), text, ha="left", fontsize=9, color=GREEN)
    words(ax, *(base + 0.35 * first - (0, 0.28)), r"$\lambda_1 \tau_1$", color=BLUE, fontsize=9)
    words(ax, *(base + 0.35 * second - (0.35, 0)), r"$\lambda_2 \tau_2$", color=ORANGE, fontsize=9)
    return ax


def midpoint(ax: Axes) -> Axes:
    """Two answers over four classes, the mixture of both, and what JS measures between them."""
    canvas(ax, 10, 3.6)
    mixture = (M, "mixture $m = (p + q) / 2$", GREY)
    panels = ((P, "expert $p$", BLUE), mixture, (Q, "merged $q$", GREEN))
    for left, (shares, name, hue) in zip((0.3, 3.85, 7.4), panels, strict=True):
        path(ax, (left, 0.8), (left + 2.3, 0.8), hue="0.4", head=False)
        for number, share in enumerate(shares):
            place = (left + 0.2 + 0.5 * number, 0.8)
            ax.add_patch(Rectangle(place, 0.4, 3.2 * share, facecolor=(*hue, 0.55), edgecolor=hue))
            words(ax, place[0] + 0.2, 0.6, str(number + 1), color="0.3")
        words(ax, left + 1.15, 2.75, name, fontsize=9)
    for start, end, middle, name in ((2.7, 3.8, 3.25, "p"), (7.3, 6.2, 6.75, "q")):
        path(ax, (start, 1.6), (end, 1.6))
        words(ax, middle, 1.95, rf"KL$({name} \| m)$")
    text = r"JS$(p, q) = \frac{1}{2}$ KL$(p \| m) + \frac{1}{2}$ KL$(q \| m)$"
    words(ax, 5, 3.3, text, fontsize=10)
    words(ax, 5, 0.2, "classes, or the words of a vocabulary", color="0.3")
    return ax


def objective(ax: Axes) -> Axes:
    """The two steps from joint training to DivMerge: what is imitated, and what is free."""
    canvas(ax, 10, 2.7)
    stages = (
        (0, "joint training", "imitates the labels,\nall $N$ parameters free", GREY),
        (3.65, "distillation", "imitates the experts,\nall $N$ parameters free", BLUE),
        (7.3, "DivMerge", "imitates the experts,\n$T \\times G$ coefficients free", GREEN),
    )
    for left, name, text, hue in stages:
        words(ax, left + 1.35, 2.45, name, fontsize=10)
        box(ax, (left, 1.0, 2.7, 1.1), text, hue)
    for left, text in ((2.7, "step 1: no labels"), (6.35, "step 2: few numbers")):
        path(ax, (left, 1.55), (left + 0.95, 1.55))
        words(ax, left + 0.475, 0.6, text, color="0.3")
    return ax
