"""The table of all methods, their ranking, and figures of what accuracy costs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from pandas.io.formats.style import Styler

from divmerge_book.evaluation.benchmark import PUBLISHED
from divmerge_book.evaluation.report import Report
from divmerge_book.figures import FLOOR, GREEN, side_by_side, title
from divmerge_core.methods import METHODS, parse

NO_DATA, INPUTS, LABELS = "no data", "unlabelled inputs", "validation labels"
REFERENCE = "reference"
Panels = Sequence[Axes] | np.ndarray  # as `plt.subplots` gives them
SCORES = {"value": "ANP", "kept": "kept margin"}  # columns of a `summary`
PUBLISHED_AS = {"value": "published", "kept": "kept_published"}
BLOCKS = (REFERENCE, NO_DATA, INPUTS, LABELS)
HUES = {b: sns.color_palette("colorblind")[n] for b, n in ((NO_DATA, 7), (INPUTS, 1), (LABELS, 4))}


def block(spec: str) -> str:
    """What a method looks at, beside the rows on which everyone's options are chosen."""
    if spec in ("expert", "base"):
        return REFERENCE
    needs = METHODS.facts[parse(spec.removesuffix(PUBLISHED))[0]]["needs"]
    return {"unlabelled inputs": INPUTS, "a validation score": LABELS}.get(
        needs.partition(",")[0], NO_DATA
    )


def one_vector(spec: str) -> bool:
    """Whether a method gives one model for all tasks; others answer by task or input."""
    return METHODS.facts[parse(spec.removesuffix(PUBLISHED))[0]].get("returns") != "predictor"


def among(report: Report, subset: str) -> Report:
    """The report of one subset."""
    return Report(report.rows[report.rows.subset == subset], report.fits, report.provenance)


def summary(report: Report, subset: str) -> pd.DataFrame:
    """A row per method on a subset: scores, and costs averaged over seeds.

    value, low, high: the ANP with the options that the search found, and its 95 % interval; kept,
    kept_low, kept_high: the kept margin; published, kept_published: both with the published
    options; below: counted tasks below the majority class, out of `counted`; worst: the smallest
    ratio; tried: how many candidates were scored; seconds of one merge; peak_bytes on top of the
    problem; stored: what is kept over the size of one model; inputs: unlabelled ones looked at;
    calls of the score; answer_ms per test row. Sorted by block, and by ANP within it.
    """
    part = among(report, subset)
    rows = side_by_side(part, subset).set_index("method")
    rows["worst"] = part.intervals(statistic="worst", draws=2).set_index("method").value
    fits = [fit for fit in report.fits if fit["subset"] == subset]
    costs = pd.DataFrame([{"method": fit["method"], **fit["cost"]} for fit in fits])
    costs = costs.groupby("method").mean()
    costs["stored"] = costs.stored_bytes / costs.model_bytes
    tried = {fit["method"]: len(fit["search"]) for fit in fits if "search" in fit}
    table = rows.join(costs)
    names = [name + PUBLISHED for name in rows.index]
    for column, published in PUBLISHED_AS.items():
        found = pd.Series(rows[column].reindex(names).values, rows.index)
        table[published] = found.fillna(rows[column])
    table["tried"] = table.index.map(tried)
    table = table[[not name.endswith(PUBLISHED) for name in table.index]]
    table["block"] = pd.Categorical([block(name) for name in table.index], BLOCKS, ordered=True)
    return table.sort_values(["block", "value"], ascending=[True, False])


def big_table(table: pd.DataFrame) -> pd.DataFrame:
    """A summary as it is read: in %, seconds, MB, and times the size of one model."""
    kept = table[table.index != "base"]

    def percent(values: pd.Series) -> list[str]:
        return [f"{100 * value:.1f}" for value in values]

    def spans(names: list[str]) -> list[str]:
        return ["{:.1f} [{:.1f}, {:.1f}]".format(*row) for row in 100 * kept[names].to_numpy()]

    def cost(values: pd.Series, form: str, factor: float = 1.0) -> list[str]:
        return ["" if np.isnan(value) else format(factor * value, form) for value in values]

    return pd.DataFrame(
        {
            "looks at": kept.block.astype(str),
            "method": [title(name) for name in kept.index],
            "ANP, %": spans(["value", "low", "high"]),
            "published, %": percent(kept.published),
            "kept margin, %": spans(["kept", "kept_low", "kept_high"]),
            "published kept, %": percent(kept.kept_published),
            "below majority": [f"{r.below} of {r.counted}" for r in kept.itertuples()],
            "worst, %": percent(kept.worst),
            "tried": cost(kept.tried, ".0f"),
            "merge, s": cost(kept.seconds, ".1f"),
            "peak, MB": cost(kept.peak_bytes, ".0f", 1e-6),
            "stored, models": cost(kept.stored, ".2f"),
            "inputs": cost(kept.inputs, ".0f"),
            "score calls": cost(kept.calls, ".0f"),
        }
    ).set_index(["looks at", "method"])


