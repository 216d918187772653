"""The paper's tables analysed again, from the numbers that it prints in `paper.json`."""

from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np
import pandas as pd

from divmerge_book.evaluation.statistics import CORRELATIONS
from divmerge_book.published import paper
from divmerge_book.studies.correlations import by_task, over_tasks

PANELS = {"KL": "kl", "JS": "js"}  # columns of Table 2 and panels of Figure 5
PLACES = {"classification": 6, "generation": 7}  # the table of ANP by number of tasks
LEVELS = {"task": "TL", "layer": "LL"}


def matrices(panel: str) -> tuple[np.ndarray, np.ndarray]:
    """Closeness and accuracy of every expert (columns) on every task (rows), `[7, 7]` each.

    Closeness is minus Figure 5's divergence; accuracy Table 5's, a share.
    """
    return -paper.figure(5, panel).to_numpy(), paper.table(5).to_numpy().T / 100


def which_correlation() -> pd.DataFrame:
    """Table 2 beside both correlations of Figure 5 with Table 5.

    Columns: task, divergence, printed, pearson, spearman.
    """
    printed, parts = paper.table(2), []
    for column, panel in PANELS.items():
        x, y = matrices(panel)
        found = {how: function(x, y) for how, function in CORRELATIONS.items()}
        part = pd.DataFrame({"task": printed.index, "printed": printed[column].to_numpy(), **found})
        parts.append(part.assign(divergence=column))
    return pd.concat(parts, ignore_index=True)


def without_the_point() -> tuple[pd.DataFrame, pd.DataFrame]:
    """`by_task` and `over_tasks` of both divergences, with a column `divergence`."""
    tasks, each, means = list(paper.table(5)), [], []
    for column, panel in PANELS.items():
        each.append(by_task(*matrices(panel), tasks).assign(divergence=column))
        means.append(over_tasks(*matrices(panel)).assign(divergence=column))
    return pd.concat(each, ignore_index=True), pd.concat(means, ignore_index=True)


def rows_behind(percentages: Iterable[float]) -> int:
    """The smallest number of test rows of which all percentages, to two decimals, are shares.

    Raises ValueError where no number up to 2000 is.
    """
    shares = np.array(list(percentages)) / 100
    for count in range(1, 2001):
        if (np.abs(np.round(shares * count) / count - shares) <= 0.5001e-4).all():
            return count
    raise ValueError(f"no number of rows up to 2000 gives {100 * shares} to two decimals")


def spread() -> pd.DataFrame:
    """How far apart the other experts' accuracies are, and how much of that can be chance.

    Index: task. Columns, in points: lowest, highest, deviation (standard, over six experts), error
    (standard, of one accuracy over the `rows` that the percentages imply), noise: the share of the
    variance that the errors make up, at most 1.
    """
    table, found = paper.table(5), []
    for task in table:
        rest, rows = table[task].drop(task), rows_behind(table[task])
        error = float(np.sqrt((rest * (100 - rest)).mean() / rows))
        noise = min(1.0, error**2 / rest.var())
        row = {"task": task, "rows": rows, "lowest": rest.min(), "highest": rest.max()}
        found.append(row | {"deviation": rest.std(), "error": error, "noise": noise})
    return pd.DataFrame(found).set_index("task")


def two_tables() -> pd.DataFrame:
    """Merging two models in Table 3, and in Tables 6 and 7 at T = 2.

    Columns: tasks, method, pairs (Table 3, %), margin (its +-), row (Table 6 or 7, %), gap (row
    minus pairs, points), margins (the gap in units of the margin).
    """
    parts, pairs = [], paper.table(3)
    for tasks, number in PLACES.items():
        some = pd.DataFrame({"pairs": pairs[tasks], "margin": pairs[f"{tasks} margin"]})
        some = some.assign(row=paper.table(number).loc[2], tasks=tasks)
        parts.append(some.reset_index())
    table = pd.concat(parts, ignore_index=True)
    table["gap"] = table.row - table.pairs
    return table.assign(margins=table.gap / table.margin)


