"""From a suite's name to a Report: every method on the same experts with the same search budget.

Experts, validation scores and test predictions are cached under keys of everything that determines
them, so that an interrupted comparison resumes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from tqdm import tqdm

from divmerge_book.data.splits import ROWS, SPLITS
from divmerge_book.evaluation import hyperparameter_search as searching
from divmerge_book.evaluation.cache import cached
from divmerge_book.evaluation.experiment import Experiment, prepare, task_names
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.sizes import SIZES, LanguageSize, Size
from divmerge_book.models.encoders import check_device, resolve
from divmerge_book.models.method_options import check_options
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
    return [
        f"{name}/{grouping}" if grouping else name
        for name, facts in METHODS.facts.items()
        if facts.get("optional") != "large"
        for grouping in facts.get("groupings", ("",))
    ]


def known_options(methods: Sequence[str]) -> set[str]:
    """Names of the options that some of these methods take."""
    return {key for spec in methods for key in options_of(parse(spec)[0])} - SET_HERE


def check_request(
    methods: Sequence[str], seeds: Sequence[int], overrides: Mapping, budget: int | None = None
) -> None:
    """Raise ValueError for methods, options or budgets that do not exist or are out of range."""
    if not methods or not seeds:
        raise ValueError(f"give one method and one seed or more, got {list(methods)} and {seeds}")
    for name, given in (("method", list(methods)), ("seed", list(seeds))):
        if twice := sorted({one for one in given if given.count(one) > 1}):
            raise ValueError(f"give every {name} once; {twice} came more than once in {given}")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise ValueError(f"seeds are 0 or more and less than 2**63, got {wrong}")
    if wrong := set(overrides) - (known := known_options(methods)):
        raise ValueError(
            f"no such options {sorted(wrong)}; these methods take {sorted(known)}"
            + "; write a grouping as in 'divmerge/block'" * ("grouping" in wrong)
        )
    inputs = overrides.get("inputs", 1)
    if not 1 <= inputs <= ROWS["merge"]:
        raise ValueError(f"inputs must be 1 to {ROWS['merge']} per task, got {inputs}")
    if budget is not None and budget < 1:
        raise ValueError(f"budget must be 1 candidate or more, got {budget}; 6 tries all")


def takes(spec: str, num_tasks: int) -> bool:
    """Whether a method merges this many experts."""
    return METHODS.facts[parse(spec)[0]].get("exactly", num_tasks) == num_tasks


def check_fit_for(
    methods: Sequence[str], subsets: Sequence[Sequence[str]], overrides: Mapping
) -> None:
    """Raise ValueError for a method whose requirements a suite does not meet, or its options."""
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
                "as Beyond one vector does, or leave it out"
            )
        for tasks in (subset for subset in subsets if takes(spec, len(subset))):
            check_options(spec, tasks, overrides)


@dataclass
class Comparison:
    """Rows and fits of one comparison, collected experiment by experiment.

    size: budget of the searches. searches: their results, by subset and method, from the first seed
    on. points: how often a fit's validation ANP is recorded. published: see `compare`. written:
    rows of language suites, answered by generation.
    """

    suite: str
    methods: Sequence[str]
    size: Size
    overrides: Mapping[str, object]
    points: int = 0
    published: bool = False
    rows: list[dict] = field(default_factory=list)
    written: list[dict] = field(default_factory=list)
    fits: list[dict] = field(default_factory=list)
    searches: dict[tuple[str, str], searching.Search] = field(default_factory=dict)

    def merge(self, experiment: Experiment, seed: int) -> None:
        """Add the references, then every method."""
        tasks = experiment.problem.vectors.tasks
        labels = {"suite": self.suite, "subset": "+".join(tasks), "seed": seed}
        self.add(references(experiment), labels)
        chosen = [spec for spec in self.methods if takes(spec, len(tasks))]
        title = f"merging {len(tasks)} tasks of {self.suite}, seed {seed}"
        for spec in (bar := tqdm(chosen, title)):
            bar.set_postfix_str(spec)
            self.add_method(experiment, spec, labels)

    def add_method(self, experiment: Experiment, spec: str, labels: Mapping) -> None:
        """The best candidate's predictions, options, cost and fit; its search, where it is new.

        And the published options', where they are wanted and a search chose others.
        """
        tried = searching.candidates(
            spec, self.size, labels["seed"], self.overrides, experiment.problem
        )
        merges, key = searching.Merges(experiment, spec, self.points), (labels["subset"], spec)
        first = key not in self.searches
        found = self.searches[key] if not first else searching.search(merges, tried)
        self.searches[key], shown = found, {spec: found.best}
        if self.published and found.best and "score" in found.records[0]:
            shown[spec + PUBLISHED] = 0
        for label, index in shown.items():
            done, method = searching.outcome(merges, tried[index]), {"method": label}
            self.add(done, labels | method)
            cost = {**done["cost"], "model_bytes": experiment.problem.vectors.base.nbytes}
            fit = {**labels, **method, "options": tried[index], "cost": cost, **(done["fit"] or {})}
            records = {"search": found.records} if first and label == spec else {}
            self.fits.append(fit | records)

    def add(self, found: Mapping, labels: Mapping) -> None:
        """Add `rows` and `written` of a reference or an outcome."""
        self.rows += [{**row, **labels} for row in found["rows"]]
        self.written += [{**row, **labels} for row in found["written"]]


def references(experiment: Experiment) -> dict[str, list[dict]]:
    """Rows of the methods `expert` (each on its own task) and `base` (with the experts' heads)."""

    def find() -> dict[str, list[dict]]:
        problem, splits = experiment.problem, experiment.test
        expert = searching.own_experts(experiment, splits, method="expert").to_dict("records")
        base = evaluate(problem, problem.vectors.base, splits, method="base").to_dict("records")
        written = searching.written_rows(experiment, expert, problem.vectors.expert)
        written += searching.written_rows(experiment, base, lambda _: problem.vectors.base)
        return {"rows": expert + base, "written": written}

    return cached(experiment, find, "references")


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
    names, own = task_names(suite, tasks), SIZES[size]
    seeds = list(own.seeds if seeds is None else seeds)
    check_request(methods, seeds, overrides, budget)
    device = str(check_device(device))
    every = [*(task_names(suite, subset) for subset in subsets), names]
    wanted = list(dict.fromkeys(map(tuple, every)))  # a subset named twice is merged once
    if strange := [subset for subset in wanted if not set(subset) <= set(names)]:
        raise ValueError(f"a subset has tasks out of {', '.join(names)}; got {strange}")
    check_fit_for(methods, wanted, overrides)
    more = max(own.merge_rows, overrides.get("inputs", 0)) if own.merge_rows else None
    own = replace(own, candidates=budget or own.candidates, merge_rows=more)
    found = Comparison(suite, methods, own, overrides, points, published)
    for seed in seeds:
        whole = prepare(suite, names, size=own, seed=seed, device=device, encoder=encoder)
        for subset in wanted:
            found.merge(whole.select(subset), seed)
    recipes = {expert.task: expert.manifest["recipe"] for expert in whole.experts}
    facts = {"size": size, "suite": suite, "encoder": encoder or own.encoder, "seeds": seeds}
    facts |= conditions(own, own.candidates, recipes, device)
    return Report.of(pd.DataFrame(found.rows), found.fits, **facts)


def conditions(
    size: Size | LanguageSize, budget: int | None, recipe: Mapping, device: str
) -> dict[str, object]:
    """What a Report's numbers depend on beside the methods: training, rows, precision, budget."""
    rows = {split: getattr(size, f"{split}_rows") or ROWS[split] for split in SPLITS[1:]}
    precision = resolve(size.precision, check_device(device))
    facts = {"precision": precision, "recipe": recipe, "budget": budget, "rows_per_task": rows}
    return facts | {"device": device}
