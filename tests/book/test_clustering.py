"""Partitions of experts into merged models, against `dp_mixture` and planted groups."""

import math

import numpy as np
import pandas as pd
import pytest
from divmerge_book.studies import clustering as module
from divmerge_book.studies.evaluator import accuracies, expert_accuracies
from helpers import forbid

from divmerge_core.methods import METHODS
from divmerge_core.methods.clustered import dp_mixture


@pytest.mark.parametrize("zeta", [0.0, 0.03, 0.5, 2.0, math.inf])
def test_a_sweep_assigns_and_scores_as_the_mixture_does(linear, zeta):
    for sigma in (0.25, 1.0):
        expected = dp_mixture(linear.problem, zeta=zeta, sigma=sigma, progress=False)
        groups = module.Groups(linear)
        found = module.assignments(groups, zeta=zeta, sigma=sigma)
        assert found == module.members_of(expected.numbers)
    assert groups.scores(found) == pytest.approx(accuracies(linear, expected))


def test_mixtures_run_from_one_model_to_all_experts_and_repeat_nothing(linear, monkeypatch):
    def measured() -> pd.DataFrame:
        return module.mixture(linear, zetas=(0.0, 0.5, math.inf), sigmas=(1.0,), draws=2)

    table, experts = measured(), expert_accuracies(linear)
    own = table[table.how == "dp_mixture"].set_index("zeta")
    assert own.models["0"] == 1 and own.models["inf"] == len(experts) and own.anp["inf"] == 1
    alike = dp_mixture(linear.problem, zeta=math.inf, progress=False)
    assert own.bytes["inf"] == alike.nbytes
    opcm = METHODS["opcm"](linear.problem, progress=False)
    found = np.array(accuracies(linear, opcm)) / list(experts.values())
    assert own.anp["0"] == pytest.approx(found.mean())
    assert (table.groups.str.count(r"\|") + 1 == table.models).all()
    assert set(table[table.how == "k_means"].models) == set(own.models)
    for name in ("accuracies", "residuals", "join"):
        monkeypatch.setattr(module, name, forbid)
    pd.testing.assert_frame_equal(measured(), table)


def test_k_means_finds_planted_groups_from_inner_products():
    generator = np.random.default_rng(0)
    centres = 10 * generator.standard_normal((3, 20))
    points = centres[[0, 1, 2, 0, 1, 2, 0]] + 0.1 * generator.standard_normal((7, 20))
    gram = points @ points.T
    assert module.members_of(module.k_means(gram, 3)) == [(0, 3, 6), (1, 4), (2, 5)]
    assert module.members_of(module.k_means(gram, 7)) == [(n,) for n in range(7)]
    assert module.members_of(module.k_means(gram, 1)) == [tuple(range(7))]
    with pytest.raises(ValueError, match="1 to 7 clusters"):
        module.k_means(gram, 8)


def test_random_groups_are_never_empty():
    assert all(set(module.random_labels(5, 3, seed)) == {0, 1, 2} for seed in range(20))
