"""From a suite's name to a Report: every method on the same experts, with a fair search, resumable.

Each finished piece (an expert, a candidate's validation score, a merged model's test answers) is
kept in the cache under a key of everything that determines it, so an interrupted comparison goes on
where it stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
from tqdm import tqdm

from divmerge_book.data.splits import ROWS
from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import SIZES, Experiment, Size, prepare, task_names
from divmerge_book.evaluation.hyperparameter_search import (
    Merges,
    Search,
    candidates,
    outcome,
    own_experts,
    search,
)
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.evaluation.report import Report
from divmerge_book.models.encoders import check_device, resolve
from divmerge_core.divergences import objective
from divmerge_core.merging.coefficients import LINKS
from divmerge_core.methods import METHODS, options_of, parse

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

PUBLISHED = ":published"  # after a method's name: its published options, not those found best


def every_method() -> list[str]:
    """Every registered method that a suite can run, with the groupings it is registered for."""
    found = []
    for name, facts in METHODS.facts.items():
        if facts.get("optional") != "large":
            found += [f"{name}/{grouping}" for grouping in facts.get("groupings", ())] or [name]
    return found


SET_HERE = {
    "grouping",
    "seed",
    "watch",
    "progress",
    "score",
    "large",
    "checkpoint",
}  # that no override changes


def check_request(methods: Sequence[str], seeds: Sequence[int], overrides: Mapping) -> None:
    """Raise ValueError for methods, options or choices that do not exist or are out of range."""
    if not methods or not seeds:
        raise ValueError(f"give one method and one seed or more, got {list(methods)} and {seeds}")
    for name, given in (("method", methods), ("seed", seeds)):
        twice = sorted({one for one in given if list(given).count(one) > 1})
        if twice:
            raise ValueError(
                f"give every {name} once; {twice} came more than once in {list(given)}"
            )
    known = {key for spec in methods for key in options_of(parse(spec)[0])} - SET_HERE
    wrong = set(overrides) - known
    if wrong:
        raise ValueError(
            f"no such options {sorted(wrong)}; these methods take {sorted(known)}; write a "
            "grouping as in 'divmerge/block'"
        )
    objective(overrides.get("divergence", "js"), overrides.get("temperature", 1.0))
    LINKS[overrides.get("link", "identity")]
    inputs = overrides.get("inputs", 1)
    if not 1 <= inputs <= ROWS["merge"]:
        raise ValueError(f"inputs must be 1 to {ROWS['merge']} per task, got {inputs}")


def takes(spec: str, num_tasks: int) -> bool:
    """Whether a method merges this many experts."""
    return METHODS.facts[parse(spec)[0]].get("exactly", num_tasks) == num_tasks


def check_fit_for(methods: Sequence[str], subsets: Sequence[Sequence[str]]) -> None:
    """Raise ValueError for a method that needs what a suite does not hold."""
    sizes = sorted({len(subset) for subset in subsets})
    for spec in methods:
        facts = METHODS.facts[parse(spec)[0]]
        if not any(takes(spec, size) for size in sizes):
            raise ValueError(
                f"{spec} merges exactly {facts['exactly']} experts, here are {sizes}; give such a "
                "subset too or leave the method out"
            )
        if facts.get("optional") == "large":
            raise ValueError(
                f"{spec} needs a second, larger base, and a suite has one; call it with large= "
                "as chapter 07 does, or leave it out"
            )


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
    budget: int | None = None,
    published: bool = False,
    **overrides: object,
) -> Report:
    """Every method on the same experts, inputs and test rows, as a Report.

    subsets: also merge these smaller sets of tasks, each once; a method that takes an exact number
    of experts is left out of others. points: how often a fit's validation ANP is recorded. budget:
    how many candidates every method's search may score, None for the size's; the best on validation
    rows at the first seed is used for every seed. published: also report the published options, as
    method `NAME:published`, where the search found others. overrides: options of the fits
    (`epochs`, `lr`, `init`, `inputs`, `divergence`, `link`), taken from the search where given.

    Raises ValueError, before anything is trained, for what is unknown or out of range, and for a
    method that needs what the suite does not hold; Diverged where a merge ran off.
    """
    names, seeds = task_names(suite, tasks), list(SIZES[size].seeds if seeds is None else seeds)
    check_request(methods, seeds, overrides)
    device = str(check_device(device))
    every = [*(task_names(suite, subset) for subset in subsets), names]
    wanted = list(dict.fromkeys(map(tuple, every)))  # a subset named twice is merged once
    check_fit_for(methods, wanted)
    settings = effort(SIZES[size], budget, overrides)
    jobs = [
        (seed, subset, spec)
        for seed in seeds
        for subset in wanted
        for spec in methods
        if takes(spec, len(subset))
    ]
    rows, fits, searches = [], [], {}
    before = None, None
    for seed, subset, spec in (bar := tqdm(jobs, f"merging {suite}")):
        bar.set_postfix_str(f"seed {seed}, {len(subset)} tasks, {spec}")
        if seed != before[0]:
            whole = prepare(suite, names, size=settings, seed=seed, device=device, encoder=encoder)
        bench = whole.select(subset)
        labels = {"suite": suite, "subset": "+".join(subset), "seed": seed}
        if (seed, subset) != before:
            rows += references(bench, labels)
        before = seed, subset
        tried = candidates(spec, settings, seed, overrides, bench.problem)
        merges = Merges(bench, spec, points)
        own = (subset, spec) not in searches
        if own:
            searches[subset, spec] = search(merges, tried)
        answers, courses = outcomes(merges, tried, searches[subset, spec], published)
        rows += [{**labels, **row} for row in answers]
        found = {"search": searches[subset, spec].records} if own else {}
        fits += [{**labels, **fit, **(found if fit["method"] == spec else {})} for fit in courses]
    facts = {"size": size, "suite": suite, "encoder": encoder or settings.encoder, "seeds": seeds}
    facts |= conditions(settings, whole, device)
    return Report.of(pd.DataFrame(rows), fits, device=device, **facts)


def conditions(size: Size, bench: Experiment, device: str) -> dict:
    """What a Report's numbers depend on beside the methods: training, rows, precision, budget."""
    splits = ("merge", "validation", "test")
    return {
        "precision": resolve(size.precision, check_device(device)),
        "recipe": {expert.task: expert.manifest["recipe"] for expert in bench.experts},
        "budget": size.candidates,
        "rows_per_task": {split: getattr(size, f"{split}_rows") or ROWS[split] for split in splits},
    }


