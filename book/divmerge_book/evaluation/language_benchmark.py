"""Every method on a language suite, scored by likelihood and by generated text; resumable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from divmerge_book.data.tasks import SUITES
from divmerge_book.evaluation.benchmark import (
    ALL_METHODS,
    Comparison,
    check_request,
    conditions,
    references,
)
from divmerge_book.evaluation.cache import cached
from divmerge_book.evaluation.experiment import Experiment, prepare_language, task_names
from divmerge_book.evaluation.hyperparameter_search import Merges
from divmerge_book.evaluation.language_scoring import ScoredSplit
from divmerge_book.evaluation.metrics import AnySplit, evaluate
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.sizes import LanguageSize, Size, size_of
from divmerge_book.models.encoders import check_device

LANGUAGE_METHODS = tuple(name for name in ALL_METHODS if not name.startswith("adamerging"))


@dataclass(frozen=True)
class LanguageReport:
    """The same merges scored by likelihood (free-form: ROUGE-1), and by generated text."""

    likelihood: Report
    written: Report
    counts: pd.DataFrame  # of prompts and completions, per seed and task


def compare_language(
    suite: str,
    tasks: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = LANGUAGE_METHODS,
    size: LanguageSize | str = "default",
    seeds: Sequence[int] | None = None,
    device: str = "cpu",
    budget: int | None = None,
    ready: Experiment | None = None,
    **overrides: object,
) -> LanguageReport:
    """Every method on the same experts, completions and test rows.

    budget: candidates per method that its search scores on validation rows at the first seed, None
    for the size's. ready: the prepared experiment of these tasks, size and device at the first
    seed, if there is one. overrides: options of the fits (`epochs`, `lr`, `init`, `divergence`).
    Results are cached, and an interrupted fit resumes. Raises ValueError for unknown names and
    options before anything is trained.
    """
    label = size if isinstance(size, str) else "own"
    names, size = task_names(suite, tasks), size_of(suite, size)
    seeds = list(size.seeds if seeds is None else seeds)
    check_request(methods, seeds, overrides)
    device, budget = str(check_device(device)), budget or size.candidates
    limits = {"inputs": size.merge_rows, "epochs": size.epochs, "candidates": budget}
    settings = Size(size.base or SUITES[suite].base, tuple(seeds), **limits)
    found, written, counts = Comparison(suite, methods, settings, overrides), [], []
    for seed in seeds:
        experiment = ready if seed == seeds[0] else None
        if experiment is None:
            experiment = prepare_language(suite, names, size=size, seed=seed, device=device)
        labels = {"suite": suite, "subset": "+".join(names), "seed": seed}
        written += written_references(experiment, labels)
        for merges, options, rows in found.merge(experiment, seed):
            written += [{**labels, **row} for row in written_rows(merges, options, rows)]
        counts += [
            {"seed": seed, "task": name, **one.counts, "bytes": one.nbytes}
            for name, one in zip(names, experiment.completions, strict=True)
        ]
    facts = {"size": label, "suite": suite, "encoder": experiment.base.name, "seeds": seeds}
    facts |= conditions(size, budget, experiment.experts[0].manifest["recipe"], device)
    facts |= {name: getattr(size, name) for name in ("blocks", "storage", "top")} | {
        "device": device
    }
    reports = [Report.of(pd.DataFrame(part), found.fits, **facts) for part in (found.rows, written)]
    return LanguageReport(*reports, pd.DataFrame(counts))


def to_write(experiment: Experiment, rows: Sequence[Mapping[str, object]]) -> list[AnySplit]:
    """The splits to generate answers for; free text of these rows was generated before."""
    known = {row["task"]: row for row in rows}
    pairs = zip(experiment.problem.vectors.tasks, experiment.written, strict=True)
    return [one if one.references is None else ScoredSplit(known[name]) for name, one in pairs]


def written_references(experiment: Experiment, labels: Mapping) -> list[dict]:
    """What each expert, and the base, generates on the test rows."""
    rows = references(experiment, {})
    splits = {
        method: to_write(experiment, [row for row in rows if row["method"] == method])
        for method in ("expert", "base")
    }
    return references(experiment, labels, splits)


def written_rows(merges: Merges, options: dict, rows: Sequence[dict]) -> list[dict]:
    """What a merge generates on the test rows."""
    experiment, spec = merges.experiment, merges.spec

    def find() -> list[dict]:
        merged, splits = merges(options).merged, to_write(experiment, rows)
        return evaluate(experiment.problem, merged, splits, method=spec).to_dict("records")

    return cached(experiment, find, "written", spec, options, method=spec)
