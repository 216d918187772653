"""Fixtures are loaded where tests run: a process that hands tests to others starts at once."""

import gc
import inspect
from functools import partial

import jaxtyping
from beartype import beartype


def checked(function=None, *, typechecker, shapes=jaxtyping.jaxtyped):
    """Types at every call; jaxtyping, twenty times as slow, where an axis has a name."""
    if function is None:
        return partial(checked, typechecker=typechecker)
    stated = getattr(function, "__annotations__", {}).values()
    named = any(isinstance(one, str) or "jaxtyping" in repr(one) for one in stated)
    if named or not inspect.isfunction(function):
        return shapes(function, typechecker=typechecker)
    return beartype(function)


jaxtyping.jaxtyped = checked


def pytest_sessionstart(session):
    config = session.config
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # what is imported stays
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish():
    """No later collection of garbage goes through what was imported."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # and can be taken apart at the end
