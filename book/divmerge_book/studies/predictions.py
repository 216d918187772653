"""What studies store: predictions, a row per merged model; scores are made of them when drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from divmerge_book.evaluation.report import Report, Sampled
from divmerge_book.evaluation.statistics import holm
from divmerge_book.evaluation.stored_tables import ResultTable

PREDICTED = ("method", "seed", "answered", "predicted", "gold")  # the rest are labels
SCORES: Mapping[str, tuple[str, ...]] = {  # a score, its interval; difference, interval, p, Holm
    "anp": ("anp", "low", "high", "difference", "from_low", "from_high", "p", "holm"),
    "kept_margin": (
        *("kept_margin", "kept_low", "kept_high", "kept_difference"),
        *("kept_from_low", "kept_from_high", "kept_p", "kept_holm"),
    ),
}
WORDS: Mapping[str, str] = {"anp": "ANP", "kept_margin": "kept margin"}
BELOW = ["below", "counted"]
NARROW = (
    ". The intervals of this stored run resample the test rows anew for every seed and are too "
    "narrow; it holds no predictions to recompute them"
)
NO_MARGIN = ". This stored run holds no predictions, so no kept margin"


def text(answers: Iterable[int]) -> str:
    """Answers as a character each: 0-9, then a to z. Raises ValueError for more than 36 classes."""
    found = [np.base_repr(int(answer), 36).lower() for answer in answers]
    if any(len(one) > 1 for one in found):
        raise ValueError(f"predictions are stored for up to 36 classes, got class {max(answers)}")
    return "".join(found)


def packed(rows: Iterable[Mapping]) -> pd.DataFrame:
    """Rows of `evaluate` with labels, a method and a seed: a row per merged model and seed.

    Columns: the labels, method, seed, answered (tasks, joined by +), predicted (a text per task,
    joined by spaces), and gold (the same; in the rows of the method `expert`, which every label
    needs). Suite and subset are left out.
    """
    table = pd.DataFrame(rows).drop(columns=["suite", "subset"], errors="ignore")
    table = table.rename(columns={"task": "answered"})
    for name in ("predicted", "gold"):
        table[name] = [one if isinstance(one, str) else text(one) for one in table[name]]
    key = [name for name in table if name not in PREDICTED[2:]]
    join = {"answered": "+".join, "predicted": " ".join, "gold": " ".join}
    found = table.groupby(key, sort=False, dropna=False).agg(join).reset_index()
    return found.assign(gold=found.gold.where(found.method == "expert", None))


def report_of(table: pd.DataFrame) -> Report:
    """The Report of packed rows of one label: suite `suite`, subset `all`."""
    gold = {
        (row.seed, task): right
        for row in table[table.method == "expert"].itertuples()
        for task, right in zip(row.answered.split("+"), row.gold.split(" "), strict=True)
    }
    rows = [
        ("suite", "all", row.method, row.seed, task, predicted, gold[row.seed, task])
        for row in table.itertuples()
        for task, predicted in zip(row.answered.split("+"), row.predicted.split(" "), strict=True)
    ]
    columns = ["suite", "subset", "method", "seed", "task", "predicted", "gold"]
    return Report(pd.DataFrame(rows, columns=columns))


def samples(report: Report, *, draws: int = 2000) -> dict[str, Sampled]:
    """ANP and kept margin of every method, with the same draws of test rows."""
    return {score: report.sampled("suite", "all", statistic=score, draws=draws) for score in SCORES}


def estimates(sampled: Mapping[str, Sampled], method: str, other: str | None) -> dict[str, float]:
    """Both scores of a method with their 95 % intervals, and the paired differences from another.

    Columns: those of SCORES but for Holm's. The difference from itself is 0 and has no p. No other
    method: no differences.
    """
    found = {}
    for score, names in SCORES.items():
        own = sampled[score].estimate(method)
        values = [own.value, *own.interval()]
        if other is not None:
            gap = sampled[score].estimate(method, other)
            p = np.nan if method == other else gap.p()
            values += [gap.value, *gap.interval(), p]
        found |= dict(zip(names[: len(values)], map(float, values), strict=True))
    return found


def compared(table: pd.DataFrame, *, draws: int = 2000) -> pd.DataFrame:
    """Both scores of every method of every label, and paired differences from the label's first.

    table: of `packed`. Columns: the labels, method, those of SCORES (p corrected over the table by
    Holm's rule), below (counted tasks whose accuracy over seeds is below the majority class), and
    counted (tasks). Intervals are 95 %, over seeds and test rows, the same ones for all methods.
    """
    labels, found = [name for name in table if name not in PREDICTED], []
    groups = table.groupby(labels, sort=False) if labels else [((), table)]
    for key, some in groups:
        report = report_of(some)
        sampled, below = samples(report, draws=draws), report.below_majority().set_index("method")
        first, label = some.method.iloc[0], dict(zip(labels, key, strict=True))
        for method in some.method.unique():
            if method != "expert":
                row = estimates(sampled, method, first) | dict(below.loc[method, BELOW])
                found.append({**label, "method": method, **row})
    return corrected(pd.DataFrame(found))


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """The table with Holm's corrections of the p-values of both scores."""
    pairs = {names[-1]: names[-2] for names in SCORES.values()}
    return table.assign(**{new: holm(table[old].to_numpy()) for new, old in pairs.items()})


def of_score(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """The table with one score's columns under the names of the ANP's, and the score as `score`."""
    names = dict(zip(SCORES[score], ("score", *SCORES["anp"][1:]), strict=True))
    rest = [name for names in SCORES.values() for name in names if name not in SCORES[score]]
    return table.drop(columns=rest, errors="ignore").rename(columns=names)


def split(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The table with its methods `a=b` as two columns of these names, or `a` as one.

    Numbers are numbers, 0 where there is none; a setting's `value` stays text.
    """
    for name, part in zip(
        names, table.method.str.partition("=")[[0, 2]].to_numpy().T, strict=False
    ):
        plain = pd.Series(part, table.index)
        numbers = pd.to_numeric(plain.replace("", "0"), errors="coerce")
        keep = name == "value" or numbers.isna().any()
        table = table.assign(**{name: plain if keep else numbers})
    return table


def scored(
    measured: ResultTable,
    columns: Mapping[str, Sequence[str]],
    score: Callable[[pd.DataFrame], pd.DataFrame] = compared,
) -> ResultTable:
    """A run with its predictions made into scores; one that was stored without any is marked.

    columns: by table, what its methods are `split` into.
    """
    new = {
        name: split(score(table), columns[name]) if name in columns else score(table)
        for name, table in measured.tables.items()
        if "predicted" in table
    }
    if new:
        return replace(measured, tables={**measured.tables, **new})
    wide = any({"low", "difference_low"} & set(table) for table in measured.tables.values())
    note = NARROW if wide and len(measured.facts["seeds"]) > 1 else NO_MARGIN
    return replace(measured, note=measured.note + note)
