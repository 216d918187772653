"""A Report: predictions with their provenance. Every score and interval is computed from these."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from divmerge_book.evaluation.metrics import combine, grades, main_scores, majority_class, scores
from divmerge_book.evaluation.provenance import origin
from divmerge_book.evaluation.sizes import departures
from divmerge_book.evaluation.statistics import Estimate, crossed, row_means
from divmerge_core.storage import fresh_file

COLUMNS = ("suite", "subset", "method", "seed", "task", "predicted", "gold")
MARGIN = 0.02  # an expert this far above the majority class makes its task count in the ANP
STATISTICS = ("anp", "kept_margin", "worst", "accuracy")


@dataclass(frozen=True)
class Sampled:
    """A statistic of every method on one subset, by seed and by draw of test rows.

    exact: `[S, M]`, on the rows as they are; drawn: `[S, draws, M]`, the same draws for all seeds
    and methods; freedom: rows less the number of tasks.
    """

    methods: Sequence[str]
    exact: np.ndarray
    drawn: np.ndarray
    freedom: int

    def estimate(self, method: str, other: str | None = None) -> Estimate:
        """The mean over seeds of a method's statistic, or of its paired difference from another."""
        pick = self.methods.index(method)
        exact, drawn = self.exact[:, pick], self.drawn[..., pick]
        if other is not None:
            pick = self.methods.index(other)
            exact, drawn = exact - self.exact[:, pick], drawn - self.drawn[..., pick]
        return crossed(exact, drawn, self.freedom)

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """Every method's mean over seeds: method, value, low, high, num_seeds."""
        every = crossed(self.exact, self.drawn, self.freedom)
        low, high = every.interval(level)
        columns = {"method": self.methods, "value": every.value, "low": low, "high": high}
        return pd.DataFrame({**columns, "num_seeds": every.num_seeds})


