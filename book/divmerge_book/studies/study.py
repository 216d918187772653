"""A study: one measurement, repeated over experiments and jobs, each result kept in the cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
from tqdm import tqdm

from divmerge_book.evaluation.cache import cached
from divmerge_book.evaluation.experiment import Experiment

Experiments = Mapping[int, Experiment]  # by seed
Rows = Iterable[Mapping] | pd.DataFrame


def study(
    measure: Callable[..., Rows],
    experiments: Experiments,
    jobs: Sequence[Mapping],
    *,
    keys: object = (),
    method: str | None = None,
    **fixed: object,
) -> pd.DataFrame:
    """The rows of `measure(experiment, seed=seed, **job, **fixed)` for every experiment and job.

    measure: returns rows that JSON can hold. jobs: labels, JSON values or dataclasses, which are
    also the measurement's options. A row has the job's labels, the seed and its own columns, which
    win where names agree. Every result is cached under the code that `measure` reaches, the
    experiment, seed, job, fixed options and `keys`, so an interrupted study continues. Objects that
    JSON cannot hold are bound to `measure` by functools.partial; `keys` then says what decides
    them. method: the only merging method that a job calls, or the label that has it: code of the
    others does not count.
    """
    rows, pairs = [], [(seed, dict(job)) for seed in experiments for job in jobs]
    for seed, job in (bar := tqdm(pairs, name_of(measure), leave=False)):
        shown = [str(value) for value in job.values() if not isinstance(value, dict | list)]
        bar.set_postfix_str(", ".join([f"seed {seed}", *shown]), refresh=False)
        make = partial(records, measure, experiments[seed], seed=seed, **job, **fixed)
        what = (name_of(measure), seed, job, fixed, keys)
        found = cached(experiments[seed], make, *what, method=job.get(method, method))
        rows += [{**job, "seed": seed, **row} for row in found]
    return pd.DataFrame(rows)


def name_of(measure: Callable) -> str:
    """The measurement's name: its function's, also under functools.partial."""
    while isinstance(measure, partial):
        measure = measure.func
    return measure.__name__.replace("_", " ")


def records(measure: Callable[..., Rows], *args: object, **options: object) -> list[dict]:
    """What a measurement returns, as a list of rows."""
    rows = measure(*args, **options)
    return rows.to_dict("records") if isinstance(rows, pd.DataFrame) else [*map(dict, rows)]
