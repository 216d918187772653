"""Inference cost: bytes stored, time per row, and proxy tuning of a large model by small ones."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import predict
from divmerge_book.evaluation.profiling import seconds
from divmerge_book.studies.evaluator import accuracies, scores_by_task
from divmerge_book.studies.input_shifts import first_rows
from divmerge_book.studies.searches import CHILDREN, ValidationScore, path_per_task
from divmerge_book.studies.study import study
from divmerge_core.merging.problem import Batch, Merged, MergeProblem
from divmerge_core.methods import METHODS, options_of, parse

# What selects the weights for an input: one set for all, the input, or its task's number.
ROUTING = {
    **{"emr": "task", "surgery": "task", "dp_mixture": "task", "layer_evolution": "task"},
    **{"expert": "task", "esm_pp": "input", "wemoe": "input", "twin": "input"},
}
SERVED = (
    *("average", "task_arithmetic", "divmerge/layer", "surgery", "esm_pp", "emr", "wemoe", "twin"),
    *("dp_mixture", "layer_evolution", "expert"),
)
Timed = tuple[MergeProblem, Merged, Sequence[tuple[int, Batch]]]  # with tasks and batches


def timing_batches(experiment: Experiment, rows: int, tasks: int = 4) -> list[tuple[int, Batch]]:
    """A batch of `rows` test inputs of medium length of each of the first tasks."""
    middles = [split.batches[len(split.batches) // 2] for split in experiment.test[:tasks]]
    return [(number, first_rows(batch, rows)) for number, batch in enumerate(middles)]


def milliseconds(models: Mapping[str, Timed], repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds per row of every model's forward pass, `[repeats]`: in turn, after a warm-up."""
    found = {name: [] for name in models}

    @torch.no_grad()
    def forward(problem: MergeProblem, merged: Merged, pairs: Sequence) -> None:
        for task, batch in pairs:
            problem.logits_of(merged, task, batch)

    for _ in range(repeats + 1):
        for name, (problem, merged, pairs) in models.items():
            call = partial(forward, problem, merged, pairs)
            count = sum(len(batch.weight) for _, batch in pairs)
            found[name].append(1e3 * seconds(call, problem.vectors.base.device) / count)
    return {name: np.array(times[1:]) for name, times in found.items()}


def merged_of(experiment: Experiment, spec: str, options: Mapping) -> Merged:
    """What a method returns, or for `expert` the experts themselves, as paths."""
    problem = experiment.problem
    if spec == "expert":
        return path_per_task(experiment, lambda pool, own, task: own)
    name, fixed = parse(spec)
    given = {**fixed, **options}
    if name == "layer_evolution":
        given["score"] = ValidationScore(experiment, 1 + CHILDREN * options["steps"]).of_paths
    if "progress" in options_of(name):
        given["progress"] = False
    return METHODS[name](problem, **given)


def cost_of(
    experiment: Experiment, *, seed: int, method: str, options: Mapping, repeats: int, rows: int
) -> list[dict]:
    """One method's row of `inference_cost`."""
    merged, problem = merged_of(experiment, method, options), experiment.problem
    base, pairs = problem.vectors.base, timing_batches(experiment, rows)
    models = {"own": (problem, merged, pairs), "plain": (problem, base, pairs)}
    times = milliseconds(models, repeats)
    return [
        {
            "finds": ROUTING.get(method.partition("/")[0], "one"),
            "bytes": merged.nbytes,
            "models": merged.nbytes / base.nbytes,
            "milliseconds": float(np.median(times["own"])),
            "slower": float(np.median(times["own"] / times["plain"])),
            **scores_by_task(experiment, accuracies(experiment, merged)),
            "options": ", ".join(f"{key} {value}" for key, value in options.items()),
        }
    ]


