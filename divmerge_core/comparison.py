"""From a suite's name to a Report: every method on the same experts, with a fair search, resumable.

Each finished piece (an expert, a candidate's validation score, a merged model's test answers) is
kept in the cache under a key of everything that determines it, so an interrupted comparison goes on
where it stopped.
"""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.bench import SIZES, Bench, Size, prepare, task_names
from divmerge_core.cells import cell, keep, recall
from divmerge_core.coefficients import LINKS, groups_of
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.encoders import check_device, resolve
from divmerge_core.evaluation import Exam, accuracy, confusion, evaluate
from divmerge_core.methods import METHODS, options_of, parse
from divmerge_core.methods.divmerge import limit
from divmerge_core.problem import Step
from divmerge_core.report import Report
from divmerge_core.splits import ROWS

ALL_METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "adamerging/task",
    "adamerging/layer",
    "divmerge/task",
    "divmerge/block",
    "divmerge/layer",
)

SET_HERE = {"grouping", "seed", "watch", "progress"}  # options that no override can change


@dataclass
class Recorder:
    """A fit's course: its loss at every step, and coefficients and validation ANP now and then."""

    bench: Bench
    points: int
    losses: list[float] = field(default_factory=list)
    course: list[dict] = field(default_factory=list)
    coeffs: Tensor | None = None
    every: int = 0

    def __call__(self, step: Step) -> None:
        if step.loss is not None:
            self.losses.append(round(step.loss, 6))
        self.coeffs = step.coeffs
        if self.points and (step.loss is None or step.number % self.every == 0):
            anp = validation_anp(self.bench, step.flat)
            mean = step.coeffs.mean(dim=1).tolist()  # [T], over groups
            self.course.append({"step": step.number, "anp": anp, "coefficients": mean})


def shares(rows: pd.DataFrame) -> list[float]:
    """The share of right answers in every row of predictions."""
    return [accuracy(confusion(row.predicted, row.gold)) for row in rows.itertuples()]


def validation_anp(bench: Bench, merged: Float[Tensor, " N"]) -> float:
    """Mean over tasks of merged over expert accuracy, on validation rows.

    Raises ValueError where an expert gets none of them right.
    """
    path = cell(bench, "experts on validation")
    if not (path / "cell.json").exists():
        keep(path, shares(own_experts(bench, bench.validation)))
    experts = recall(path)
    if not all(experts):
        raise ValueError(
            f"an expert gets no validation row right: {experts} for {bench.problem.vectors.tasks}; "
            "give it more training rows or leave its task out"
        )
    found = shares(evaluate(bench.problem, merged, bench.validation))
    return sum(m / e for m, e in zip(found, experts, strict=True)) / len(found)


def own_experts(bench: Bench, exams: Sequence[Exam], **labels: object) -> pd.DataFrame:
    """Every expert's answers on its own task."""
    parts = []
    for number, task in enumerate(bench.problem.vectors.tasks):
        alone = bench.problem.select([task])
        parts.append(evaluate(alone, bench.problem.vectors.expert(task), [exams[number]], **labels))
    return pd.concat(parts, ignore_index=True)


def options_for(spec: str, size: Size, seed: int, overrides: Mapping) -> list[dict]:
    """The candidates of a method: its registered options, with a fit's data and seed filled in."""
    name, fixed = parse(spec)
    allowed = options_of(name)
    search = METHODS.facts[name]["search"] or ({},)
    fit = {"epochs": size.epochs, "seed": seed, "inputs": size.inputs, **overrides}
    fit = {key: value for key, value in fit.items() if key in allowed and value is not None}
    candidates = [{**option, **fixed, **fit} for option in search[: size.candidates]]
    return [option for n, option in enumerate(candidates) if option not in candidates[:n]]


