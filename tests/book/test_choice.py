"""The choice of an objective: the ablation, robustness, trajectories, and their figures."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from comparisons import mean_divergence, naive_merge
from divmerge_book.data.tasks import TASKS
from divmerge_book.figures import choice as draw
from divmerge_book.studies import choice, robustness
from divmerge_book.studies.evaluator import accuracies
from divmerge_book.studies.objective_fits import FitConfig, FitSpec, fit_result, merge
from divmerge_book.studies.predictions import compared, packed, split
from helpers import linear_problem
from torch.testing import assert_close

from divmerge_core.divergences import kl
from divmerge_core.merging.coefficients import GROUPINGS, groups_of
from divmerge_core.merging.fit import expert_logits

SHORT = FitConfig(epochs=1, rates=(1e-2, 0.3), rate=0.1)


def test_every_objective_chooses_a_step_size_and_is_compared_with_js(experiment):
    options = {"specs": ["js", "kl"], "groupings": ["task"], "counts": [2]}
    found = choice.ablation({0: experiment}, **options, config=SHORT)
    table, fits = choice.summary(found["scores"], draws=200), found["fits"]
    own = table[table.objective == "js"].set_index("search")
    assert (own.difference == 0).all() and own.p.isna().all()
    for row in table[table.objective == "kl"].itertuples():
        assert row.difference == pytest.approx(row.anp - own.anp[row.search])
        assert row.from_low <= row.difference <= row.from_high
    start = table[table.objective == "start"]
    assert start.anp.nunique() == 1 and start.difference.isna().all()
    assert set(fits[fits.search == "same"].rate) == {SHORT.rate} and len(fits) == 4
    for row in fits[fits.search == "searched"].itertuples():
        tried = {
            rate: fit_result(experiment, row.objective, row.grouping, rate, SHORT)["validation"]
            for rate in SHORT.rates
        }
        assert row.rate == max(tried, key=tried.get)
        assert row.validation == tried[row.rate]


def test_without_js_there_is_no_reference():
    with pytest.raises(ValueError, match="differences are from 'js'; add it"):
        choice.ablation({}, specs=["kl"], groupings=["task"], counts=[2])


def summed(answers: dict[str, object], draws: int = 2000) -> pd.DataFrame:
    """The summary of these answers to one task, by objective; the expert's are the gold ones."""
    label = {"search": "s", "count": 1, "seed": 0, "task": "a", "gold": answers["expert"]}
    rows = [{**label, "method": method, "predicted": said} for method, said in answers.items()]
    return choice.summary(packed(rows), draws=draws).set_index("objective")


def test_a_summary_by_hand():
    """kl is right where js is wrong on one row of four: a quarter more, of an expert at 1."""
    table = summed({"expert": "0101", "js/task": "0100", "kl/task": "0101"}, draws=500)
    assert table.anp.to_dict() == {"js": 0.75, "kl": 1.0}
    assert table.difference["kl"] == 0.25
    # of a majority of two in four, js has kept half the expert's lead
    assert table.kept_margin.to_dict() == {"js": 0.5, "kl": 1.0}
    assert table.kept_difference["kl"] == 0.5 and table.below.tolist() == [0, 0]
    assert table.from_low["kl"] < 0.0 < table.p["kl"]  # one row of four says little


