"""Methods side by side on a language suite, by likelihood and by what is written; resumable."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from divmerge_book.data.splits import ROWS
from divmerge_book.data.tasks import SUITES
from divmerge_book.evaluation.benchmark import check_request, outcomes, references
from divmerge_book.evaluation.cache import kept
from divmerge_book.evaluation.experiment import Size, task_names
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, own_experts, search
from divmerge_book.evaluation.language_experiment import (
    LanguageBench,
    LanguageSize,
    prepare_language,
    size_of,
)
from divmerge_book.evaluation.language_scoring import KnownExam, WrittenExam
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.evaluation.report import Report
from divmerge_book.models.encoders import check_device, resolve

LANGUAGE_METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "divmerge/task",
    "divmerge/block",
    "divmerge/layer",
)


@dataclass(frozen=True)
class LanguageReport:
    """The same merges scored twice: by likelihood (free-form: ROUGE-1), and as they write."""

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
    ready: LanguageBench | None = None,
    **overrides: object,
) -> LanguageReport:
    """Every method on the same experts, completions and test rows.

    budget: candidates per method that its search scores on validation rows at the first seed, None
    for the size's. ready: what `prepare_language` made of these tasks, size and device at the first
    seed, to spare doing it again. overrides: options of the fits (`epochs`, `lr`, `init`,
    `divergence`). Finished pieces are kept in the cache, and a fit that was killed goes on. Raises
    ValueError for unknown names and options before anything is trained.
    """
    label = size if isinstance(size, str) else "own"
    names, size = task_names(suite, tasks), size_of(suite, size)
    seeds = list(size.seeds if seeds is None else seeds)
    check_request(methods, seeds, overrides)
    device = str(check_device(device))
    tuned = Size(
        size.base or SUITES[suite].base,
        tuple(seeds),
        inputs=size.merge_rows,
        epochs=size.epochs,
        candidates=budget or size.candidates,
    )
    rows, said, fits, counts, searches = [], [], [], [], {}
    for seed in seeds:
        bench = ready if ready is not None and seed == seeds[0] else None
        bench = bench or prepare_language(suite, names, size=size, seed=seed, device=device)
        labels = {"suite": suite, "subset": "+".join(names), "seed": seed}
        known = references(bench, labels)
        rows += known
        said += [{**labels, **row} for row in written_references(bench, known)]
        counts += [
            {"seed": seed, "task": name, **one.counts, "bytes": one.nbytes}
            for name, one in zip(names, bench.completions, strict=True)
        ]
        for spec in (bar := tqdm(methods, f"merging {suite}, seed {seed}")):
            bar.set_postfix_str(spec)
            tried = candidates(spec, tuned, seed, overrides, bench.problem)
            merges = Merges(bench, spec)
            own = spec not in searches
            if own:
                searches[spec] = search(merges, tried)
            answers, courses = outcomes(merges, tried, searches[spec], False)
            rows += [{**labels, **row} for row in answers]
            found = {"search": searches[spec].records} if own else {}
            fits += [{**labels, **fit, **found} for fit in courses]
            options = tried[searches[spec].best]
            said += [{**labels, **row} for row in written_answers(merges, options, answers)]
    facts = {"size": label, "suite": suite, "encoder": bench.base.name, "seeds": seeds}
    facts |= facts_of(bench, size, tuned.candidates, device)
    reports = [Report.of(pd.DataFrame(part), fits, device=device, **facts) for part in (rows, said)]
    return LanguageReport(*reports, pd.DataFrame(counts))


def facts_of(bench: LanguageBench, size: LanguageSize, budget: int, device: str) -> dict:
    """What the numbers depend on beside the methods."""
    splits = ("merge", "validation", "test")
    return {
        "precision": resolve(size.precision, check_device(device)),
        "recipe": bench.experts[0].manifest["recipe"],
        "budget": budget,
        "blocks": size.blocks,
        "storage": size.storage,
        "top": size.top,
        "rows_per_task": {split: getattr(size, f"{split}_rows") or ROWS[split] for split in splits},
    }


def writing(bench: LanguageBench, rows: Sequence[dict]) -> list[WrittenExam | KnownExam]:
    """The exams that are answered by writing, but for what these rows know already."""
    known = {row["task"]: row for row in rows}
    pairs = zip(bench.problem.vectors.tasks, bench.written, strict=True)
    return [exam if exam.references is None else KnownExam(known[name]) for name, exam in pairs]


def written_references(bench: LanguageBench, rows: Sequence[dict]) -> list[dict]:
    """What each expert, and the base, writes on the test rows."""

    def find() -> list[dict]:
        exams = {
            method: writing(bench, [row for row in rows if row["method"] == method])
            for method in ("expert", "base")
        }
        expert = own_experts(bench, exams["expert"], method="expert")
        base = evaluate(bench.problem, bench.problem.vectors.base, exams["base"], method="base")
        return expert.to_dict("records") + base.to_dict("records")

    return kept(bench, find, "written references")


def written_answers(merges: Merges, options: dict, rows: Sequence[dict]) -> list[dict]:
    """What a merge writes on the test rows."""
    bench, spec = merges.bench, merges.spec

    def find() -> list[dict]:
        merged = merges(options).merged
        found = evaluate(bench.problem, merged, writing(bench, rows), method=spec)
        return found.to_dict("records")

    return kept(bench, find, "written", spec, options, method=spec)
