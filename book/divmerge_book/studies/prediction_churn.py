"""Prediction churn, calibration and representation similarity before and after merging.

A negative flip (column lost) is a row that the expert predicts correctly and the merge does not; a
positive flip (gained) is the reverse. Rows are known by their index in the task's test split; no
text is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation import statistics
from divmerge_book.evaluation.experiment import Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.interference import behaviour
from divmerge_book.models.encoders import make_batches
from divmerge_book.studies.corrupted_experts import auc
from divmerge_book.studies.evaluator import subsample
from divmerge_book.studies.study import Experiments, study
from divmerge_core.methods import METHODS, options_of, parse

MERGES = ("average", "task_arithmetic", "divmerge/task", "divmerge/layer")
MODELS = ("expert", "base", *MERGES)
SIMILARITIES = {"cka": behaviour.cka, "shift": behaviour.shift, "common": behaviour.common_share}


def row_numbers(experiment: Experiment, task: int) -> list[int]:
    """The index in the test split of every row of a task's test rows, in their order."""
    expert = experiment.experts[task]
    data = TASKS[expert.task].load("test").select(range(experiment.test[task].rows))
    length = expert.manifest["recipe"]["max_length"]
    return make_batches(data, experiment.base, batch_size=64, max_length=length)[1].tolist()


def texts(task: str, rows: Sequence[int]) -> list[str]:
    """The inputs at these indices of a task's test split."""
    data = TASKS[task].load("test")
    columns = [name for name in ("text", "pair") if name in data.column_names]
    return [" / ".join(data[row][name] for name in columns) for row in rows]


def predictions_of(
    experiment: Experiment, *, seed: int, model: str, options: Mapping, rows: int
) -> list[dict]:
    """A model's predictions, a row per task; `expert` is every task's own expert.

    Lists in the order of the test rows: right (0 or 1), sure (confidence, thousandths); of experts
    also margin (thousandths) and row, the index in the test split; of others cka, shift and common
    of every layer on `rows` rows, embeddings first.
    """
    problem, table = experiment.problem, []
    vectors, flat = problem.vectors, problem.vectors.base
    if model in options:
        name, _ = parse(model)
        given = {key: seed if key == "seed" else v for key, v in options[model].items()}
        quiet = {"progress": False} if "progress" in options_of(name) else {}
        flat = METHODS[name](problem, **given, **quiet)
    for number, task in enumerate(vectors.tasks):
        split, expert = experiment.test[number], vectors.expert(task)
        own = expert if model == "expert" else flat
        logits = behaviour.all_logits(problem, own, number, split.batches)
        row = {"task": task, "right": (logits.argmax(-1) == split.gold).int().tolist()}
        row["sure"] = (1000 * behaviour.confidence(logits)).round().int().tolist()
        if model == "expert":
            row["margin"] = (1000 * behaviour.margin(logits)).round().int().tolist()
            row["row"] = row_numbers(experiment, number)
        else:
            few = subsample(split, rows)
            states = [behaviour.hidden_states(problem, some, few) for some in (expert, own)]
            for name, measure in SIMILARITIES.items():
                row[name] = [round(measure(x, y), 5) for x, y in zip(*states, strict=True)]
        table.append(row)
    return table


def predictions(experiments: Experiments, size: Size, *, rows: int) -> pd.DataFrame:
    """`predictions_of` every model of MODELS: columns seed, model, and those.

    rows: test rows per task on which layers are compared. Options are chosen on validation rows at
    the first seed and used for all; task arithmetic tries all scales.
    """
    first, options = next(iter(experiments)), {}
    for spec in MERGES:
        wanted = replace(size, candidates=None) if spec == "task_arithmetic" else size
        tried = candidates(spec, wanted, first, {}, experiments[first].problem)
        options[spec] = tried[search(Merges(experiments[first], spec), tried).best]
    jobs = [{"model": model} for model in MODELS]
    return study(predictions_of, experiments, jobs, options=options, rows=rows)


