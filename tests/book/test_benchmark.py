"""Comparisons: every method on the same rows, resumable, with a search that sees no test row."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from divmerge_book.evaluation import benchmark, experiment, hyperparameter_search
from divmerge_book.evaluation.experiment import SIZES
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.figures.baselines import benchmark_table, summary
from divmerge_book.models import finetuning
from helpers import forbid, linear_problem

from divmerge_core.merging.problem import Diverged
from divmerge_core.methods import METHODS, parse

PROBLEM = linear_problem()
QUICK = ("average", "ties", "divmerge/block")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The methods that were really run, in order."""
    names, run = [], hyperparameter_search.run_method

    def counted(experiment, spec, *rest):
        names.append(spec)
        return run(experiment, spec, *rest)

    monkeypatch.setattr(hyperparameter_search, "run_method", counted)
    return names


def toy_size(monkeypatch, **changes) -> None:
    monkeypatch.setitem(SIZES, "toy", replace(SIZES["toy"], **changes))


def run(*methods: str, **options):
    return benchmark.compare("toy", size="toy", methods=list(methods), **options)


@pytest.fixture(autouse=True)
def few_rows(fresh, monkeypatch):
    toy_size(monkeypatch, merge_rows=8)


def test_every_method_predicts_the_same_rows_and_a_second_comparison_runs_nothing(monkeypatch):
    report = benchmark.compare("toy", size="toy", points=2, device="auto")
    assert set(report.rows.method) == {"expert", "base", *benchmark.ALL_METHODS}
    assert set(report.rows.subset) == {"mood+place"}
    for _, rows in report.rows.groupby("task"):
        assert rows.gold.map(tuple).nunique() == 1 and len(rows) == 2 + len(benchmark.ALL_METHODS)
    table = report.intervals(draws=50).set_index("method")
    assert table.value["expert"] == 1 and table.value.notna().all()

    fits = {fit["method"]: fit for fit in report.fits}
    assert fits["ties"]["options"] == {"scale": 1.0} and "losses" not in fits["ties"]
    fit = fits["divmerge/block"]
    assert fit["options"]["grouping"] == "block" and fit["tasks"] == ["mood", "place"]
    assert [len(row) for row in fit["coefficients"]] == [len(fit["groups"])] * 2
    assert fit["groups"][0] == "embeddings" and "encoder.layer.1" in fit["groups"]
    assert all(math.isfinite(loss) for loss in fit["losses"])
    assert [fit["course"][n]["step"] for n in (0, -1)] == [0, len(fit["losses"])]
    assert all(point["anp"] > 0 for point in fit["course"])

    facts = report.provenance
    assert facts["suite"] == "toy" and facts["size"] == "toy" and facts["seeds"] == [0]
    assert facts["precision"] == "float32" and "auto" not in facts["device"]
    rates = {task: recipe["lr"] for task, recipe in facts["recipe"].items()}
    assert rates == {"mood": 1e-2, "place": 1e-2}
    assert facts["rows_per_task"] == {"merge": 8, "validation": 100, "test": 500}

    monkeypatch.setattr(hyperparameter_search, "run_method", forbid)
    monkeypatch.setattr(finetuning, "train", forbid)
    second = benchmark.compare("toy", size="toy", points=2)
    pd.testing.assert_frame_equal(report.rows, second.rows)
    assert report.fits == second.fits


def test_subsets_are_merged_beside_the_whole_and_each_once():
    subsets = [["place", "mood"], ["mood", "place"], ["mood", "place"]]
    report = run("average", subsets=subsets)
    assert list(report.rows.subset.unique()) == ["place+mood", "mood+place"]
    assert not report.rows.duplicated(["subset", "method", "seed", "task"]).any()
    table = report.intervals(draws=20).set_index(["subset", "method"]).value
    assert table["place+mood", "average"] == pytest.approx(table["mood+place", "average"])


def test_every_seed_has_experts_of_its_own():
    report = run("average", seeds=[0, 1])
    assert sorted(report.rows.seed.unique()) == [0, 1]
    one, other = (experiment.prepare("toy", size="toy", seed=n).problem.vectors for n in (0, 1))
    assert one.base.equal(other.base)
    assert not any(a.equal(b) for a, b in zip(one.deltas, other.deltas, strict=True))


def test_a_method_without_its_grouping_takes_its_own():
    assert run("divmerge", epochs=1).fits[0]["groups"] == ["model"]


