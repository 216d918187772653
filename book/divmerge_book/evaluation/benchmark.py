"""From a suite's name to a Report: every method on the same experts with the same search budget.

Experts, validation scores and test predictions are cached under keys of everything that determines
them, so that an interrupted comparison resumes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from tqdm import tqdm

from divmerge_book.data.splits import ROWS, SPLITS
from divmerge_book.evaluation.cache import cached
from divmerge_book.evaluation.experiment import Experiment, prepare, task_names
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
from divmerge_book.evaluation.sizes import SIZES, LanguageSize, Size
from divmerge_book.models.encoders import check_device, resolve
from divmerge_core.divergences import objective
from divmerge_core.merging.coefficients import LINKS
from divmerge_core.methods import METHODS, options_of, parse

ALL_METHODS = (
    *("average", "task_arithmetic", "ties", "adamerging/task", "adamerging/layer"),
    *("divmerge/task", "divmerge/block", "divmerge/layer"),
)
PUBLISHED = ":published"  # after a method's name: its published options, not those of the search
# Options that no override changes.
SET_HERE = {"grouping", "seed", "callback", "progress", "score", "large", "checkpoint"}


def every_method() -> list[str]:
    """Every method that a suite can run, with each of its registered groupings."""
    found = []
    for name, facts in METHODS.facts.items():
        if facts.get("optional") != "large":
            found += [f"{name}/{grouping}" for grouping in facts.get("groupings", ())] or [name]
    return found


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
    """Raise ValueError for a method whose requirements a suite does not meet."""
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


@dataclass
class Comparison:
    """Rows and fits of one comparison, collected subset by subset.

    size: budget of the searches. searches: their results, by subset and method, from the first seed
    on. points: how often a fit's validation ANP is recorded. published: see `compare`.
    """

    suite: str
    methods: Sequence[str]
    size: Size
    overrides: Mapping[str, object]
    points: int = 0
    published: bool = False
    rows: list[dict] = field(default_factory=list)
    fits: list[dict] = field(default_factory=list)
    searches: dict[tuple[str, str], Search] = field(default_factory=dict)

    def merge(self, experiment: Experiment, seed: int) -> Iterator[tuple[Merges, dict, list[dict]]]:
        """Add the references, then every method: yields merges, the best options, and new rows."""
        tasks = experiment.problem.vectors.tasks
        labels = {"suite": self.suite, "subset": "+".join(tasks), "seed": seed}
        self.rows += references(experiment, labels)
        chosen = [spec for spec in self.methods if takes(spec, len(tasks))]
        for spec in (
            bar := tqdm(chosen, f"merging {len(tasks)} tasks of {self.suite}, seed {seed}")
        ):
            bar.set_postfix_str(spec)
            tried = candidates(spec, self.size, seed, self.overrides, experiment.problem)
            merges, key = Merges(experiment, spec, self.points), (labels["subset"], spec)
            first = key not in self.searches
            if first:
                self.searches[key] = search(merges, tried)
            found = self.searches[key]
            rows, fits = outcomes(merges, tried, found, self.published)
            self.rows += (rows := [{**labels, **row} for row in rows])
            for fit in fits:
                records = {"search": found.records} if first and fit["method"] == spec else {}
                self.fits.append({**labels, **fit, **records})
            yield merges, tried[found.best], rows


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

    subsets: also merge these smaller sets of tasks; a method that takes an exact number of experts
    is left out of others. points: how often a fit's validation ANP is recorded. budget: candidates
    per method that its search may score, None for the size's; the best on validation rows at the
    first seed serves every seed. published: also report the published options, as method
    `NAME:published`, where the search found others. overrides: options of the fits (`epochs`, `lr`,
    `init`, `inputs`, `divergence`, `link`), which the search does not vary. Raises ValueError,
    before anything is trained, for what is unknown or out of range, and for a method whose
    requirements the suite does not meet; Diverged where a merge diverged.
    """
    names, seeds = task_names(suite, tasks), list(SIZES[size].seeds if seeds is None else seeds)
    check_request(methods, seeds, overrides)
    device = str(check_device(device))
    every = [*(task_names(suite, subset) for subset in subsets), names]
    wanted = list(dict.fromkeys(map(tuple, every)))  # a subset named twice is merged once
    check_fit_for(methods, wanted)
    settings = effort(SIZES[size], budget, overrides)
    found = Comparison(suite, methods, settings, overrides, points, published)
    for seed in seeds:
        whole = prepare(suite, names, size=settings, seed=seed, device=device, encoder=encoder)
        for subset in wanted:
            for _ in found.merge(whole.select(subset), seed):
                pass
    recipes = {expert.task: expert.manifest["recipe"] for expert in whole.experts}
    facts = {"size": size, "suite": suite, "encoder": encoder or settings.encoder, "seeds": seeds}
    facts |= conditions(settings, settings.candidates, recipes, device)
    return Report.of(pd.DataFrame(found.rows), found.fits, device=device, **facts)


def conditions(
    size: Size | LanguageSize, budget: int | None, recipe: Mapping, device: str
) -> dict[str, object]:
    """What a Report's numbers depend on beside the methods: training, rows, precision, budget."""
    rows = {split: getattr(size, f"{split}_rows") or ROWS[split] for split in SPLITS[1:]}
    precision = resolve(size.precision, check_device(device))
    return {"precision": precision, "recipe": recipe, "budget": budget, "rows_per_task": rows}


def effort(size: Size, budget: int | None, overrides: Mapping) -> Size:
    """The size with `budget` candidates, and with as many merge rows as the fits use.

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
    """Test predictions of the best candidate, and its options, cost and fit.

    published: of the published options too, where a search chose others.
    """
    shown = {merges.spec: found.best}
    if published and found.best and "score" in found.records[0]:
        shown[merges.spec + PUBLISHED] = 0
    rows, fits = [], []
    for label, index in shown.items():
        done = outcome(merges, tried[index])
        rows += [{"method": label, **row} for row in done["rows"]]
        cost = {**done["cost"], "model_bytes": merges.experiment.problem.vectors.base.nbytes}
        fit = {"method": label, "options": tried[index], "cost": cost}
        fits.append({**fit, **(done["fit"] or {})})
    return rows, fits


def references(
    experiment: Experiment, labels: Mapping, splits: Mapping | None = None
) -> list[dict]:
    """Rows of the methods `expert` (each on its own task) and `base` (with the experts' heads).

    splits: those to predict, by method; None: the test splits.
    """
    given = splits or dict.fromkeys(("expert", "base"), experiment.test)

    def find() -> list[dict]:
        problem = experiment.problem
        expert = own_experts(experiment, given["expert"], method="expert")
        base = evaluate(problem, problem.vectors.base, given["base"], method="base")
        return expert.to_dict("records") + base.to_dict("records")

    name = "references" if splits is None else "written references"
    return [{**labels, **row} for row in cached(experiment, find, name)]