def test_the_same_answers_differ_by_nothing_and_p_agrees_with_the_interval():
    gold = [0, 1] * 30
    wrong = {"expert": 0, "js/task": 12, "kl/task": 12, "far/task": 30}
    table = summed({name: [1, 0] * (k // 2) + gold[k:] for name, k in wrong.items()})
    assert table.p["kl"] == 1 and table.difference["kl"] == 0 and np.isnan(table.p["js"])
    assert table.p["far"] < 0.001 and table.from_high["far"] < 0
    assert table.holm["far"] == pytest.approx(2 * table.p["far"])  # of two comparisons


def test_in_the_forest_only_what_survives_correction_is_filled(ax):
    rows = [
        {"objective": "kl", "count": 2, "holm": 0.01, "difference": 0.02},
        {"objective": "entropy", "count": 2, "holm": 0.4, "difference": -0.1},
    ]
    table = pd.DataFrame(rows).assign(from_low=-0.2, from_high=0.1)
    draw.forest(ax, table, order=["kl", "entropy"])
    marks = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in marks] == [2.0, -10.0]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, True]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["KL", "entropy (AdaMerging)"]
    assert "points" in ax.get_xlabel()


def test_a_gradient_that_vanishes_is_drawn_at_the_floor(ax):
    odds = pd.DataFrame({"objective": ["js"] * 2, "odds": [0.0, 1.0], "pull": [1.0, 0.0]})
    draw.objective_values(ax, odds, ["js"], "pull")
    assert ax.lines[-1].get_ydata()[-1] == draw.FLOOR


# --- robustness -----------------------------------------------------------------------------------
def test_noise_has_the_norm_of_what_it_replaces_tensor_by_tensor(experiment):
    before = experiment.problem.vectors.deltas.clone()
    changed = robustness.CORRUPTIONS["noise"](experiment, 1, 0).experiment.problem.vectors
    assert torch.equal(experiment.problem.vectors.deltas, before)
    assert torch.equal(changed.deltas[0], before[0])
    for start, stop in changed.layout.bounds:
        assert_close(changed.deltas[1, start:stop].norm(), before[1, start:stop].norm())
    assert torch.cosine_similarity(changed.deltas[1], before[1], dim=0).abs() < 0.2


def test_permuted_labels_are_the_same_labels_on_other_rows_and_teach_little(experiment):
    splits = TASKS["place"].read()
    shuffled = robustness.permuted(splits, 0)
    texts, answers = zip(*((row[0], row[-1]) for row in splits["train"]), strict=True)
    same, others = zip(*((row[0], row[-1]) for row in shuffled["train"]), strict=True)
    assert same == texts and others != answers and sorted(others) == sorted(answers)
    assert all(shuffled[key] == splits[key] for key in splits if key != "train")
    changed = robustness.CORRUPTIONS["permuted"](experiment, 1, 0).experiment
    deltas, before = changed.problem.vectors.deltas, experiment.problem.vectors.deltas
    assert torch.equal(deltas[0], before[0])
    own = changed.problem.vectors.expert("place")
    assert_close(own, changed.problem.vectors.layout.flatten(changed.experts[1].state))
    good, bad = (
        accuracies(one, one.problem.vectors.expert("place"), ["place"])[0]
        for one in (experiment, changed)
    )
    assert bad < good - 0.2


def test_answers_are_changed_for_one_expert_alone(experiment):
    own = expert_logits(experiment.problem)
    wrong, sure, none = (
        robustness.corrupted_fit(experiment, kind, "js", seed=1)[1].targets
        for kind in ("wrong", "overconfident", "none")
    )
    for given in (wrong, sure):
        assert_close(list(given[0]), list(own[0]))
    assert_close(wrong[1][0], own[1][0][:, [2, 0, 1]])
    assert_close(sure[1][0], 5 * own[1][0])
    assert none is None


def test_costs_are_what_the_others_lose_against_leaving_the_expert_out(experiment):
    options = {"kinds": ["none", "wrong"], "groupings": ["task"], "config": SHORT}
    study = robustness.corruption_study({0: experiment}, specs=["js", "kl"], **options)
    found = robustness.corruption_costs(study)
    assert list(found.kind) == ["none", "none", "wrong", "wrong"]
    assert set(found.task) == {"mood"}
    # left out of two, the other expert stays alone: it is itself, and its ratio is 1
    assert found.cost.tolist() == pytest.approx((1 - found.honest).tolist())
    plain = fit_result(experiment, "js", "task", SHORT.rate, SHORT)["coefficients"]
    own = found[(found.kind == "none") & (found.objective == "js")]
    assert own.coefficient.item() == pytest.approx(plain[0][0])


def test_temperature_one_is_the_plain_fit(experiment):
    options = {"grouping": "task", "config": SHORT}
    hot = robustness.temperatures({0: experiment}, specs=["js"], values=[1.0, 4.0], **options)
    found = split(compared(hot["rows"], draws=50), ("objective", "temperature"))
    options = {"groupings": ["task"], "counts": [2], "config": SHORT}
    scores = choice.ablation({0: experiment}, specs=["js"], **options)["scores"]
    plain = choice.summary(scores, draws=50)
    same = plain[(plain.search == "same") & (plain.objective == "js")].anp.item()
    assert found.anp[0] == pytest.approx(same)
    assert list(found.temperature) == list(hot["fits"].temperature) == [1.0, 4.0]


# --- trajectories ---------------------------------------------------------------------------------
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_gradient_norms_are_those_of_autograd(grouping):
    problem = linear_problem()
    names, groups = groups_of(problem.vectors.layout, grouping)
    coeffs = torch.rand(3, len(names), generator=torch.manual_seed(0), dtype=torch.float64)
    targets = expert_logits(problem)
    found = choice.task_gradients(FitSpec(problem, kl), coeffs, grouping, targets)
    for task, (loss, norm) in enumerate(found):
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
    own = choice.trajectories({0: experiment}, specs=["js"], **options)
    assert sorted(own.step.unique()) == [0, 3, 4]  # 16 inputs in batches of 4: four steps
    first = own[own.step == 0]
    assert first.coefficient.tolist() == [0.5, 0.5] and set(own.strained) == {"mood"}
    assert not own.diverged.any()
    options["config"] = replace(SHORT, rate=1e6)
    assert choice.trajectories({0: experiment}, specs=["logit_mse"], **options).diverged.all()
    assert own.groupby("step").share.sum().tolist() == pytest.approx([1, 1, 1])
    start = merge(experiment.problem.vectors, torch.full((2, 1), 0.5), "task")
    assert first.loss.mean() == pytest.approx(mean_divergence(experiment.problem, start), rel=1e-4)


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
    agree = choice.disagreement(made_up([3.0, 2.0, 1.0], [0.7, 0.8, 0.9])).iloc[0]
    assert agree[["correlation", "against", "lost"]].tolist() == pytest.approx([1.0, 0.0, 0.0])
    fight = choice.disagreement(made_up([3.0, 2.0, 1.0], [0.9, 0.8, 0.85]))
    assert fight.against[0] == 0.5 and fight.correlation[0] == pytest.approx(-0.5)
    assert fight.lost[0] == pytest.approx(0.05) and fight.kept_lost[0] == pytest.approx(0.1)
    assert choice.totals(made_up([3.0, 2.0, 1.0], [0.7, 0.8, 0.9])).loss.tolist() == [3.0, 2.0, 1.0]


UNEVEN = made_up([3.0, 2.0], [0.7, 0.8], ((0.5, 0.5), (1.0, 0.0)))


def test_balance_by_hand():
    found = choice.balance(UNEVEN).iloc[0]
    assert found["effective_tasks"] == pytest.approx((2 + 1) / 2) and found["tasks"] == 2
    assert found["largest"] == pytest.approx(0.75) and found["strained"] == pytest.approx(0.75)


def test_shares_are_drawn_in_per_cent_beside_the_equal_one(ax):
    draw.task_curves(ax, UNEVEN, "share")
    assert [line.get_ydata()[-1] for line in ax.lines[:2]] == [100, 0]
    assert list(ax.lines[2].get_ydata()) == [50, 50]
