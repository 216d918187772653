"""Cached results, under a key of everything that determines them."""

import json
from collections.abc import Callable
from pathlib import Path

from divmerge_book.data.code_digest import code_digest, key_of, versions
from divmerge_book.evaluation.experiment import Experiment
from divmerge_core.methods import METHODS, parse
from divmerge_core.storage import cache_dir, dump_json, once


def cache_path(
    experiment: Experiment, make: Callable, *what: object, method: str | None = None
) -> Path:
    """The file of a result: its key holds code, library versions, experiment and options.

    make: the function that makes it, whose reachable code counts. what: everything else that
    determines it. method: the one merging method that `make` calls; None counts all methods' code.
    """
    code = [code_digest(make, apart=None if method is None else "METHODS")]
    if method is not None:
        code.append(code_digest(METHODS[parse(method)[0]]))
    return cache_dir() / "results" / f"{key_of(code, versions(), experiment.digest, what)}.json"


def cached(
    experiment: Experiment, make: Callable[[], object], *what: object, method: str | None = None
) -> object:
    """The result of `make()`, as JSON has it: computed once, by one process; see `cache_path`."""
    path = cache_path(experiment, make, *what, method=method)
    once(path, lambda new: dump_json(new, make()), folder=False)
    return json.loads(path.read_text("utf-8"))
