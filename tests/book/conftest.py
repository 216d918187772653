"""Fixtures: an empty figure; four linear tasks; two described BERT experts, plan, experiment."""

import warnings
from pathlib import Path

import early_imports  # noqa: F401
import matplotlib.pyplot as plt
import pytest
from divmerge_book.user_models import check, load, read
from helpers import linear_experiment
from local_files import make_project


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.fixture
def linear(tiny, cache):
    """An experiment of four linear tasks, in an empty cache; experts get all rows right."""
    return linear_experiment(tiny, 4)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A description of two random BERT experts; only to be read."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def plan(project):
    return check(read(project))


@pytest.fixture(scope="session")
def bench(plan):
    """Toy experts move further than fine-tuning does; `load` warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load(plan)