def per_row(table: pd.DataFrame) -> pd.DataFrame:
    """One record per model and test row, from `predictions`.

    Columns: seed, model, task, row, right, confidence, expert (whether it is right), margin (the
    expert's), lost and gained.
    """
    own = table[table.model == "expert"][["seed", "task", "right", "margin", "row"]]
    own = own.rename(columns={"right": "expert"})
    lists = ["right", "sure", "expert", "margin", "row"]
    rows = table[["seed", "model", "task", "right", "sure"]].merge(own, on=["seed", "task"])
    rows = rows.explode(lists, ignore_index=True).astype(dict.fromkeys(lists, int))
    rows = rows.astype({"right": bool, "expert": bool}).assign(margin=rows.margin / 1000)
    lost, gained = rows.expert & ~rows.right, rows.right & ~rows.expert
    return rows.assign(confidence=rows.sure / 1000, lost=lost, gained=gained).drop(columns="sure")


def merged_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The records of all models but the experts."""
    return per_row(table).query("model != 'expert'")


def churn_by_task(table: pd.DataFrame) -> pd.DataFrame:
    """Flips of every merge: seed, model, task, rows, and shares lost, gained, net, gross (sum)."""
    groups = merged_rows(table).groupby(["model", "seed", "task"], sort=False)
    rates = groups.agg(rows=("row", "size"), lost=("lost", "mean"), gained=("gained", "mean"))
    both = {"net": rates.gained - rates.lost, "gross": rates.gained + rates.lost}
    return rates.assign(**both).reset_index()


def churn_intervals(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean over tasks of lost, gained and net, with 95 % intervals: model, what, value, low, high.

    Each draw resamples every task's rows, the same ones for all seeds and models
    (`statistics.crossed`); with one seed only rows vary. Raises ValueError where seeds have
    different test rows.
    """
    generator, rows = np.random.default_rng(seed), merged_rows(table)
    rows = rows.assign(net=rows.gained.astype(float) - rows.lost)
    rows["place"] = rows.groupby(["model", "seed", "task"]).cumcount()
    models, seeds = (list(dict.fromkeys(rows[name])) for name in ("model", "seed"))
    names, means, total = ["lost", "gained", "net"], [], 0
    order = [(what, model, n) for model in models for what in names for n in seeds]
    for _, part in rows.groupby("task", sort=False):
        wide = part.pivot(index=["place", "row"], columns=["model", "seed"], values=names)
        if wide.isna().any(axis=None):
            raise ValueError("seeds have different test rows; give a table of the same rows")
        drawn = statistics.row_means(wide[order].to_numpy(float), draws, generator)
        means.append(drawn.reshape(-1, len(names) * len(models), len(seeds)))
        total += len(wide)
    found = np.moveaxis(np.mean(means, axis=0), -1, 0)  # [S, 1 + draws, models x what]
    every = statistics.crossed(found[:, 0], found[:, 1:], total - len(means))
    label = pd.MultiIndex.from_product([models, names], names=["model", "what"])
    ends = dict(zip(("low", "high"), every.interval(), strict=True))
    return pd.DataFrame({"value": every.value, **ends}, label).reset_index()


def flips_by_margin(table: pd.DataFrame, *, parts: int = 5) -> pd.DataFrame:
    """Negative flips by the expert's margin: model, part, margin, lost; and auc per model.

    The rows that the expert gets right, of every seed and task, are split into `parts` equal parts
    by margin, the smallest first; lost: share of a part, mean over seeds and tasks. auc: the
    probability that a kept row has a larger margin than a lost one, over all tasks.
    """
    rows = merged_rows(table).query("expert").sort_values("margin", kind="stable")

    def part_numbers(margins: pd.Series) -> np.ndarray:
        sizes = [len(some) for some in np.array_split(margins.to_numpy(), parts)]
        return np.repeat(np.arange(1, parts + 1), sizes)

    each = rows.groupby(["model", "seed", "task"], sort=False)
    rows["part"] = each.margin.transform(part_numbers).astype(int)
    means = rows.groupby(["model", "part", "seed", "task"])[["margin", "lost"]].mean()
    groups = rows.groupby(["model", "seed"])[["margin", "lost"]]
    mean = groups.apply(lambda some: auc(some.margin, some.lost)).groupby("model").mean()
    found = means.groupby(["model", "part"]).mean().reset_index("part").assign(auc=mean)
    order = [name for name in dict.fromkeys(table.model) if name in mean]
    return found.loc[order].rename_axis("model").reset_index()


