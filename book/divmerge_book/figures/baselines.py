"""The table of all methods, their ranking, and figures of accuracy against cost."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from pandas.io.formats.style import Styler

from divmerge_book.evaluation.benchmark import PUBLISHED
from divmerge_book.evaluation.report import Report
from divmerge_book.figures import FLOOR, GREEN, percent_intervals, score_intervals, title
from divmerge_book.figures import primitives as plot
from divmerge_core.methods import METHODS, parse

NO_DATA, INPUTS, LABELS = "no data", "unlabelled inputs", "validation labels"
REFERENCE = "reference"
Panels = Sequence[Axes] | np.ndarray  # as `plt.subplots` gives them
SCORES = {"value": "ANP", "kept": "kept margin"}  # columns of a `summary`
PUBLISHED_AS = {"value": "published", "kept": "kept_published"}
BLOCKS = (REFERENCE, NO_DATA, INPUTS, LABELS)
HUES = {b: sns.color_palette("colorblind")[n] for b, n in ((NO_DATA, 7), (INPUTS, 1), (LABELS, 4))}


def facts_of(spec: str) -> dict:
    """The registered facts of a method, whatever its grouping and options."""
    return METHODS.facts[parse(spec.removesuffix(PUBLISHED))[0]]


def block(spec: str) -> str:
    """The data that a method needs, apart from the rows on which everyone's options are chosen."""
    if spec in ("expert", "base"):
        return REFERENCE
    needs = facts_of(spec)["needs"].partition(",")[0]
    return {"unlabelled inputs": INPUTS, "a validation score": LABELS}.get(needs, NO_DATA)


def is_single_model(spec: str) -> bool:
    """Whether a method gives one model for all tasks; others predict by task or input."""
    return facts_of(spec).get("returns") != "predictor"


