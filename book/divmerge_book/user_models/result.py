"""Merge users' experts by several methods and score them where there are labels."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.experiment import SIZES, Experiment
from divmerge_book.evaluation.hyperparameter_search import (
    Made,
    Merges,
    candidates,
    own_experts,
    search,
)
from divmerge_book.evaluation.metrics import evaluate, graded, grades
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.statistics import middle
from divmerge_book.models.language.reading import MultipleChoiceBatch
from divmerge_book.user_models.labels import order_note
from divmerge_book.user_models.method_needs import check_budget, check_methods
from divmerge_core.divergences import objective
from divmerge_core.merging.problem import Batch, Merged

SUITE = "local"


@dataclass(frozen=True)
class MergeResult:
    """Merges and options by method, and a Report where there are labels.

    closeness: method, task, rows (the split of the inputs), divergence (mean, in nats, from the
    expert) and agreement (share of inputs with the expert's prediction): these need no labels.
    notes: what was warned of. chosen: method -> a note where a search chose its options.
    """

    made: Mapping[str, Made]
    options: Mapping[str, Mapping]
    closeness: pd.DataFrame
    report: Report | None
    notes: Sequence[str] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)


def rows_in(batch: Batch) -> int:
    """How many inputs a batch holds: of a language model's answer, all positions are of one."""
    whole = batch.answer is None or isinstance(batch, MultipleChoiceBatch)
    return len(batch.weight if whole else batch.inputs["input_ids"])


@torch.no_grad()
def closeness(
    bench: Experiment, merged: Mapping[str, Merged], *, divergence: str = "js"
) -> pd.DataFrame:
    """Divergence of merges from every expert, on its test inputs, or else its merge inputs.

    Tasks with neither are left out. Columns method, task, rows, divergence (mean over inputs, nats)
    and agreement (share of inputs with the expert's prediction; of answers in words, the mean share
    of positions with its token).
    """
    problem, distance, found = bench.problem, objective(divergence), []
    for number, task in enumerate(problem.vectors.tasks):
        tested = getattr(bench.test[number], "batches", ())  # what is written has none
        batches: Sequence[Batch] = tested or problem.batches[number]
        if not batches:
            continue
        expert = problem.vectors.expert(task)
        sums = {method: torch.zeros(2, dtype=torch.float64) for method in merged}
        for batch in batches:
            wanted = problem.logits(expert, number, batch)
            weight = batch.weight.double().cpu()
            weight *= rows_in(batch) / weight.sum()
            for method, flat in merged.items():
                given = problem.logits_of(flat, number, batch)
                same = given.argmax(-1) == wanted.argmax(-1)
                both = torch.stack([distance(wanted, given), same]).double().cpu()
                sums[method] += both @ weight
        total = sum(map(rows_in, batches))
        for method, both in sums.items():
            found.append((method, task, "test" if tested else "merge", *(both / total).tolist()))
    return pd.DataFrame(found, columns=["method", "task", "rows", "divergence", "agreement"])


def merge_and_score(
    bench: Experiment,
    specs: Sequence[str],
    *,
    budget: int | None = None,
    seed: int = 0,
    suite: str = SUITE,
    progress: bool = True,
    **overrides: object,
) -> MergeResult:
    """Every method on the user's experts, scored where there are labelled test rows.

    budget: candidates of each method's search on validation rows, None for all that it registers;
    without validation rows each takes its published options, and more than one is refused.
    overrides: options of the methods (`epochs`, `lr`, `inputs`, `divergence`, `scale`). suite: its
    name in the report, whose methods `expert` and `base` are the references.

    Raises ValueError for what is unknown, for methods that return no single model, and for those
    that need a validation score where there is none; Diverged where a fit diverges.
    """
    tasks, searched = bench.problem.vectors.tasks, [split.rows for split in bench.validation]
    lacking = {
        split: [task for task, given in zip(tasks, every, strict=True) if not given]
        for split, every in (("merge", bench.problem.batches), ("validation", searched))
    }
    check_methods(specs, tasks, lacking, overrides)
    check_budget(budget, lacking["validation"])
    searching = not lacking["validation"]
    size = replace(SIZES["full"], candidates=budget if searching else 1, inputs=None)
    made, options, chosen = {}, {}, {}
    for spec in (bar := tqdm(specs, "merging", disable=not progress, leave=False)):
        bar.set_postfix_str(spec)
        merges = Merges(bench, spec)
        tried = candidates(spec, size, seed, overrides, bench.problem)
        options[spec] = tried[search(merges, tried).best]
        if len(tried) > 1:
            chosen[spec] = f"options: the best of {len(tried)} sets on the validation rows"
        made[spec] = merges(options[spec])
    flats = {"base": bench.problem.vectors.base, **{s: one.merged for s, one in made.items()}}
    known = *scored(bench, flats, seed, suite), chosen
    return MergeResult(made, options, closeness(bench, flats), *known)


def scored(
    bench: Experiment, merged: Mapping[str, Merged], seed: int, suite: str
) -> tuple[Report | None, list[str]]:
    """Predictions of experts and merges on the labelled test rows, None without any; warnings."""
    every = zip(bench.problem.vectors.tasks, bench.test, strict=True)
    rows = {task: split.rows for task, split in every if split.rows}
    if not rows:
        return None, []
    part, notes = bench.select(list(rows)), []
    ends = sorted({min(rows.values()), max(rows.values())})
    labels = {"suite": suite, "subset": "+".join(rows), "seed": seed}
    parts = [own_experts(part, part.test, **labels, method="expert")]
    for own in parts[0].itertuples():
        answers = bench.experts[bench.problem.vectors.tasks.index(own.task)].manifest["answers"]
        if graded(own.gold) or max(own.predicted) >= len(answers):
            continue  # text, which may be none of the labels
        if note := order_note(own.task, own.predicted, own.gold, answers):
            warnings.warn(note, stacklevel=3)
            notes.append(note)
    for method, flat in merged.items():
        parts.append(evaluate(part.problem, flat, part.test, **labels, method=method))
    report = Report.of(
        pd.concat(parts, ignore_index=True),
        suite=suite,
        encoder=bench.base.name,
        size="own",
        device=str(bench.problem.vectors.base.device),
        precision=bench.experts[0].manifest["precision"],
        rows_per_task={"test": " to ".join(map(str, ends))},
    )
    return report, notes


def rescored(
    report: Report | None, bench: Experiment, method: str, flat: Float[Tensor, " N"]
) -> Report | None:
    """The report with this vector's predictions in the place of a method's."""
    if report is None:
        return None
    mine = report.rows.method == method
    part = bench.select(list(report.rows[mine].task))
    labels = report.rows.loc[mine, ["suite", "subset", "method", "seed"]].iloc[0].to_dict()
    found = evaluate(part.problem, flat, part.test, **labels)
    return replace(report, rows=pd.concat([report.rows[~mine], found], ignore_index=True))


def task_scores(
    report: Report | None, method: str, *, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """A method's scores on every labelled task, with 95 % intervals over rows.

    Columns task, metric, value, low, high. By task: accuracy, or the mean grade of free text;
    majority, that of a constant prediction (no interval; not of free text); ratio and kept_margin
    (see `Report.against_experts`), with an interval where the task counts in the ANP, NaN for the
    margin of an expert that has none. Where tasks count, the last rows are `all`: anp, kept_margin.
    """
    columns = ["task", "metric", "value", "low", "high"]
    if report is None:
        return pd.DataFrame(columns=columns)
    generator, found, statistics = np.random.default_rng(seed), [], ("anp", "kept_margin")

    def intervals(part: Report, task: str, metrics: Sequence[str]) -> None:
        for metric, statistic in zip(metrics, statistics, strict=True):
            every = part.intervals(statistic=statistic, draws=draws, seed=seed).set_index("method")
            found.append((task, metric, *every.loc[method, ["value", "low", "high"]]))

    exact = report.against_experts().query("method == @method").set_index("task")
    for row in report.rows[report.rows.method == method].itertuples():
        right, own = grades(row.predicted, row.gold), exact.loc[row.task]
        if graded(row.gold):
            drawn = right[generator.integers(0, len(right), (draws, len(right)))].mean(1)
            found.append((row.task, row.gold, right.mean(), *middle(drawn)))
        else:
            drawn = generator.binomial(len(right), right.mean(), draws) / len(right)
            found.append((row.task, "accuracy", right.mean(), *middle(drawn)))
            found.append((row.task, "majority", own.floor, np.nan, np.nan))
        metrics = ["ratio", "kept_margin"]
        if own.counted:
            alone = replace(report, rows=report.rows[report.rows.task == row.task])
            intervals(alone, row.task, metrics)
        else:
            found += [(row.task, metric, own[metric], np.nan, np.nan) for metric in metrics]
    if exact.counted.any():
        intervals(report, "all", statistics)
    return pd.DataFrame(found, columns=columns)
