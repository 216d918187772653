"""What weights, costs, planes and lines say of interference, in sentences."""

import pandas as pd

from divmerge_book.evaluation.statistics import format_correlation
from divmerge_book.figures import title
from divmerge_book.figures.conflict import place_label
from divmerge_book.findings import listed, missing, scores, span
from divmerge_book.studies.pairwise_interference import RULES, matrix

COIN = 0.05  # sign conflicts this near to one half are called near a coin's


def counted(pairs: pd.DataFrame, idle: pd.DataFrame, source: str) -> str:
    """How the mean sign conflict and cosine change when idle rows leave the count.

    pairs, idle: tables of `placement.survey`.
    """
    mean = pairs.groupby("counted", sort=False)[["conflict", "cosine"]].mean()
    share = 100 * idle.groupby("task", sort=False)[["parameters", "length"]].mean()
    touched = mean.conflict["touched"]
    near = "near" if abs(touched - 0.5) <= COIN else "not near"
    return (
        f"In {source}, {span(share.parameters, 0)} % of a task vector's entries only shrank; they "
        f"hold at most {share.length.max():.3f} % of its squared length. The mean sign conflict is "
        f"{mean.conflict['all']:.2f} over all parameters and {touched:.2f} without idle rows, "
        f"{near} a coin's one half. The mean cosine, which weighs entries by their size, goes from "
        f"{mean.cosine['all']:.3f} to {mean.cosine['touched']:.3f}."
    )


def lengths(half: pd.DataFrame, table: pd.DataFrame, source: str) -> str:
    """The closest and the furthest pair, and where task vectors are longest.

    half: cosines, task by partner; table: `lengths` of `placement.survey`.
    """
    ranked = half.stack().dropna().sort_values()
    low, high = ranked.index[0], ranked.index[-1]
    where = table.groupby("place", sort=False)[["share", "rms"]].mean()
    top, far, least = where.share.idxmax(), where.rms.idxmax(), where.share.idxmin()
    return (
        f"In {source} the closest pair is {listed(high)} ({ranked.iloc[-1]:+.2f}), the furthest "
        f"{listed(low)} ({ranked.iloc[0]:+.2f}); the median is {ranked.median():+.3f}. The largest "
        f"part of the squared length is in {place_label(top)} ({100 * where.share[top]:.0f} % on "
        f"average), the smallest in {place_label(least)} ({100 * where.share[least]:.2f} %); per "
        f"entry, {place_label(far)} moves most."
    )


def placed(spread: pd.DataFrame, source: str) -> str:
    """Where tasks agree most and least, and where pairs differ most.

    spread: mean and std of conflict and cosine, by place.
    """
    wide = spread[("cosine", "std")].sort_values()
    agree = spread[("conflict", "mean")].sort_values()
    return (
        f"In {source} tasks agree most in {agree.index[0]} (conflict {agree.iloc[0]:.2f}) and "
        f"least in {agree.index[-1]} ({agree.iloc[-1]:.2f}). Pairs differ most in "
        f"{wide.index[-1]}: the cosines' standard deviation is {wide.iloc[-1]:.2f} there, and "
        f"{wide.iloc[0]:.3f} in {wide.index[0]}."
    )


def overlapping(table: pd.DataFrame, source: str) -> str:
    """How much of their largest entries two tasks share, beside chance. table: `overlap`."""
    mean = 100 * table.groupby(["share", "within"]).overlap.mean()
    parts = [
        f"of the largest {100 * share:.0f} % two tasks share {mean[share, 'model']:.1f} % in the "
        f"whole model and {mean[share, 'tensor']:.1f} % within tensors, where chance gives "
        f"{100 * share:.0f} %"
        for share in table.share.unique()
    ]
    return f"In {source}, over pairs and seeds, {'; '.join(parts)}."


def ranks(table: pd.DataFrame, source: str) -> str:
    """Stable ranks of tasks with two answers and with more. table: stable and answers, by task."""
    two, more = table.stable[table.answers == 2], table.stable[table.answers > 2]
    text = (
        f"In the last block's output layer the stable rank, in {source}, is {span(two)} for tasks "
        "with two answers"
    )
    if more.empty:
        return f"{text}."
    verdict = "above all of those" if more.min() > two.max() else "not above all of those"
    return f"{text}, and {span(more)} for those with more answers, {verdict}."


def aligned(mean: pd.DataFrame, source: str) -> str:
    """Alignment ratios beside chance at the smallest and the largest cut, and chance's part.

    mean: of `alignment` by residual.
    """
    left, right = mean.iloc[0], mean.iloc[-1]
    return (
        f"In {source}, at the cut of {left.residual:g}, the ratio with one other task is "
        f"{left.partner:.2f}, and {left.chance_partner:.2f} by chance "
        f"({100 * left.chance_partner / left.partner:.0f} % of it); at {right.residual:g} it is "
        f"{right.partner:.2f} against {right.chance_partner:.2f}. With the sum of all it is "
        f"{left.merged:.2f} against {left.chance:.2f}, and {right.merged:.2f} against "
        f"{right.chance:.2f}."
    )


