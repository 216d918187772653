"""Bytes, time and proxy tuning: every method's row, and fusion with a single expert."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import transformers
from divmerge_book.evaluation.experiment import prepare
from divmerge_book.studies import inference_cost as module
from helpers import linear_problem

QUICK = {
    "divmerge/layer": {"epochs": 1, "inputs": 4},
    "esm_pp": {"inputs": 4, "rank": 2},
    **{"surgery": {"steps": 2}, "wemoe": {"steps": 1}, "twin": {"steps": 2}},
    "layer_evolution": {"steps": 1},
}


@pytest.fixture
def experiment(fresh):
    return prepare("toy", size="toy")


def test_every_method_has_its_cost_and_needs_what_its_routing_says(experiment, monkeypatch):
    """All tasks share one encoder input here: models that need the task's number differ by it."""
    models, make = {}, module.merged_of

    def kept(experiment, spec, options):
        return models.setdefault(spec, make(experiment, spec, options))

    monkeypatch.setattr(module, "merged_of", kept)
    table = module.inference_cost(experiment, options=QUICK, repeats=1, rows=2)
    rows, problem = table.set_index("method"), experiment.problem
    assert list(table.method) == list(module.SERVED)
    assert rows.models["average"] == rows.models["divmerge/layer"] == 1
    assert rows.models["expert"] == 2 and rows.anp["expert"] == 1
    assert (rows.bytes >= problem.vectors.base.nbytes).all()
    assert (rows.milliseconds > 0).all() and (rows.slower > 0).all()
    assert (rows.finds == "one").sum() == 3 and set(rows.finds) == {"one", "input", "task"}
    assert rows.options["surgery"] == "steps 2"
    batch = problem.batches[0][0]
    alike = replace(problem, forward=lambda flat, pairs: problem.forward(flat, [(0, batch)]))
    for spec, merged in models.items():
        if spec == "dp_mixture" and len(set(merged.numbers)) == 1:
            continue
        model = replace(merged, problem=alike) if hasattr(merged, "problem") else merged
        first, second = (alike.logits_of(model, task, batch) for task in (0, 1))
        same = first.shape == second.shape and bool((first == second).all())
        assert same == (module.ROUTING.get(spec.partition("/")[0], "one") != "task"), spec


def test_a_plain_model_is_as_slow_as_a_plain_model():
    problem = linear_problem()
    pairs = [(task, batches[0]) for task, batches in enumerate(problem.batches)]
    calls = dict.fromkeys("ab", (problem, problem.vectors.base, pairs))
    times = module.milliseconds(calls, repeats=9)
    assert len(times["a"]) == 9 and 0.2 < np.median(times["a"] / times["b"]) < 5


def test_one_small_expert_steering_its_own_base_is_that_expert(experiment):
    table = module.proxy_tuning(experiment, experiment, repeats=1, rows=2)
    rows = table.pivot(index="model", columns="task", values="accuracy")
    for name in ("large expert", "proxy, own", "fused, own"):
        assert list(rows.loc[name]) == pytest.approx(list(rows.loc["small expert"])), name
    assert (table.milliseconds > 0).all()


def test_experiments_with_other_tokens_rows_or_tasks_are_refused(experiment):
    other = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1})
    base = replace(experiment.base, tokenizer=other)
    wrong = {
        "different vocabularies": replace(experiment, base=base),
        "test rows differ|shorter|longer": replace(experiment, test=experiment.validation),
        "same order": experiment.select(["place", "mood"]),
    }
    for message, one in wrong.items():
        with pytest.raises(ValueError, match=message):
            module.check_pair(one, experiment)


def test_the_share_of_the_gap_by_hand():
    rows = [("a", "large base", 0.4), ("a", "fused", 0.6), ("a", "large expert", 0.9)]
    rows += [("b", "large base", 0.6), ("b", "fused", 0.6), ("b", "large expert", 0.7)]
    table = pd.DataFrame(rows, columns=["task", "model", "accuracy"]).assign(milliseconds=1.0)
    found = module.gap_closed(table).closed
    assert found["large base"] == 0 and found["large expert"] == 1
    assert found["fused"] == pytest.approx((0.6 - 0.5) / (0.8 - 0.5))
