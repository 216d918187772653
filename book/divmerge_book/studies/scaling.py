"""Accuracy against the number of merged tasks: the subsets, the merges, and what each answers.

Every row of a table is one merged model on one of its tasks: which test rows it gets right, and how
far its answers are from the expert's. Every merge's rows are kept in the cache, so an interrupted
study goes on where it stopped.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import SIZES, Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Made, Merges, candidates, search
from divmerge_book.interference.weights import cosine, sign_conflict
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import Merged
from divmerge_core.methods import METHODS

Subset = tuple[str, ...]
References = Mapping[str, list[Tensor]]  # every task's expert's logits on its test rows, by batch
JOIN = "+"  # between the tasks of a subset
EXPERT, COMMONEST = "expert", "commonest answer"  # references, beside the methods


@dataclass(frozen=True)
class Effort:
    """How much a size runs.

    tasks: how many of the suite's, None for all. subsets: for every T at the first seed, random
    ones, or all there are for the T in `whole` (below 0: counted from the number of tasks).
    repeated: how many of these at each other seed. budget: candidates that a search scores.
    scales: of task arithmetic with fixed coefficients. every: fixed coefficients for all subsets.
    """

    methods: tuple[str, ...]
    tasks: int | None = None
    subsets: int = 5
    repeated: int = 2
    whole: tuple[int, ...] = (2,)
    budget: int = 3
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 1.0, 1.5)
    every: bool = True


FREE = (
    *("average", "model_stock", "multi_slerp", "task_arithmetic", "ties", "dare", "breadcrumbs"),
    *("pcb", "consensus", "tsv_m", "iso_c", "iso_cts", "doge", "opcm"),
)
FITTED = (
    *("regmean", "fisher", "adamerging/task", "adamerging/layer"),
    *("divmerge/task", "divmerge/layer"),
)
FEW = ("average", "task_arithmetic", "ties", "divmerge/layer")
EFFORTS: Mapping[str, Effort] = {
    "smoke": Effort(
        ("average", "task_arithmetic", "divmerge/layer"), 3, budget=1, scales=(0.3, 1.0)
    ),
    "default": Effort(FEW, 4, repeated=1, budget=1, scales=(0.1, 0.3, 0.5, 1.0)),
    "full": Effort((*FREE, *FITTED), subsets=3, repeated=1),
}


def settings_of(size: str) -> tuple[Size, Effort]:
    """Rows, recipe and budget of a size, and how much it runs.

    `full` has the rows of `default`, of which it merges more. Raises ValueError for another size.
    """
    if size not in EFFORTS:
        raise ValueError(f"this study knows the sizes {', '.join(EFFORTS)}, not {size!r}")
    rows = SIZES["default" if size == "full" else size]
    return replace(rows, candidates=EFFORTS[size].budget), EFFORTS[size]


FIXED = 0.3  # the scale at which all subsets are merged: task arithmetic's published one


def subsets_of(
    tasks: Sequence[str], count: int, *, whole: Sequence[int] = (), seed: int = 0
) -> list[Subset]:
    """`count` random subsets of every number of tasks from 2 on, or all where there are no more.

    In the order of the tasks within a subset, by number of tasks, in random order within a number.
    whole: numbers of tasks of which all are wanted; -1 is one less than there are. Raises
    ValueError for fewer than two tasks or no subset.
    """
    if len(tasks) < 2 or count < 1:
        raise ValueError(
            f"give two tasks or more and one subset or more, got {list(tasks)} and {count}"
        )
    found, wanted = [], {number if number > 0 else len(tasks) + number for number in whole}
    for number in range(2, len(tasks) + 1):
        every = list(combinations(tasks, number))
        generator = random.Random(f"{seed} {number}")
        few = len(every) if number in wanted else min(count, len(every))
        found += generator.sample(every, few)
    return found


def first_of_each(subsets: Sequence[Subset], count: int) -> list[Subset]:
    """The first `count` subsets of every number of tasks."""
    sizes = [len(subset) for subset in subsets]
    return [s for n, s in enumerate(subsets) if sizes[:n].count(len(s)) < count]


def packed(right: Bool[Tensor, " B"]) -> str:
    """Which rows are right, as a hexadecimal number: a leading 1, then a bit per row."""
    return f"{int('1' + ''.join('01'[bit] for bit in right.tolist()), 2):x}"


def unpacked(text: str) -> list[bool]:
    """The inverse of `packed`."""
    return [bit == "1" for bit in f"{int(text, 16):b}"[1:]]


@torch.no_grad()
def references(bench: Experiment) -> References:
    """Every expert's logits on its own test rows."""
    found, problem = {}, bench.problem
    for number, task in enumerate(problem.vectors.tasks):
        expert = problem.vectors.expert(task)
        found[task] = [problem.logits(expert, number, b) for b in bench.test[number].batches]
    return found