def asymmetric(table: pd.DataFrame, source: str) -> str:
    """Who costs the others most and who pays most, with the next. table: of `costs.costs`."""
    wide, lost = matrix(table, "added", "js"), 100 * matrix(table, "added", "accuracy")
    gap = (wide - wide.T).abs().stack().mean() / wide.stack().mean()
    taker, payer = (wide.mean(axis=n).sort_values(ascending=False) for n in (0, 1))
    worst = lost.stack().idxmax()
    cost, paid = (
        f"`{mean.index[0]}` ({mean.iloc[0]:.3f} nats on average), then `{mean.index[1]}` "
        f"({mean.iloc[1]:.3f}), least `{mean.index[-1]}` ({mean.iloc[-1]:.3f})"
        for mean in (taker, payer)
    )
    return (
        f"In {source} the expert that costs the others most when it is added is {cost}. The task "
        f"that pays most is {paid}. The largest loss of accuracy is that of `{worst[0]}`, "
        f"{lost.stack().max():.0f} points, when `{worst[1]}` is added. The two directions of a "
        f"pair differ by {100 * gap:.0f} % of the mean cost."
    )


def causes(table: pd.DataFrame, source: str) -> str:
    """Direction against length, and halving against averaging. table: of `costs.costs`."""
    js = table.groupby("rule").js.mean().loc[list(RULES)]
    part = js["halved"] / js["averaged"]
    verdict = (
        "so the direction of the other vector costs more than its length"
        if js["shuffled"] < js["added"] / 2
        else "so the length alone explains half of the cost or more"
    )
    return (
        f"In {source} a shuffled vector of the same length costs {js['shuffled']:.4f} nats and the "
        f"real one {js['added']:.4f}, {verdict}. An average of two costs {js['averaged']:.4f}; "
        f"halving the own vector and adding nothing costs {100 * part:.0f} % of that, which is no "
        "interference between tasks. (The two need not add up.)"
    )


def plane(grid: pd.DataFrame, marks: pd.DataFrame, pair: str, source: str) -> str:
    """The best point of a pair's plane, the best with one scale, and where methods end.

    grid, marks: of `landscapes`.
    """
    return " ".join(of_plane(grid, marks, pair, source, *one) for one in scores(grid).items()) + (
        missing(grid, source)
    )


def of_plane(
    grid: pd.DataFrame, marks: pd.DataFrame, pair: str, source: str, column: str, words: str
) -> str:
    """`plane` by one score."""
    some = grid[grid.pair == pair]
    best, lowest = some.loc[some[column].idxmax()], some.loc[some.js.idxmin()]
    even = 100 * some[some.l1 == some.l2][column].max()
    near = 100 * (some[column] > best[column] - 0.05).mean()
    ends = marks[marks.pair == pair].dropna(subset=["anp"]).set_index("method")
    said = [
        f"{title(m)} {100 * r[column]:.1f} % at ({r.l1:.2f}, {r.l2:.2f})"
        for m, r in ends.iterrows()
    ]
    return (
        f"For {pair.replace('+', ' and ')}, by {words}, in {source}: {'; '.join(said)}. The best "
        f"point of the grid has {100 * best[column]:.1f} % at ({best.l1:.2f}, {best.l2:.2f}), "
        f"the best with one scale for both {even:.1f} %, the point of lowest JS "
        f"{100 * lowest[column]:.1f} %; {near:.0f} % of the grid lie within 5 points of the best."
    )


def disentangled(grid: pd.DataFrame, source: str) -> str:
    """Rank correlation of the disentanglement error with the ANP for coefficients in [0, 1]."""
    box = grid[grid.l1.between(0, 1) & grid.l2.between(0, 1)]
    tied = box.groupby("pair", sort=False)[["disagreement", "anp"]]
    rho = {pair: format_correlation(part.corr("spearman").iloc[0, 1]) for pair, part in tied}
    said = [f"{value} for {pair}" for pair, value in rho.items()]
    return (
        f"In {source}, within the square from 0 to 1, the rank correlation of $\\xi$ with the ANP "
        f"is {listed(said)}. $\\xi$ is no measure of quality: it is zero at the base."
    )


def barriers(ways: pd.DataFrame, walls: pd.DataFrame, rows: int, source: str) -> str:
    """How high barriers are, which pairs have one above the chord, and where the middle is best.

    ways: of `costs.segments`; walls: of `costs.barriers`; rows: test rows per task.
    """
    ends = ways.groupby(["seed", "pair", "at"]).accuracy.mean().unstack("at")
    better = ends.iloc[:, ends.shape[1] // 2] > ends[[0.0, 1.0]].max(axis=1)
    error = 100 * ((ways.accuracy * (1 - ways.accuracy)).mean() / rows) ** 0.5
    over = 100 * walls[["error", "error_chord"]].mean()
    each = 100 * walls.groupby("pair", sort=False).error_chord.mean()
    high = [f"{pair} ({each[pair]:.1f})" for pair in each.index if each[pair] > error]
    return (
        f"In {source} the mean barrier over {len(each)} pairs is {over.error:.1f} points above the "
        f"mean of the ends and {over.error_chord:.1f} above the chord. One accuracy on one task "
        f"has a standard error of about {error:.1f} points; higher above the chord than that are: "
        f"{listed(high)}. In {100 * better.mean():.0f} % of pairs and seeds the average has a "
        "higher mean accuracy on both tasks than either expert."
    )
