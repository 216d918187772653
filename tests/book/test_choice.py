"""The choice of an objective: what is posed, how it is fitted, and what is made of the results."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.experiment import SIZES, prepare
from divmerge_book.evaluation.hyperparameter_search import validation_anp
from divmerge_book.figures import choice as draw
from divmerge_book.studies import objective_fits as posing
from divmerge_book.studies.choice import ablation, summary
from divmerge_book.studies.objective_fits import (
    BESIDE,
    FitSpec,
    Rule,
    fit,
    gold_answers,
    learned,
    merge,
    objectives,
    only_seen,
    pose,
)
from divmerge_book.studies.predictions import compared, packed, split
from divmerge_book.studies.robustness import (
    STRAINS,
    costs,
    permuted,
    posed_under,
    strains,
    temperatures,
)
from divmerge_book.studies.trajectories import balance, courses, disagreement, pulls, totals
from helpers import MARKERS, linear_problem, naive_merge
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, js, kl
from divmerge_core.merging.coefficients import GROUPINGS, groups_of
from divmerge_core.merging.fit import expert_logits

SHORT = Rule(epochs=1, rates=(1e-2, 0.3), rate=0.1)


@pytest.fixture
def bench(toys, once):
    if "bench" not in once:
        size = replace(SIZES["toy"], merge_rows=16, validation_rows=30, test_rows=40)
        once["bench"] = prepare("toy", size=size)
    return once["bench"]


# --- what is posed --------------------------------------------------------------------------------


def test_every_divergence_and_three_others_are_compared():
    assert objectives() == [*DIVERGENCES, "hidden_cosine", "entropy", "labels"]
    assert "cheats" in BESIDE.facts["labels"]["label"]


def test_the_oracle_is_told_the_gold_answer_of_every_input(bench):
    for task, answers in zip(MARKERS, gold_answers(bench), strict=True):
        number = bench.problem.vectors.tasks.index(task)
        for batch, gold in zip(bench.problem.batches[number], answers, strict=True):
            texts = bench.base.tokenizer.batch_decode(batch.inputs["input_ids"])
            for text, answer in zip(texts, gold.tolist(), strict=True):
                (marker,) = set(text.split()) & set(MARKERS[task])
                assert TASKS[task].answers[answer] == MARKERS[task][marker]


def test_the_oracle_minimises_the_cross_entropy_with_gold_answers(bench):
    posed = pose(bench, "labels")
    logits = bench.problem.logits(bench.problem.vectors.base, 0, bench.problem.batches[0][0])
    found = posed.loss(posed.targets[0][0], logits)
    gold = gold_answers(bench)[0][0]
    assert_close(found, torch.nn.functional.cross_entropy(logits, gold, reduction="none"))


def test_hidden_states_are_what_the_heads_read(bench):
    problem, hidden = bench.problem, pose(bench, "hidden_cosine").problem
    for number, expert in enumerate(bench.experts):
        batch = problem.batches[number][0]
        states = hidden.logits(problem.vectors.base, number, batch)
        logits = states @ expert.head["weight"].T + expert.head["bias"]
        assert_close(logits, problem.logits(problem.vectors.base, number, batch))


def test_entropy_asks_no_expert(bench):
    loss, merged = pose(bench, "entropy").loss, torch.randn(3, 2)
    assert torch.equal(loss(torch.zeros(3, 2), merged), loss(torch.randn(3, 2), merged))


def test_what_compares_no_two_answers_has_no_temperature(bench):
    with pytest.raises(ValueError, match="'entropy' has no temperature, got 2.0; leave it out"):
        pose(bench, "entropy", 2.0)
    with pytest.raises(ValueError, match="choose one of"):
        pose(bench, "entropi")


# --- one fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", ["task", "layer"])
def test_words_that_no_input_names_do_not_change_a_fit(bench, grouping, monkeypatch):
    fast = fit(pose(bench, "js"), grouping, 0.1, SHORT)
    monkeypatch.setattr(posing, "only_seen", lambda problem: problem)
    assert_close(fit(pose(bench, "js"), grouping, 0.1, SHORT), fast)


def test_only_words_that_are_named_are_kept(bench):
    smaller = only_seen(bench.problem)
    named = {
        n
        for some in bench.problem.batches
        for b in some
        for n in b.inputs["input_ids"].unique().tolist()
    }
    number = bench.problem.vectors.layout.names.index(posing.WORDS)
    assert smaller.vectors.layout.shapes[number][0] == len(named | {0})
    for task, (some, fewer) in enumerate(zip(bench.problem.batches, smaller.batches, strict=True)):
        there = bench.problem.logits(bench.problem.vectors.base, task, some[0])
        assert_close(smaller.logits(smaller.vectors.base, task, fewer[0]), there)
    problem = linear_problem()
    assert only_seen(problem) is problem


@pytest.mark.parametrize("spec", ["js", "hidden_cosine", "entropy", "labels"])
def test_every_fit_lowers_its_own_objective(bench, spec):
    posed, losses = pose(bench, spec), []
    rule = Rule(epochs=6)
    whole = replace(posed.problem, batches=[some[:1] for some in posed.problem.batches])
    targets = posed.targets and [some[:1] for some in posed.targets]
    fit(
        FitSpec(whole, posed.loss, targets),
        "layer",
        0.03,
        rule,
        lambda step: losses.append(step.loss),
    )
    assert losses[-2] < losses[0]


def test_a_fit_that_diverges_is_scored_where_it_started(bench):
    found = learned(bench, "logit_mse", "task", 150.0, SHORT)
    assert found["diverged"]
    assert found["coefficients"] == [[0.5], [0.5]]


def test_coefficients_are_validated_as_merged(bench):
    found = learned(bench, "js", "layer", 0.1, SHORT)
    flat = merge(bench.problem.vectors, torch.tensor(found["coefficients"]), "layer")
    assert found["validation"] == validation_anp(bench, flat)
    assert not found["diverged"]


# --- the ablation ---------------------------------------------------------------------------------


def test_every_objective_chooses_a_step_size_and_is_compared_with_js(bench):
    options = {"specs": ["js", "kl"], "groupings": ["task"], "counts": [2]}
    found = ablation({0: bench}, **options, rule=SHORT)
    table, fits = summary(found["scores"], draws=200), found["fits"]
    own = table[table.objective == "js"].set_index("search")
    assert (own.difference == 0).all() and own.p.isna().all()
    for row in table[table.objective == "kl"].itertuples():
        assert row.difference == pytest.approx(row.anp - own.anp[row.search])
        assert row.from_low <= row.difference <= row.from_high
    assert table[table.objective == "start"].anp.nunique() == 1
    assert set(fits[fits.search == "same"].rate) == {SHORT.rate}
    for row in fits[fits.search == "searched"].itertuples():
        tried = {
            rate: learned(bench, row.objective, row.grouping, rate, SHORT)["validation"]
            for rate in SHORT.rates
        }
        assert row.rate == max(tried, key=tried.get)
        assert row.validation == tried[row.rate]


def test_without_js_there_is_nothing_to_differ_from(bench):
    with pytest.raises(ValueError, match="differences are from 'js'; add it"):
        ablation({0: bench}, specs=["kl"], groupings=["task"], counts=[2])


def test_a_summary_by_hand():
    """kl is right where js is wrong on one row of four: a quarter more, of an expert at 1."""
    gold, rows = "0101", []
    for method, said in (("expert", "0101"), ("js/task", "0100"), ("kl/task", "0101")):
        row = {"search": "s", "count": 1, "method": method, "seed": 0, "task": "a"}
        rows.append({**row, "predicted": said, "gold": gold})
    table = summary(packed(rows), draws=500).set_index("objective")
    assert table.anp.to_dict() == {"js": 0.75, "kl": 1.0}
    assert table.difference["kl"] == 0.25
    # of a majority of two in four, js has kept half the expert's lead
    assert table.kept_margin.to_dict() == {"js": 0.5, "kl": 1.0}
    assert table.kept_difference["kl"] == 0.5 and table.below.tolist() == [0, 0]
    assert table.from_low["kl"] < 0.0 < table.p["kl"]  # one row of four says little


def test_the_same_answers_differ_by_nothing_and_p_agrees_with_the_interval():
    gold, rows = [0, 1] * 30, []
    for method, wrong in (("expert", 0), ("js/task", 12), ("kl/task", 12), ("far/task", 30)):
        said = [1 - g if n < wrong else g for n, g in enumerate(gold)]
        row = {"search": "s", "count": 1, "method": method, "seed": 0, "task": "a"}
        rows.append({**row, "predicted": said, "gold": gold})
    table = summary(packed(rows)).set_index("objective")
    assert table.p["kl"] == 1 and table.difference["kl"] == 0 and np.isnan(table.p["js"])
    assert table.p["far"] < 0.001 and table.from_high["far"] < 0


# --- strains --------------------------------------------------------------------------------------


def test_noise_has_the_length_of_what_it_replaces_tensor_by_tensor(bench):
    before = bench.problem.vectors.deltas.clone()
    changed = STRAINS["noise"](bench, 1, 0).bench.problem.vectors
    assert torch.equal(bench.problem.vectors.deltas, before)
    assert torch.equal(changed.deltas[0], before[0])
    for start, stop in changed.layout.bounds:
        assert_close(changed.deltas[1, start:stop].norm(), before[1, start:stop].norm())
    cosine = torch.cosine_similarity(changed.deltas[1], before[1], dim=0)
    assert cosine.abs() < 0.2


def test_permuted_labels_are_the_same_labels_on_other_rows(bench):
    splits = TASKS["place"].read()
    twisted = permuted(splits, 0)
    answers, texts = ([row[place] for row in splits["train"]] for place in (-1, 0))
    assert sorted(row[-1] for row in twisted["train"]) == sorted(answers)
    assert [row[-1] for row in twisted["train"]] != answers
    assert [row[0] for row in twisted["train"]] == texts
    assert {key: twisted[key] for key in splits if key != "train"} == {
        key: splits[key] for key in splits if key != "train"
    }


def test_an_expert_of_permuted_labels_knows_little_of_its_task(bench):
    strained = STRAINS["permuted"](bench, 1, 0).bench
    assert torch.equal(strained.problem.vectors.deltas[0], bench.problem.vectors.deltas[0])
    expert = strained.problem.vectors.expert("place")
    scores = []
    for at in (bench, strained):
        exam, own = at.test[1], at.problem.vectors.expert("place")
        right = [at.problem.logits(own, 1, b).argmax(-1) for b in exam.batches]
        scores.append((torch.cat(right) == exam.gold).double().mean().item())
    assert scores[1] < scores[0] - 0.2
    assert_close(expert, strained.problem.vectors.layout.flatten(strained.experts[1].state))


def test_answers_are_changed_for_one_expert_alone(bench):
    own = expert_logits(bench.problem)
    wrong = posed_under(STRAINS["wrong"](bench, 1, 0), "js", 1).targets
    sure = posed_under(STRAINS["overconfident"](bench, 1, 0), "js", 1).targets
    for given in (wrong, sure):
        assert_close(list(given[0]), list(own[0]))
    assert_close(wrong[1][0], own[1][0][:, [2, 0, 1]])
    assert_close(sure[1][0], 5 * own[1][0])
    assert posed_under(STRAINS["none"](bench, 1, 0), "js", 1).targets is None


def test_costs_are_what_the_others_lose_against_leaving_the_expert_out(bench):
    kinds = ["none", "noise", "wrong"]
    rows = strains({0: bench}, specs=["js", "kl"], kinds=kinds, groupings=["task"], rule=SHORT)
    found = costs(rows)
    assert list(found.kind) == ["none", "none", "noise", "noise", "wrong", "wrong"]
    assert set(found.task) == {"mood"}
    # left out of two, the other expert stays alone: it is itself, and its ratio is 1
    assert_close(torch.tensor(found.cost.values), torch.tensor(1 - found.honest.values))
    plain = learned(bench, "js", "task", SHORT.rate, SHORT)["coefficients"]
    own = found[(found.kind == "none") & (found.objective == "js")]
    assert own.coefficient.item() == pytest.approx(plain[0][0])


def test_temperature_one_is_the_plain_fit(bench):
    hot = temperatures({0: bench}, specs=["js"], values=[1.0, 4.0], grouping="task", rule=SHORT)
    found = split(compared(hot["rows"], draws=50), ("objective", "temperature"))
    plain = ablation({0: bench}, specs=["js"], groupings=["task"], counts=[2], rule=SHORT)
    plain = summary(plain["scores"], draws=50)
    same = plain[(plain.search == "same") & (plain.objective == "js")].anp.item()
    assert found.anp[0] == pytest.approx(same)
    assert list(found.temperature) == [1.0, 4.0]


# --- on the way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_pulls_are_the_lengths_of_autograds_gradients(grouping):
    problem = linear_problem()
    names, groups = groups_of(problem.vectors.layout, grouping)
    coeffs = torch.rand(3, len(names), generator=torch.manual_seed(0), dtype=torch.float64)
    targets = expert_logits(problem)
    found = list(pulls(FitSpec(problem, kl), coeffs, grouping, targets))
    for task, (loss, pull) in enumerate(found):
        free = coeffs.clone().requires_grad_()
        logits = problem.forward(
            naive_merge(problem, free, groups), [(task, b) for b in problem.batches[task]]
        )
        terms = zip(problem.batches[task], targets[task], logits, strict=True)
        whole = sum(b.weight @ kl(e, z) for b, e, z in terms) / 3
        (slope,) = torch.autograd.grad(whole, free)
        assert loss == pytest.approx(whole.item())
        assert pull == pytest.approx(slope.norm().item(), rel=1e-6)


def test_a_course_begins_at_the_start_and_notes_the_end(bench):
    table = courses({0: bench}, specs=["js", "labels"], grouping="task", rule=SHORT, every=3)
    own = table[table.objective == "js"]
    assert sorted(own.step.unique()) == [0, 3, 4]  # 16 inputs in batches of 4: four steps
    assert_close(
        torch.tensor(own[own.step == 0].coefficient.values), torch.full((2,), 0.5).double()
    )
    assert_close(torch.tensor(own.groupby("step").share.sum().values), torch.ones(3).double())
    problem, start = bench.problem, merge(bench.problem.vectors, torch.full((2, 1), 0.5), "task")
    for task, some in enumerate(expert_logits(problem)):
        pairs = zip(problem.batches[task], some, strict=True)
        loss = sum((b.weight @ js(e, problem.logits(start, task, b))).item() for b, e in pairs) / 4
        assert own[own.step == 0].loss.iloc[task] == pytest.approx(loss, rel=1e-4)


def made_up(losses, anps, shares=((0.5, 0.5),) * 3) -> pd.DataFrame:
    """A course of two tasks whose losses are equal."""
    label = {"kind": "none", "strained": "a", "objective": "js", "seed": 0}
    return pd.DataFrame(
        {**label, "step": step, "task": task, "loss": loss / 2, "anp": anp, "share": share}
        for step, (loss, anp, both) in enumerate(zip(losses, anps, shares, strict=True))
        for task, share in zip("ab", both, strict=True)
    )


def test_loss_and_anp_agree_or_not_by_hand():
    agree = disagreement(made_up([3.0, 2.0, 1.0], [0.7, 0.8, 0.9]))
    found = agree.loc[0, ["correlation", "against", "lost"]].tolist()
    assert found == pytest.approx([1.0, 0.0, 0.0])
    fight = disagreement(made_up([3.0, 2.0, 1.0], [0.9, 0.8, 0.85]))
    assert fight.against[0] == 0.5 and fight.correlation[0] == pytest.approx(-0.5)
    assert fight.lost[0] == pytest.approx(0.05)
    assert totals(made_up([3.0, 2.0, 1.0], [0.7, 0.8, 0.9])).loss.tolist() == [3.0, 2.0, 1.0]


def test_balance_by_hand():
    table = made_up([3.0, 2.0], [0.7, 0.8], ((0.5, 0.5), (1.0, 0.0)))
    found = balance(table).iloc[0]
    assert found["even"] == pytest.approx((2 + 1) / 2) and found["tasks"] == 2
    assert found["largest"] == pytest.approx(0.75) and found["strained"] == pytest.approx(0.75)


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_in_the_forest_only_what_survives_correction_is_filled(ax):
    rows = [
        {"objective": "kl", "count": 2, "holm": 0.01, "difference": 0.02},
        {"objective": "entropy", "count": 2, "holm": 0.4, "difference": -0.1},
    ]
    table = pd.DataFrame(rows)
    table["from_low"], table["from_high"] = -0.2, 0.1
    assert draw.forest(ax, table, order=["kl", "entropy"]) is ax
    marks = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in marks] == [2.0, -10.0]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, True]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["kl", "entropy (AdaMerging)"]
    assert "points" in ax.get_xlabel()


def test_shares_are_drawn_in_per_cent_beside_the_equal_one(ax):
    table = made_up([3.0, 2.0], [0.7, 0.8], ((0.5, 0.5), (1.0, 0.0)))
    draw.by_task(ax, table, "share")
    assert [line.get_ydata()[-1] for line in ax.lines[:2]] == [100, 0]
    assert list(ax.lines[2].get_ydata()) == [50, 50]


def test_losses_are_drawn_in_units_of_the_first(ax):
    draw.travelled(ax, made_up([4.0, 2.0, 1.0], [0.7, 0.8, 0.9]), "loss")
    assert list(ax.lines[0].get_ydata()) == [1.0, 0.5, 0.25]


def test_every_other_figure_draws_on_the_axes_it_is_given(ax):
    odds = pd.DataFrame({"objective": ["js"] * 2, "odds": [0.0, 1.0], "pull": [1.0, 0.0]})
    assert draw.values(ax, odds, ["js"], "pull").lines[-1].get_ydata()[-1] == draw.FLOOR
    ax.set_yscale("linear")
    ratio = pd.DataFrame({"objective": ["js", "logit_mse"], "ratio": [0.25, 3.0]})
    assert draw.directions(ax, ratio) is ax
    ax.clear()
    hot = {"objective": "js", "temperature": [1.0, 2.0], "seed": 0, "anp": [0.9, 0.8]}
    assert draw.tempered(ax, pd.DataFrame(hot)) is ax
    ax.clear()
    cost = {"objective": ["js", "kl"], "kind": "noise", "cost": [0.1, 0.2], "seed": 0}
    assert draw.strained(ax, pd.DataFrame(cost)) is ax
    assert draw.per_objective(ax, pd.DataFrame(cost), "cost", order=["js", "kl"]) is ax
