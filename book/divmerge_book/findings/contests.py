"""Who is ahead of whom, by ANP and by kept margin, in sentences made of a Report."""

from collections.abc import Mapping, Sequence

import pandas as pd

from divmerge_book.evaluation.benchmark import PUBLISHED
from divmerge_book.evaluation.report import Report, Sampled
from divmerge_book.figures import largest, score_intervals, title
from divmerge_book.figures.baselines import PUBLISHED_AS, REFERENCE, is_single_model
from divmerge_book.figures.baselines import SCORES as COLUMNS
from divmerge_book.findings import SCORES, bullets, listed, span


def sampled(report: Report, subset: str) -> dict[str, Sampled]:
    """By score: what its paired differences on a subset are drawn from."""
    suite = report.rows[report.rows.subset == subset].suite.iloc[0]
    return {name: report.sampled(suite, subset, statistic=name) for name in SCORES}


def gap(drawn: Mapping[str, Sampled], pairs: Mapping[str, tuple[str, str]]) -> str:
    """`+1.0 points of ANP [-0.5, 2.5] and ...`: first minus second of the pair of every score."""
    said = []
    for name, (one, other) in pairs.items():
        found = drawn[name].estimate(one, other)
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


def standing(report: Report, source: str) -> str:
    """By both scores: the best DivMerge of the largest merge against the best other single model.

    Methods that answer with more than one model are left out. Ahead or behind where the paired
    95 % interval excludes 0; else not significantly different.
    """
    rows = largest(report.rows)
    suite, subset = rows.suite.iloc[0], rows.subset.iloc[0]
    if not report.counted(suite):
        return f"In {source} no task counts: no expert is far enough above the majority class."
    table = score_intervals(report, subset).set_index("method")
    searched = ~table.index.str.endswith(PUBLISHED)
    table = table[searched & ~table.index.isin(("expert", "base"))]
    table = table[[is_single_model(method) for method in table.index]]
    ours = table.index.str.startswith("divmerge")
    if not ours.any() or ours.all():
        return f"In {source} there is no DivMerge to compare with another method."
    drawn, lines = sampled(report, subset), []
    for column, name in zip(COLUMNS, SCORES, strict=True):
        best, other = table[ours][column].idxmax(), table[~ours][column].idxmax()
        least, most = drawn[name].estimate(best, other).interval()
        verdict = "is ahead of" if least > 0 else "is behind" if most < 0 else ""
        lines.append(
            f"by {SCORES[name]}, {title(best)} ({100 * table[column][best]:.1f} %) "
            f"{verdict or 'does not differ significantly from'} the best other single model, "
            f"{title(other)} ({100 * table[column][other]:.1f} %): "
            f"{gap(drawn, {name: (best, other)})}"
        )
    return (
        f"On {suite} in {source}, T = {subset.count('+') + 1}: {'; '.join(lines)}. {lowest(table)}"
    )


def lowest(table: pd.DataFrame) -> str:
    """How many methods are below the majority class on a counted task, and which on most."""
    rows = table[table.below > 0].sort_values("below", ascending=False, kind="stable")
    if rows.empty:
        return "No method is below the majority class on a counted task."
    most = [f"{title(row.Index)} ({row.below} of {row.counted})" for row in rows[:3].itertuples()]
    return (
        f"{len(rows)} of {len(table)} methods are below the majority class on one counted task or "
        f"more; most tasks: {listed(most)}."
    )


# --- all baselines --------------------------------------------------------------------------------


def verdict(report: Report, subset: str, table: pd.DataFrame) -> str:
    """Who beats the best DivMerge on a subset by either score, by how much and at what price.

    table: the report's `baselines.summary` of the subset.
    """
    named = table[table.block != REFERENCE]
    ours = named.index.str.startswith("divmerge")
    if not ours.any():
        return "DivMerge is not among the methods of this table."
    drawn, best, head, ahead = sampled(report, subset), {}, [], pd.Series(False, named.index)
    for column, name in zip(COLUMNS, SCORES, strict=True):
        order = named[column].sort_values(ascending=False)
        best[name] = named[ours][column].idxmax()
        ahead |= named[column] > named[column][best[name]]
        head.append(
            f"By {SCORES[name]} the best DivMerge is {title(best[name])}, number "
            f"{1 + list(order.index).index(best[name])} of {len(order)} with "
            f"{100 * order[best[name]]:.1f} %."
        )
    first, lines = named.loc[best["anp"]], []
    for method, row in named[ahead].sort_values("value", ascending=False).iterrows():
        price = [f"{row.seconds:.1f} s against {first.seconds:.1f} s", f"looks at {row.block}"]
        if not is_single_model(method):
            price.append(f"no single model: {row.stored:.2f} models stored")
        pairs = {name: (method, other) for name, other in best.items()}
        lines.append(f"{title(method)}: {gap(drawn, pairs)} ({'; '.join(price)})")
    none = "No other method has a higher ANP or kept margin."
    return f"{' '.join(head)}\n\n{bullets(lines) or none}"


def by_access(table: pd.DataFrame, source: str) -> str:
    """Whether what a method looks at or which method it is decides more, of single models.

    table: a `baselines.summary`. Compares the standard deviation of the blocks' means with that of
    methods within their block (root mean square), and names the best of each block.
    """
    rows = table[table.block != REFERENCE]
    rows = rows[[is_single_model(name) for name in rows.index]]
    groups = rows.assign(block=rows.block.astype(str)).groupby("block", sort=False)
    if len(groups) < 2:
        return f"In {source} all single models look at the same data."
    said = []
    for column, words in COLUMNS.items():
        best = groups[column].idxmax()
        named = [
            f"{title(m)} ({100 * rows[column][m]:.1f} %; {block})" for block, m in best.items()
        ]
        between = 100 * groups[column].mean().std()
        within = 100 * ((rows[column] - groups[column].transform("mean")) ** 2).mean() ** 0.5
        word = "more" if between > within else "less"
        said.append(
            f"By {words} the best are {listed(named)}; data access matters {word} than the choice "
            f"of the method within it (standard deviations of {between:.1f} and {within:.1f} "
            "points)."
        )
    return f"Single models in {source}. {' '.join(said)}"


def searching(table: pd.DataFrame, source: str) -> str:
    """What the search is worth by method, beside the distance of neighbours in the ranking.

    table: a `baselines.summary`. Only methods whose search scored more than one candidate.
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
    """The findings of the chapter on all baselines, a bullet each.

    table: the `baselines.summary` of the report's largest merge.
    """
    return bullets([by_access(table, source), searching(table, source), standing(report, source)])
