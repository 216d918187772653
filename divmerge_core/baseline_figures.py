"""The table of all methods, and figures of what accuracy costs; text that says who beats whom."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from divmerge_core.comparison import PUBLISHED
from divmerge_core.figures import GREEN, title
from divmerge_core.methods import METHODS, parse
from divmerge_core.report import Report

NO_DATA, INPUTS, LABELS = "no data", "unlabelled inputs", "validation labels"
REFERENCE = "reference"
BLOCKS = (REFERENCE, NO_DATA, INPUTS, LABELS)
HUES = dict(zip((NO_DATA, INPUTS, LABELS), sns.color_palette("colorblind"), strict=False))


def block(spec: str) -> str:
    """What a method looks at, beside the rows on which everyone's options are chosen."""
    if spec in ("expert", "base"):
        return REFERENCE
    needs = METHODS.facts[parse(spec.removesuffix(PUBLISHED))[0]]["needs"]
    return {"unlabelled inputs": INPUTS, "a validation score": LABELS}.get(needs, NO_DATA)


def one_vector(spec: str) -> bool:
    """Whether a method gives one model for all tasks; others answer by task or input."""
    return METHODS.facts[parse(spec.removesuffix(PUBLISHED))[0]].get("returns") != "predictor"


def among(report: Report, subset: str, *methods: str) -> Report:
    """The report of one subset, and of these methods beside the experts where some are named."""
    rows = report.rows[report.rows.subset == subset]
    if methods:
        rows = rows[rows.method.isin(["expert", *methods])]
    return Report(rows, report.fits, report.provenance)


def summary(report: Report, subset: str) -> pd.DataFrame:
    """A row per method on a subset: scores, and costs averaged over seeds.

    value, low, high: the ANP with the options that the search found, and its 95 % interval;
    published: the ANP with the published ones; worst: the smallest ratio; tried: how many
    candidates were scored; seconds of one merge; peak_bytes on top of the problem; stored: what is
    kept over the size of one model; inputs: unlabelled ones looked at; calls of the score;
    answer_ms per test row. Sorted by block, and by ANP within it.
    """
    part = among(report, subset)
    rows = part.intervals().set_index("method")
    rows["worst"] = part.intervals(statistic="worst", draws=2).set_index("method").value
    fits = [fit for fit in report.fits if fit["subset"] == subset]
    costs = pd.DataFrame([{"method": fit["method"], **fit["cost"]} for fit in fits])
    costs = costs.groupby("method").mean()
    size = costs.stored_bytes.min()  # one model; nothing smaller answers
    costs["stored"] = costs.stored_bytes / size
    tried = {fit["method"]: len(fit["search"]) for fit in fits if "search" in fit}
    table = rows.join(costs)
    table["published"] = rows.value.reindex([name + PUBLISHED for name in rows.index]).values
    table["tried"] = table.index.map(tried)
    table = table[[not name.endswith(PUBLISHED) for name in table.index]]
    table["published"] = table.published.fillna(table.value)
    table["block"] = pd.Categorical([block(name) for name in table.index], BLOCKS, ordered=True)
    return table.sort_values(["block", "value"], ascending=[True, False])


def big_table(report: Report, subset: str) -> pd.DataFrame:
    """The summary as it is read: in %, seconds, MB, and times the size of one model."""
    table = summary(report, subset)
    kept = table[table.index != "base"]

    def percent(values: pd.Series) -> list[str]:
        return [f"{100 * value:.1f}" for value in values]

    def cost(values: pd.Series, form: str, factor: float = 1.0) -> list[str]:
        return ["" if np.isnan(value) else format(factor * value, form) for value in values]

    spans = [f" [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in kept.itertuples()]
    return pd.DataFrame(
        {
            "looks at": kept.block.astype(str),
            "method": [title(name) for name in kept.index],
            "ANP, %": [
                value + span for value, span in zip(percent(kept.value), spans, strict=True)
            ],
            "published, %": percent(kept.published),
            "worst, %": percent(kept.worst),
            "tried": cost(kept.tried, ".0f"),
            "merge, s": cost(kept.seconds, ".1f"),
            "peak, MB": cost(kept.peak_bytes, ".0f", 1e-6),
            "stored, models": cost(kept.stored, ".2f"),
            "inputs": cost(kept.inputs, ".0f"),
            "score calls": cost(kept.calls, ".0f"),
        }
    ).set_index(["looks at", "method"])


def against_cost(ax: Axes, table: pd.DataFrame) -> Axes:
    """ANP against the seconds of one merge (log scale): what accuracy costs.

    table: a `summary`. Filled: one model for all tasks; hollow: several, or routed. The front of
    what nothing faster reaches, among single models, is drawn as a line.
    """
    table = table[table.block != REFERENCE].assign(seconds=lambda t: t.seconds.clip(lower=0.05))
    for name, row in table.iterrows():
        shade = GREEN if name.startswith("divmerge") else HUES[row.block]
        fill = shade if one_vector(name) else "none"
        ax.scatter(row.seconds, row.value, s=36, facecolors=fill, edgecolors=shade, zorder=3)
    single = table[[one_vector(name) for name in table.index]].sort_values("seconds")
    front = single[single.value > single.value.cummax().shift(fill_value=0)]
    ax.step(front.seconds, front.value, where="post", color="black", linewidth=0.8, zorder=2)
    ours = table.index[table.index.str.startswith("divmerge")]
    named = [name for name in table.index if name in {*front.index, *ours}]
    margin_labels(ax, table.loc[named, ["seconds", "value"]])
    for label, shade in {"DivMerge": GREEN, **HUES}.items():
        ax.scatter([], [], color=shade, s=36, label=label)
    ax.scatter([], [], facecolors="none", edgecolors="black", s=36, label="more than one model")
    ax.set_xscale("log")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="seconds of one merge", ylabel="ANP, % of the experts")
    ax.legend(fontsize=8, loc="lower right")
    return ax