def inference_cost(
    experiment: Experiment, *, options: Mapping[str, Mapping], repeats: int, rows: int = 8
) -> pd.DataFrame:
    """Bytes, time per row and accuracy of every method in SERVED: a row each.

    options: by method; published ones where there are none. Columns: method, finds (see ROUTING:
    `task` cannot answer inputs of unknown task), bytes, models (bytes in units of one model),
    milliseconds (median, in batches of `rows`), slower (median ratio to a plain model timed in
    turn with it, which hardly depends on the machine's other load), `scores_by_task`, options.
    """
    jobs = [{"method": name, "options": options.get(name, {})} for name in SERVED]
    table = study(cost_of, {0: experiment}, jobs, repeats=repeats, rows=rows)
    return table.drop(columns="seed")


def check_pair(small: Experiment, large: Experiment) -> None:
    """Raise ValueError unless two experiments have the same test rows as the same tokens."""
    if small.base.tokenizer.get_vocab() != large.base.tokenizer.get_vocab():
        raise ValueError(
            f"{small.base.name!r} and {large.base.name!r} have different vocabularies; logits can "
            "be fused where both models read the same tokens"
        )
    if small.problem.vectors.tasks != large.problem.vectors.tasks:
        raise ValueError("prepare both experiments with the same tasks in the same order")
    for one, other in zip(small.test, large.test, strict=True):
        pairs = zip(one.batches, other.batches, strict=True)
        ids = [(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in pairs]
        if not torch.equal(one.gold, other.gold) or not all(torch.equal(a, b) for a, b in ids):
            raise ValueError("prepare both experiments at one size: their test rows differ")


def tuned(
    large: Experiment, *, small: Experiment, seed: int, task: str, repeats: int, rows: int
) -> list[dict]:
    """One task's rows of `proxy_tuning`: `own` models use its small expert, `all` every one."""
    number = large.problem.vectors.tasks.index(task)
    few, many = small.problem.select([task]), small.problem
    big, whole, fuse = large.problem.select([task]), large.problem, METHODS["logits_fusion"]
    models = {  # name -> (problem, model, the task's number in it)
        "large base": (big, big.vectors.base, 0),
        "small expert": (few, few.vectors.expert(task), 0),
        "fused, own": (few, fuse(few, large=big), 0),
        "proxy, own": (few, fuse(few, large=big, weight=1.0), 0),
        "fused, all": (many, fuse(many, large=whole), number),
        "proxy, all": (many, fuse(many, large=whole, weight=1.0), number),
        "large expert": (big, big.vectors.expert(task), 0),
    }
    (_, batch), split = timing_batches(large, rows, number + 1)[number], large.test[number]
    timed = {name: (*model, [(place, batch)]) for name, (*model, place) in models.items()}
    times, table = milliseconds(timed, repeats), []
    for name, model in models.items():
        correct = predict(*model, split) == split.gold
        row = {"model": name, "accuracy": correct.double().mean().item()}
        table.append({**row, "milliseconds": float(np.median(times[name]))})
    return table


def proxy_tuning(
    small: Experiment, large: Experiment, *, seed: int = 0, repeats: int = 5, rows: int = 8
) -> pd.DataFrame:
    """Small experts steering a large base, per task: task, model, accuracy, milliseconds, seed.

    milliseconds: per row, medians, all models in turn. The large base uses the heads of its own
    experts, which saw the task's labels; only its encoder is untrained on the task. Raises
    ValueError where the experiments have different rows or tokens.
    """
    check_pair(small, large)
    jobs = [{"task": task} for task in large.problem.vectors.tasks]
    sizes = {"repeats": repeats, "rows": rows}
    return study(partial(tuned, small=small), {seed: large}, jobs, keys=small.digest, **sizes)


def gap_closed(table: pd.DataFrame) -> pd.DataFrame:
    """Means over tasks and seeds by model: accuracy, milliseconds, closed (share of the gap).

    closed: on the scale from the large base (0) to the large expert (1).
    """
    columns = [name for name in ("accuracy", "milliseconds", "kept_margin") if name in table]
    mean = table.groupby("model", sort=False)[columns].mean()
    low, high = mean.accuracy["large base"], mean.accuracy["large expert"]
    return mean.assign(closed=(mean.accuracy - low) / (high - low))
