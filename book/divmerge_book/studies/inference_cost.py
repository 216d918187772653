"""What it takes to answer: bytes stored, time per row, and a large model steered by small ones."""

import statistics
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import predict
from divmerge_book.evaluation.profiling import seconds
from divmerge_book.studies.continual_merging import accuracies, by_task, expert_accuracies
from divmerge_book.studies.searches import CHILDREN, GROUPING, Marks
from divmerge_core.merging.problem import Batch, Merged, MergeProblem
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.paths import Path, Paths, Pool

# How an answer finds its weights: one set for all, read from the input, or by the task's number.
FINDS = {
    **{"emr": "task", "surgery": "task", "dp_mixture": "task", "layer_evolution": "task"},
    **{"expert": "task", "esm_pp": "input", "wemoe": "input", "twin": "input"},
}
SERVED = (
    *("average", "task_arithmetic", "divmerge/layer", "surgery", "esm_pp", "emr", "wemoe", "twin"),
    *("dp_mixture", "layer_evolution", "expert"),
)


def some_rows(bench: Experiment, rows: int, tasks: int = 4) -> list[tuple[int, Batch]]:
    """A batch of test inputs of middling length of each of the first tasks."""
    found = []
    for number, exam in enumerate(bench.test[:tasks]):
        batch = exam.batches[len(exam.batches) // 2]
        inputs = {key: value[:rows] for key, value in batch.inputs.items()}
        count = len(next(iter(inputs.values())))
        found.append((number, Batch(inputs, batch.weight.new_full((count,), 1 / count))))
    return found


def once(problem: MergeProblem, merged: Merged, pairs: Sequence[tuple[int, Batch]]) -> float:
    """Milliseconds per row of answering these batches."""

    def answer() -> None:
        with torch.no_grad():
            for task, batch in pairs:
                problem.logits_of(merged, task, batch)

    took = seconds(answer, problem.vectors.base.device)
    return 1e3 * took / sum(len(batch.weight) for _, batch in pairs)


def latency(
    problem: MergeProblem, merged: Merged, pairs: Sequence[tuple[int, Batch]], repeats: int
) -> dict[str, float]:
    """Milliseconds per row, and its ratio to one plain model that is timed in turn with it.

    Medians over repeats, after one of each that is not counted. The ratio hardly depends on what
    else the machine does, the milliseconds do.
    """
    base = problem.vectors.base
    both = [(once(problem, merged, pairs), once(problem, base, pairs)) for _ in range(repeats + 1)][
        1:
    ]
    return {
        "milliseconds": statistics.median(own for own, _ in both),
        "slower": statistics.median(own / plain for own, plain in both),
    }


def the_experts(problem: MergeProblem) -> Paths:
    """Every task's own expert, as paths that take all of it."""
    pool, tasks = Pool.of(problem, GROUPING), problem.vectors.tasks
    paths = [Path(((task, 1.0),) * pool.segments.num_groups) for task in range(len(tasks))]
    return Paths(problem, [pool.model(path) for path in paths], paths, pool.segments)


def made(bench: Experiment, spec: str, options: Mapping) -> Merged:
    """What a method returns on a bench, `expert` for the experts themselves.

    layer_evolution is scored by the accuracy of the task whose turn it is, on validation rows.
    """
    if spec == "expert":
        return the_experts(bench.problem)
    name, fixed = parse(spec)
    given = {**fixed, **options}
    if name == "layer_evolution":
        given["score"] = Marks(bench, 1 + CHILDREN * options["steps"]).of_paths
    if "progress" in options_of(name):
        given["progress"] = False
    return METHODS[name](bench.problem, **given)


def storage(
    bench: Experiment,
    *,
    methods: Sequence[str] = SERVED,
    options: Mapping[str, Mapping] | None = None,
    repeats: int = 7,
    rows: int = 8,
) -> pd.DataFrame:
    """Every method's bytes, time per row and ANP: a row each.

    Columns: method, finds (where the weights of an answer come from: `one` set for all, `input` or
    `task`), bytes, models (bytes in units of one model), milliseconds and slower (see `latency`, in
    batches of `rows`), anp (on test rows), `arrivals.by_task`, options. Where a task's number finds
    the weights, an input of unknown task cannot be answered. options: by method, published ones
    where none.
    """
    problem, alone = bench.problem, expert_accuracies(bench)
    pairs, found, one = some_rows(bench, rows), [], bench.problem.vectors.base.nbytes
    for spec in (bar := tqdm(methods, "storage", leave=False)):
        bar.set_postfix_str(spec)
        given = dict((options or {}).get(spec, {}))

        def find(spec: str = spec, given: Mapping = given) -> dict:
            merged = made(bench, spec, given)
            reached = accuracies(bench, merged, list(alone))
            ratios = [value / own for value, own in zip(reached, alone.values(), strict=True)]
            row = {"bytes": merged.nbytes, "models": merged.nbytes / one}
            row |= latency(problem, merged, pairs, repeats)
            return {**row, "anp": sum(ratios) / len(ratios), **by_task(bench, reached)}

        row = kept(bench, find, "storage", spec, given, repeats, rows)
        text = ", ".join(f"{key} {value}" for key, value in given.items())
        finds = FINDS.get(parse(spec)[0] if spec != "expert" else spec, "one")
        found.append({"method": spec, "finds": finds, **row, "options": text})
    return pd.DataFrame(found)


# --- a large model steered by small ones ----------------------------------------------------------


def check_pair(small: Experiment, large: Experiment) -> None:
    """Raise ValueError unless two benches read the same test rows as the same tokens."""
    if small.base.tokenizer.get_vocab() != large.base.tokenizer.get_vocab():
        raise ValueError(
            f"{small.base.name!r} and {large.base.name!r} have different vocabularies; logits can "
            "be fused where both models read the same tokens"
        )
    if small.problem.vectors.tasks != large.problem.vectors.tasks:
        raise ValueError("prepare both benches with the same tasks in the same order")
    for one, other in zip(small.test, large.test, strict=True):
        pairs = zip(one.batches, other.batches, strict=True)
        ids = [(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in pairs]
        if not torch.equal(one.gold, other.gold) or not all(torch.equal(a, b) for a, b in ids):
            raise ValueError("prepare both benches at one size: their test rows differ")


def rivals(
    small: Experiment, large: Experiment, number: int
) -> dict[str, tuple[MergeProblem, Merged, int]]:
    """Models that answer a task's rows: (problem, model, the task's number in it) by name.

    `own` ones know the task and use its small expert alone; `all` ones use every small expert.
    """
    task = large.problem.vectors.tasks[number]
    few, many = small.problem.select([task]), small.problem
    big, whole = large.problem.select([task]), large.problem
    fuse = METHODS["logits_fusion"]
    return {
        "large base": (big, big.vectors.base, 0),
        "small expert": (few, few.vectors.expert(task), 0),
        "fused, own": (few, fuse(few, large=big), 0),
        "proxy, own": (few, fuse(few, large=big, weight=1.0), 0),
        "fused, all": (many, fuse(many, large=whole), number),
        "proxy, all": (many, fuse(many, large=whole, weight=1.0), number),
        "large expert": (big, big.vectors.expert(task), 0),
    }


def fusion(
    small: Experiment, large: Experiment, *, repeats: int = 5, rows: int = 8
) -> pd.DataFrame:
    """Small experts steering a large base, per task: task, model, accuracy, milliseconds per row.

    The large base answers with the heads that its own experts trained: these saw the task's labels,
    so it is no model without training on the task; only its encoder is. The same test rows and
    tokens for both; times are medians over repeats, all models in turn. Raises ValueError where
    the benches do not read the same.
    """
    check_pair(small, large)
    pairs = dict(some_rows(large, rows, tasks=len(large.test)))
    found = []
    for number, task in enumerate(tqdm(large.problem.vectors.tasks, "fusion", leave=False)):

        def find(number: int = number) -> list[tuple]:
            exam, models = large.test[number], rivals(small, large, number)
            right, times = {}, {name: [] for name in models}
            for name, (problem, merged, place) in models.items():
                answers = predict(problem, merged, place, exam)
                right[name] = (answers == exam.gold).double().mean().item()
            for _ in range(repeats):
                for name, (problem, merged, place) in models.items():
                    times[name].append(once(problem, merged, [(place, pairs[number])]))
            medians = {name: statistics.median(some) for name, some in times.items()}
            return [(name, right[name], medians[name]) for name in models]

        what = ("fusion", small.digest, task, repeats, rows)
        found += [(task, *row) for row in kept(large, find, *what)]
    return pd.DataFrame(found, columns=["task", "model", "accuracy", "milliseconds"])


def gap_closed(table: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over tasks and seeds, share of the gap closed, time: a row per model.

    closed: how far from the large base (0) to the large expert (1) a model's mean accuracy is.
    kept_margin: of the large expert, where the table has one.
    """
    columns = ["accuracy", "milliseconds", *(["kept_margin"] if "kept_margin" in table else [])]
    mean = table.groupby("model", sort=False)[columns].mean()
    low, high = mean.accuracy["large base"], mean.accuracy["large expert"]
    return mean.assign(closed=(mean.accuracy - low) / (high - low))
