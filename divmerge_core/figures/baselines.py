"""The table of all methods, and figures of what accuracy costs; text that says who beats whom."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from pandas.io.formats.style import Styler

from divmerge_core.comparison import PUBLISHED
from divmerge_core.figures import GREEN, title
from divmerge_core.methods import METHODS, parse
from divmerge_core.report import Report

NO_DATA, INPUTS, LABELS = "no data", "unlabelled inputs", "validation labels"
REFERENCE = "reference"
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
    costs["stored"] = costs.stored_bytes / costs.model_bytes
    tried = {fit["method"]: len(fit["search"]) for fit in fits if "search" in fit}
    table = rows.join(costs)
    table["published"] = rows.value.reindex([name + PUBLISHED for name in rows.index]).values
    table["tried"] = table.index.map(tried)
    table = table[[not name.endswith(PUBLISHED) for name in table.index]]
    table["published"] = table.published.fillna(table.value)
    table["block"] = pd.Categorical([block(name) for name in table.index], BLOCKS, ordered=True)
    return table.sort_values(["block", "value"], ascending=[True, False])


def big_table(table: pd.DataFrame) -> pd.DataFrame:
    """A summary as it is read: in %, seconds, MB, and times the size of one model."""
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


def printed(rows: pd.DataFrame, caption: str) -> Styler:
    """A `big_table` in letters small enough for a page's width."""
    small = rows.style.set_caption(caption).set_table_attributes('style="font-size: 70%"')
    return small.set_properties(**{"white-space": "nowrap", "padding": "2px 4px"})


def shade(name: str, row: pd.Series):
    """A method's colour: its block's, or DivMerge's own."""
    return GREEN if name.startswith("divmerge") else HUES[row.block]


def against_cost(ax: Axes, table: pd.DataFrame) -> Axes:
    """ANP against the seconds of one merge (log scale): what accuracy costs.

    table: a `summary`. Filled: one model for all tasks; hollow: several, or routed. The line, whose
    corners are named, is what no faster single model reaches; so is the best hollow point.
    """
    table = table[table.block != REFERENCE].assign(seconds=lambda t: t.seconds.clip(lower=0.02))
    for name, row in table.iterrows():
        fill = shade(name, row) if one_vector(name) else "none"
        ax.scatter(row.seconds, row.value, s=36, facecolors=fill, edgecolors=shade(name, row))
    single = table[[one_vector(name) for name in table.index]]
    single = single.sort_values(["seconds", "value"], ascending=[True, False])
    front = single[single.value > single.value.cummax().shift(fill_value=0)]
    ax.step(front.seconds, front.value, where="post", color="black", linewidth=0.8, zorder=0)
    hollow = table.drop(index=single.index).value
    for name in [*front.index, *([hollow.idxmax()] if len(hollow) else [])]:
        place = {"xytext": (-4, 5), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        ax.annotate(title(name), table.loc[name, ["seconds", "value"]], **place)
    for label, hue in {"DivMerge": GREEN, **HUES}.items():
        ax.scatter([], [], color=hue, s=36, label=label)
    ax.scatter([], [], facecolors="none", edgecolors="black", s=36, label="more than one model")
    ax.set_xscale("log")
    ax.set_xlim(left=table.seconds.min() / 4)  # room for names
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="seconds of one merge", ylabel="ANP, % of the experts")
    ax.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    return ax


def ranking(axes: list[Axes], tables: dict[str, pd.DataFrame]) -> list[Axes]:
    """ANP of every method, a panel per subset; methods in the order of the last, by block.

    tables: a `summary` per panel's title. Filled: options found; hollow: published ones. The bar
    is the 95 % interval; the dashed line is the experts.
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
            ax.plot([row.low, row.high], [y, y], color=hue, linewidth=3, alpha=0.4)
            ax.plot(row.published, y, "o", color=hue, markerfacecolor="white", markersize=5)
            ax.plot(row.value, y, "o", color=hue, markersize=5)
        ax.axvline(1, color="black", linewidth=1, linestyle="--")
        ax.set(title=heading, xlabel="ANP, % of the experts", ylim=(len(order) - 0.5, -0.5))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_yticks(range(len(order)), [title(name) for name in order], fontsize=8)
    return axes


def verdict(report: Report, subset: str, table: pd.DataFrame) -> str:
    """Who beats the best DivMerge on a subset, by how much and at what price.

    table: the report's `summary` of the subset.
    """
    suite = report.rows.suite.iloc[0]
    named = table[table.block != REFERENCE].sort_values("value", ascending=False)
    ours = named[named.index.str.startswith("divmerge")]
    if ours.empty:
        return "DivMerge is not among the methods of this table."
    best, lines = ours.iloc[0], []
    sampled = report.sampled(suite, subset)
    for name, row in named[named.value > best.value].iterrows():
        apart = sampled.estimate(name, best.name)
        gap, (low, high) = apart.value, apart.interval()
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
