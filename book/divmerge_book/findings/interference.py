"""Findings on interference in weights, costs, planes and lines."""

import pandas as pd

from divmerge_book.evaluation.statistics import format_correlation
from divmerge_book.figures import title
from divmerge_book.figures.conflict import place_label
from divmerge_book.figures.landscapes import MARKS
from divmerge_book.findings import listed, missing, scores, span
from divmerge_book.studies.landscapes import RULES, matrix

CHANCE = 0.05  # sign conflicts this near to one half are near those of random signs


def counted(pairs: pd.DataFrame, idle: pd.DataFrame, source: str) -> str:
    """How the mean sign conflict and cosine change when idle rows leave the count.

    pairs, idle: tables of `weight_statistics`.
    """
    mean = pairs.groupby("counted")[["conflict", "cosine"]].mean()
    whole, some = mean.loc["all"], mean.loc["touched"]
    share = 100 * idle.groupby("task")[["parameters", "length"]].mean()
    near = "near" if abs(some.conflict - 0.5) <= CHANCE else "not near"
    return (
        f"In {source}, {span(share.parameters, 0)} % of a task vector's entries only shrank; they "
        f"make up at most {share.length.max():.3f} % of its squared length. The mean sign conflict "
        f"is {whole.conflict:.2f} over all parameters and {some.conflict:.2f} without idle rows, "
        f"{near} the 0.5 of random signs; the cosine {whole.cosine:+.3f} and {some.cosine:+.3f}."
    )


def lengths(half: pd.DataFrame, table: pd.DataFrame, source: str) -> str:
    """The closest and the furthest pair, and where task vectors are longest.

    half: cosines, task by partner; table: `lengths` of `weight_statistics`.
    """
    ranked = half.stack().dropna()
    high, low = ranked.idxmax(), ranked.idxmin()
    where = table.groupby("place")[["share", "rms"]].mean().rename(place_label)
    share = 100 * where.share
    return (
        f"In {source} the closest pair is {listed(high)} ({ranked[high]:+.2f}), the furthest "
        f"{listed(low)} ({ranked[low]:+.2f}); the median is {ranked.median():+.3f}. The largest "
        f"part of the squared length is in {share.idxmax()} ({share.max():.0f} % on average), the "
        f"smallest in {share.idxmin()} ({share.min():.2f} %); per entry, {where.rms.idxmax()} "
        f"moves most."
    )


def placed(spread: pd.DataFrame, source: str) -> str:
    """Where tasks agree most and least, and where pairs differ most.

    spread: mean and std of conflict and cosine, by place.
    """
    conflict, std = spread["conflict"]["mean"], spread["cosine"]["std"]
    return (
        f"In {source} tasks agree most in {conflict.idxmin()} (conflict {conflict.min():.2f}) and "
        f"least in {conflict.idxmax()} ({conflict.max():.2f}). Pairs differ most in "
        f"{std.idxmax()}: the cosines' standard deviation is {std.max():.2f} there, and "
        f"{std.min():.3f} in {std.idxmin()}."
    )


