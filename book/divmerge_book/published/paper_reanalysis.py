"""The paper's tables analysed again, from the numbers that it prints in `paper.json`."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from divmerge_book.evaluation.statistics import CORRELATIONS
from divmerge_book.published import paper
from divmerge_book.studies.correlations import by_task, over_tasks

PANELS = {"KL": "kl", "JS": "js"}  # columns of Table 2 and panels of Figure 5
PLACES = {"classification": 6, "generation": 7}  # the table of ANP by number of tasks
LEVELS = {"task": "TL", "layer": "LL"}
ROW = ["table", "tasks", "T"]  # a printed row of ANPs


def matrices(panel: str) -> tuple[np.ndarray, np.ndarray]:
    """Closeness and accuracy of every expert (columns) on every task (rows), `[7, 7]` each.

    Closeness is minus Figure 5's divergence; accuracy Table 5's, a share.
    """
    return -paper.figure(5, panel).to_numpy(), paper.table(5).to_numpy().T / 100


def which_correlation() -> pd.DataFrame:
    """Table 2 beside both correlations of Figure 5 with Table 5.

    Columns: task, printed, pearson, spearman, divergence.
    """
    printed, parts = paper.table(2), []
    for divergence, panel in PANELS.items():
        found = {how: function(*matrices(panel)) for how, function in CORRELATIONS.items()}
        part = printed[divergence].rename("printed").reset_index()
        parts.append(part.assign(**found, divergence=divergence))
    return pd.concat(parts, ignore_index=True)


def without_the_point() -> tuple[pd.DataFrame, pd.DataFrame]:
    """`by_task` and `over_tasks` of both divergences, with a column `divergence`."""
    tasks, pairs = list(paper.table(5)), {name: matrices(panel) for name, panel in PANELS.items()}
    each = [by_task(*pair, tasks).assign(divergence=name) for name, pair in pairs.items()]
    means = [over_tasks(*pair).assign(divergence=name) for name, pair in pairs.items()]
    return pd.concat(each, ignore_index=True), pd.concat(means, ignore_index=True)


def rows_behind(percentages: Iterable[float]) -> int:
    """The smallest number of test rows of which all percentages, to two decimals, are shares.

    Raises ValueError where no number up to 2000 is.
    """
    shares = np.array(list(percentages)) / 100
    counts = np.arange(1, 2001)[:, None]
    fits = (np.abs(np.round(shares * counts) / counts - shares) <= 0.5001e-4).all(axis=1)
    if not fits.any():
        raise ValueError(f"no number of rows up to 2000 gives {100 * shares} to two decimals")
    return int(counts[fits.argmax(), 0])


def spread() -> pd.DataFrame:
    """How far apart the other experts' accuracies are, and how much of that can be chance.

    Index: task. Columns, in points: lowest, highest, deviation (standard, over six experts), error
    (standard, of one accuracy over the `rows` that the percentages imply), noise: the share of the
    variance that the errors make up, at most 1.
    """
    table = paper.table(5)
    rest = table.where(~np.eye(len(table), dtype=bool))  # without the own expert
    rows = pd.Series({task: rows_behind(table[task]) for task in table})
    error = np.sqrt((rest * (100 - rest)).mean() / rows)
    columns = {"rows": rows, "lowest": rest.min(), "highest": rest.max(), "deviation": rest.std()}
    columns |= {"error": error, "noise": (error**2 / rest.var()).clip(upper=1)}
    return pd.DataFrame(columns).rename_axis("task")


def anps() -> pd.DataFrame:
    """Every printed ANP, %, long: table (6, 7 or 3), tasks, T, method, anp."""
    parts = [
        paper.table(number).reset_index().melt("T", var_name="method").assign(tasks=tasks)
        for tasks, number in PLACES.items()
    ]
    pairs = paper.table(3)[list(PLACES)].reset_index().melt("method", var_name="tasks")
    found = pd.concat(
        [*parts, pairs.assign(T=2)], keys=[*PLACES.values(), 3], names=["table", None]
    )
    return found.rename(columns={"value": "anp"}).reset_index("table")


def two_tables() -> pd.DataFrame:
    """Merging two models in Table 3, and in Tables 6 and 7 at T = 2.

    Columns: method, pairs (Table 3, %), margin (its +-), row (Table 6 or 7, %), tasks, gap (row
    minus pairs, points), margins (the gap in units of the margin).
    """
    printed, parts = paper.table(3), []
    for tasks, number in PLACES.items():
        columns = {"pairs": printed[tasks], "margin": printed[f"{tasks} margin"]}
        part = pd.DataFrame(columns).assign(row=paper.table(number).loc[2], tasks=tasks)
        parts.append(part.reset_index())
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
    steps, generator = np.arange(0.2, 1.0, 0.0005), np.random.default_rng(seed)
    gaps = grid_gap(values, steps)
    random = generator.uniform(values.min(), values.max(), (draws, len(values))).round(2)
    hits = sum(grid_gap(row, steps).min() <= gaps.min() + 1e-9 for row in random)
    return {
        **{"table": number, "T": num_tasks, "values": len(values)},
        **{"step": steps[gaps.argmin()], "gap": gaps.min(), "chance": (1 + hits) / (1 + draws)},
    }


def js_and_kl() -> pd.DataFrame:
    """Every cell in which Tables 3, 6 and 7 print the ANP of JS and of KL.

    Columns: table, tasks, T, level (task or layer), js, kl (%), gain (js minus kl, points).
    """
    js, kl = (fitted(anps(), divergence) for divergence in ("js", "kl"))
    table = js.merge(kl, on=[*ROW, "level"])
    return table.assign(gain=(table.js - table.kl).round(2))


def fitted(found: pd.DataFrame, divergence: str) -> pd.DataFrame:
    """The ANPs of DivMerge by one divergence, with a column `level`."""
    methods = {f"{short} {divergence.upper()}": level for level, short in LEVELS.items()}
    found = found.assign(level=found.method.map(methods)).dropna(subset="level")
    return found.rename(columns={"anp": divergence})[[*ROW, "level", divergence]]


def js_and_others() -> pd.DataFrame:
    """JS at each level against the best method that uses no expert's answers, in every row.

    Columns: tasks, T, level, js, other (its name), best (its ANP, %), gain (points).
    """
    found = anps().query("table != 3").reset_index(drop=True)
    others = found[~found.method.str.endswith((" JS", " KL"))]
    best = others.loc[others.groupby(ROW).anp.idxmax()]
    best = best.rename(columns={"method": "other", "anp": "best"})
    table = fitted(found, "js").merge(best, on=ROW).drop(columns="table")
    return table.assign(gain=(table.js - table.best).round(2))


def steps(number: int) -> pd.DataFrame:
    """How a method's ANP in Table 6 or 7 changes when one more model is merged, in points."""
    change = paper.table(number).diff().iloc[1:].round(2)
    return change.set_axis([f"{count - 1} to {count}" for count in change.index])


def printed_averages() -> pd.DataFrame:
    """Averages of Tables 2, 6 and 7. Columns: column, printed, found (worked out), table."""
    parts = []
    for number in (2, 6, 7):
        both = {"printed": paper.averages(number), "found": paper.table(number).mean()}
        parts.append(pd.DataFrame(both).rename_axis("column").reset_index().assign(table=number))
    return pd.concat(parts, ignore_index=True)
