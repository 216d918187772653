"""Fixtures are loaded where tests run: a process that hands tests to others starts at once."""

import gc


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