def flip_examples(table: pd.DataFrame, model: str, task: str) -> pd.DataFrame:
    """A task's flips at the first seed: row, kind (lost or gained), margin, largest first."""
    rows = per_row(table[(table.seed == table.seed.iloc[0]) & (table.task == task)])
    rows = rows[(rows.model == model) & (rows.lost | rows.gained)]
    found = rows.assign(kind=np.where(rows.lost, "lost", "gained"))
    found = found.sort_values("margin", ascending=False, kind="stable", ignore_index=True)
    return found[["row", "kind", "margin"]]


def confident_flips(table: pd.DataFrame, model: str, task: str) -> pd.DataFrame:
    """The first four rows of each kind of `flip_examples`, with the beginning of their texts."""
    few = flip_examples(table, model, task).groupby("kind", sort=False).head(4)
    return few.assign(text=[text[:110] for text in texts(task, few["row"].tolist())])


def calibration_inputs(rows: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """Confidence, and right or wrong, of these rows of `per_row`."""
    return torch.tensor(rows.confidence.to_numpy()), torch.tensor(rows.right.to_numpy())


def calibration_table(table: pd.DataFrame, *, bins: int = 10, draws: int = 200) -> pd.DataFrame:
    """Calibration of every model, all tasks' rows together.

    Columns: seed, model, accuracy, confidence, gap (confidence minus accuracy), uneven (mean over
    tasks of the gap's size), ece (expected calibration error), chance (`chance_error`).
    """

    def of(rows: pd.DataFrame) -> pd.Series:
        (sure, right), means = calibration_inputs(rows), rows[["right", "confidence"]].mean()
        by_task = rows.groupby("task")[["right", "confidence"]].mean()
        row = {"accuracy": means.right, "confidence": means.confidence}
        row["gap"] = means.confidence - means.right
        row["uneven"] = (by_task.confidence - by_task.right).abs().mean()
        row["ece"] = statistics.expected_calibration_error(sure, right, bins=bins)
        return pd.Series({**row, "chance": statistics.chance_error(sure, bins=bins, draws=draws)})

    return per_row(table).groupby(["seed", "model"], sort=False).apply(of).reset_index()


def reliability_table(table: pd.DataFrame, *, bins: int = 10) -> pd.DataFrame:
    """Reliability diagrams, without empty bins: model, bin, count, confidence, accuracy."""
    names, parts = ("count", "confidence", "accuracy"), {}
    for model, rows in per_row(table).groupby("model", sort=False):
        found = statistics.reliability(*calibration_inputs(rows), bins=bins)
        parts[model] = pd.DataFrame({name: getattr(found, name).numpy() for name in names})
    found = pd.concat(parts, names=["model", "bin"]).reset_index()
    return found[found["count"] > 0].reset_index(drop=True)


def layer_similarity(table: pd.DataFrame) -> pd.DataFrame:
    """cka, shift and common of every layer: seed, model, task, layer (0: embeddings), and those."""
    lists, rows = [*SIMILARITIES], table[table.model != "expert"]
    rows = rows[["seed", "model", "task", *lists]].explode(lists)
    rows = rows.astype(dict.fromkeys(lists, float))
    return rows.assign(layer=rows.groupby(level=0).cumcount()).reset_index(drop=True)
