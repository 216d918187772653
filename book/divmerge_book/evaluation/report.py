"""A Report: predictions with their provenance. Every score and interval is computed from these."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from divmerge_book.evaluation.metrics import (
    combine,
    grades,
    main_scores,
    majority_class,
    own_scores,
    scores,
)
from divmerge_book.evaluation.provenance import origin
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
        return cls(
            rows[list(COLUMNS)].reset_index(drop=True), list(map(dict, fits)), origin(**facts)
        )

    def majority(self) -> pd.Series:
        """Accuracy of the majority class of the test rows, by suite and task; 0 if graded."""
        first = self.rows.drop_duplicates(["suite", "task"]).set_index(["suite", "task"])
        shares = [
            majority_class(predicted, gold).mean()
            for predicted, gold in zip(first.predicted, first.gold, strict=True)
        ]
        return pd.Series(shares, first.index, name="gold", dtype=float)

    def counted(self, suite: str) -> list[str]:
        """Tasks that count in the ANP: over seeds, the expert beats the majority by MARGIN."""
        rows = self.rows[(self.rows.suite == suite) & (self.rows.method == "expert")]
        reached = main_scores(scores(rows)).groupby("task", sort=False).value.mean()
        floor = self.majority().loc[suite]
        return [task for task in reached.index if reached[task] >= floor[task] + MARGIN]

    def own_metric(self) -> pd.DataFrame:
        """Tidy scores by each task's own metric: GLUE's Matthews correlation or F1, else accuracy.

        Columns as of `metrics`; a row per row of the Report.
        """
        return own_scores(scores(self.rows)).reset_index(drop=True)

    def against_experts(self) -> pd.DataFrame:
        """A row per row of the Report: accuracy or grade beside the expert's and the majority's.

        Columns: suite, subset, method, seed, task, metric, value, floor (the majority's), ratio
        (value over the same seed's expert's), kept_margin ((value - floor) over how far the expert
        is above the floor in the mean over seeds, since that of one seed may not be; NaN where that
        mean is not), counted.
        """
        exact = main_scores(scores(self.rows)).reset_index(drop=True)
        key = ["suite", "subset", "seed", "task"]
        expert = exact[exact.method == "expert"].set_index(key).value
        own = expert.loc[list(exact[key].itertuples(index=False))].to_numpy()
        mean = expert.groupby(["suite", "subset", "task"]).mean()
        usual = mean.loc[list(zip(exact.suite, exact.subset, exact.task, strict=True))].to_numpy()
        counts = {(suite, t) for suite in exact.suite.unique() for t in self.counted(suite)}
        pairs = list(zip(exact.suite, exact.task, strict=True))
        floor = self.majority().loc[pairs].to_numpy()
        value, above = exact.value.to_numpy(), usual - floor
        with np.errstate(divide="ignore", invalid="ignore"):  # an expert that gets nothing right
            kept = np.where(above > 0, (value - floor) / above, np.nan)
            found = exact.assign(floor=floor, ratio=value / own, kept_margin=kept)
        return found.assign(counted=[pair in counts for pair in pairs])

    def metrics(self) -> pd.DataFrame:
        """Tidy scores: suite, subset, method, seed, task, metric, value.

        Per task: accuracy, macro_f1, matthews, f1 of two answers, ratio and kept_margin (see
        `against_experts`); of a graded task its mean grade and, of that, the last two.
        Under the task name `all`, of counted tasks: anp, the mean ratio (DivMerge Eq. 5); worst,
        the smallest of them; kept_margin, the mean; below_majority, how many are below it.
        """
        tidy, found = scores(self.rows), self.against_experts()
        single = [
            found.drop(columns="value").rename(columns={name: "value"}).assign(metric=name)
            for name in ("ratio", "kept_margin")
        ]
        some = found[found.counted].assign(below=lambda table: table.value < table.floor)
        groups = some.groupby(["suite", "subset", "method", "seed"], sort=False)
        overall = {
            "anp": groups.ratio.mean(),
            "worst": groups.ratio.min(),
            "kept_margin": groups.kept_margin.mean(),
            "below_majority": groups.below.sum().astype(float),
        }
        whole = [
            values.rename("value").reset_index().assign(task="all", metric=name)
            for name, values in overall.items()
        ]
        return pd.concat([tidy, *single, *whole], ignore_index=True)[list(tidy.columns)]

    def below_majority(self) -> pd.DataFrame:
        """Per method, the counted tasks on which its accuracy over seeds is below the majority's.

        Columns: suite, subset, method, below (how many), counted (out of how many), tasks (names).
        """
        found = self.against_experts()
        keys = ["suite", "subset", "method"]
        means = found[found.counted].groupby([*keys, "task"], sort=False)[["value", "floor"]].mean()
        rows = []
        for key, some in means.groupby(keys, sort=False):
            names = [task for (*_, task), row in some.iterrows() if row.value < row.floor]
            rows.append((*key, len(names), len(some), names))
        return pd.DataFrame(rows, columns=[*keys, "below", "counted", "tasks"])

    def intervals(
        self, *, statistic: str = "anp", level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> pd.DataFrame:
        """Bootstrap intervals: suite, subset, method, value, low, high (and num_seeds).

        statistic: `anp`, `kept_margin`, `worst`, or `accuracy` (mean over counted tasks). Test rows
        are drawn once for all seeds, which answer the same ones, and for all methods, so that
        `difference` is paired; see `statistics.crossed`. With one seed, only test rows vary. The
        interval of `worst`, a minimum, is approximate.
        """
        pairs = self.rows[["suite", "subset"]].drop_duplicates().itertuples(index=False)
        parts = []
        for suite, subset in pairs:
            sampled = self.sampled(suite, subset, statistic=statistic, draws=draws, seed=seed)
            parts.append(sampled.table(level).assign(suite=suite, subset=subset))
        columns = ["suite", "subset", "method", "value", "low", "high", "num_seeds"]
        return pd.concat(parts, ignore_index=True)[columns]

    def difference(
        self,
        suite: str,
        subset: str,
        method: str,
        other: str,
        *,
        statistic: str = "anp",
        draws: int = 2000,
        seed: int = 0,
    ) -> tuple[float, float, float]:
        """The statistic of `method` minus that of `other`: value and paired 95 % interval."""
        sampled = self.sampled(suite, subset, statistic=statistic, draws=draws, seed=seed)
        found = sampled.estimate(method, other)
        low, high = found.interval()
        return float(found.value), float(low), float(high)

    def sampled(
        self,
        suite: str,
        subset: str,
        *,
        statistic: str = "anp",
        draws: int = 2000,
        seed: int = 0,
    ) -> Sampled:
        """A statistic of all methods of a subset with its bootstrap draws over test rows.

        Raises ValueError for an unknown statistic, where no task counts, and where seeds answer
        different rows of a task.
        """
        rows = self.rows[(self.rows.suite == suite) & (self.rows.subset == subset)]
        counted = self.counted(suite)
        tasks = [task for task in rows.task.unique() if task in counted]
        if statistic not in STATISTICS or not tasks:
            raise ValueError(
                f"statistic must be {', '.join(STATISTICS)}, got {statistic!r}; and a task must "
                f"count in the ANP (its expert beats the majority by {MARGIN}), got {tasks}"
            )
        generator = np.random.default_rng(seed)
        methods, seeds = list(rows.method.unique()), list(rows.seed.unique())
        table, right, floor, total = rows.set_index(["method", "seed", "task"]), [], [], 0
        for task in tasks:
            first = table.loc[(methods[0], seeds[0], task)]
            own = [table.loc[(method, number, task)] for number in seeds for method in methods]
            if any(list(row.gold) != list(first.gold) for row in own):
                raise ValueError(
                    f"seeds and methods must answer the same rows of {task!r} for a joint "
                    "interval; report them as different suites or subsets"
                )
            row_scores = [grades(row.predicted, row.gold) for row in own]
            row_scores.append(majority_class(first.predicted, first.gold))
            means = row_means(
                np.stack(row_scores, axis=1), draws, generator
            )  # [1 + draws, S M + 1]
            right.append(means[:, :-1].reshape(-1, len(seeds), len(methods)))
            floor.append(means[:, -1])
            total += len(row_scores[0])
        found = combine(np.stack(right), np.stack(floor), methods.index("expert"), statistic)
        drawn = found[1:].swapaxes(0, 1)  # [S, draws, M]
        return Sampled(methods, found[0], drawn, max(total - len(tasks), 1))

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
        """A saved Report, exactly as it was."""
        data = json.loads(Path(path).read_text("utf-8"))
        return cls(pd.DataFrame(data["rows"])[list(COLUMNS)], data["fits"], data["provenance"])


def from_text(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of an older file, with a base-36 digit per prediction, as lists of class numbers."""
    columns = {name: list(rows[name]) for name in ("predicted", "gold")}
    for n, predicted in enumerate(columns["predicted"]):
        if isinstance(predicted, str):
            for name, values in columns.items():
                columns[name][n] = [int(digit, 36) for digit in values[n]]
    return rows.assign(**{n: pd.Series(v, rows.index, dtype=object) for n, v in columns.items()})


def caption(report: Report) -> str:
    """One line of provenance for a figure or table."""
    facts, seeds = report.provenance, report.rows.seed.nunique()
    return (
        f"{facts['encoder']}, {facts['size']} size, {seeds} seed{'s' * (seeds > 1)}, "
        f"{facts['rows_per_task']['test']} test rows a task, {facts['device']}, "
        f"{facts['precision']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"measured {facts['date']}"
    )
