"""The paper's values beside ours, claim by claim."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from divmerge_book.figures.primitives import label_rows, reference


def draw(ax: Axes, checks: Sequence) -> Axes:
    """A row per check: ours, filled where its interval excludes 0, and the paper's value."""
    reference(ax, 0)
    for row, one in enumerate(checks):
        sure = one.low > 0 or one.high < 0
        ax.plot([one.low, one.high], [row, row], color="C0", linewidth=1.5)
        ax.plot(one.value, row, "o", color="C0", markerfacecolor="C0" if sure else "white")
        ax.plot(one.paper, row, "D", color="C1", markersize=5)
    for label, look in (("stored result, 95 % interval", "oC0"), ("the paper", "DC1")):
        ax.plot([], [], look, label=label)
    label_rows(ax, [one.claim.replace("is above", ">") for one in checks], size=8, grid=True)
    return ax


def beside_paper(checks: Sequence) -> Figure | None:
    """A panel per setting, of `findings.replication.Check`s in points; None without any."""
    panels: dict[str, list] = {}
    for one in (one for one in checks if one.unit == "points"):
        panels.setdefault(one.setting, []).append(one)
    if not panels:
        return None
    heights = list(map(len, panels.values()))
    shape = {"figsize": (7.5, 0.24 * sum(heights) + 1.4), "height_ratios": heights}
    shape |= {"squeeze": False, "sharex": True, "layout": "constrained"}
    fig, axes = plt.subplots(len(panels), 1, **shape)
    for ax, (setting, some) in zip(axes[:, 0], panels.items(), strict=True):
        draw(ax, some).set_title(setting.replace("`", ""), fontsize=9)
    axes[-1, 0].set_xlabel("difference, points of ANP", fontsize=9)
    fig.legend(*axes[-1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig
