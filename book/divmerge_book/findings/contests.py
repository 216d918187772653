"""Findings on the ranking of methods by ANP and by kept margin, from a Report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from divmerge_book.evaluation.benchmark import PUBLISHED
from divmerge_book.evaluation.report import Report, Sampled, caption
from divmerge_book.figures import largest, ranking, score_intervals, task_table, title
from divmerge_book.figures.baselines import PUBLISHED_AS, REFERENCE, is_single_model, single_models
from divmerge_book.figures.baselines import SCORES as COLUMNS
from divmerge_book.findings import SCORES, bullets, listed, span, table_of

COLUMN_OF = dict(zip(SCORES, COLUMNS, strict=True))  # of a `summary`, by score


def sampled(report: Report, subset: str) -> dict[str, Sampled]:
    """By score: what its paired differences on a subset are drawn from."""
    suite = report.rows[report.rows.subset == subset].suite.iloc[0]
    return {name: report.sampled(suite, subset, statistic=name) for name in SCORES}


def gap(drawn: Mapping[str, Sampled], pairs: Mapping[str, tuple[str, str]]) -> str:
    """`+1.0 points of ANP [-0.5, 2.5] and ...`: first minus second of the pair of every score."""
    said = []
    for name, pair in pairs.items():
        found = drawn[name].estimate(*pair)
        low, high = found.interval()
        sure = "" if low > 0 or high < 0 else " (includes 0)"
        said.append(
            f"{100 * found.value:+.1f} points of {SCORES[name]} "
            f"[{100 * low:+.1f}, {100 * high:+.1f}]{sure}"
        )
    return " and ".join(said)


def gaps(report: Report, subset: str, methods: Sequence[str], others: Sequence[str]) -> str:
    """A line per method and other: the paired differences of both scores, with 95 % intervals."""
    drawn = sampled(report, subset)
    return bullets(
        f"{title(one)} minus {title(other)}: {gap(drawn, dict.fromkeys(SCORES, (one, other)))}."
        for one in methods
        for other in others
        if one != other
    )


def by_task(report: Report, subset: str, ours: str, other: str) -> str:
    """The kept margin of one method less another's on every counted task, the largest loss first.

    Each is a mean over seeds, with the lowest and the highest seed where there are several.
    """
    found = report.against_experts().query("subset == @subset and counted")
    table = found.pivot_table("kept_margin", ["task", "seed"], "method", sort=False)
    gains = (100 * (table[ours] - table[other])).groupby(level="task")
    means, said = gains.mean().sort_values(), []
    for task, mean in means.items():
        own = gains.get_group(task)
        ends = f" ({round(own.min()):+d} to {round(own.max()):+d})" if len(own) > 1 else ""
        said.append(f"`{task}` {round(mean):+d}{ends}")
    behind = listed([f"`{task}`" for task in means.index[means.round() < 0]], "no task")
    experts = found[found.method == "expert"].groupby("task")[["value", "floor"]].mean()
    least = (100 * (experts.value - experts.floor)).nsmallest(2)
    few = listed([f"`{task}` ({gap:.1f} points)" for task, gap in least.items()])
    return (
        f"{title(ours)} minus {title(other)} by task, in points of kept margin as a mean over "
        f"seeds (lowest to highest seed): {', '.join(said)}. It is behind on {behind}. "
        f"Experts are least above the majority class on {few}; the less, the fewer rows "
        "decide a kept margin."
    )


def stored(file: Path) -> Report | None:
    """The Report in a file; None where there is no such file, as where only the package is."""
    return Report.load(file) if file.is_file() else None


def account(report: Report | None, ours: str) -> str:
    """Where a Report's numbers come from, its `standing`, and one method beside others.

    The others are DivMerge per layer, TSV-M and the best single model that is no DivMerge, against
    which both scores are compared, with the last task by task. Accuracies by task follow.
    """
    if report is None:
        return "Not measured here."
    subset = largest(report.rows).subset.iloc[0]
    table = single_models(ranking(report).set_index("method").drop(["expert", "base"]))
    rival = next(name for name in table.index if not name.startswith("divmerge"))
    others = [m for m in dict.fromkeys(("divmerge/layer", "tsv_m", rival)) if m in table.index]
    shares = (100 * task_table(report, subset)).map("{:.1f}".format).rename_axis("accuracy, %")
    parts = [f"*{caption(report)}.*", standing(report, "the stored run")]
    parts += [gaps(report, subset, [ours], others), by_task(report, subset, ours, rival)]
    shares = shares.reset_index()
    return "\n\n".join([*parts, table_of([*shares], shares.to_numpy())])


def standing(report: Report, source: str) -> str:
    """By both scores: the best DivMerge of the largest merge against the best other single model.

    Methods that answer with more than one model are left out. Ahead or behind where the paired
    95 % interval excludes 0; else not significantly different.
    """
    suite, subset = largest(report.rows)[["suite", "subset"]].iloc[0]
    if not report.counted(suite):
        return f"In {source} no task counts: no expert is far enough above the majority class."
    table = score_intervals(report, subset).set_index("method").drop(["expert", "base"])
    table = single_models(table[~table.index.str.endswith(PUBLISHED)])
    ours = table.index.str.startswith("divmerge")
    if not ours.any() or ours.all():
        return f"In {source} there is no DivMerge, or no single model of another method."
    drawn, lines = sampled(report, subset), []
    for name, column in COLUMN_OF.items():
        value = 100 * table[column]
        best, other = value[ours].idxmax(), value[~ours].idxmax()
        least, most = drawn[name].estimate(best, other).interval()
        verdict = "is ahead of" if least > 0 else "is behind" if most < 0 else ""
        lines.append(
            f"by {SCORES[name]}, {title(best)} ({value[best]:.1f} %) "
            f"{verdict or 'does not differ significantly from'} the best other single model, "
            f"{title(other)} ({value[other]:.1f} %): {gap(drawn, {name: (best, other)})}"
        )
    count, some = subset.count("+") + 1, len(report.counted(suite))
    few = f" ({some} counted)" if some < count else ""
    return f"On {suite} in {source}, T = {count}{few}: {'; '.join(lines)}. {lowest(table)}"


def lowest(table: pd.DataFrame) -> str:
    """How many methods are below the majority class on a counted task, and which on most."""
    if not (most := table.below.max()):
        return "No method is below the majority class on a counted task."
    worst = listed(map(title, table.index[table.below == most]))
    return (
        f"{(table.below > 0).sum()} of {len(table)} methods are below the majority class on at "
        f"least one counted task; {worst} on most, {most} of {table.counted.max()}."
    )


# --- all baselines: table is a `baselines.summary` ------------------------------------------------
def verdict(report: Report, subset: str, table: pd.DataFrame) -> str:
    """A table of who beats the best DivMerge on a subset by either score, and at what price."""
    named = table[table.block != REFERENCE]
    ours = named.index.str.startswith("divmerge")
    if not ours.any():
        return "DivMerge is not among the methods of this table."
    drawn, best, head, ahead = sampled(report, subset), {}, [], pd.Series(False, named.index)
    for name, column in COLUMN_OF.items():
        value = 100 * named[column].sort_values(ascending=False)
        best[name] = value.index[value.index.str.startswith("divmerge")][0]
        ahead |= value > value[best[name]]
        head.append(
            f"By {SCORES[name]} the best DivMerge is {title(best[name])}, number "
            f"{1 + value.index.get_loc(best[name])} of {len(value)} with {value[best[name]]:.1f} %."
        )
    first, lines = named.seconds[best["anp"]], []
    for method, row in named[ahead].sort_values("value", ascending=False).iterrows():
        cells = [
            gap(drawn, {name: (method, other)}).replace(f"points of {SCORES[name]} ", "")
            for name, other in best.items()
        ]
        stored = "1" if is_single_model(method) else f"{row.stored:.2f}"
        lines.append([title(method), *cells, f"{row.seconds:.1f}", row.block, stored])
    if not lines:
        return f"{' '.join(head)}\n\nNo other method has a higher ANP or kept margin."
    heads = ("method", *(f"{words}, points" for words in SCORES.values()))
    rows = table_of([*heads, "merge, s", "data used", "models stored"], lines)
    return f"{' '.join(head)} {title(best['anp'])} takes {first:.1f} s.\n\n{rows}"


def by_access(table: pd.DataFrame, source: str) -> str:
    """Whether data access or the choice of the method within it matters more, of single models.

    Compares the standard deviation of the blocks' means with that of methods within their block
    (root mean square), and names the best of each block.
    """
    rows = single_models(table[table.block != REFERENCE])
    groups = rows.assign(block=rows.block.astype(str)).groupby("block", sort=False)
    if len(groups) < 2 or groups.size().max() < 2:
        return f"In {source} all single models look at the same data, or each at its own."
    said = []
    for column, words in COLUMNS.items():
        best = [
            f"{title(method)} ({100 * rows[column][method]:.1f} %; {block})"
            for block, method in groups[column].idxmax().items()
        ]
        between = 100 * groups[column].mean().std()
        within = 100 * ((rows[column] - groups[column].transform("mean")) ** 2).mean() ** 0.5
        said.append(
            f"By {words} the best are {listed(best)}; in this table data "
            f"access matters {'more' if between > within else 'less'} than the method within it "
            f"(standard deviations of {between:.1f} and {within:.1f} points)."
        )
    return f"Single models in {source}. {' '.join(said)}"


def searching(table: pd.DataFrame, source: str) -> str:
    """What the search is worth by method, beside the distance of neighbours in the ranking.

    Only methods whose search scored more than one candidate.
    """
    rows = table[(table.block != REFERENCE) & (table.tried > 1)]
    if len(rows) < 2:
        return f"{source[0].upper()}{source[1:]} made no search for two methods or more."
    said = []
    for column, words in COLUMNS.items():
        gain = 100 * (rows[column] - rows[PUBLISHED_AS[column]])
        step = 100 * rows[column].sort_values().diff().median()
        said.append(
            f"changes the {words} by {span(gain, sign=True)} points (most: "
            f"{title(gain.idxmax())}), by more than the median distance of neighbours in the "
            f"ranking ({step:.1f}) for {(gain.abs() > step).sum()} of {len(rows)} methods"
        )
    return f"In {source} the search {'; it '.join(said)}."


def summary(report: Report, table: pd.DataFrame, source: str) -> str:
    """The findings of the chapter on all baselines, a bullet each; table: of the largest merge."""
    return bullets([by_access(table, source), searching(table, source), standing(report, source)])
