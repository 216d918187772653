"""Results, kept in the cache under a key of all that decides them."""

import json
from collections.abc import Callable
from pathlib import Path

from divmerge_book.data.code_digest import code_digest, key_of, versions
from divmerge_book.evaluation.experiment import Experiment
from divmerge_core.methods import METHODS, parse
from divmerge_core.storage import cache_dir, dump_json, once


def cell(bench: Experiment, make: Callable, *what: object, method: str | None = None) -> Path:
    """Where a result on this bench is kept: under its code, library versions, bench and options.

    make: the function that makes it; the code that it reaches counts. what: all else that decides
    it. method: the one merging method that `make` calls; None counts the code of all.
    """
    code = [code_digest(make, apart=None if method is None else "METHODS")]
    if method is not None:
        code.append(code_digest(METHODS[parse(method)[0]]))
    return cache_dir() / "cells" / f"{key_of(code, versions(), bench.digest, what)}.json"


def kept(
    bench: Experiment, make: Callable[[], object], *what: object, method: str | None = None
) -> object:
    """What `make()` gives, as JSON has it: made once, by one process; see `cell`."""
    path = cell(bench, make, *what, method=method)
    once(path, lambda new: dump_json(new, make()), folder=False)
    return json.loads(path.read_text("utf-8"))
