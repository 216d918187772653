"""Few inputs, shifted inputs, and both sides of Proposition 3, on toy experts."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.hyperparameter_search import own_experts
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.figures import protocol as draw
from divmerge_book.studies.learning_curve import (
    INPUT_SHIFTS,
    divergence_sum,
    input_shifts,
    learning_curve,
    mixed,
    proposition3,
    sample_inputs,
    seeded,
)
from divmerge_book.studies.predictions import compared, split
from divmerge_book.studies.protocol import COLUMNS, DEFAULT

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.methods import METHODS


def rows(batches) -> list[int]:
    return [sum(len(batch.weight) for batch in own) for own in batches]


def in_columns(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return split(compared(table, draws=200), COLUMNS[name])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 16, 10**6])
def test_as_many_inputs_are_sampled_as_asked_or_as_there_are(experiment, count):
    chosen = sample_inputs(experiment.problem.batches, count, seeded(0))
    assert rows(chosen) == [min(count, 16)] * 2
    assert all(abs(float(b.weight.sum()) - 1) < 1e-6 for own in chosen for b in own)


def test_no_inputs_leave_the_average(experiment):
    table = learning_curve({0: experiment}, (0, 8), groupings=("layer",), steps=4)
    table = in_columns(table, "needed").set_index("inputs")
    average = evaluate(experiment.problem, METHODS["average"](experiment.problem), experiment.test)
    experts = own_experts(experiment, experiment.test)
    ratios = []
    for pair in zip(average.itertuples(), experts.itertuples(), strict=True):
        right, most = (sum(map(int.__eq__, one.predicted, one.gold)) for one in pair)
        ratios.append(right / most)
    assert table.anp[0] == pytest.approx(sum(ratios) / 2)
    assert table.difference[8] == 0
    ax = draw.learning_curve(plt.figure().gca(), table.reset_index())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "8"]


# --- shifted inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUT_SHIFTS)
def test_shifted_inputs_go_through_the_tasks_own_head(experiment, kind):
    problem = experiment.problem
    found = INPUT_SHIFTS[kind](experiment, problem.batches, seeded(0))
    for task, (batch, *_) in enumerate(found):
        assert problem.logits(problem.vectors.base, task, batch).shape[1] == (2, 3)[task]
    if kind == "other_task":
        assert found[0] is problem.batches[1] and found[1] is problem.batches[0]


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_special_tokens_and_padding_stay_in_place(experiment, kind):
    special, changed = torch.tensor(experiment.base.tokenizer.all_special_ids), 0
    found = INPUT_SHIFTS[kind](experiment, [], seeded(0))
    for own, others in zip(experiment.problem.batches, found, strict=True):
        for old, new in zip(own, others, strict=True):
            ids, other = old.inputs["input_ids"], new.inputs["input_ids"]
            kept = torch.isin(ids, special)
            assert torch.equal(ids[kept], other[kept])
            assert torch.equal(kept, torch.isin(other, special))
            assert torch.equal(old.inputs["attention_mask"], new.inputs["attention_mask"])
            changed += int((ids != other).sum())
            if kind == "shuffled":
                assert torch.equal(ids.sort(dim=1).values, other.sort(dim=1).values)
    assert changed > 0


def test_another_domain_needs_a_task_that_is_not_merged(experiment):
    with pytest.raises(ValueError, match="need a task that is not merged; name one more"):
        INPUT_SHIFTS["outside"](experiment, [], seeded(0))


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_share_is_replaced_and_the_objective_is_linear_in_it(experiment, share, count):
    problem, own = experiment.problem, experiment.problem.batches
    shifted = INPUT_SHIFTS["shuffled"](experiment, [], seeded(0))
    found = mixed(own, shifted, share, seeded(0))
    for old, new in zip(own, found, strict=True):
        assert sum(a is not b for a, b in zip(old, new, strict=True)) == count
    rest = mixed(shifted, own, share, seeded(0))  # the same places, the other way round
    pairs = [(own, shifted), (found, rest)]
    ends, both = (
        sum(divergence_sum(replace(problem, batches=b), problem.vectors.base) for b in pair)
        for pair in pairs
    )
    assert both == pytest.approx(ends, rel=1e-5)


def test_shifted_inputs_are_compared_with_a_tasks_own(experiment):
    others = {0: experiment.problem.batches}
    options = {"inputs": 8, "shares": (0.5, 1.0), "groupings": ("task",), "steps": 2}
    table = in_columns(input_shifts({0: experiment}, others, **options), "wrong")
    assert len(table) == 2 + 2 * len(INPUT_SHIFTS)
    assert table[table.kind == DEFAULT].difference.item() == 0
    ax = draw.shift_costs(plt.figure().gca(), table)
    assert len(ax.get_yticklabels()) == 1 + len(INPUT_SHIFTS)
    assert table[table.kind == DEFAULT].share.item() == 0 and set(table.share) == {0, 0.5, 1}


# --- Proposition 3 --------------------------------------------------------------------------------


def test_the_objective_is_summed_over_tasks(experiment):
    problem, flat, expected = experiment.problem, experiment.problem.vectors.base, 0.0
    for task, batches in enumerate(problem.batches):
        expert = problem.vectors.expert(problem.vectors.tasks[task])
        for batch in batches:
            p, q = problem.logits(expert, task, batch), problem.logits(flat, task, batch)
            expected += DIVERGENCES["js"](p, q).mean().item() / len(batches)
    assert divergence_sum(problem, flat) == pytest.approx(expected, rel=1e-5)


def test_proposition_3_holds_and_half_its_bound_too(experiment):
    """JS lies in [0, log 2], so that its mean changes by no more than log 2 per task."""
    others = {0: experiment.problem.batches}
    table = proposition3({0: experiment}, others, inputs=8, steps=2)
    assert len(table) == 2 * len(INPUT_SHIFTS)
    assert (table.bound == 2 * math.log(2) * 2).all()
    assert (table.apart <= table.bound / 2).all()
    assert table.apart.tolist() == (table.right - table.wrong).abs().tolist()
    assert draw.proposition3(plt.figure().gca(), table).get_xscale() == "log"