@torch.no_grad()
def judged(bench: Experiment, merged: Merged, experts: References) -> list[dict]:
    """A row per task: `right`, packed, and `js` to the expert, nats, mean over test rows."""
    rows = []
    for number, task in enumerate(bench.problem.vectors.tasks):
        exam = bench.test[number]
        logits = [bench.problem.logits_of(merged, number, batch) for batch in exam.batches]
        far = [DIVERGENCES["js"](p, q) for p, q in zip(experts[task], logits, strict=True)]
        right = torch.cat([some.argmax(-1) for some in logits]) == exam.gold
        js = round(torch.cat(far).double().mean().item(), 5)
        rows.append({"task": task, "right": packed(right), "js": js})
    return rows


def own_rows(bench: Experiment, experts: References) -> list[dict]:
    """Every expert on its own task, and what always giving the commonest test answer gets right."""
    rows = []
    for task, exam in zip(bench.problem.vectors.tasks, bench.test, strict=True):
        answers = torch.cat([logits.argmax(-1) for logits in experts[task]])
        common = exam.gold == exam.gold.bincount().argmax()
        for name, right in ((EXPERT, answers == exam.gold), (COMMONEST, common)):
            rows.append({"method": name, "subset": task, "task": task, "right": packed(right)})
    return rows


def with_coefficients(made: Made, rows: list[dict]) -> list[dict]:
    """The rows with every task's mean coefficient over groups, where the merge was a fit's."""
    if made.fit is None:
        return rows
    means = [sum(row) / len(row) for row in made.fit["coefficients"]]
    return [{**row, "coefficient": round(c, 5)} for row, c in zip(rows, means, strict=True)]


def piece(merges: Merges, options: dict, experts: References) -> list[dict]:
    """One merge's rows, from the cache or found now."""

    def find() -> list[dict]:
        made = merges(options)
        return with_coefficients(made, judged(merges.experiment, made.merged, experts))

    return kept(merges.experiment, find, "scaling", merges.spec, options, method=merges.spec)


