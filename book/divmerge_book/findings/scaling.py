"""Findings of the chapter on the number of tasks."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from divmerge_book.figures import title
from divmerge_book.findings import SCORES, bullets, each, listed, span, split, table_of
from divmerge_book.studies.scores import SOURCES, differences
from divmerge_book.studies.task_attribution import COVARIATES, FORECASTS

NEAR = 0.1  # pairs add up where the mean of their sums is this near to the mean loss, in shares
SLACK = 0.02  # of the ratio: merges nearer to the majority class are not below it


def leaders(means: pd.DataFrame, source: str, words: str = "ANP") -> str:
    """The best method at every T, and how far each falls from the smallest to the largest T.

    means: of `scores.over_subsets`, of the score that `words` name.
    """
    wide = 100 * means.pivot(index="method", columns="T", values="value")
    best, low, high = wide.idxmax(), wide.columns.min(), wide.columns.max()
    where = [
        f"{title(method)} at T = {listed(map(str, best.index[best == method]))}"
        for method in best.unique()
    ]
    change = wide[high] - wide[low]
    least, most = change.idxmax(), change.idxmin()
    return (
        f"In {source} the method with the highest mean {words} is {'; '.join(where)}. From "
        f"T = {low} to {high} the mean changes by {change[most]:+.1f} points ({title(most)}) to "
        f"{change[least]:+.1f} ({title(least)}); it is negative for {(change < 0).sum()} of "
        f"{len(change)} methods."
    )


def ahead(scores: pd.DataFrame, means: pd.DataFrame, source: str, statistic: str = "anp") -> str:
    """The best DivMerge (or the best method) against the best of the others, at every T.

    scores: of `scores.by_subset`; means: of `scores.over_subsets`, of the same statistic.
    """
    wide = means.pivot(index="method", columns="T", values="value")
    order = wide.mean(axis=1).sort_values(ascending=False).index
    ours = next((m for m in order if m.startswith("divmerge")), order[0])
    others = [method for method in order if method != ours]
    if not others:
        return f"In {source} there is one method and nothing to compare it with."
    gaps = differences(scores, ours, others, statistic=statistic).set_index(["T", "other"])
    lines = []
    for number, best in wide.loc[others].idxmax().items():
        row = 100 * gaps.loc[(number, best)]
        ends = ["one subset", ""]
        if not pd.isna(row.low):
            ends = [f"[{row.low:+.1f}, {row.high:+.1f}]", f"{row.won:.0f} %"]
        lines.append([str(number), title(best), f"{row.value:+.1f}", *ends])
    heads = ["$T$", "best other", "points", "95 % interval", "subsets ahead"]
    return (
        f"{title(ours)} minus the best of the others by {SCORES[statistic]} in {source}:\n\n"
        f"{table_of(heads, lines)}"
    )


def sources(spreads: pd.DataFrame, source: str) -> str:
    """Root mean square over methods of each standard deviation, by T. spreads: of `scores`."""
    square = spreads.dropna().assign(square=lambda table: table.sd**2)
    wide = 100 * square.pivot_table("square", "T", "source").reindex(columns=list(SOURCES)) ** 0.5
    wide = wide.map("{:.1f}".format).replace("nan", "").rename(columns="over {}".format)
    rows = [[str(n), *row] for n, row in zip(wide.index, wide.to_numpy(), strict=True)]
    table = table_of(["T", *wide], rows)
    return f"Standard deviation in points of ANP, root mean square of methods, {source}:\n\n{table}"


def paired(scores: pd.DataFrame, source: str) -> str:
    """Spread over subsets of a method's ANP, and of the difference of two methods' on the same.

    scores: of `scores.by_subset`. Root mean squares at the smallest T of the first seed.
    """
    smallest = scores["T"].min()
    first = scores[(scores.seed == scores.seed.iloc[0]) & (scores["T"] == smallest)]
    wide = 100 * first.pivot(index="subset", columns="method", values="anp")
    gaps = pd.DataFrame({pair: wide[pair[0]] - wide[pair[1]] for pair in combinations(wide, 2)})
    if len(wide) < 2 or gaps.empty:
        return f"{source[0].upper()}{source[1:]} has too few subsets or methods to compare spreads."
    own, both = (table.var().mean() ** 0.5 for table in (wide, gaps))
    return (
        f"In {source}, at $T = {smallest}$, a method's ANP varies by {own:.1f} points over subsets "
        f"(standard deviation), and the difference of two methods on the same subset by "
        f"{both:.1f}, {'less than' if both < own else 'no less than'} the ANP itself."
    )


def counted_below(table: pd.DataFrame) -> pd.DataFrame:
    """How many tasks of a merge are below the majority class: method by T, mean over merges.

    table: of `scores.ratios`.
    """
    below = (table.kept_margin < 0).groupby([table.method, table["T"], table.seed, table.subset])
    return below.sum().groupby(["method", "T"]).mean().unstack("T")


def below_majority(table: pd.DataFrame, floor: pd.Series, source: str) -> str:
    """How often a merged model is worse than the majority class, and where by most.

    table: of `scores.ratios`; floor: of `scores.floor`. Below: by two points of the ratio or more.
    """
    floors = table.task.map(floor).astype(float)
    below = table.ratio - floors < -SLACK
    share = 100 * below.groupby(table["T"]).mean()
    ends = [f"{share[n]:.0f} % at $T = {n}$" for n in sorted({*share.index[[0, -1]]})]
    text = (
        f"Of all merges and tasks in {source}, {listed(ends)} end two points or more below the "
        f"majority class's ratio."
    )
    if not below.any():
        return f"{text} No merge does worse than that."
    low = table.loc[(table.ratio / floors).idxmin()]
    return (
        f"{text} The furthest below: `{low.task}` in {low.subset.replace('+', ', ')} by "
        f"{title(low.method)}, {100 * low.ratio:.0f} % of its expert where the majority class has "
        f"{100 * floor[low.task]:.0f} %. So a merge can do worse than a constant prediction: the "
        f"task's head receives features that the other task vectors have moved."
    )


def beside(theirs: pd.DataFrame, columns: Mapping[str, str], methods: Sequence[str]) -> str:
    """How the paper's Table 6 changes from T = 3 to 4, and which of its methods are not here.

    columns: the paper's names to ours; methods: those of this chapter's table.
    """
    change, layer = theirs.diff(), ["LL KL", "LL JS"]
    up = [(name, n) for name in theirs for n in theirs.index[change[name] > 0]]
    rises = [f"{name} from {n - 1} to {n}" for name, n in up]
    absent = [name for name, method in columns.items() if method not in set(methods)]
    step = -change.loc[4]
    also = f" Not drawn beside the paper's: {listed(absent)}." if absent else ""
    return (
        f"From $T = 3$ to $4$ the printed values fall by {span(step.drop(layer))} points, those "
        f"of DivMerge per layer by {step[layer].min():.1f} and {step[layer].max():.1f}. They rise "
        f"in (TL: a coefficient per task, LL: per layer): {'; '.join(rises)}.{also}"
    )


def steps(merged: pd.DataFrame, source: str) -> str:
    """How much means over all subsets change from one T to the next, and how single subsets vary.

    merged: of `scores.by_subset`, all subsets of every T of two and more.
    """
    lines = []
    for method, rows in merged.groupby("method", sort=False):
        anp = 100 * rows.set_index("T").anp
        mean = anp.groupby("T").mean()
        middle = mean.index[len(mean) // 2]
        if len(mean) > 1:
            lines.append(
                f"{title(method)}: from one $T$ to the next the mean changes by "
                f"{span(mean.diff().dropna(), sign=True)} points; single subsets of {middle} have "
                f"{span(anp[[middle]], 0)} %"
            )
    return f"Fixed coefficients, all subsets, {source}:\n\n{bullets(lines)}"


def dilution(grid: pd.DataFrame, source: str, column: str = "anp") -> str:
    """How much of the average's loss over T a larger shared coefficient saves.

    grid: means of anp and kept_margin by T, scale and `fixed` (False in the average's rows).
    """
    level = 100 * grid[grid.scale * grid["T"] >= 1].groupby("T")[column].max()
    mean = 100 * grid[~grid.fixed].set_index("T")[column]
    low, high = min(level.index), max(level.index)
    drop, saved = mean[low] - mean[high], level[high] - mean[high]
    text = (
        f"On the subsets merged with several coefficients in {source} the average "
        f"($1/T$) loses {drop:.1f} points of {SCORES[column]} from $T = {low}$ to ${high}$. Of "
        f"coefficients from $1/T$ up, the best has {saved:.1f} points more than $1/T$ at "
        f"$T = {high}$, and {level[low] - mean[low]:.1f} more at $T = {low}$."
    )
    if drop <= 0:
        return f"{text} There is no drop to explain."
    return f"{text} So dilution explains {100 * min(saved / drop, 1):.0f} % of the drop."


def added_up(
    forecasts: Mapping[str, pd.DataFrame], source: str, words: str = "accuracy over the expert's"
) -> str:
    """For which methods the losses of pairs add up at the largest T, on average over tasks.

    forecasts: of `task_attribution.forecasts`, by method; words: for what is lost.
    """
    last = {m: table[table["T"] == table["T"].max()] for m, table in forecasts.items()}
    loss = {m: (rows["sum"].mean(), rows.loss.mean()) for m, rows in last.items() if len(rows)}
    shares = {m: total / lost for m, (total, lost) in loss.items() if lost > 0}
    times = pd.Series(shares, dtype=float)
    if times.empty:
        return f"{source[0].upper()}{source[1:]} merged no three tasks whose pairs it merged too."
    yes, no = split(times.index.map(title), abs(times - 1) <= NEAR)
    return (
        f"Losses of {words} in {source}: at $T = {max(rows['T'].max() for rows in last.values())}$ "
        f"the mean sum over pairs divided by the mean loss is: {each(times)}. Within "
        f"{100 * NEAR:.0f} %, mean losses of pairs add up for: {yes}. They do not for: {no}."
    )


def skilled(skills: pd.DataFrame, source: str) -> str:
    """How much of the losses' variance each forecast explains. skills: of `skill`."""
    if skills.empty:
        return "The subsets of this run are too few to fit the rival forecasts."
    whole = skills[skills["T"] == 0].sort_values("r2", ascending=False)
    wide = whole.pivot_table("r2", "method", "forecast", sort=False)
    lines = [[title(m), *(f"{r2:.2f}" for r2 in row)] for m, *row in wide.itertuples()]
    table = table_of(["method", *map(FORECASTS.get, wide)], lines)
    return f"$R^2$ of forecasts of single losses of single tasks, {source}:\n\n{table}"


def strongest(related: pd.DataFrame, source: str) -> str:
    """The number with the largest rank correlation, by method; related: of `task_attribution`."""
    rho = related.dropna(subset=["rho"]).reset_index(drop=True)
    if rho.empty:
        return f"{source[0].upper()}{source[1:]} has too few subsets of a size for a correlation."
    rows = rho.loc[rho.groupby("method", sort=False).rho.apply(lambda part: part.abs().idxmax())]
    every = rows.itertuples()
    said = [f"{title(r.method)}: *{COVARIATES[r.number]}* ({r.rho:+.2f})" for r in every]
    return f"The number with the largest correlation in {source}, by method: {'; '.join(said)}."


def effect(method: str, table: pd.DataFrame) -> str:
    """Who harms most and who loses most under one method, each with its place in the other order.

    table: of `task_attribution.shapley_values`. Tasks without both numbers are left out: a task
    that does not count in the ANP has no loss of its own.
    """
    rows = 100 * table.set_index("task")[["marginal_effect", "own_change"]].dropna()
    place, count = rows.rank().astype(int), len(rows)
    if count < 2:
        return f"{title(method)}: too few tasks count in the ANP to compare harm and loss"
    bad, hurt = rows.idxmin()
    first, second = rows.marginal_effect.nsmallest(2)
    return (
        f"{title(method)}: adding `{bad}` changes the others most ({first:+.1f} points, the next "
        f"{second:+.1f}) and `{bad}` is number {place.own_change[bad]} of {count} by its own loss; "
        f"`{hurt}` loses most ({-rows.own_change[hurt]:.1f} points) and is number "
        f"{place.marginal_effect[hurt]} by harm"
    )


def effects(tables: Mapping[str, pd.DataFrame], source: str, words: str = "ANP") -> str:
    """`effect` of every method, and how far harm and loss go together; words: of the score."""
    rho = [t.marginal_effect.corr(t.own_change, method="spearman") for t in tables.values()]
    text = f"By {words} in {source}:\n\n{bullets(effect(*item) for item in tables.items())}"
    if known := [value for value in rho if pd.notna(value)]:
        text += f"\n\nRank correlation of harm done and loss: {span(known, 2, sign=True)}."
    return text


def summary(
    means: pd.DataFrame, kept: pd.DataFrame, grid: pd.DataFrame,
    forecasts: Mapping[str, pd.DataFrame], effects: Mapping[str, pd.DataFrame], source: str,
) -> str:  # fmt: skip
    """The chapter's findings, a bullet each; see `leaders`, `dilution`, `added_up` and `effect`."""
    lines = [leaders(means, source), leaders(kept, source, "kept margin"), dilution(grid, source)]
    first = f"Harm and loss by task in {source}. {effect(*next(iter(effects.items())))}."
    return bullets([*lines, added_up(forecasts, source), first])
