"""What a fit found, and how it went: coefficients, losses, ANP on validation rows."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from divmerge_book.figures import colour, short, title
from divmerge_book.figures.styles import line


def coefficient_map(ax: Axes, fit: Mapping) -> Axes:
    """Learned coefficients, group by task; white is 0.

    fit: an entry of `Report.fits`. With many groups every few get a label.
    """
    table = pd.DataFrame(
        np.array(fit["coefficients"]).T,
        index=[short(group) for group in fit["groups"]],
        columns=fit["tasks"],
    )
    limit = float(np.abs(table.values).max())
    sns.heatmap(
        table,
        ax=ax,
        cmap="PRGn",
        vmin=-limit,
        vmax=limit,
        annot=table.size <= 80,
        fmt=".2f",
        annot_kws={"fontsize": 8},
        yticklabels=True if len(table) <= 40 else max(1, len(table) // 14),
        cbar_kws={"label": "coefficient"},
    )
    ax.set(title=title(fit["method"]), xlabel="task", ylabel="parameters")
    ax.tick_params(axis="x", rotation=35)
    ax.tick_params(axis="y", rotation=0, labelsize=7 if len(table) > 12 else 9)
    return ax


def losses(ax: Axes, fits: list[Mapping], *, window: int = 8) -> Axes:
    """Objective over steps: each batch faint, the mean of `window` of them strong."""
    for fit in fits:
        loss = pd.Series(fit["losses"])
        shade = colour(fit["method"])
        ax.plot(loss, color=shade, alpha=0.2, linewidth=0.8)
        smooth = loss.rolling(window, min_periods=1).mean()
        ax.plot(smooth, line(fit["method"]), color=shade, label=title(fit["method"]))
    ax.set(xlabel="step", ylabel="objective, nats, summed over tasks")
    ax.legend(fontsize=8)
    return ax


def anp_course(ax: Axes, fits: list[Mapping]) -> Axes:
    """Validation ANP over steps, where the fits recorded it."""
    for fit in fits:
        course = pd.DataFrame(fit["course"])
        shade = colour(fit["method"])
        style = line(fit["method"])
        ax.plot(course.step, course.anp, style, marker="o", color=shade, label=title(fit["method"]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="step", ylabel="ANP on validation rows, %")
    ax.legend(fontsize=8)
    return ax