def printed(rows: pd.DataFrame, caption: str) -> Styler:
    """A `big_table` in letters small enough for a page's width."""
    small = rows.style.set_caption(caption).set_table_attributes('style="font-size: 70%"')
    return small.set_properties(**{"white-space": "nowrap", "padding": "2px 4px"})


def shade(name: str, row: pd.Series):
    """A method's colour: its block's, or DivMerge's own."""
    return GREEN if name.startswith("divmerge") else HUES[row.block]


def against_cost(axes: Panels, table: pd.DataFrame) -> Panels:
    """Scores against the seconds of one merge (log scale): ANP on one Axes, kept margin on another.

    table: a `summary`. Filled: one model for all tasks; hollow: several, or routed. The line, whose
    corners are named, is what no faster single model reaches; so is the best hollow point. A kept
    margin below FLOOR stands at it.
    """
    table = table[table.block != REFERENCE].assign(seconds=lambda t: t.seconds.clip(lower=0.02))
    for ax, (column, words) in zip(axes, SCORES.items(), strict=True):
        front(ax, table.assign(score=table[column].clip(lower=FLOOR)))
        ax.set(ylabel=f"{words}, % of the experts")
    for label, hue in {"DivMerge": GREEN, **HUES}.items():
        axes[-1].scatter([], [], color=hue, s=36, label=label)
    hollow = {"facecolors": "none", "edgecolors": "black"}
    axes[-1].scatter([], [], s=36, label="more than one model", **hollow)
    axes[-1].set_xlabel("seconds of one merge")
    axes[-1].legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return axes


def front(ax: Axes, table: pd.DataFrame) -> None:
    """Points of score and seconds, and the line of what no faster single model reaches."""
    for name, row in table.iterrows():
        fill = shade(name, row) if one_vector(name) else "none"
        ax.scatter(row.seconds, row.score, s=36, facecolors=fill, edgecolors=shade(name, row))
    single = table[[one_vector(name) for name in table.index]]
    single = single.sort_values(["seconds", "score"], ascending=[True, False])
    best = single[single.score > single.score.cummax().shift(fill_value=-np.inf)]
    ax.step(best.seconds, best.score, where="post", color="black", linewidth=0.8, zorder=0)
    hollow = table.drop(index=single.index).score
    for name in [*best.index, *([hollow.idxmax()] if len(hollow) else [])]:
        place = {"xytext": (-4, 5), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        ax.annotate(title(name), table.loc[name, ["seconds", "score"]], **place)
    ax.set_xscale("log")
    ax.set_xlim(left=table.seconds.min() / 4)  # room for names
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def ranking(axes: Panels, tables: dict[str, pd.DataFrame]) -> Panels:
    """ANP and kept margin of every method, a panel per subset; in the last one's order, by block.

    tables: a `summary` per panel's title. Circles: ANP; squares below them: kept margin, at FLOOR
    where it is lower. Filled: options found; hollow: published ones. Bars are 95 % intervals; the
    lines are the experts (dashed) and, for kept margins, the majority class (dotted).
    """
    rows = pd.concat([*tables.values()][::-1])  # the last panel's first
    rows = rows[(rows.block != REFERENCE) & ~rows.index.duplicated()]
    order = list(rows.sort_values(["block", "value"], ascending=[True, False]).index)
    for ax, (heading, table) in zip(axes, tables.items(), strict=True):
        for y, name in enumerate(order):
            if name not in table.index:
                continue
            row = table.loc[name]
            hue = shade(name, row)
            both = ("value", "low", "high", "o", 0.0), ("kept", "kept_low", "kept_high", "s", 0.4)
            for column, low, high, marker, down in both:
                ends, size = row[[low, high]].clip(lower=FLOOR), 5 - 4 * down
                ax.plot(ends, [y + down] * 2, color=hue, linewidth=0.6 * size, alpha=0.4)
                for value, fill in ((row[PUBLISHED_AS[column]], "white"), (row[column], hue)):
                    style = {"color": hue, "markerfacecolor": fill, "markersize": size}
                    ax.plot(max(value, FLOOR), y + down, marker, **style)
        ax.axvline(1, color="black", linewidth=1, linestyle="--")
        ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
        ax.set(title=heading, xlabel="% of the experts", ylim=(len(order), -0.6))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_yticks(range(len(order)), [title(name) for name in order], fontsize=8)
    return axes