def overlapping(table: pd.DataFrame, source: str) -> str:
    """How much of their largest entries two tasks share, beside chance. table: `overlap`."""
    mean = 100 * table.pivot_table("overlap", "share", "within", sort=False)
    parts = [
        f"of the largest {100 * share:.0f} % two tasks share {row.model:.1f} % in the whole model "
        f"and {row.tensor:.1f} % within tensors, where chance gives {100 * share:.0f} %"
        for share, row in mean.iterrows()
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
    """Alignment ratios beside chance at the smallest and the largest cut; mean: by residual."""
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
    """Which experts cost others most and which tasks pay most; table: `costs`."""
    wide, lost = matrix(table, "added", "js"), 100 * matrix(table, "added", "accuracy").stack()
    gap, worst = (wide - wide.T).abs().stack().mean() / wide.stack().mean(), lost.idxmax()
    cost, paid = (
        f"`{mean.index[0]}` ({mean.iloc[0]:.3f} nats on average), then `{mean.index[1]}` "
        f"({mean.iloc[1]:.3f}), least `{mean.index[-1]}` ({mean.iloc[-1]:.3f})"
        for mean in (wide.mean(axis=n).sort_values(ascending=False) for n in (0, 1))
    )
    return (
        f"In {source} the expert that costs the others most when it is added is {cost}. The most "
        f"damaged task is {paid}. The largest loss of accuracy is that of `{worst[0]}`, "
        f"{lost.max():.0f} points, when `{worst[1]}` is added. The two directions of a pair differ "
        f"by {100 * gap:.0f} % of the mean cost."
    )


def causes(table: pd.DataFrame, source: str) -> str:
    """Direction against length, and halving against averaging; table: `costs`."""
    js = table.groupby("rule").js.mean().loc[list(RULES)]
    verdict = (
        "so the direction of the other vector costs more than its length"
        if js["shuffled"] < js["added"] / 2
        else "so the length alone explains half of the cost or more"
    )
    return (
        f"In {source} a shuffled vector of the same length costs {js['shuffled']:.4f} nats and the "
        f"real one {js['added']:.4f}, {verdict}. An average of two costs {js['averaged']:.4f}; "
        f"halving the own vector and adding nothing costs "
        f"{100 * js['halved'] / js['averaged']:.0f} % of that, which is no interference between "
        "tasks. (The two need not add up.)"
    )


def plane_scores(grid: pd.DataFrame, marks: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By score: every method's on every pair's plane, and two points of the grid's, in %.

    grid, marks: of `landscapes`.
    """
    last, cells, found = marks.dropna(subset=["anp"]), grid.groupby("pair", sort=False), {}
    for column, words in scores(grid).items():
        table = last.pivot(index="pair", columns="method", values=column)[list(MARKS)]
        table = table.loc[list(cells.groups)]
        lowest = grid.loc[cells.js.idxmin()].set_index("pair")[column]
        table = table.rename(columns=title).assign(**{"lowest JS": lowest})
        found[words] = 100 * table.assign(**{"highest of the grid": cells[column].max()})
    return found


def plane(grid: pd.DataFrame, pair: str, source: str) -> str:
    """The best point of a pair's plane, and the best with one scale; grid: of `landscapes`."""
    some, lines = grid[grid.pair == pair], []
    for column, words in scores(grid).items():
        value = 100 * some[column]
        best, lowest = some.loc[value.idxmax()], some.js.idxmin()
        lines.append(
            f"For {pair.replace('+', ' and ')}, by {words}, in {source} the best point of the grid "
            f"has {value.max():.1f} % at ({best.l1:.2f}, {best.l2:.2f}), the best with one scale "
            f"for both {value[some.l1 == some.l2].max():.1f} %, the point of lowest JS "
            f"{value[lowest]:.1f} %; {100 * (value > value.max() - 5).mean():.0f} % of the grid "
            f"lie within 5 points of the best."
        )
    return " ".join(lines) + missing(grid, source)


def disentangled(grid: pd.DataFrame, source: str) -> str:
    """Rank correlation of the disentanglement error with the ANP for coefficients in [0, 1]."""
    box = grid[grid.l1.between(0, 1) & grid.l2.between(0, 1)]
    said = [
        f"{format_correlation(part.disagreement.corr(part.anp, 'spearman'))} for {pair}"
        for pair, part in box.groupby("pair", sort=False)
    ]
    return (
        f"In {source}, within the square from 0 to 1, the rank correlation of $\\xi$ with the ANP "
        f"is {listed(said)}. $\\xi$ is no measure of quality: it is zero at the base."
    )


def barriers(ways: pd.DataFrame, walls: pd.DataFrame, rows: int, source: str) -> str:
    """How high barriers are, which pairs have one above the chord, and where the middle is best.

    ways: of `segments`; walls: of `barriers`; rows: test rows per task.
    """
    ends = ways.pivot_table("accuracy", ["seed", "pair"], "at")
    better = ends.iloc[:, ends.shape[1] // 2] > ends[[0.0, 1.0]].max(axis=1)
    noise = 100 * ((ways.accuracy * (1 - ways.accuracy)).mean() / rows) ** 0.5
    over = 100 * walls[["error", "error_chord"]].mean()
    each = 100 * walls.groupby("pair", sort=False).error_chord.mean()
    high = [f"{pair} ({value:.1f})" for pair, value in each[each > noise].items()]
    return (
        f"In {source} the mean barrier over {len(each)} pairs is {over.error:.1f} points above the "
        f"mean of the ends and {over.error_chord:.1f} above the chord. One accuracy on one task "
        f"has a standard error of about {noise:.1f} points; higher above the chord than that are: "
        f"{listed(high)}. In {100 * better.mean():.0f} % of pairs and seeds the average has a "
        "higher mean accuracy on both tasks than either expert."
    )
