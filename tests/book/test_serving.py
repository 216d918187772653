"""Bytes, time, fusion, and the studies that the chapter beyond one vector runs and stores."""

import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import transformers
from divmerge_book.evaluation.experiment import SIZES, prepare
from divmerge_book.evaluation.stored_tables import load, save
from divmerge_book.figures import beyond as draw
from divmerge_book.studies import inference_cost
from divmerge_book.studies import plans as studies
from divmerge_book.studies.continual_merging import forgetting
from divmerge_book.studies.inference_cost import (
    FINDS,
    SERVED,
    check_pair,
    fusion,
    gap_closed,
    latency,
    storage,
)
from divmerge_book.studies.plans import STUDIES, Plan, facts_of, plan, run
from helpers import linear_problem
from test_arrivals import forbid

RESULTS = Path(__file__).resolve().parents[2] / "book" / "results" / "beyond"
QUICK = {
    "divmerge/layer": {"epochs": 1, "inputs": 4},
    "esm_pp": {"inputs": 4, "rank": 2},
    "surgery": {"steps": 2},
    "wemoe": {"steps": 1},
    "twin": {"steps": 2},
    "layer_evolution": {"steps": 1},
}


@pytest.fixture
def fresh(toys, shared_cache, tmp_path, monkeypatch):
    """The toy suite with its experts, in a cache that holds no finished piece."""
    (tmp_path / "cache").mkdir()
    for kind in ("experts", "tasks"):
        (tmp_path / "cache" / kind).symlink_to(shared_cache / kind, target_is_directory=True)
    monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bench(fresh):
    return prepare("toy", size="toy")


# --- storage --------------------------------------------------------------------------------------


def test_every_method_is_weighed_timed_and_scored_once(bench, monkeypatch):
    table = storage(bench, options=QUICK, repeats=1, rows=2)
    rows = table.set_index("method")
    assert list(table.method) == list(SERVED)
    assert rows.models["average"] == rows.models["divmerge/layer"] == 1
    assert rows.models["expert"] == 2 and rows.anp["expert"] == 1
    assert (rows.bytes >= bench.problem.vectors.base.nbytes).all()
    assert (rows.milliseconds > 0).all() and (rows.slower > 0).all()
    assert (rows.finds == "one").sum() == 3 and set(rows.finds) == {"one", "input", "task"}
    assert rows.options["surgery"] == "steps 2"
    monkeypatch.setattr(inference_cost, "made", forbid)
    again = storage(bench, options=QUICK, repeats=1, rows=2)
    pd.testing.assert_frame_equal(again, table)


def test_only_methods_that_find_weights_by_input_give_one_answer_whatever_the_task(bench):
    """All tasks share the encoder's inputs: models that need the task's number differ by it."""
    problem = bench.problem
    batch = problem.batches[0][0]
    alike = replace(
        problem, forward=lambda parameters, pairs: problem.forward(parameters, [(0, batch)])
    )
    for spec in SERVED:
        merged = inference_cost.made(replace(bench, problem=problem), spec, QUICK.get(spec, {}))
        if spec == "dp_mixture" and len(set(merged.numbers)) == 1:
            continue
        model = replace(merged, problem=alike) if hasattr(merged, "problem") else merged
        first, second = (alike.logits_of(model, task, batch) for task in (0, 1))
        same = first.shape == second.shape and bool((first == second).all())
        assert same == (FINDS.get(spec.partition("/")[0], "one") != "task"), spec


def test_a_plain_model_is_as_slow_as_a_plain_model(tiny):
    problem = linear_problem()
    pairs = [(task, batches[0]) for task, batches in enumerate(problem.batches)]
    found = latency(problem, problem.vectors.base, pairs, repeats=9)
    assert 0.2 < found["slower"] < 5


# --- fusion ---------------------------------------------------------------------------------------


def test_one_small_expert_steering_its_own_base_is_that_expert(bench):
    table = fusion(bench, bench, repeats=1, rows=2)
    rows = table.pivot(index="model", columns="task", values="accuracy")
    expert = list(rows.loc["small expert"])
    for name in ("large expert", "proxy, own", "fused, own"):
        assert list(rows.loc[name]) == pytest.approx(expert), name
    assert (table.milliseconds > 0).all()


def test_fused_answers_are_not_worked_out_twice(bench, monkeypatch):
    first = fusion(bench, bench, repeats=1)
    monkeypatch.setattr(inference_cost, "predict", forbid)
    pd.testing.assert_frame_equal(fusion(bench, bench, repeats=1), first)


