"""What studies store: predictions, a row per merged model; scores are computed when drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import own_experts
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.statistics import holm
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.studies.study import Experiments, study

PREDICTED = ("method", "seed", "answered", "predicted", "gold")  # the rest are labels
SCORES: Mapping[str, tuple[str, ...]] = {  # a score, its interval; difference, interval, p, Holm
    "anp": ("anp", "low", "high", "difference", "from_low", "from_high", "p", "holm"),
    "kept_margin": (
        *("kept_margin", "kept_low", "kept_high", "kept_difference"),
        *("kept_from_low", "kept_from_high", "kept_p", "kept_holm"),
    ),
}
WORDS: Mapping[str, str] = {"anp": "ANP", "kept_margin": "kept margin"}
NO_MARGIN = ". This stored run contains no predictions, so no kept margin"


def text(answers: Iterable[int]) -> str:
    """Answers as a character each: 0-9, then a to z. Raises ValueError for more than 36 classes."""
    found = [np.base_repr(int(answer), 36).lower() for answer in answers]
    if any(len(one) > 1 for one in found):
        raise ValueError(f"predictions are stored for up to 36 classes, got class {max(answers)}")
    return "".join(found)


def packed(rows: Iterable[Mapping] | pd.DataFrame) -> pd.DataFrame:
    """Rows of `evaluate` with labels, a method and a seed: a row per merged model and seed.

    Columns: the labels, method, seed, answered (tasks, joined by +), predicted (a text per task,
    joined by spaces), gold (the same, of the method `expert`, which every label needs).
    """
    table = pd.DataFrame(rows).rename(columns={"task": "answered"})
    for name in ("predicted", "gold"):
        table[name] = [one if isinstance(one, str) else text(one) for one in table[name]]
    key = [name for name in table if name not in PREDICTED[2:]]
    join = {"answered": "+".join, "predicted": " ".join, "gold": " ".join}
    found = table.groupby(key, sort=False, dropna=False).agg(join).reset_index()
    return found.assign(gold=found.gold.where(found.method == "expert", None))


def expert_predictions(experiment: Experiment, *, seed: int, method: str) -> pd.DataFrame:
    """Every expert's answers on its own task's test rows."""
    return own_experts(experiment, experiment.test)


def with_experts(
    rows: pd.DataFrame,
    experiments: Experiments,
    labels: Sequence[str] = (),
    facts: Sequence[str] = (),
) -> pd.DataFrame:
    """The `packed` rows of merged models, and the experts' by label; facts: other columns."""
    experts = study(expert_predictions, experiments, [{"method": "expert"}])
    tasks = rows[[*labels, "task"]].drop_duplicates()
    both = pd.concat([rows, tasks.merge(experts, on="task")], ignore_index=True)
    return packed(both[[*labels, *facts, "method", "seed", "task", "predicted", "gold"]])


def report_of(table: pd.DataFrame) -> Report:
    """The Report of packed rows of one label: suite `suite`, subset `all`."""
    lists = {"task": table.answered.str.split("+"), "predicted": table.predicted.str.split(" ")}
    rows = table.assign(**lists, gold=table.gold.str.split(" "))
    names, key = ["method", "seed", *lists], ["seed", "task"]
    experts = rows[rows.method == "expert"][[*key, "gold"]].explode(["task", "gold"])
    rows = rows[names].explode(list(lists)).merge(experts, "left", key, validate="m:1")
    return Report(rows.astype(object).assign(suite="suite", subset="all"))


def compared(
    rows: pd.DataFrame,
    by: Sequence[str] | None = None,
    against: str | Callable[[str], str | None] | None = None,
    *,
    family: str | None = None,
    draws: int = 2000,
) -> pd.DataFrame:
    """Both scores of every method of every label, and paired differences from a reference.

    rows: `packed`. by: the labels; None: all columns that are. against: the reference, also as a
    function of the method (None: no difference); by default the label's first method. Columns: the
    labels, method, those of SCORES (p corrected by Holm's rule over the table, or within each value
    of `family`), below (counted tasks below the majority class, over seeds), counted. Intervals are
    95 %, over seeds and test rows, the same rows for all methods.
    """
    by = [name for name in rows if name not in PREDICTED] if by is None else list(by)
    found = []
    for key, some in rows.groupby(by, sort=False) if by else [((), rows)]:
        report = report_of(some)
        sampled = {s: report.sampled("suite", "all", statistic=s, draws=draws) for s in SCORES}
        below = report.below_majority().set_index("method")[["below", "counted"]]
        reference = some.method.iloc[0] if against is None else against
        for method in some.method[some.method != "expert"].unique():
            other = reference(method) if callable(reference) else reference
            row = dict(zip(by, key, strict=True)) | {"method": method, **below.loc[method]}
            for score, names in SCORES.items():
                own = sampled[score].estimate(method)
                values = [own.value, *own.interval()]
                if other is not None:
                    gap = sampled[score].estimate(method, other)
                    p = np.nan if method == other else gap.p()
                    values += [gap.value, *gap.interval(), p]
                row |= dict(zip(names, map(float, values), strict=False))
            found.append(row)
    table = pd.DataFrame(found)
    families = table[family] if family else np.zeros(len(table))
    for *_, p, corrected in SCORES.values():
        table[corrected] = table[p].groupby(families).transform(lambda some: holm(some.to_numpy()))
    return table


def of_score(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """The table with one score's columns under the names of the ANP's, and the score as `score`."""
    names = dict(zip(SCORES[score], ("score", *SCORES["anp"][1:]), strict=True))
    rest = [name for names in SCORES.values() for name in names if name not in SCORES[score]]
    return table.drop(columns=rest, errors="ignore").rename(columns=names)


def significant(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with a corrected p-value of the ANP's difference below 0.05."""
    return table[table.holm < 0.05]


def split(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The table with its methods `a=b` as two columns of these names, or `a` as one.

    Numbers are numbers, 0 where there is none; a setting's `value` stays text.
    """
    parts = table.method.str.partition("=")
    for name, part in zip(names, (0, 2), strict=False):
        numbers = pd.to_numeric(parts[part].replace("", "0"), errors="coerce")
        keep = name == "value" or numbers.isna().any()
        table = table.assign(**{name: parts[part].astype(object) if keep else numbers})
    return table


def scored(
    measured: ResultTable,
    columns: Mapping[str, Sequence[str]],
    score: Callable[[pd.DataFrame], pd.DataFrame] = compared,
) -> ResultTable:
    """A run with its predictions turned into scores, or marked where it has none.

    columns: by table, what its methods are `split` into.
    """
    new = {
        name: split(score(table), columns[name]) if name in columns else score(table)
        for name, table in measured.tables.items()
        if "predicted" in table
    }
    note = measured.note + ("" if new else NO_MARGIN)
    return replace(measured, tables={**measured.tables, **new}, note=note)
