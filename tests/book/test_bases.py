"""The study of bases and objectives: its plan, its merges, and what it says of them."""

from itertools import product

import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.findings import bases as find
from divmerge_book.studies import ideas
from divmerge_book.studies.bases import COLUMNS, ablation, merge, planned
from divmerge_book.studies.predictions import SCORES, compared, split

from divmerge_core.divergences import js
from divmerge_core.methods import METHODS

CONFIG = {"inputs": 8, "epochs": 1, "optimizer": "annealed_adam"}


def test_the_plan_varies_basis_and_objective_and_repeats_no_job():
    jobs = planned(("raw", "tsv", "tsv:3"), ("task",), (2, 8))
    found = [(job["method"], job["tasks"], job["grouping"]) for job in jobs]
    wanted = {(f"{o}={b}", 8, "layer") for o, b in product(("none", "js"), ("raw", "tsv", "tsv:3"))}
    wanted |= {(f"entropy={b}", 8, "layer") for b in ("raw", "tsv:3")}
    wanted |= {(f"js={b}", 2, "layer") for b in ("raw", "tsv:3")}
    wanted |= {(f"js={b}", 8, "task") for b in ("raw", "tsv:3")}
    assert len(found) == len(wanted) and set(found) == wanted


def test_no_objective_on_task_vectors_is_the_average(experiment):
    found = merge(experiment, "none=raw", 0, "layer", 0.1, CONFIG)
    average = METHODS["average"](experiment.problem)
    assert (found - average).abs().max() < 1e-6


def test_every_job_is_scored_at_its_best_step_size(experiment):
    jobs, rates = planned(("raw", "tsv:3"), (), (2,)), (0.1, 0.01)
    rows = ablation({0: experiment}, jobs, rates=rates, config=CONFIG)
    merged = rows[rows.method != "expert"]
    assert set(merged.method) == {job["method"] for job in jobs}
    fitted = ~merged.method.str.startswith("none=")
    assert set(merged[fitted].lr) <= set(rates) and (merged[~fitted].lr == 0).all()
    table = compared(rows, by=["tasks", "grouping"], against="js=tsv:3", draws=100)
    table = split(table, COLUMNS)
    assert set(table.objective) == {"none", "js", "entropy"}
    said = find.parts(table, "this run")
    assert "over the objective alone" in said and "points of kept margin" in said


def test_sentences_have_the_sign_of_a_gain():
    columns = {name: 0.0 for names in SCORES.values() for name in names}
    rows = [
        columns | {"objective": o, "basis": b, "tasks": 8, "grouping": "layer", **values}
        for o, b, values in (
            ("js", "tsv:3", {"anp": 0.9, "kept_margin": 0.6}),
            ("js", "raw", {"anp": 0.8, "difference": -0.1, "from_low": -0.2, "from_high": -0.05}),
        )
    ]
    table = pd.DataFrame(rows)
    said = find.parts(table, "the stored run")
    assert "over the objective alone (DivMerge): +10.0 points of ANP (+5.0 to +20.0)" in said
    assert "T = 8: +10.0 points of ANP (+5.0 to +20.0), +0.0" in find.over_tasks(table, "this run")
    other = find.best(table.replace("tsv:3", "tsv:5"), "this run")  # a basis of a reader's own
    assert other.startswith("Of 2 bases fitted by JS in this run, by ANP TSV directions, 5 bands")


def test_the_preset_is_the_basis_with_the_objective(experiment):
    options = {"inputs": 8, "epochs": 1, "progress": False}
    ours = METHODS["divmerge+"](experiment.problem, **options)
    plain = {"basis": "tsv:3", "grouping": "layer", "optimizer": "annealed_adam", "lr": 0.2}
    assert ours.equal(METHODS["divmerge"](experiment.problem, **plain, **options))


def test_the_summary_has_gains_by_number_of_tasks_and_what_is_held():
    rows = [
        {"objective": o, "basis": b, "tasks": n, "grouping": "layer", "anp": a, "difference": d}
        for o, b, n, a, d in (("js", "tsv:3", 8, 0.9, 0.0), ("js", "raw", 8, 0.8, -0.1))
    ]
    table = pd.DataFrame(rows).assign(from_low=-0.2, from_high=-0.05)
    held = pd.DataFrame({"task vectors": [8.0], "TSV directions": [2.5]}, index=[8])
    gains, parts, memory = find.summary(table, held, "the stored run")
    assert gains.endswith(", T = 8: +10.0 points of ANP (+5.0 to +20.0).")
    assert parts == "At T = 8 DivMerge+ has 90.0 % ANP; raw task vectors fitted by JS 80.0 %."
    assert memory.endswith("experts: task vectors 8.00 N, TSV directions 2.50 N.")


# --- fits beside ProDistill's ---------------------------------------------------------------------
@torch.no_grad()
def test_a_fit_from_a_merge_keeps_the_experts_and_changes_the_base(experiment):
    problem = experiment.problem
    average, found = METHODS["average"](problem), []
    again = ideas.started_at(problem, average)
    assert torch.equal(again.vectors.base, average)
    assert again.vectors.deltas is problem.vectors.deltas
    pairs = zip(problem.vectors.tasks, again.batches, strict=True)
    for number, (task, batches) in enumerate(pairs):
        wanted = [problem.logits(problem.vectors.expert(task), number, b) for b in batches]
        assert all(torch.equal(w, b.expert) for w, b in zip(wanted, batches, strict=True))
        merged = [problem.logits(average, number, batch) for batch in batches]
        found.append(js(torch.cat(wanted), torch.cat(merged)).mean().item())
    said = ideas.distance(problem, average, problem.batches)
    assert said == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_every_fit_is_scored_beside_prodistill(experiment):
    table = ideas.ideas({0: experiment}, inputs=8, epochs=1)
    then = {name for name, *_ in ideas.THEN.values()}
    assert set(table.method) == {*ideas.FITS, *then, "expert"}
    facts = {"suite": "toy", "encoder": "toy", "tasks": ["a"], "size": "smoke", "seeds": [0]}
    facts |= {"rows": 8, "device": "cpu", "machine": "one", "torch": "2", "date": "today"}
    scores = compared(table, by=[], against=ideas.peer, draws=50)
    more = scores.set_index("method").anp
    gap = scores.set_index("method").loc[ideas.MORE, SCORES["anp"][3]]
    assert gap == pytest.approx(more[ideas.MORE] - more[f"prodistill, {ideas.MORE}"])
    scores.loc[scores.method == "five bands", ["from_low", "kept_from_low"]] = [0.01, -0.01]
    scores.loc[scores.method != "five bands", ["from_low", "kept_from_low"]] = -0.01
    said = find.fits(ResultTable({"answers": table}, facts, "this run"), scores)
    assert said.count("\n| ") == 12 and "above 0: by ANP, five bands; by kept margin, none." in said
    nats = table.set_index("method").read
    assert f"{nats['divmerge+'] / nats['prodistill']:.2f} times as far" in said