def test_encoders_that_read_other_tokens_are_refused(bench):
    other = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1})
    strange = replace(bench, base=replace(bench.base, tokenizer=other))
    with pytest.raises(ValueError, match="different vocabularies"):
        check_pair(strange, bench)
    with pytest.raises(ValueError, match="test rows differ|shorter|longer"):
        check_pair(replace(bench, test=bench.validation), bench)
    with pytest.raises(ValueError, match="same order"):
        check_pair(bench, bench.select(["place", "mood"]))


def test_the_share_of_the_gap_by_hand():
    rows = [("a", "large base", 0.4), ("a", "fused", 0.6), ("a", "large expert", 0.9)]
    rows += [("b", "large base", 0.6), ("b", "fused", 0.6), ("b", "large expert", 0.7)]
    table = pd.DataFrame(rows, columns=["task", "model", "accuracy"]).assign(milliseconds=1.0)
    found = gap_closed(table).closed
    assert found["large base"] == 0 and found["large expert"] == 1
    assert found["fused"] == pytest.approx((0.6 - 0.5) / (0.8 - 0.5))


# --- plans and stored tables ----------------------------------------------------------------------


@pytest.fixture
def tiny_plan(fresh, monkeypatch, tiny_folder) -> Plan:
    monkeypatch.setattr(studies, "SMALL", str(tiny_folder))
    monkeypatch.setitem(SIZES, "smoke", replace(SIZES["toy"], recipe=SIZES["toy"].recipe))
    drawn = plan("toy", size="smoke", seeds=[0], encoder=str(tiny_folder))
    return replace(drawn, options=QUICK, calls=5, policy=3, shares=(0.0, 0.5), repeats=1)


DRAWN = {
    "arrivals": [
        draw.arriving,
        lambda ax, table: draw.by_order(ax, forgetting(table), "ratio"),
        lambda ax, table: draw.by_order(ax, forgetting(table), "bwt"),
    ],
    "mixture": [draw.model_counts, draw.worth],
    "pools": [
        lambda ax, table: draw.judged(ax, table, "flip", "auc"),
        lambda ax, table: draw.judged(ax, table, "noise", "anp"),
    ],
    "evolution": [draw.courses, draw.gaps],
    "fusion": [draw.steering],
    "storage": [
        lambda ax, table: draw.priced(ax, table, "models"),
        lambda ax, table: draw.priced(ax, table, "slower"),
    ],
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_gives_a_table_that_is_stored_with_its_origin(name, tiny_plan, tmp_path):
    path = tmp_path / "beyond" / f"{name}.json"
    table = run(name, tiny_plan)["rows"]
    scored = studies.with_margins(name, table, facts_of(name, tiny_plan))
    assert ("kept_margin" in scored) == (name != "evolution")
    for figure in DRAWN[name]:
        ax = figure(plt.figure().gca(), scored)
        ax.figure.canvas.draw()
        assert ax.lines and not any(math.isnan(x) for x in ax.get_xlim())
        plt.close(ax.figure)
    assert len(table) and table.columns.is_unique
    save(path, {"rows": table}, **facts_of(name, tiny_plan))
    (found,), facts = load(path)[0].values(), load(path)[1]
    assert len(found) == len(table) and list(found.columns) == list(table.columns)
    assert facts["study"] == name and facts["tasks"] == ["mood", "place"]
    for fact in ("encoder", "small", "seeds", "date", "torch", "machine", "device"):
        assert facts[fact], fact
    assert facts["date"] in studies.caption(facts)
    json.loads(path.read_text(), parse_constant=forbid)


def test_a_plan_takes_what_is_given_and_the_size_says_the_rest():
    found = plan("embedded", size="full", seeds=[4], orders=2)
    assert (found.seeds, found.orders, found.encoder) == ((4,), 2, SIZES["full"].encoder)
    assert len(found.tasks) == 8 and found.size == "full"
    few = plan("embedded", size="smoke")
    assert len(few.tasks) < 8 and few.encoder == "bert_tiny"
    assert plan("embedded", tasks=["sms", "bbc"]).tasks == ("sms", "bbc")
    with pytest.raises(ValueError, match="merges two or more"):
        plan("embedded", tasks=["sms"])


@pytest.mark.skipif(not RESULTS.is_dir(), reason="nothing is stored yet")
def test_published_studies_carry_their_origin():
    for name in STUDIES:
        tables, facts = load(RESULTS / f"{name}.json")
        assert facts["size"] == "full" and facts["date"] in studies.caption(facts), name
        assert len(tables["rows"])