def effort(size: Size, budget: int | None, overrides: Mapping) -> Size:
    """The size with `budget` candidates, and with as many merge rows as the fits ask for.

    Raises ValueError for a budget below 1.
    """
    if budget is not None:
        if budget < 1:
            raise ValueError(f"budget must be 1 candidate or more, got {budget}; 6 tries all")
        size = replace(size, candidates=budget)
    inputs = overrides.get("inputs", 0)
    if size.merge_rows and inputs > size.merge_rows:
        size = replace(size, merge_rows=inputs)
    return size


def outcomes(
    merges: Merges, tried: Sequence[dict], found: Search, published: bool
) -> tuple[list[dict], list[dict]]:
    """Test answers, and options with cost and course, of the best candidate.

    published: of the published options too, where a search chose others.
    """
    shown = {merges.spec: found.best}
    if published and found.best and "score" in found.records[0]:
        shown[merges.spec + PUBLISHED] = 0
    rows, fits = [], []
    for label, index in shown.items():
        done = outcome(merges, tried[index])
        rows += [{"method": label, **row} for row in done["rows"]]
        cost = {**done["cost"], "model_bytes": merges.bench.problem.vectors.base.nbytes}
        fit = {"method": label, "options": tried[index], "cost": cost}
        fits.append({**fit, **(done["fit"] or {})})
    return rows, fits


def references(bench: Experiment, labels: Mapping) -> list[dict]:
    """Rows of the methods `expert` (each on its own task) and `base` (with the experts' heads)."""

    def find() -> list[dict]:
        expert = own_experts(bench, bench.test, method="expert")
        base = evaluate(bench.problem, bench.problem.vectors.base, bench.test, method="base")
        return expert.to_dict("records") + base.to_dict("records")

    return [{**labels, **row} for row in kept(bench, find, "references")]
