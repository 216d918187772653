"""What DivMerge+ owes to its basis and what to its objective: both varied alone, and T and bands.

Tables are predictions, see `predictions.packed`; a method is `objective=basis`.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import validation_anp
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.evaluation.profiling import seconds
from divmerge_book.studies.predictions import with_experts
from divmerge_book.studies.study import study
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.problem import Diverged, Merged
from divmerge_core.methods import METHODS
from divmerge_core.methods.basis import basis

FITTED = {"js": "divmerge", "entropy": "adamerging"}  # objective -> method
COLUMNS = ("objective", "basis")  # what a method says
JOB = ("method", "tasks", "grouping")


def first(experiment: Experiment, count: int) -> Experiment:
    """The experiment on the first `count` of its tasks."""
    return experiment.select(experiment.problem.vectors.tasks[:count])


def merge(
    experiment: Experiment, method: str, seed: int, grouping: str, lr: float, config: Mapping
) -> Merged:
    """`objective=basis`: fitted coefficients; those of the start where the objective is `none`."""
    objective, _, name = method.partition("=")
    if objective == "none":
        vectors, init = basis(experiment.problem, name)
        start = Coefficients(vectors.layout, len(vectors.tasks), grouping="layer", init=init)
        return grouped_merge(vectors.base, vectors.deltas, start().detach(), start.segments)
    options = {"basis": name, "grouping": grouping, "lr": lr, "init": None, **config}
    return METHODS[FITTED[objective]](experiment.problem, seed=seed, progress=False, **options)


def rated(
    experiment: Experiment, *, seed: int, method: str, tasks: int, grouping: str, lr: float, **how
) -> list[dict]:
    """Validation ANP of one step size; below every other where the fit diverges."""
    some = first(experiment, tasks)
    try:
        anp = validation_anp(some, merge(some, method, seed, grouping, lr, how["config"]))
    except Diverged:
        anp = -1.0
    return [{"anp": anp}]


def predicted(
    experiment: Experiment, *, seed: int, method: str, tasks: int, grouping: str, lr: float, **how
) -> pd.DataFrame:
    """Test predictions of one merge, and its seconds."""
    some, held = first(experiment, tasks), []

    def run() -> None:
        held.append(merge(some, method, seed, grouping, lr, how["config"]))

    took = round(seconds(run, some.problem.vectors.base.device), 2)
    return evaluate(some.problem, held[0], some.test).assign(seconds=took)


def ablation(
    experiments: Mapping[int, Experiment],
    jobs: Sequence[Mapping],
    *,
    rates: Sequence[float],
    config: Mapping,
) -> pd.DataFrame:
    """Predictions of every job and of the experts. Labels: tasks, grouping; facts: lr, seconds.

    jobs: of `planned`. rates: step sizes; the best on validation rows at the first seed serves
    every seed. config: other options of the fits.
    """
    seed, *_ = experiments
    fitted = [job for job in jobs if not job["method"].startswith("none=")]
    tried = [job | {"lr": lr} for job in fitted for lr in rates]
    scores = study(rated, {seed: experiments[seed]}, tried, config=config)
    best = scores.loc[scores.groupby([*JOB], sort=False).anp.idxmax()]
    chosen = best[[*JOB, "lr"]].to_dict("records")
    chosen += [job | {"lr": 0.0} for job in jobs if job not in fitted]
    rows = study(predicted, experiments, chosen, config=config)
    return with_experts(rows, experiments, ["tasks", "grouping"], ["lr", "seconds"])


def planned(
    bases: Sequence[str], groupings: Sequence[str], counts: Sequence[int]
) -> list[dict[str, object]]:
    """Jobs: method (`objective=basis`), tasks (the first so many) and grouping.

    At the largest number of tasks, per layer: every basis at its start and fitted by JS, and two by
    entropy. With other numbers of tasks and groupings: two bases, fitted by JS.
    """
    most, two = max(counts), ("raw", "tsv:3")
    jobs = [(f"{o}={b}", most, "layer") for o in ("none", "js") for b in bases]
    jobs += [(f"entropy={b}", most, "layer") for b in two]
    jobs += [(f"js={b}", count, "layer") for count in counts for b in two]
    jobs += [(f"js={b}", most, grouping) for grouping in groupings for b in two]
    return [dict(zip(JOB, job, strict=True)) for job in dict.fromkeys(jobs)]
