"""Inputs of a fit on toy experts: samples of a task's own, and shifted ones."""

from dataclasses import replace

import pytest
import torch
from divmerge_book.studies.input_shifts import INPUT_SHIFTS, mixed, sample_inputs, seeded
from divmerge_book.studies.protocol import divergence_sum


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 16, 10**6])
def test_as_many_inputs_are_sampled_as_asked_or_as_there_are(experiment, count):
    for own in sample_inputs(experiment.problem.batches, count, seeded(0)):
        assert sum(len(batch.weight) for batch in own) == min(count, 16)
        assert all(abs(float(batch.weight.sum()) - 1) < 1e-6 for batch in own)


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
    ends, both = (
        sum(divergence_sum(replace(problem, batches=b), problem.vectors.base) for b in pair)
        for pair in [(own, shifted), (found, rest)]
    )
    assert both == pytest.approx(ends, rel=1e-5)
