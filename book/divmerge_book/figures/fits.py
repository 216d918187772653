"""Figures of one fit: coefficients, losses, ANP on validation rows; entries of `Report.fits`."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from divmerge_book.figures import primitives as plot
from divmerge_book.figures import short
from divmerge_book.figures.styles import colour, title
from divmerge_book.figures.styles import line as line_style


def coefficient_map(ax: Axes, fit: Mapping) -> Axes:
    """Learned coefficients, group by task; white is 0. With many groups every few get a label."""
    names = [short(group) for group in fit["groups"]]
    table = pd.DataFrame(np.array(fit["coefficients"]).T, names, fit["tasks"])
    shown = True if len(table) <= 40 else max(1, len(table) // 14)
    how = plot.diverging(0, float(np.abs(table.values).max()))
    plot.heat_map(ax, table, label="coefficient", annot=table.size <= 80, yticklabels=shown, **how)
    ax.tick_params(axis="y", labelsize=7 if len(table) > 12 else 9)
    return plot.finish(ax, "task", "parameters", title=title(fit["method"]))


def loss_curve(ax: Axes, fits: list[Mapping], *, window: int = 8) -> Axes:
    """Objective over steps: each batch faint, the mean of `window` of them strong."""
    for fit in fits:
        loss, name = pd.Series(fit["losses"]), fit["method"]
        smooth, shade = loss.rolling(window, min_periods=1).mean(), colour(name)
        plot.line(ax, loss.index, loss, alpha=0.2, linewidth=0.8, color=shade)
        look = {"color": shade, "linestyle": line_style(name)}
        plot.line(ax, loss.index, smooth, label=title(name), **look)
    return plot.finish(ax, "step", "objective, summed, nats", legend=8)


def anp_curve(ax: Axes, fits: list[Mapping]) -> Axes:
    """Validation ANP over steps, where the fits recorded it."""
    for fit in fits:
        course, name = pd.DataFrame(fit["course"]), fit["method"]
        look = {"color": colour(name), "marker": "o", "linestyle": line_style(name)}
        plot.line(ax, course.step, course.anp, label=title(name), **look)
    return plot.finish(ax, "step", "ANP on validation rows, %", percent="y", legend=8)