@dataclass(frozen=True)
class Report:
    """Predictions, one row per suite x subset x method x seed x task; fits; and their origin.

    predicted and gold are lists of class numbers; a graded row (free text) has a list of grades for
    `predicted` and their name for `gold`. The method `expert` is each task's own expert, by whose
    score the ANP divides. fits: options, coefficients and trajectory of every fit.
    """

    rows: pd.DataFrame
    fits: list[dict] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)

    def __post_init__(self):
        if any(isinstance(predicted, str) for predicted in self.rows.predicted):
            object.__setattr__(self, "rows", from_text(self.rows))

    @classmethod
    def of(cls, rows: pd.DataFrame, fits: Sequence[Mapping] = (), **facts: object) -> "Report":
        """A Report with provenance: `facts`, versions, device, machine and date are kept."""
        rows = rows[list(COLUMNS)].reset_index(drop=True)
        return cls(rows, list(map(dict, fits)), origin(**facts))

    def majority(self) -> pd.Series:
        """Accuracy of the majority class of the test rows, by suite and task; 0 if graded."""
        first = self.rows.drop_duplicates(["suite", "task"]).set_index(["suite", "task"])
        shares = [majority_class(row.predicted, row.gold).mean() for row in first.itertuples()]
        return pd.Series(shares, first.index, name="floor", dtype=float)

    def counted(self, suite: str) -> list[str]:
        """Tasks that count in the ANP: over seeds, the expert beats the majority by MARGIN."""
        rows = self.rows[(self.rows.suite == suite) & (self.rows.method == "expert")]
        reached = main_scores(scores(rows)).groupby("task", sort=False).value.mean()
        floor = self.majority().loc[suite]
        return [task for task in reached.index if reached[task] >= floor[task] + MARGIN]

    def against_experts(self) -> pd.DataFrame:
        """A row per row of the Report: accuracy or grade beside the expert's and the majority's.

        Columns: suite, subset, method, seed, task, metric, value, floor (the majority's), ratio
        (value over the same seed's expert's, NaN where that is 0), kept_margin ((value - floor)
        over how far the expert is above the floor in the mean over seeds, since that of one seed
        may not be; NaN where that mean is not), counted.
        """
        found, key = main_scores(scores(self.rows)), ["suite", "subset", "task"]
        expert = found[found.method == "expert"].set_index([*key, "seed"]).value
        own = expert.loc[pd.MultiIndex.from_frame(found[[*key, "seed"]])].to_numpy()
        found = found.join(self.majority(), on=["suite", "task"])
        found = found.assign(ratio=found.value / np.where(own > 0, own, np.nan))
        mean = found[key].join(expert.groupby(key).mean(), on=key).value
        kept = (found.value - found.floor) / (mean - found.floor).where(lambda above: above > 0)
        counts = {(suite, t) for suite in found.suite.unique() for t in self.counted(suite)}
        counted = [pair in counts for pair in zip(found.suite, found.task, strict=True)]
        return found.assign(kept_margin=kept, counted=counted).reset_index(drop=True)

    def metrics(self) -> pd.DataFrame:
        """Tidy scores: suite, subset, method, seed, task, metric, value.

        Per task: accuracy, macro_f1, matthews, f1 of two answers, ratio and kept_margin (see
        `against_experts`); of a graded task its mean grade and, of that, the last two.
        Under the task name `all`, of counted tasks: anp, the mean ratio (DivMerge Eq. 5); worst,
        the smallest of them; kept_margin, the mean; below_majority, how many are below it.
        """
        found, key = self.against_experts(), ["suite", "subset", "method", "seed"]
        single = found[[*key, "task", "ratio", "kept_margin"]].melt([*key, "task"], None, "metric")
        some = found[found.counted].assign(below=lambda table: table.value < table.floor)
        whole = some.groupby(key, sort=False).agg(
            anp=("ratio", "mean"),
            worst=("ratio", "min"),
            kept_margin=("kept_margin", "mean"),
            below_majority=("below", "sum"),
        )
        whole = whole.astype(float).reset_index().melt(key, None, "metric").assign(task="all")
        return pd.concat([scores(self.rows), single, whole], ignore_index=True)

    def below_majority(self) -> pd.DataFrame:
        """Per method, the counted tasks on which its accuracy over seeds is below the majority's.

        Columns: suite, subset, method, below (how many), counted (out of how many), tasks (names).
        """
        found, keys = self.against_experts(), ["suite", "subset", "method"]
        means = found[found.counted].groupby([*keys, "task"], sort=False)[["value", "floor"]].mean()
        rows = []
        for key, some in means.reset_index().groupby(keys, sort=False):
            names = some.task[some.value < some.floor].tolist()
            rows.append((*key, len(names), len(some), names))
        return pd.DataFrame(rows, columns=[*keys, "below", "counted", "tasks"])

    def intervals(self, *, level: float = 0.95, **options: object) -> pd.DataFrame:
        """Intervals: suite, subset, method, value, low, high (and num_seeds).

        options: statistic, draws and seed of `sampled`. Test rows are drawn once for all seeds,
        which answer the same ones, and for all methods, so that `difference` is paired; see
        `statistics.crossed`. With one seed, only test rows vary. The interval of `worst`, a
        minimum, is approximate.
        """
        columns = ["suite", "subset", "method", "value", "low", "high", "num_seeds"]
        pairs = self.rows[columns[:2]].drop_duplicates().itertuples(index=False)
        parts = [
            self.sampled(*pair, **options).table(level).assign(suite=pair.suite, subset=pair.subset)
            for pair in pairs
        ]
        return pd.concat(parts, ignore_index=True)[columns]

    def difference(
        self, suite: str, subset: str, method: str, other: str, **options: object
    ) -> tuple[float, float, float]:
        """The statistic of `method` minus that of `other`: value and paired 95 % interval.

        options: of `sampled`.
        """
        found = self.sampled(suite, subset, **options).estimate(method, other)
        return float(found.value), *map(float, found.interval())

    def sampled(
        self, suite: str, subset: str, *, statistic: str = "anp", draws: int = 2000, seed: int = 0
    ) -> Sampled:
        """A statistic of all methods of a subset with its bootstrap draws over test rows.

        statistic: `anp`, `kept_margin`, `worst`, or `accuracy` (mean over counted tasks). Raises
        ValueError for an unknown one, where no task counts, and where seeds answer different rows
        of a task.
        """
        rows = self.rows[(self.rows.suite == suite) & (self.rows.subset == subset)]
        counted = self.counted(suite)
        tasks = [task for task in rows.task.unique() if task in counted]
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be {', '.join(STATISTICS)}, got {statistic!r}")
        if not tasks:
            raise ValueError(
                f"no task of {subset} counts in the ANP, as no expert beats the majority class by "
                f"{MARGIN}; merge other tasks too, or train experts on more rows (a larger size)"
            )
        generator = np.random.default_rng(seed)
        methods, seeds = list(rows.method.unique()), list(rows.seed.unique())
        table, means, total = rows.set_index(["task", "seed", "method"]), [], -len(tasks)
        for task in tasks:
            own = table.loc[[(task, number, method) for number in seeds for method in methods]]
            first = own.iloc[0]
            if any(list(gold) != list(first.gold) for gold in own.gold):
                raise ValueError(
                    f"seeds and methods must answer the same rows of {task!r} for a joint "
                    "interval; report them as different suites or subsets"
                )
            columns = [*map(grades, own.predicted, own.gold)]
            columns.append(majority_class(first.predicted, first.gold))
            means.append(row_means(np.stack(columns, axis=1), draws, generator))
            total += len(columns[0])
        every = np.stack(means)  # [tasks, 1 + draws, S M + 1]
        right = every[..., :-1].reshape(*every.shape[:2], len(seeds), len(methods))
        found = combine(right, every[..., -1], methods.index("expert"), statistic)
        return Sampled(methods, found[0], found[1:].swapaxes(0, 1), max(total, 1))

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, a line per row, atomically: an interrupted save leaves the old file."""
        lines = ",\n".join(
            json.dumps(row, separators=(",", ":")) for row in self.rows.to_dict("records")
        )
        facts, fits = (json.dumps(part, indent=1) for part in (self.provenance, self.fits))
        text = f'{{"provenance": {facts},\n"rows": [\n{lines}\n],\n"fits": {fits}}}'
        with fresh_file(Path(path)) as new:
            new.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """A saved Report, exactly as it was. Raises ValueError for another file."""
        text, data = Path(path).read_text("utf-8"), None
        with suppress(json.JSONDecodeError):
            data = json.loads(text)
        if not isinstance(data, dict) or not {"rows", "fits", "provenance"} <= data.keys():
            raise ValueError(f"{path} is no Report, which has rows, fits and provenance")
        return cls(pd.DataFrame(data["rows"])[list(COLUMNS)], data["fits"], data["provenance"])


def from_text(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of an older file, with a base-36 digit per prediction, as lists of class numbers."""
    older = rows.predicted.map(lambda one: isinstance(one, str))
    texts = rows.loc[older, ["predicted", "gold"]]
    lists = texts.map(lambda digits: [int(digit, 36) for digit in digits])
    return rows.assign(**{name: rows[name].where(~older, lists[name]) for name in lists})


def caption(report: Report) -> str:
    """One line of provenance for a figure or table; rows are those that each task was scored on."""
    facts, seeds = report.provenance, report.rows.seed.nunique()
    ends = report.rows.predicted.map(len).agg(["min", "max"]).unique()
    given = {fit["options"]["inputs"] for fit in report.fits if "inputs" in fit["options"]}
    own = facts | ({"inputs": given.pop()} if len(given) == 1 else {})
    return (
        f"{facts['encoder']}, {facts['size']} size, {seeds} seed{'s' * (seeds > 1)}, "
        f"{' to '.join(map(str, ends))} test rows a task, {facts['device']}, "
        f"{facts['precision']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"measured {facts['date']}{departures(own)}"
    )