def scaling(
    benches: Mapping[int, Experiment],
    subsets: Sequence[Subset],
    *,
    methods: Sequence[str],
    size: Size,
    repeated: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method on the same subsets: its answers, and the options that were found.

    benches: by seed of the experts. The first seed merges all subsets, each other seed the first
    `repeated` of every T. Options are found once for every method and T, on validation rows at the
    first seed, on the first subset of that T; size says how many candidates are scored.

    Answers: seed, method, subset, task, right (`unpacked` reads it), js (nats), coefficient (mean
    over groups; methods that fit coefficients). The experts and the commonest answer stand there
    with their task as the subset. Found: method, T, options, tried.
    """
    rows, found, best = [], [], {}
    few, first = first_of_each(subsets, repeated), next(iter(benches))
    jobs = [(seed, s) for seed in benches for s in (subsets if seed == first else few)]
    experts = {seed: references(bench) for seed, bench in benches.items()}
    for seed, bench in benches.items():
        rows += [{"seed": seed, **row} for row in own_rows(bench, experts[seed])]
    for seed, subset in (bar := tqdm(jobs, "subsets", leave=False)):
        bench = benches[seed].select(subset)
        for spec in methods:
            bar.set_postfix_str(f"seed {seed}, T = {len(subset)}, {spec}")
            tried = candidates(spec, size, seed, {}, bench.problem)
            merges, key = Merges(bench, spec), (spec, len(subset))
            if key not in best:
                best[key] = search(merges, tried).best
                chosen = {k: v for k, v in tried[best[key]].items() if k != "seed"}
                named = {"method": spec, "T": len(subset), "options": str(chosen)}
                found.append({**named, "tried": len(tried)})
            labels = {"seed": seed, "method": spec, "subset": JOIN.join(subset)}
            rows += [{**labels, **r} for r in piece(merges, tried[best[key]], experts[seed])]
    answers = pd.DataFrame(rows)
    if "coefficient" not in answers:  # no method among these fits any
        answers["coefficient"] = float("nan")
    return answers, pd.DataFrame(found)


def scaled(
    chosen: Callable[[], Experiment], scale: float | None, experts: References
) -> list[dict[str, object]]:
    """What a sum of task vectors with one coefficient answers; see `fixed`."""
    bench = chosen()
    share = 1 / len(bench.problem.vectors.tasks) if scale is None else scale
    merged = METHODS["task_arithmetic"](bench.problem, scale=share)
    return [{**row, "scale": share} for row in judged(bench, merged, experts)]


def fixed(
    bench: Experiment, subsets: Sequence[Subset], scales: Sequence[float | None]
) -> pd.DataFrame:
    """Sums of task vectors with the same coefficient for every subset, whatever its size.

    None among the scales is 1/T: the average. Columns: subset, task, scale (the coefficient), fixed
    (False for the average), right, js. A subset may be a single task.
    """
    experts, rows = references(bench), []
    for subset in tqdm(subsets, "fixed coefficients", leave=False):
        chosen = cache(partial(bench.select, subset))
        for scale in scales:
            find = partial(scaled, chosen, scale, experts)
            name = (*subset, "fixed coefficient", scale)
            found = kept(bench, find, *name, method="task_arithmetic")
            labels = {"subset": JOIN.join(subset), "fixed": scale is not None}
            rows += [{**labels, **row} for row in found]
    return pd.DataFrame(rows)


def geometry(bench: Experiment) -> pd.DataFrame:
    """How every two task vectors stand to each other: task, other, inner, cosine, conflict.

    inner: product, in squared parameter units; on the diagonal the squared length. conflict: share
    of parameters pushed in opposite directions.
    """
    deltas, tasks = dense(bench.problem.vectors.deltas), bench.problem.vectors.tasks
    lengths = deltas.square().sum(dim=1).sqrt()  # `norm` loses digits over millions of numbers
    angles, opposite = cosine(deltas), sign_conflict(deltas)
    inner = angles * torch.outer(lengths, lengths)
    return pd.DataFrame(
        {
            "task": task,
            "other": other,
            "inner": inner[i, j].item(),
            "cosine": angles[i, j].item(),
            "conflict": opposite[i, j].item(),
        }
        for i, task in enumerate(tasks)
        for j, other in enumerate(tasks)
    )


def plan(tasks: Sequence[str], effort: Effort) -> tuple[list[Subset], list[Subset], list[Subset]]:
    """The subsets that a size merges: by every method, over fixed scales, and at one fixed scale.

    The last are all subsets, single tasks too, or only those of the first with single tasks, where
    the size does not ask for every one.
    """
    main = subsets_of(tasks, effort.subsets, whole=effort.whole)
    alone: list[Subset] = [(task,) for task in tasks]
    every = subsets_of(tasks, 1, whole=range(2, len(tasks) + 1)) if effort.every else main
    return main, first_of_each(main, effort.subsets), alone + every
