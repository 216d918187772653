"""A study measures every experiment and job once, and again when what decides it changes."""

from dataclasses import dataclass
from functools import partial

import pandas as pd
import pytest
from divmerge_book.data.code_digest import leaves
from divmerge_book.evaluation import cache as caching
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.studies.study import study


def experiments(words: str) -> dict[int, Experiment]:
    """Experiments that have nothing but a digest."""
    found = {seed: object.__new__(Experiment) for seed in (0, 3)}
    for seed, one in found.items():
        object.__setattr__(one, "digest", f"{words} {seed}")
    return found


@dataclass(frozen=True)
class Budget:
    steps: int = 2


EXPERIMENTS = experiments("experts")
JOBS = [{"kind": kind} for kind in ("a", "b")]
GIVEN = {"experiments": EXPERIMENTS, "jobs": JOBS, "scale": 2, "budget": Budget()}
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def calls() -> list:
    return []


@pytest.fixture
def measure(calls):
    def measure(experiment, *, seed, kind, scale=1, budget=None, fails=None):
        if kind == fails:
            raise KeyboardInterrupt
        calls.append((experiment.digest, seed, kind))
        return [{"value": scale * seed, "task": task} for task in ("x", "y")]

    return measure


def test_a_job_is_measured_once_and_its_rows_are_labelled(measure, calls):
    table = study(measure, **GIVEN)
    assert len(calls) == 4 and calls[-1] == ("experts 3", 3, "b")
    assert table.to_dict("records")[-1] == {"kind": "b", "seed": 3, "value": 6, "task": "y"}
    pd.testing.assert_frame_equal(table, study(measure, **GIVEN))
    assert len(calls) == 4


CHANGES = {
    "jobs": [{"kind": "c"}, {"kind": "d"}],
    **{"scale": 3, "budget": Budget(3), "keys": ["new"], "experiments": experiments("other")},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_anything_measures_again(measure, calls, name):
    study(measure, **GIVEN)
    study(measure, **{**GIVEN, name: CHANGES[name]})
    assert len(calls) == 8


def test_a_change_of_code_measures_again(measure, calls, monkeypatch):
    digested = []
    monkeypatch.setattr(caching, "code_digest", lambda *given, **_: digested.append(given) or "one")
    study(measure, EXPERIMENTS, JOBS)
    assert measure in leaves(digested[0])
    monkeypatch.setattr(caching, "code_digest", lambda *given, **_: "two")
    study(measure, EXPERIMENTS, JOBS)
    assert len(calls) == 8


def test_the_code_of_other_methods_does_not_count(measure, monkeypatch):
    asked = []
    monkeypatch.setattr(caching, "code_digest", lambda *_, apart=None: asked.append(apart) or "one")
    for kind, method in (("ties", "kind"), ("a", "average"), ("b", None)):
        study(measure, {0: EXPERIMENTS[0]}, [{"kind": kind}], method=method)
    assert asked == ["METHODS", None, "METHODS", None, None]  # None: the method's own, or all


def test_an_interrupted_study_continues(measure, calls):
    with pytest.raises(KeyboardInterrupt):
        study(partial(measure, fails="b"), EXPERIMENTS, JOBS)
    assert len(calls) == 1
    study(measure, EXPERIMENTS, JOBS)
    assert len(calls) == 4


def test_a_measurement_may_return_a_table():
    def measure(experiment, *, seed, kind):
        return pd.DataFrame({"value": [1.5, None]})

    assert study(measure, EXPERIMENTS, JOBS).value.tolist()[0] == 1.5