def test_an_interrupted_comparison_resumes(fresh, monkeypatch):
    real, done = hyperparameter_search.run_method, []

    def interrupted(experiment, spec, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(spec)
        return real(experiment, spec, *rest)

    monkeypatch.setattr(hyperparameter_search, "run_method", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*QUICK)
    assert done == ["average", "ties"]
    done.clear()
    run(*QUICK)
    assert done == ["divmerge/block"]
    assert not list(fresh.glob("results/.*"))  # neither a lock nor a part


def test_candidates_are_the_registered_options_with_the_fits_own():
    one = replace(SIZES["smoke"], candidates=1)
    assert candidates("task_arithmetic", one, 0, {}, PROBLEM) == [{"scale": 0.3}]  # the published
    assert candidates("average", SIZES["smoke"], 0, {"lr": 0.1}, PROBLEM) == [{}]
    per_step = METHODS.facts["evolved_coefficients"]["calls"](len(PROBLEM.vectors.tasks))
    (searched,) = candidates("evolved_coefficients", replace(one, calls=61), 0, {}, PROBLEM)
    assert searched["steps"] == 61 // per_step
    size = replace(SIZES["smoke"], candidates=2, epochs=3)
    options = candidates("divmerge/block", size, 5, {"lr": 0.1}, PROBLEM)
    assert [option.get("init") for option in options] == [None, 0.5]
    for option in options:
        assert option.items() >= {"grouping": "block", "seed": 5, "epochs": 3, "lr": 0.1}.items()
    every = replace(SIZES["smoke"], candidates=None)  # an override makes equal candidates one
    assert len(candidates("divmerge/task", every, 0, {"init": 0.2, "lr": 0.1}, PROBLEM)) == 1


def test_no_method_tries_more_candidates_than_another():
    """All have six; none where there is nothing to choose, one where the method searches itself."""
    for name in METHODS:
        facts, found = METHODS.facts[name], candidates(name, SIZES["full"], 0, {}, PROBLEM)
        itself = facts["needs"] == "a validation score"
        assert len(found) == (1 if itself or not facts["search"] else 6), name


def test_published_options_that_are_the_best_stand_once(monkeypatch):
    toy_size(monkeypatch, candidates=2)
    scores = iter([0.9, 0.5])
    monkeypatch.setattr(hyperparameter_search, "validation_anp", lambda *_: next(scores))
    report = run("task_arithmetic", published=True)
    assert [fit["method"] for fit in report.fits] == ["task_arithmetic"]
    assert set(report.rows.method) == {"expert", "base", "task_arithmetic"}


def test_the_best_candidate_on_validation_rows_is_tested_beside_the_published_one(ran, monkeypatch):
    """A search over three thresholds of consensus, whose scores are fixed."""
    toy_size(monkeypatch, candidates=3)
    options = ({"threshold": 0.4}, {"threshold": 0.2}, {"threshold": 0.3})
    monkeypatch.setitem(METHODS.facts["consensus"], "search", options)
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(hyperparameter_search, "validation_anp", lambda *_: next(scores))
    report = run("consensus", published=True)
    assert len(ran) == 3  # neither merge is made again
    fits = {fit["method"]: fit for fit in report.fits}
    assert fits["consensus"]["options"] == {"threshold": 0.2}
    assert fits["consensus:published"]["options"] == {"threshold": 0.4}
    assert set(report.rows.method) == {"expert", "base", *fits}
    assert fits["consensus"]["search"] == [
        {"options": {"threshold": value}, "score": score}
        for value, score in ((0.4, 0.5), (0.2, 0.9), (0.3, 0.7))
    ]


def test_another_scale_of_the_same_change_takes_no_second_merge(ran, monkeypatch):
    toy_size(monkeypatch, candidates=6)
    report = run("breadcrumbs", published=True)
    removed = {fit.get("remove") for fit in METHODS.facts["breadcrumbs"]["search"]}
    assert len(ran) == len(removed) < 6
    found = experiment.prepare("toy", size="toy")
    for fit in report.fits:
        merged = METHODS["breadcrumbs"](found.problem, **fit["options"])
        rows = hyperparameter_search.evaluate(found.problem, merged, found.test)
        own = report.rows[report.rows.method == fit["method"]]
        assert list(rows.predicted) == list(own.predicted)


def test_the_budget_is_the_number_of_candidates():
    report = run("ties", "average", budget=2, published=True)
    assert [len(fit["search"]) for fit in report.fits if "search" in fit] == [2, 1]
    assert "average:published" not in set(report.rows.method)  # there is nothing to find
    assert report.provenance["budget"] == 2


def test_the_search_sees_no_test_row(fresh):
    found = experiment.prepare("toy", size="toy")
    tried = candidates("ties", replace(SIZES["toy"], candidates=2), 0, {}, PROBLEM)
    seeing = search(Merges(found, "ties"), tried)
    for path in fresh.glob("results/*.json"):
        path.unlink()
    assert len(tried) == 2
    assert search(Merges(replace(found, test=[]), "ties"), tried).records == seeing.records


def test_the_first_seeds_choice_serves_every_seed(monkeypatch):
    toy_size(monkeypatch, candidates=2)
    searched, find = [], hyperparameter_search.search

    def counted(merges, tried):
        searched.append(merges.spec)
        return find(merges, tried)

    monkeypatch.setattr(hyperparameter_search, "search", counted)
    report = run("ties", "divmerge/task", seeds=[0, 1], epochs=1)
    assert searched == ["ties", "divmerge/task"]
    by_seed = {(fit["method"], fit["seed"]): fit["options"] for fit in report.fits}
    assert by_seed["ties", 0] == by_seed["ties", 1]
    assert by_seed["divmerge/task", 1] == {**by_seed["divmerge/task", 0], "seed": 1}


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_another_scale_of_a_linear_method_is_what_it_makes_itself(linear, ran, name):
    merges = Merges(linear, name)
    _, again = (merges({"scale": scale}).merged for scale in (1.0, 0.4))
    assert ran == [name]
    torch.testing.assert_close(again, METHODS[name](linear.problem, scale=0.4))


def test_only_a_fit_that_diverged_is_a_candidate_without_a_score(fresh, monkeypatch):
    """A candidate that diverges is recorded and not chosen; any other error stops the search."""
    toy_size(monkeypatch, candidates=2)
    real, error = hyperparameter_search.run_method, Diverged("NaN at step 7")

    def fragile(experiment, spec, options, *rest):
        if options["scale"] == 0.3 or spec == "ties":
            raise error
        return real(experiment, spec, options, *rest)

    monkeypatch.setattr(hyperparameter_search, "run_method", fragile)
    (fit,) = run("task_arithmetic", published=True).fits  # the published options gave nothing
    assert fit["options"] == {"scale": 0.2} and fit["search"][0]["error"] == "NaN at step 7"
    with pytest.raises(Diverged, match="ties: every candidate diverged; the first: NaN at step 7"):
        run("ties")
    error, results = TypeError("no such option"), len(list(fresh.glob("results/*.json")))
    found = Merges(experiment.prepare("toy", size="toy", seed=0), "ties")
    with pytest.raises(TypeError, match="no such option"):
        search(found, [{"scale": 0.7}, {"scale": 0.8}])
    assert len(list(fresh.glob("results/*.json"))) == results


def test_a_new_method_is_compared_and_tabled_by_itself(monkeypatch):
    """One function and its facts: it is among all methods, searched, and a row of the table."""

    def halfway(problem, *, share: float = 0.5):
        return problem.vectors.merge([share] * len(problem.vectors.tasks))

    facts = {"needs": "nothing", "cost": "weights", "symmetric": True}
    facts["search"] = ({"share": 0.5}, {"share": 0.4})
    monkeypatch.setitem(METHODS, "halfway", halfway)
    monkeypatch.setitem(METHODS.facts, "halfway", facts)
    assert "halfway" in benchmark.every_method()
    report = run("average", "halfway", budget=6, published=True)
    table = benchmark_table(summary(report, "mood+place"))
    assert table.loc[("no data", "halfway"), "tried"] == "2"


def test_a_method_whose_requirements_a_suite_does_not_meet_is_refused_or_left_out():
    assert benchmark.takes("slerp", 2) and not benchmark.takes("slerp", 3)
    with pytest.raises(ValueError, match=r"slerp merges exactly 2 experts, here are \[8\]"):
        benchmark.compare("embedded", methods=["average", "slerp"])
    assert set(run("slerp").rows.method) == {"expert", "base", "slerp"}
    with pytest.raises(ValueError, match="logits_fusion needs a second, larger base"):
        benchmark.compare("embedded", methods=["logits_fusion"])
    assert {parse(spec)[0] for spec in benchmark.ALL_METHODS} <= set(METHODS)


def test_costs_stand_beside_the_predictions(monkeypatch):
    toy_size(monkeypatch, calls=8)
    methods = ["average", "divmerge/task", "emr", "evolved_coefficients", "fisher"]
    cost = {fit["method"]: fit["cost"] for fit in run(*methods, inputs=4, epochs=1).fits}
    found = experiment.prepare("toy", size="toy")
    size = found.problem.vectors.base.nbytes
    assert cost["average"]["stored_bytes"] == size and cost["emr"]["stored_bytes"] > 2 * size
    assert cost["average"]["inputs"] == 0 == cost["divmerge/task"]["calls"]
    assert cost["divmerge/task"]["inputs"] == cost["fisher"]["inputs"] == 2 * 4
    assert 0 < cost["evolved_coefficients"]["calls"] <= SIZES["toy"].calls + 6  # start and step
    assert all(c["seconds"] >= 0 and c["answer_ms"] > 0 for c in cost.values())
    assert all(c["peak_bytes"] > 0 for c in cost.values())
    made = hyperparameter_search.run_method(found, "emr", {})
    made.merged.logits(0, found.test[0].batches[0])  # predictions are no inputs of the merge
    assert made.cost["inputs"] == 0
