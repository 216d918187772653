"""Trajectories of fits: what is recorded on the way, and what is made of it."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from divmerge_book.figures import choice as draw
from divmerge_book.studies.objective_fits import FitConfig, FitSpec, merge
from divmerge_book.studies.trajectories import (
    balance,
    disagreement,
    task_gradients,
    totals,
    trajectories,
)
from helpers import linear_problem, naive_merge

from divmerge_core.divergences import js, kl
from divmerge_core.merging.coefficients import GROUPINGS, groups_of
from divmerge_core.merging.fit import expert_logits

SHORT = FitConfig(epochs=1, rate=0.1)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_gradient_norms_are_those_of_autograd(grouping):
    problem = linear_problem()
    names, groups = groups_of(problem.vectors.layout, grouping)
    coeffs = torch.rand(3, len(names), generator=torch.manual_seed(0), dtype=torch.float64)
    targets = expert_logits(problem)
    for task, (loss, norm) in enumerate(
        task_gradients(FitSpec(problem, kl), coeffs, grouping, targets)
    ):
        free = coeffs.clone().requires_grad_()
        pairs = [(task, batch) for batch in problem.batches[task]]
        logits = problem.forward(naive_merge(problem, free, groups), pairs)
        terms = zip(problem.batches[task], targets[task], logits, strict=True)
        whole = sum(b.weight @ kl(e, z) for b, e, z in terms) / 3
        (slope,) = torch.autograd.grad(whole, free)
        assert loss == pytest.approx(whole.item())
        assert norm == pytest.approx(slope.norm().item(), rel=1e-6)


def test_a_trajectory_begins_at_the_start_and_records_the_end(experiment):
    options = {"grouping": "task", "config": SHORT, "every": 3}
    own = trajectories({0: experiment}, specs=["js"], **options)
    assert sorted(own.step.unique()) == [0, 3, 4]  # 16 inputs in batches of 4: four steps
    first = own[own.step == 0]
    assert first.coefficient.tolist() == [0.5, 0.5] and set(own.strained) == {"mood"}
    assert not own.diverged.any()
    far = replace(SHORT, rate=1e6)
    assert trajectories(
        {0: experiment}, specs=["logit_mse"], grouping="task", config=far
    ).diverged.all()
    assert own.groupby("step").share.sum().tolist() == pytest.approx([1, 1, 1])
    problem = experiment.problem
    start = merge(problem.vectors, torch.full((2, 1), 0.5), "task")
    for task, some in enumerate(expert_logits(problem)):
        pairs = zip(problem.batches[task], some, strict=True)
        loss = sum((b.weight @ js(e, problem.logits(start, task, b))).item() for b, e in pairs) / 4
        assert first.loss.iloc[task] == pytest.approx(loss, rel=1e-4)


def made_up(losses, anps, shares=((0.5, 0.5),) * 3) -> pd.DataFrame:
    """A trajectory of two tasks whose losses are equal."""
    label = {"kind": "none", "strained": "a", "objective": "js", "seed": 0}
    return pd.DataFrame(
        {**label, "step": step, "task": task, "loss": loss / 2, "share": share}
        | {"anp": anp, "kept_margin": 2 * anp}
        for step, (loss, anp, both) in enumerate(zip(losses, anps, shares, strict=True))
        for task, share in zip("ab", both, strict=True)
    )


def test_loss_and_anp_agree_or_not_by_hand():
    agree = disagreement(made_up([3.0, 2.0, 1.0], [0.7, 0.8, 0.9])).iloc[0]
    assert agree[["correlation", "against", "lost"]].tolist() == pytest.approx([1.0, 0.0, 0.0])
    fight = disagreement(made_up([3.0, 2.0, 1.0], [0.9, 0.8, 0.85]))
    assert fight.against[0] == 0.5 and fight.correlation[0] == pytest.approx(-0.5)
    assert fight.lost[0] == pytest.approx(0.05) and fight.kept_lost[0] == pytest.approx(0.1)
    assert totals(made_up([3.0, 2.0, 1.0], [0.7, 0.8, 0.9])).loss.tolist() == [3.0, 2.0, 1.0]


UNEVEN = made_up([3.0, 2.0], [0.7, 0.8], ((0.5, 0.5), (1.0, 0.0)))


def test_balance_by_hand():
    found = balance(UNEVEN).iloc[0]
    assert found["effective_tasks"] == pytest.approx((2 + 1) / 2) and found["tasks"] == 2
    assert found["largest"] == pytest.approx(0.75) and found["strained"] == pytest.approx(0.75)


def test_shares_are_drawn_in_per_cent_beside_the_equal_one_and_losses_in_units_of_the_first():
    ax = draw.task_curves(plt.figure().gca(), UNEVEN, "share")
    assert [line.get_ydata()[-1] for line in ax.lines[:2]] == [100, 0]
    assert list(ax.lines[2].get_ydata()) == [50, 50]
    table = made_up([4.0, 2.0, 1.0], [0.7, 0.8, 0.9])
    ax = draw.training_curve(plt.figure().gca(), table, "loss")
    assert list(ax.lines[0].get_ydata()) == [1.0, 0.5, 0.25]
    plt.close("all")
