"""Every method on a language suite, scored by likelihood and by generated text; resumable."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from divmerge_book.data.tasks import SUITES
from divmerge_book.evaluation import benchmark
from divmerge_book.evaluation.experiment import Experiment, prepare_language, task_names
from divmerge_book.evaluation.report import Report
from divmerge_book.evaluation.sizes import LanguageSize, Size, size_of
from divmerge_book.models.encoders import check_device

LANGUAGE_METHODS = tuple(m for m in benchmark.ALL_METHODS if not m.startswith("adamerging"))


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
    benchmark.check_request(methods, seeds, overrides, budget)
    benchmark.check_fit_for(methods, [names], overrides)
    device, budget = str(check_device(device)), budget or size.candidates
    limits = {"inputs": size.merge_rows, "epochs": size.epochs, "candidates": budget}
    settings = Size(size.base or SUITES[suite].base, tuple(seeds), **limits)
    found, counts = benchmark.Comparison(suite, methods, settings, overrides), []
    for number, seed in enumerate(seeds):
        experiment = None if number else ready
        if experiment is None:
            experiment = prepare_language(suite, names, size=size, seed=seed, device=device)
        found.merge(experiment, seed)
        counts += [
            {"seed": seed, "task": name, **one.counts, "bytes": one.nbytes}
            for name, one in zip(names, experiment.completions, strict=True)
        ]
    facts = {"size": label, "suite": suite, "encoder": experiment.base.name, "seeds": seeds}
    recipe = experiment.experts[0].manifest["recipe"]
    facts |= benchmark.conditions(size, budget, recipe, device)
    facts |= {name: getattr(size, name) for name in ("blocks", "storage", "top")}
    reports = [
        Report.of(pd.DataFrame(part), found.fits, **facts) for part in (found.rows, found.written)
    ]
    return LanguageReport(*reports, pd.DataFrame(counts))
