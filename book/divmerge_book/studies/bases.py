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
from divmerge_core.merging.problem import Diverged, Merged
from divmerge_core.methods import METHODS
from divmerge_core.methods.basis import basis

FITTED = {"js": "divmerge", "entropy": "adamerging"}  # objective -> method
COLUMNS = ("objective", "basis")


def first(experiment: Experiment, count: int) -> Experiment:
    """The experiment on the first `count` of its tasks."""
    return experiment.select(experiment.problem.vectors.tasks[:count])


def merge(
    experiment: Experiment, method: str, seed: int, grouping: str, lr: float, config: Mapping
) -> Merged:
    """`objective=basis`: fitted coefficients; those of the start where the objective is `none`."""
    objective, _, name = method.partition("=")
    if objective == "none":
        vectors, start = basis(experiment.problem, name)
        return vectors.merge([start] * len(vectors.tasks))
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
    """Predictions of every job and of the experts. Labels: tasks, grouping, lr; fact: seconds.

    jobs: method (`objective=basis`), tasks (the first so many) and grouping. rates: step sizes; the
    best on validation rows at the first seed serves every seed. config: other options of the fits.
    """
    seed, *_ = experiments
    tried = [job | {"lr": lr} for job in jobs for lr in rates]
    scores = study(rated, {seed: experiments[seed]}, tried, config=config)
    best = scores.loc[scores.groupby(["method", "tasks", "grouping"], sort=False).anp.idxmax()]
    chosen = best[["method", "tasks", "grouping", "lr"]].to_dict("records")
    rows = study(predicted, experiments, chosen, config=config)
    return with_experts(rows, experiments, ["tasks", "grouping"], ["lr", "seconds"])


def planned(bases: Sequence[str], groupings: Sequence[str], counts: Sequence[int]) -> list[dict]:
    """Jobs: every basis and objective per layer at the largest T; two bases elsewhere."""
    most = max(counts)
    objectives = ("none", *FITTED)
    jobs = [(f"{o}={b}", most, "layer") for b in bases for o in objectives]
    pair = [f"{o}={b}" for b in ("raw", "tsv:2") for o in objectives]
    jobs += [(one, count, "layer") for count in counts for one in pair]
    jobs += [(one, most, g) for g in groupings for one in pair]
    names = ("method", "tasks", "grouping")
    return [dict(zip(names, job, strict=True)) for job in dict.fromkeys(jobs)]
