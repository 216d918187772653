"""A Report: predictions with their origin, from which every score and interval is worked out.

Predictions, not scores, are stored: any metric, and a paired bootstrap over test examples and
seeds, can be computed from them later, exactly.
"""

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
import transformers

from divmerge_core.evaluation import grades, main_scores, numbers, scores
from divmerge_core.storage import write_json

COLUMNS = ("suite", "subset", "method", "seed", "task", "predicted", "gold")
MARGIN = 0.02  # an expert this far above the majority class makes its task count in the ANP


@dataclass(frozen=True)
class Report:
    """Predictions, one row per suite x subset x method x seed x task; fits; and their origin.

    A graded row (free text) has a list of grades for `predicted` and their name for `gold`. The
    method `expert` holds each task's own expert: what ANP divides by. `fits` holds, per fit, its
    coefficients and its course.
    """

    rows: pd.DataFrame
    fits: list[dict] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)

    @classmethod
    def of(cls, rows: pd.DataFrame, fits: Sequence[Mapping] = (), **facts: object) -> "Report":
        """A Report with provenance: `facts`, versions, device, machine and date are kept."""
        return cls(
            rows[list(COLUMNS)].reset_index(drop=True), list(map(dict, fits)), origin(**facts)
        )

    def majority(self) -> pd.Series:
        """Accuracy of always giving the commonest test answer, by suite and task; 0 if graded."""
        first = self.rows.drop_duplicates(["suite", "task"]).set_index(["suite", "task"])
        shares = [
            np.bincount(numbers(gold)).max() / len(gold) if isinstance(predicted, str) else 0.0
            for predicted, gold in zip(first.predicted, first.gold, strict=True)
        ]
        return pd.Series(shares, first.index, name="gold")

    def counted(self, suite: str) -> list[str]:
        """Tasks that count in the ANP: over seeds, the expert beats the majority by MARGIN."""
        rows = self.rows[(self.rows.suite == suite) & (self.rows.method == "expert")]
        reached = main_scores(scores(rows)).groupby("task", sort=False).value.mean()
        floor = self.majority().loc[suite]
        return [task for task in reached.index if reached[task] >= floor[task] + MARGIN]

    def metrics(self) -> pd.DataFrame:
        """Tidy scores: suite, subset, method, seed, task, metric, value.

        Per task: accuracy, macro_f1, matthews and ratio, the accuracy divided by the expert's; of
        a graded task its mean grade and, of that, the ratio.
        Under the task name `all`: anp, the mean ratio over counted tasks (DivMerge Eq. 5), and
        worst, the smallest of them.
        """
        tidy = scores(self.rows)
        exact = main_scores(tidy)
        key = ["suite", "subset", "seed", "task"]
        expert = exact[exact.method == "expert"].set_index(key).value
        ratio = exact.assign(metric="ratio")
        with np.errstate(divide="ignore", invalid="ignore"):  # an expert that gets nothing right
            whole = expert.loc[list(exact[key].itertuples(index=False))].values
            ratio["value"] = exact.value.values / whole
        counts = {suite: self.counted(suite) for suite in self.rows.suite.unique()}
        kept = ratio[
            [task in counts[suite] for suite, task in zip(ratio.suite, ratio.task, strict=True)]
        ]
        groups = kept.groupby(["suite", "subset", "method", "seed"], sort=False).value
        overall = [
            values.reset_index().assign(task="all", metric=name)
            for name, values in (("anp", groups.mean()), ("worst", groups.min()))
        ]
        return pd.concat([tidy, ratio, *overall], ignore_index=True)[list(tidy.columns)]

    def intervals(
        self, *, statistic: str = "anp", level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> pd.DataFrame:
        """Percentile bootstrap: suite, subset, method, value, low, high (and num_seeds).

        statistic: `anp`, `worst`, or `accuracy` (mean over counted tasks). Each draw resamples
        seeds, and within a seed every task's test rows; the same rows for all methods, so that
        `difference` is paired. With one seed, only test rows vary.
        """
        found = []
        for (suite, subset), rows in self.rows.groupby(["suite", "subset"], sort=False):
            point, drawn = self.bootstrap(rows, suite, statistic, draws, seed)
            tail = 100 * (1 - level) / 2
            low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
            for n, method in enumerate(rows.method.unique()):
                found.append(
                    (suite, subset, method, point[n], low[n], high[n], rows.seed.nunique())
                )
        return pd.DataFrame(
            found, columns=["suite", "subset", "method", "value", "low", "high", "num_seeds"]
        )

    def difference(
        self, suite: str, subset: str, method: str, other: str, *, draws: int = 2000, seed: int = 0
    ) -> tuple[float, float, float]:
        """ANP of `method` minus ANP of `other`: the value and its paired 95 % interval."""
        rows = self.rows[(self.rows.suite == suite) & (self.rows.subset == subset)]
        names = list(rows.method.unique())
        point, drawn = self.bootstrap(rows, suite, "anp", draws, seed)
        a, b = names.index(method), names.index(other)
        low, high = np.percentile(drawn[:, a] - drawn[:, b], [2.5, 97.5])
        return float(point[a] - point[b]), float(low), float(high)

    def bootstrap(
        self, rows: pd.DataFrame, suite: str, statistic: str, draws: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The statistic [M] and its bootstrap draws [draws, M], methods in order of appearance."""
        generator = np.random.default_rng(seed)
        methods, seeds = list(rows.method.unique()), list(rows.seed.unique())
        tasks = [task for task in rows.task.unique() if task in self.counted(suite)]
        if statistic not in ("anp", "worst", "accuracy") or not tasks:
            raise ValueError(
                f"statistic must be anp, worst or accuracy, got {statistic!r}; and a task must "
                f"count in the ANP (its expert beats the majority by {MARGIN}), got {tasks}"
            )
        table = rows.set_index(["method", "seed", "task"])
        point, drawn = [], []
        for number in seeds:
            exact, resampled = [], []
            for task in tasks:
                own = [table.loc[(method, number, task)] for method in methods]
                right = np.stack([grades(row.predicted, row.gold) for row in own], axis=1)
                count = len(right)  # of [rows, M]
                weight = generator.multinomial(count, np.full(count, 1 / count), draws)
                exact.append(right.mean(0))
                resampled.append(weight @ right / count)
            point.append(combine(np.stack(exact), methods, statistic))  # [M]
            drawn.append(combine(np.stack(resampled), methods, statistic))  # [draws, M]
        chosen = generator.integers(len(seeds), size=(draws, len(seeds)))
        every = np.stack(drawn)[chosen, np.arange(draws)[:, None]].mean(1)  # [draws, M]
        return np.mean(point, axis=0), every

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, atomically: an interrupted save leaves the old file."""
        data = {
            "provenance": self.provenance,
            "rows": self.rows.to_dict("records"),
            "fits": self.fits,
        }
        write_json(Path(path), data)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """A saved Report, exactly as it was."""
        data = json.loads(Path(path).read_text("utf-8"))
        return cls(pd.DataFrame(data["rows"])[list(COLUMNS)], data["fits"], data["provenance"])


def combine(right: np.ndarray, methods: Sequence[str], statistic: str) -> np.ndarray:
    """Accuracies [tasks, ..., M] to ANP, worst ratio or mean accuracy [..., M]."""
    if statistic == "accuracy":
        return right.mean(0)
    ratio = right / right[..., [methods.index("expert")]]
    return ratio.mean(0) if statistic == "anp" else ratio.min(0)


def origin(**facts: object) -> dict:
    """Where numbers come from: versions, machine, date, and the facts given (device: its name)."""
    device = torch.device(str(facts.get("device", "cpu")))
    return {
        **facts,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
    }


def caption(report: Report) -> str:
    """One line of provenance for a figure or table."""
    facts, seeds = report.provenance, report.rows.seed.nunique()
    return (
        f"{facts['encoder']}, {facts['size']} size, {seeds} seed{'s' * (seeds > 1)}, "
        f"{facts['rows_per_task']['test']} test rows a task, {facts['device']}, "
        f"{facts['precision']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"measured {facts['date']}"
    )