def run_method(bench: Bench, spec: str, options: Mapping, points: int = 0):
    """Merged parameters, and the fit's course where there is one."""
    name, _ = parse(spec)
    if "watch" not in options_of(name):
        return METHODS[name](bench.problem, **options), None
    default = inspect.signature(METHODS[name]).parameters["grouping"].default
    grouping = options.get("grouping", default)
    seen = limit(bench.problem, options.get("inputs"), grouping).batches
    steps = options["epochs"] * max(map(len, seen))
    recorder = Recorder(bench, points, every=max(1, steps // max(1, points)))
    started = time.perf_counter()
    merged = METHODS[name](bench.problem, watch=recorder, **options)
    groups, _ = groups_of(bench.problem.vectors.layout, grouping)
    fit = {
        "tasks": list(bench.problem.vectors.tasks),
        "groups": list(groups),
        "coefficients": [[round(v, 5) for v in row] for row in recorder.coeffs.tolist()],
        "losses": recorder.losses,
        "course": recorder.course,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return merged, fit


def choose(
    bench: Bench, spec: str, candidates: Sequence[dict], points: int = 0
) -> tuple[dict, tuple | None]:
    """The candidate with the best mean validation ANP, and its merge where it was made just now.

    Each candidate's score is kept in the cache.
    """
    if len(candidates) == 1:
        return candidates[0], None
    best = None
    for options in candidates:
        path, made = cell(bench, "search", spec, options), None
        if not (path / "cell.json").exists():
            made = run_method(bench, spec, options, points)
            keep(path, validation_anp(bench, made[0]))
        if best is None or recall(path) > best[0]:
            best = recall(path), options, made
    return best[1:]


def check_request(methods: Sequence[str], seeds: Sequence[int], overrides: Mapping) -> None:
    """Raise ValueError for methods, options or choices that do not exist or are out of range."""
    if not methods or not seeds:
        raise ValueError(f"give one method and one seed or more, got {list(methods)} and {seeds}")
    known = {key for spec in methods for key in options_of(parse(spec)[0])} - SET_HERE
    wrong = set(overrides) - known
    if wrong:
        raise ValueError(
            f"no such options {sorted(wrong)}; these methods take {sorted(known)}; write a "
            "grouping as in 'divmerge/block'"
        )
    for option, choices in (("divergence", DIVERGENCES), ("link", LINKS)):
        if option in overrides:
            choices[overrides[option]]
    inputs = overrides.get("inputs", 1)
    if not 1 <= inputs <= ROWS["merge"]:
        raise ValueError(f"inputs must be 1 to {ROWS['merge']} per task, got {inputs}")


def outcome(bench: Bench, spec: str, options: Mapping, made: tuple | None, points: int) -> dict:
    """A method's test answers and fit: from the cache, from the merge just made, or made now."""
    path = cell(bench, "test", spec, options, points)
    if not (path / "cell.json").exists():
        merged, fit = made or run_method(bench, spec, options, points)
        found = evaluate(bench.problem, merged, bench.test)
        keep(path, {"rows": found.to_dict("records"), "fit": fit})
    return recall(path)


def compare(
    suite: str,
    tasks: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = ALL_METHODS,
    size: str = "default",
    seeds: Sequence[int] | None = None,
    device: str = "cpu",
    encoder: str | None = None,
    subsets: Sequence[Sequence[str]] = (),
    points: int = 0,
    **overrides: object,
) -> Report:
    """Every method on the same experts, inputs and test rows, as a Report.

    subsets: also merge these smaller sets of tasks. points: how often a fit's validation ANP is
    recorded. overrides: options of the fits (`epochs`, `lr`, `init`, `inputs`, `divergence`,
    `link`), taken from the search where given. Where a method has several candidates, the best on
    validation rows at the first seed is used for every seed. Raises ValueError for anything
    unknown, before anything is trained.
    """
    settings, names = SIZES[size], task_names(suite, tasks)
    seeds = list(settings.seeds if seeds is None else seeds)
    check_request(methods, seeds, overrides)
    inputs = overrides.get("inputs", 0)
    if settings.merge_rows and inputs > settings.merge_rows:
        settings = replace(settings, merge_rows=inputs)
    wanted = [tuple(task_names(suite, subset)) for subset in subsets] + [tuple(names)]
    chosen: dict[tuple, dict] = {}
    rows, fits = [], []
    jobs = [(seed, subset, spec) for seed in seeds for subset in wanted for spec in methods]
    benches: dict[int, Bench] = {}
    for seed, subset, spec in (bar := tqdm(jobs, f"merging {suite}")):
        bar.set_postfix_str(f"seed {seed}, {len(subset)} tasks, {spec}")
        if seed not in benches:
            benches = {
                seed: prepare(
                    suite, names, size=settings, seed=seed, device=device, encoder=encoder
                )
            }
        bench = benches[seed].select(subset)
        labels = {"suite": suite, "subset": "+".join(subset), "seed": seed}
        if spec == methods[0]:
            rows += references(bench, labels)
        candidates = options_for(spec, settings, seed, overrides)
        made = None
        if (subset, spec) not in chosen:
            chosen[subset, spec], made = choose(bench, spec, candidates, points)
        options = chosen[subset, spec] | {k: v for k, v in candidates[0].items() if k == "seed"}
        done = outcome(bench, spec, options, made, points)
        rows += [{**labels, "method": spec, **row} for row in done["rows"]]
        fits.append({**labels, "method": spec, "options": options, **(done["fit"] or {})})
    return Report.of(
        pd.DataFrame(rows),
        fits,
        size=size,
        suite=suite,
        encoder=encoder or settings.encoder,
        device=device,
        precision=resolve(settings.precision, check_device(device)),
        recipe=bench.experts[0].manifest["recipe"],
        seeds=seeds,
        rows_per_task={
            split: getattr(settings, f"{split}_rows") or ROWS[split]
            for split in ("merge", "validation", "test")
        },
    )


def references(bench: Bench, labels: Mapping) -> list[dict]:
    """Rows of the methods `expert` (each on its own task) and `base` (with the experts' heads)."""
    path = cell(bench, "references")
    if not (path / "cell.json").exists():
        expert = own_experts(bench, bench.test, method="expert")
        base = evaluate(bench.problem, bench.problem.vectors.base, bench.test, method="base")
        keep(path, expert.to_dict("records") + base.to_dict("records"))
    return [{**labels, **row} for row in recall(path)]