def margin_labels(ax: Axes, points: pd.DataFrame, *, gap: float = 0.055) -> None:
    """Names of points (index) in the right margin, with a thin line to each (x, y).

    gap: the least distance of two names, as a share of the axis; call it after the last limit.
    """
    low, high = ax.get_ylim()
    heights = []
    for value in points.iloc[:, 1].sort_values(ascending=False):
        height = (value - low) / (high - low)
        heights.append(min(height, heights[-1] - gap) if heights else height)
    short_by = max(0.0, -heights[-1]) if heights else 0.0
    order = points.iloc[:, 1].sort_values(ascending=False).index
    for name, height in zip(order, heights, strict=True):
        ax.annotate(
            title(name),
            points.loc[name],
            xytext=(1.03, height + short_by),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5},
        )


def ranking(axes: list[Axes], tables: dict[str, pd.DataFrame]) -> list[Axes]:
    """ANP of every method, a panel per subset; methods in the order of the last, by block.

    tables: a `summary` per panel's title. Filled: options found; hollow: published ones. The bar
    is the 95 % interval; the dashed line is the experts.
    """
    last = [*tables.values()][-1]
    order = list(last[last.block != REFERENCE].index)
    for table in tables.values():  # methods that take fewer experts
        order += [n for n in table.index if n not in order and table.block[n] != REFERENCE]
    for ax, (heading, table) in zip(axes, tables.items(), strict=True):
        for y, name in enumerate(order):
            if name not in table.index:
                continue
            row = table.loc[name]
            shade = GREEN if name.startswith("divmerge") else HUES[row.block]
            ax.plot([row.low, row.high], [y, y], color=shade, linewidth=3, alpha=0.4)
            ax.plot(row.published, y, "o", color=shade, markerfacecolor="white", markersize=5)
            ax.plot(row.value, y, "o", color=shade, markersize=5)
        ax.axvline(1, color="black", linewidth=1, linestyle="--")
        ax.set(title=heading, xlabel="ANP, % of the experts", ylim=(len(order) - 0.5, -0.5))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_yticks(range(len(order)), [title(name) for name in order], fontsize=8)
    return axes


def verdict(report: Report, subset: str) -> str:
    """Who beats the best DivMerge on a subset, by how much and at what price; from the report."""
    suite, table = report.rows.suite.iloc[0], summary(report, subset)
    named = table[table.block != REFERENCE].sort_values("value", ascending=False)
    ours = named[named.index.str.startswith("divmerge")]
    best, lines = ours.iloc[0], []
    for name, row in named[named.value > best.value].iterrows():
        pair = among(report, subset, name, best.name)
        gap, low, high = pair.difference(suite, subset, name, best.name)
        sure = "" if low > 0 else ", an interval that holds 0"
        price = [f"{row.seconds:.1f} s against {best.seconds:.1f} s", f"looks at {row.block}"]
        if not one_vector(name):
            price.append(f"no single model: {row.stored:.2f} models stored")
        lines.append(
            f"- {title(name)}: {100 * gap:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]{sure} "
            f"({'; '.join(price)})"
        )
    place = 1 + list(named.index).index(best.name)
    head = (
        f"The best DivMerge is {title(best.name)}, number {place} of {len(named)} with "
        f"{100 * best.value:.1f} %."
    )
    return "\n".join([head, "", *(lines or ["No other method has a higher ANP."])])