def single_models(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of those methods that give one model for all tasks."""
    return table[[is_single_model(name) for name in table.index]]


def summary(report: Report, subset: str, *, published: bool = False) -> pd.DataFrame:
    """A row per method on a subset: scores, and costs averaged over seeds.

    value, low, high: the ANP with the options that the search found (published: with the published
    ones), and its 95 % interval; kept, kept_low, kept_high: the kept margin; published,
    kept_published: both with the published options; below: counted tasks below the majority class,
    out of `counted`; worst: the smallest ratio; tried: how many candidates were scored; seconds of
    one merge; peak_bytes on top of the problem; stored: size of what is stored over the size of one
    model; inputs: unlabelled ones read; calls of the score; answer_ms per test row. Sorted by
    block, and by ANP within it.
    """
    rows = report.rows[report.rows.subset == subset]
    part = Report(rows, report.fits, report.provenance)
    table = score_intervals(part, subset).set_index("method")
    table["worst"] = part.intervals(statistic="worst", draws=2).set_index("method").value
    fits = [fit for fit in report.fits if fit["subset"] == subset]
    costs = pd.DataFrame([{"method": fit["method"], **fit["cost"]} for fit in fits])
    table = table.join(costs.groupby("method").mean())
    table["stored"] = table.stored_bytes / table.model_bytes
    for column, name in PUBLISHED_AS.items():
        found = table[column].reindex(table.index + PUBLISHED)
        table[name] = found.set_axis(table.index).fillna(table[column])
    tried = {fit["method"]: len(fit["search"]) for fit in fits if "search" in fit}
    plain = table.index[~table.index.str.endswith(PUBLISHED)]
    other = plain + PUBLISHED * published
    table = table.loc[other.where(other.isin(table.index), plain)].set_axis(plain)
    table["tried"] = table.index.map(tried)
    table["block"] = pd.Categorical(table.index.map(block), BLOCKS, ordered=True)
    return table.sort_values(["block", "value"], ascending=[True, False])


def benchmark_table(table: pd.DataFrame) -> pd.DataFrame:
    """A summary for display: in %, seconds, MB, and times the size of one model."""
    kept = table[table.index != "base"]

    def formatted(column: str, digits: int, factor: float | int = 1.0) -> list[str]:
        return ["" if np.isnan(x) else f"{factor * x:.{digits}f}" for x in kept[column]]

    return pd.DataFrame(
        {
            "data used": kept.block.astype(str),
            "method": [title(name) for name in kept.index],
            "ANP, %": percent_intervals(kept[["value", "low", "high"]]),
            "published, %": formatted("published", 1, 100),
            "kept margin, %": percent_intervals(kept[["kept", "kept_low", "kept_high"]]),
            "published kept, %": formatted("kept_published", 1, 100),
            "below majority": [f"{r.below} of {r.counted}" for r in kept.itertuples()],
            "worst, %": formatted("worst", 1, 100),
            "tried": formatted("tried", 0),
            "merge, s": formatted("seconds", 1),
            "peak, MB": formatted("peak_bytes", 0, 1e-6),
            "stored, models": formatted("stored", 2),
            "inputs": formatted("inputs", 0),
            "score calls": formatted("calls", 0),
        }
    ).set_index(["data used", "method"])


def styled(rows: pd.DataFrame, caption: str) -> Styler:
    """A `benchmark_table` in small letters, DivMerge in bold."""
    small = rows.style.set_caption(caption).set_table_attributes('style="font-size: 70%"')
    ours = rows.index.get_level_values("method").str.startswith("DivMerge")
    small = small.set_properties(subset=(ours, slice(None)), **{"font-weight": "bold"})
    return small.set_properties(**{"white-space": "nowrap", "padding": "2px 4px"})


def shade(name: str, row: pd.Series):
    """A method's colour: its block's, or DivMerge's own."""
    return GREEN if name.startswith("divmerge") else HUES[row.block]


def score_against_cost(axes: Panels, table: pd.DataFrame) -> Panels:
    """Scores against the seconds of one merge (log scale): ANP on one Axes, kept margin on another.

    table: a `summary`. Filled: one model for all tasks; hollow: several, or routed. The line is the
    Pareto front of single models; the methods on it and the best hollow one are named. Kept margins
    below FLOOR are drawn there.
    """
    table = table[table.block != REFERENCE].assign(seconds=lambda t: t.seconds.clip(lower=0.02))
    for ax, (column, words) in zip(axes, SCORES.items(), strict=True):
        pareto_front(ax, table.assign(score=table[column].clip(lower=FLOOR)))
        ax.set(ylabel=f"{words}, % of the experts")
    for label, hue in {"DivMerge": GREEN, **HUES}.items():
        axes[-1].scatter([], [], color=hue, s=36, label=label)
    hollow = {"facecolors": "none", "edgecolors": "black", "label": "more than one model"}
    axes[-1].scatter([], [], s=36, **hollow)
    below = {"fontsize": 8, "ncols": 3, "loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    plot.finish(axes[-1], "seconds of one merge", legend=below)
    return axes


def pareto_front(ax: Axes, table: pd.DataFrame) -> None:
    """Points of score and seconds, and the best score of single models up to each time."""
    single = single_models(table).sort_values(["seconds", "score"], ascending=[True, False])
    for name, row in table.iterrows():
        fill = shade(name, row) if name in single.index else "none"
        ax.scatter(row.seconds, row.score, s=36, facecolors=fill, edgecolors=shade(name, row))
    best = single[single.score > single.score.cummax().shift(fill_value=-np.inf)]
    ax.step(best.seconds, best.score, where="post", color="black", linewidth=0.8, zorder=0)
    hollow = table.drop(index=single.index).nlargest(1, "score")
    ax.set_xscale("log")
    ax.set_xlim(left=table.seconds.min() / 4)  # room for names
    ax.margins(y=0.08)
    rows = pd.concat([best, hollow]).iterrows()
    names = [(row.seconds, row.score, title(name)) for name, row in rows]
    plot.annotate(ax, names, up=5, left=True)
    plot.finish(ax, percent="y")


def ranking(axes: Panels, tables: dict[str, pd.DataFrame]) -> Panels:
    """ANP and kept margin of every method, a panel per subset; in the last one's order, by block.

    tables: a `summary` per panel's title. Circles: ANP; squares below them: kept margin, at FLOOR
    where it is lower. Filled: options found; hollow: published ones. Bars are 95 % intervals; the
    lines are the experts (dashed) and, for kept margins, the majority class (dotted).
    """
    rows = pd.concat([*tables.values()][::-1])  # the last panel's first
    rows = rows[(rows.block != REFERENCE) & ~rows.index.duplicated()]
    order = list(rows.sort_values(["block", "value"], ascending=[True, False]).index)
    columns = ("value", "low", "high", "o", 0.0), ("kept", "kept_low", "kept_high", "s", 0.4)
    for ax, (heading, table) in zip(axes, tables.items(), strict=True):
        for name, row in table[table.block != REFERENCE].iterrows():
            for column, low, high, marker, down in columns:
                value, other, low, high = row[[column, PUBLISHED_AS[column], low, high]].clip(FLOOR)
                size, y = 5 - 4 * down, order.index(name) + down
                look = {"color": shade(name, row), "marker": marker, "markersize": size}
                plot.intervals(ax, y, other, markerfacecolor="white", **look)
                plot.intervals(ax, y, value, low, high, width=0.6 * size, **look)
        plot.label_rows(ax, map(title, order), size=8, grid=True)
        limits = {"title": heading, "ylim": (len(order), -0.6), "at": {1: "--", 0: ":"}}
        plot.finish(ax, "% of the experts", percent="x", **limits)
    return axes