def grid_gap(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The largest distance of 100 - value from a multiple of each step, `[M], [K] -> [K]`."""
    places = (100 - values)[None] / steps[:, None]
    return (np.abs(places - np.round(places)) * steps[:, None]).max(1)


def on_a_grid(number: int, num_tasks: int, *, draws: int = 2000, seed: int = 0) -> dict:
    """Whether a printed row of ANPs lies on a grid: 100 minus multiples of one step.

    Where every score is a count of right answers, the mean of a pair's two ratios moves in steps;
    a mean over several pairs of tasks, some scored by ROUGE, does not. Steps of 0.2 to 1 point are
    tried. Returns step, gap (largest distance from the grid, points) and chance: the share of
    random rows, spread evenly over the same range and rounded alike, with as small a gap.
    """
    values = np.unique(paper.table(number).loc[num_tasks].to_numpy())
    steps = np.arange(0.2, 1.0, 0.0005)
    gaps, generator = grid_gap(values, steps), np.random.default_rng(seed)
    hits = sum(
        grid_gap(row, steps).min() <= gaps.min() + 1e-9
        for row in generator.uniform(values.min(), values.max(), (draws, len(values))).round(2)
    )
    return {
        **{"table": number, "T": num_tasks, "values": len(values)},
        **{"step": steps[gaps.argmin()], "gap": gaps.min(), "chance": (1 + hits) / (1 + draws)},
    }


def rows_of_levels() -> Iterator[tuple[dict, str, pd.Series]]:
    """Every row of Tables 6 and 7 at both levels: labels, the level's short name, printed ANPs."""
    for tasks, number in PLACES.items():
        for level, short in LEVELS.items():
            for count, line in paper.table(number).iterrows():
                yield {"table": number, "tasks": tasks, "T": count, "level": level}, short, line


def js_and_kl() -> pd.DataFrame:
    """Every cell in which Tables 3, 6 and 7 print the ANP of JS and of KL.

    Columns: table, tasks, T, level (task or layer), js, kl (%), gain (js minus kl, points).
    """
    rows = list(rows_of_levels())
    for tasks, (level, short) in product(PLACES, LEVELS.items()):
        label = {"table": 3, "tasks": tasks, "T": 2, "level": level}
        rows.append((label, short, paper.table(3)[tasks]))
    table = pd.DataFrame(
        {**label, "js": line[f"{short} JS"], "kl": line[f"{short} KL"]}
        for label, short, line in rows
    )
    return table.assign(gain=(table.js - table.kl).round(2))


def js_and_others() -> pd.DataFrame:
    """JS at each level against the best method that uses no expert's answers, in every row.

    Columns: tasks, T, level, js, other (its name), best (its ANP, %), gain (points).
    """
    rows = []
    for label, short, line in rows_of_levels():
        others = line[[name for name in line.index if not name.endswith((" JS", " KL"))]]
        best = {"other": others.idxmax(), "best": others.max()}
        rows.append({**label, "js": line[f"{short} JS"], **best})
    found = pd.DataFrame(rows).drop(columns="table")
    return found.assign(gain=(found.js - found.best).round(2))


def steps(number: int) -> pd.DataFrame:
    """How a method's ANP in Table 6 or 7 changes when one more model is merged, in points."""
    change = paper.table(number).diff().iloc[1:].round(2)
    return change.set_axis([f"{count - 1} to {count}" for count in change.index])


def printed_averages() -> pd.DataFrame:
    """Averages of Tables 2, 6 and 7. Columns: column, printed, found (worked out), table."""
    parts = []
    for number in (2, 6, 7):
        both = {"printed": paper.averages(number), "found": paper.table(number).mean()}
        some = pd.DataFrame(both).rename_axis("column").reset_index()
        parts.append(some.assign(table=number))
    return pd.concat(parts, ignore_index=True)
