"""Prediction churn, calibration and representation similarity before and after merging.

A negative flip (column lost) is a row that the expert predicts correctly and the merge does not; a
positive flip (gained) is the reverse. Rows are known by their index in the task's test split; no
text is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.experiment import Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.evaluation.statistics import (
    chance_error,
    crossed,
    expected_calibration_error,
    reliability,
    row_means,
)
from divmerge_book.interference.behaviour import all_logits, confidence, margin
from divmerge_book.interference.representation import cka, common_share, hidden_states, shift
from divmerge_book.models.encoders import make_batches
from divmerge_book.studies.corrupted_experts import auc
from divmerge_book.studies.evaluator import subsample
from divmerge_book.studies.study import study
from divmerge_core.methods import METHODS, options_of, parse

MERGES = ("average", "task_arithmetic", "divmerge/task", "divmerge/layer")
MODELS = ("expert", "base", *MERGES)
SIMILARITIES = {"cka": cka, "shift": shift, "common": common_share}


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


def parameters_of(experiment: Experiment, model: str, options: Mapping) -> Float[Tensor, " N"]:
    """Parameters of the base, or of a merge with these options."""
    if model == "base":
        return experiment.problem.vectors.base
    name = parse(model)[0]
    quiet = {"progress": False} if "progress" in options_of(name) else {}
    return METHODS[name](experiment.problem, **options, **quiet)


def predictions_of(
    experiment: Experiment, *, seed: int, model: str, options: Mapping, rows: int
) -> list[dict]:
    """A model's predictions on every task; `expert` is every task's own expert.

    A row per task, with lists in the order of the test rows: right (0 or 1) and sure (confidence,
    in thousandths). For the experts also margin (thousandths) and row, the index in the test split;
    for others cka, shift and common of every layer on `rows` rows, embeddings first.
    """
    problem, table = experiment.problem, []
    given = {key: seed if key == "seed" else v for key, v in options.get(model, {}).items()}
    flat = None if model == "expert" else parameters_of(experiment, model, given)
    for number, task in enumerate(problem.vectors.tasks):
        split, expert = experiment.test[number], problem.vectors.expert(task)
        own = expert if flat is None else flat
        logits = all_logits(problem, own, number, split.batches)
        row = {"task": task, "right": (logits.argmax(-1) == split.gold).int().tolist()}
        row["sure"] = (1000 * confidence(logits)).round().int().tolist()
        if flat is None:
            row["margin"] = (1000 * margin(logits)).round().int().tolist()
            row["row"] = row_numbers(experiment, number)
        else:
            few = subsample(split, rows)
            states = [hidden_states(problem, some, few) for some in (expert, own)]
            for name, measure in SIMILARITIES.items():
                row[name] = [round(measure(x, y), 5) for x, y in zip(*states, strict=True)]
        table.append(row)
    return table


def chosen_options(experiment: Experiment, size: Size, seed: int) -> dict[str, dict]:
    """The options of every merge, chosen on validation rows; task arithmetic tries all scales."""
    found = {}
    for spec in MERGES:
        wanted = replace(size, candidates=None) if spec == "task_arithmetic" else size
        options = candidates(spec, wanted, seed, {}, experiment.problem)
        found[spec] = options[search(Merges(experiment, spec), options).best]
    return found


def predictions(experiments: Mapping[int, Experiment], size: Size, *, rows: int) -> pd.DataFrame:
    """`predictions_of` every model of MODELS: columns seed, model, and those.

    experiments: by seed of experts. rows: test rows per task on which layers are compared. Options
    are chosen at the first seed and used for all.
    """
    first = next(iter(experiments))
    options = chosen_options(experiments[first], size, first)
    jobs = [{"model": model} for model in MODELS]
    return study(predictions_of, experiments, jobs, options=options, rows=rows)


def per_row(table: pd.DataFrame) -> pd.DataFrame:
    """One record per model and test row, from `predictions`.

    Columns: seed, model, task, row, right, confidence, expert (whether the expert is right), margin
    (the expert's), lost and gained.
    """
    own = table[table.model == "expert"][["seed", "task", "right", "margin", "row"]]
    own = own.rename(columns={"right": "expert"})
    lists = ["right", "sure", "expert", "margin", "row"]
    rows = table[["seed", "model", "task", "right", "sure"]].merge(own, on=["seed", "task"])
    rows = rows.explode(lists, ignore_index=True).astype(dict.fromkeys(lists, int))
    rows = rows.astype({"right": bool, "expert": bool}).assign(margin=rows.margin / 1000)
    lost, gained = rows.expert & ~rows.right, rows.right & ~rows.expert
    return rows.assign(confidence=rows.sure / 1000, lost=lost, gained=gained).drop(columns="sure")


def churn_by_task(table: pd.DataFrame) -> pd.DataFrame:
    """Flips of every merge: seed, model, task, rows, and shares lost, gained, net and gross.

    net = gained - lost is the merge's accuracy minus the expert's; gross = gained + lost.
    """
    rows = per_row(table).query("model != 'expert'")
    rates = rows.groupby(["model", "seed", "task"], sort=False)
    rates = rates.agg(rows=("row", "size"), lost=("lost", "mean"), gained=("gained", "mean"))
    return rates.assign(
        net=rates.gained - rates.lost, gross=rates.gained + rates.lost
    ).reset_index()


def churn_intervals(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean over tasks of lost, gained and net, with 95 % intervals: model, what, value, low, high.

    Each draw resamples every task's rows, the same ones for all seeds and models; see
    `statistics.crossed`. With one seed only rows vary. Raises ValueError where seeds have
    different test rows.
    """
    generator, rows = np.random.default_rng(seed), per_row(table).query("model != 'expert'")
    rows = rows.assign(gap=rows.right.astype(float) - rows.expert)
    rows["place"] = rows.groupby(["model", "seed", "task"]).cumcount()
    models, seeds = (list(dict.fromkeys(rows[name])) for name in ("model", "seed"))
    tasks, total = [], 0
    for _, part in rows.groupby("task", sort=False):
        gaps = part.pivot(index=["place", "row"], columns=["model", "seed"], values="gap")
        if gaps.isna().any(axis=None):
            raise ValueError("seeds have different test rows; give a table of the same rows")
        gaps = gaps[[*product(models, seeds)]].to_numpy()  # [B, models x seeds]
        columns = np.concatenate([gaps < 0, gaps > 0, gaps], axis=1).astype(float)
        means = row_means(columns, draws, generator)
        tasks.append(means.reshape(1 + draws, 3, len(models), len(seeds)))
        total += len(gaps)
    found = np.moveaxis(np.mean(tasks, axis=0), -1, 0)  # [S, 1 + draws, 3, M]
    every = crossed(found[:, 0], found[:, 1:], total - len(tasks))
    ends = {"value": every.value, **dict(zip(("low", "high"), every.interval(), strict=True))}
    return pd.DataFrame(
        {"model": model, "what": what, **{name: some[k, n] for name, some in ends.items()}}
        for n, model in enumerate(models)
        for k, what in enumerate(("lost", "gained", "net"))
    )


def flips_by_margin(table: pd.DataFrame, *, parts: int = 5) -> pd.DataFrame:
    """Negative flips by the expert's margin: model, part, margin, lost; and auc per model.

    The rows that the expert gets right, of every seed and task, are split into `parts` equal parts
    by margin (part 1: the smallest). lost: share of a part, mean over seeds and tasks. auc: the
    probability that a kept row has a larger margin than a lost one, over all tasks.
    """
    rows = per_row(table).query("model != 'expert' and expert")
    rows = rows.sort_values("margin", kind="stable")
    split = rows.groupby(["model", "seed", "task"], sort=False)
    place, count = split.cumcount(), split.model.transform("size")
    size, larger = count // parts, count % parts  # the first parts have one row more
    wide = larger * (size + 1)
    rows["part"] = 1 + np.where(
        place < wide, place // (size + 1), larger + (place - wide) // size.clip(lower=1)
    )
    means = rows.groupby(["model", "part", "seed", "task"])[["margin", "lost"]].mean()
    ranked = {
        model: np.nanmean([auc(one.margin, one.lost) for _, one in some.groupby("seed")])
        for model, some in rows.groupby("model")
    }
    found = means.groupby(["model", "part"]).mean().reset_index()
    order = [name for name in dict.fromkeys(table.model) if name in ranked]
    found = found.assign(auc=found.model.map(ranked)).set_index("model").loc[order]
    return found.reset_index()


def flip_examples(table: pd.DataFrame, model: str, task: str) -> pd.DataFrame:
    """A task's flips at the first seed: row, kind (lost or gained), margin, largest first."""
    rows = per_row(table[(table.seed == table.seed.iloc[0]) & (table.task == task)])
    rows = rows[(rows.model == model) & (rows.lost | rows.gained)]
    kinds = np.where(rows.lost, "lost", "gained")
    found = rows.assign(kind=kinds).sort_values("margin", ascending=False, kind="stable")
    return found[["row", "kind", "margin"]].reset_index(drop=True)


def calibration_inputs(rows: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """Confidence, and right or wrong, of these rows of `per_row`."""
    return torch.tensor(rows.confidence.to_numpy()), torch.tensor(rows.right.to_numpy())


def calibration_table(table: pd.DataFrame, *, bins: int = 10, draws: int = 200) -> pd.DataFrame:
    """Calibration of every model, all tasks' rows together.

    Columns: seed, model, accuracy, confidence; gap, confidence minus accuracy; uneven, the mean
    over tasks of the gap's size; ece, the expected calibration error; chance, its value for a
    perfectly calibrated model (`chance_error`).
    """
    found = []
    for (seed, model), rows in per_row(table).groupby(["seed", "model"], sort=False):
        means = rows.groupby("task")[["right", "confidence"]].mean()
        sure, right = calibration_inputs(rows)
        row = {"seed": seed, "model": model, "accuracy": rows.right.mean()}
        row |= {"confidence": rows.confidence.mean()}
        row |= {"gap": row["confidence"] - row["accuracy"]}
        row |= {"uneven": (means.confidence - means.right).abs().mean()}
        row |= {"ece": expected_calibration_error(sure, right, bins=bins)}
        found.append({**row, "chance": chance_error(sure, bins=bins, draws=draws)})
    return pd.DataFrame(found)


def reliability_table(table: pd.DataFrame, *, bins: int = 10) -> pd.DataFrame:
    """The reliability diagram of every model over all tasks and seeds, without empty bins.

    Columns: model, bin, count, confidence, accuracy.
    """
    parts = {}
    for model, rows in per_row(table).groupby("model", sort=False):
        found = reliability(*calibration_inputs(rows), bins=bins)
        columns = ("count", "confidence", "accuracy")
        parts[model] = pd.DataFrame({name: getattr(found, name).numpy() for name in columns})
    found = pd.concat(parts, names=["model", "bin"]).reset_index()
    return found[found["count"] > 0].reset_index(drop=True)


def layer_similarity(table: pd.DataFrame) -> pd.DataFrame:
    """cka, shift and common of every layer: seed, model, task, layer (0: embeddings), and those."""
    lists, rows = [*SIMILARITIES], table[table.model != "expert"]
    rows = rows[["seed", "model", "task", *lists]].explode(lists)
    rows = rows.astype(dict.fromkeys(lists, float))
    return rows.assign(layer=rows.groupby(level=0).cumcount()).reset_index(drop=True)
