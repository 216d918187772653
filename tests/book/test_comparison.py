"""Comparisons: every method on the same rows, resumable, with a search that sees no test row."""

import math
from dataclasses import replace

import pandas as pd
import pytest
from divmerge_book.evaluation import benchmark, cache, experiment, hyperparameter_search
from divmerge_book.evaluation.benchmark import ALL_METHODS, compare, every_method
from divmerge_book.evaluation.experiment import SIZES
from divmerge_book.evaluation.hyperparameter_search import candidates
from divmerge_book.figures.baselines import big_table, summary
from divmerge_book.models import finetuning
from helpers import linear_problem

from divmerge_core.merging.problem import Diverged
from divmerge_core.methods import METHODS, parse

PROBLEM = linear_problem()
QUICK = ("average", "ties", "divmerge/block")


@pytest.fixture
def fresh(toys, shared_cache, tmp_path, monkeypatch):
    """The toy suite with its experts in a cache that holds no result yet."""
    for kind in ("experts", "tasks"):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / kind).symlink_to(shared_cache / kind, target_is_directory=True)
    monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The methods that were really run, in order."""
    names, run = [], hyperparameter_search.run_method

    def counted(experiment, spec, *rest, **options):
        names.append(spec)
        return run(experiment, spec, *rest, **options)

    monkeypatch.setattr(hyperparameter_search, "run_method", counted)
    return names


def toy_size(monkeypatch, **changes) -> None:
    monkeypatch.setitem(SIZES, "toy", replace(SIZES["toy"], **changes))


# --- what comes out -------------------------------------------------------------------------------


def test_every_method_answers_the_same_rows(fresh, monkeypatch):
    toy_size(monkeypatch, merge_rows=8)
    report = compare("toy", size="toy")
    assert set(report.rows.method) == {"expert", "base", *ALL_METHODS}
    assert set(report.rows.subset) == {"mood+place"}
    for _, rows in report.rows.groupby("task"):
        assert rows.gold.map(tuple).nunique() == 1 and len(rows) == 2 + len(ALL_METHODS)
    table = report.intervals(draws=50).set_index("method")
    assert table.value["expert"] == 1 and table.value.notna().all()


def test_fits_tell_their_course_and_their_coefficients(fresh):
    report = compare("toy", size="toy", methods=["ties", "divmerge/block"], points=2)
    ties, fit = report.fits
    assert ties["options"] == {"scale": 1.0} and "losses" not in ties
    assert fit["options"]["grouping"] == "block"
    assert fit["tasks"] == ["mood", "place"]
    assert len(fit["coefficients"]) == 2
    assert [len(row) for row in fit["coefficients"]] == [len(fit["groups"])] * 2
    assert fit["groups"][0] == "embeddings" and "encoder.layer.1" in fit["groups"]
    assert all(math.isfinite(loss) for loss in fit["losses"])
    assert fit["course"][0]["step"] == 0
    assert fit["course"][-1]["step"] == len(fit["losses"])
    assert all(point["anp"] > 0 for point in fit["course"])


def test_subsets_are_merged_beside_the_whole(fresh, monkeypatch):
    report = compare("toy", size="toy", methods=["average"], subsets=[["place", "mood"]])
    assert list(report.rows.subset.unique()) == ["place+mood", "mood+place"]
    table = report.intervals(draws=20).set_index(["subset", "method"]).value
    assert table["place+mood", "average"] == pytest.approx(table["mood+place", "average"])


def test_a_subset_that_names_all_tasks_in_order_is_the_whole(fresh):
    subsets = [["mood", "place"], ["mood", "place"]]
    report = compare("toy", size="toy", methods=["average"], subsets=subsets)
    assert list(report.rows.subset.unique()) == ["mood+place"]
    assert not report.rows.duplicated(["subset", "method", "seed", "task"]).any()
    assert len(report.intervals(draws=20)) == 3


def test_a_device_chosen_by_itself_is_resolved_before_work_starts(fresh):
    report = compare("toy", size="toy", methods=["average"], device="auto")
    assert report.provenance["device"] and "auto" not in report.provenance["device"]


def test_provenance_says_what_was_compared_on_what(fresh, toys):
    facts = compare("toy", size="toy", methods=["average"]).provenance
    assert facts["suite"] == "toy" and facts["size"] == "toy" and facts["seeds"] == [0]
    assert facts["precision"] == "float32"
    assert {task: one["lr"] for task, one in facts["recipe"].items()} == {
        "mood": 1e-2,
        "place": 1e-2,
    }
    assert set(facts["rows_per_task"]) == {"merge", "validation", "test"}


def test_every_seed_has_experts_of_its_own(fresh):
    report = compare("toy", size="toy", methods=["average"], seeds=[0, 1])
    assert sorted(report.rows.seed.unique()) == [0, 1]
    one, other = (
        experiment.prepare("toy", size="toy", seed=seed).problem.vectors for seed in (0, 1)
    )
    assert one.base.equal(other.base)
    assert not any(a.equal(b) for a, b in zip(one.deltas, other.deltas, strict=True))


def test_a_method_without_its_grouping_takes_its_own(fresh):
    fit = compare("toy", size="toy", methods=["divmerge"], epochs=1).fits[0]
    assert fit["groups"] == ["model"]


# --- resumed, not repeated ------------------------------------------------------------------------


def forbid(*args, **options):
    pytest.fail("finished work is repeated")


def test_a_second_comparison_runs_nothing(fresh, monkeypatch):
    toy_size(monkeypatch, merge_rows=8)
    first = compare("toy", size="toy", methods=QUICK)
    monkeypatch.setattr(hyperparameter_search, "run_method", forbid)
    monkeypatch.setattr(finetuning, "train", forbid)
    second = compare("toy", size="toy", methods=QUICK)
    pd.testing.assert_frame_equal(first.rows, second.rows)
    assert first.fits == second.fits


def test_an_interrupted_comparison_goes_on_where_it_stopped(fresh, monkeypatch):
    toy_size(monkeypatch, merge_rows=8)
    run, done = hyperparameter_search.run_method, []

    def interrupted(experiment, spec, *rest, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(spec)
        return run(experiment, spec, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hyperparameter_search, "run_method", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare("toy", size="toy", methods=QUICK)
    assert done == ["average", "ties"]
    done.clear()
    monkeypatch.setattr(hyperparameter_search, "run_method", interrupted)
    compare("toy", size="toy", methods=QUICK)
    assert done == ["divmerge/block"]
    assert not list(fresh.glob("cells/.*"))  # neither a lock nor a part


@pytest.mark.parametrize(
    "changed",
    [{"epochs": 1}, {"lr": 0.5}, {"divergence": "kl"}, {"init": 0.4}, {"inputs": 4}],
    ids=str,
)
def test_other_options_are_other_results(fresh, ran, monkeypatch, changed):
    toy_size(monkeypatch, merge_rows=8)
    compare("toy", size="toy", methods=["divmerge/task"])
    report = compare("toy", size="toy", methods=["divmerge/task"], **changed)
    assert len(ran) == 2
    assert report.fits[0]["options"].items() >= changed.items()


def test_other_code_is_another_result(fresh, ran, monkeypatch):
    compare("toy", size="toy", methods=["average"])
    monkeypatch.setattr(cache, "code_digest", lambda *things, **options: "changed")
    compare("toy", size="toy", methods=["average"])
    assert ran == ["average", "average"]


# --- the search -----------------------------------------------------------------------------------


def test_one_candidate_is_the_published_one():
    options = candidates("task_arithmetic", replace(SIZES["smoke"], candidates=1), 0, {}, PROBLEM)
    assert options == [{"scale": 0.3}]


def test_candidates_are_the_registered_options_with_the_fits_own():
    size = replace(SIZES["smoke"], candidates=2, epochs=3)
    options = candidates("divmerge/block", size, 5, {"lr": 0.1}, PROBLEM)
    assert [option.get("init") for option in options] == [None, 0.5]
    for option in options:
        assert option["grouping"] == "block" and option["seed"] == 5
        assert option["epochs"] == 3 and option["lr"] == 0.1


@pytest.mark.parametrize("name", METHODS)
def test_no_method_tries_more_candidates_than_another(name):
    """All have six; none where there is nothing to choose, one where the method searches itself."""
    facts, found = METHODS.facts[name], candidates(name, SIZES["full"], 0, {}, PROBLEM)
    itself = facts["needs"] == "a validation score"
    assert len(found) == (1 if itself or not facts["search"] else 6)


def test_an_override_makes_equal_candidates_one():
    size = replace(SIZES["smoke"], candidates=None)
    assert len(candidates("divmerge/task", size, 0, {"init": 0.2, "lr": 0.1}, PROBLEM)) == 1


def test_options_go_to_the_methods_that_take_them():
    assert candidates("average", SIZES["smoke"], 0, {"lr": 0.1}, PROBLEM) == [{}]


@pytest.fixture
def scored(fresh, ran, monkeypatch) -> list[str]:
    """A search over three thresholds of consensus, whose scores are fixed; the merges that ran."""
    toy_size(monkeypatch, candidates=3)
    options = ({"threshold": 0.4}, {"threshold": 0.2}, {"threshold": 0.3})
    monkeypatch.setitem(METHODS.facts["consensus"], "search", options)
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(hyperparameter_search, "validation_anp", lambda bench, merged: next(scores))
    return ran


def test_the_best_candidate_on_validation_rows_is_the_one_that_is_tested(scored):
    report = compare("toy", size="toy", methods=["consensus"])
    assert len(scored) == 3  # the best merge is kept, not made again
    (fit,) = report.fits
    assert fit["options"] == {"threshold": 0.2}
    assert fit["search"] == [
        {"options": {"threshold": value}, "score": score}
        for value, score in ((0.4, 0.5), (0.2, 0.9), (0.3, 0.7))
    ]


def test_the_published_options_stand_beside_those_found(scored):
    report = compare("toy", size="toy", methods=["consensus"], published=True)
    assert len(scored) == 3  # neither merge is made again
    options = {fit["method"]: fit["options"] for fit in report.fits}
    assert options["consensus:published"] == {"threshold": 0.4}
    assert set(report.rows.method) == {"expert", "base", *options}


def test_another_scale_of_the_same_change_takes_no_second_merge(fresh, ran, monkeypatch):
    toy_size(monkeypatch, candidates=6)
    report = compare("toy", size="toy", methods=["breadcrumbs"], published=True)
    removed = {fit.get("remove") for fit in METHODS.facts["breadcrumbs"]["search"]}
    assert len(ran) == len(removed) < 6
    by_hand = {fit["method"]: fit["options"] for fit in report.fits}
    found = experiment.prepare("toy", size="toy")
    for method, options in by_hand.items():
        merged = METHODS["breadcrumbs"](found.problem, **options)
        rows = hyperparameter_search.evaluate(found.problem, merged, found.test)
        assert list(rows.predicted) == list(report.rows[report.rows.method == method].predicted)


def test_nothing_to_find_is_reported_once(fresh):
    report = compare("toy", size="toy", methods=["average"], published=True)
    assert set(report.rows.method) == {"expert", "base", "average"}


def test_the_budget_is_the_number_of_candidates(fresh, ran):
    report = compare("toy", size="toy", methods=["ties", "divmerge/task"], budget=2, epochs=1)
    assert [len(fit["search"]) for fit in report.fits] == [2, 2]
    assert report.provenance["budget"] == 2
    with pytest.raises(ValueError, match="budget must be 1 candidate or more, got 0"):
        compare("toy", size="toy", budget=0)


def test_only_a_fit_that_diverged_is_a_candidate_without_a_score(fresh, monkeypatch):
    """A mistake in a method's code, or in a call of it, stops the search."""
    found, tried = experiment.prepare("toy", size="toy"), [{"scale": 0.3}, {"scale": 0.5}]

    def raising(error):
        def run(experiment, spec, options, points=0):
            raise error

        return run

    monkeypatch.setattr(hyperparameter_search, "run_method", raising(TypeError("no such option")))
    with pytest.raises(TypeError, match="no such option"):
        hyperparameter_search.search(hyperparameter_search.Merges(found, "ties"), tried)
    assert not list(fresh.glob("cells/*/cell.json")), "nothing is kept of it"
    monkeypatch.setattr(hyperparameter_search, "run_method", raising(Diverged("ran off")))
    with pytest.raises(Diverged, match="ties: every candidate diverged; the first: ran off"):
        hyperparameter_search.search(hyperparameter_search.Merges(found, "ties"), tried)


def test_the_search_sees_no_test_row(fresh):
    found = experiment.prepare("toy", size="toy")
    tried = candidates("ties", replace(SIZES["toy"], candidates=2), 0, {}, PROBLEM)
    assert len(tried) == 2
    seeing = hyperparameter_search.search(hyperparameter_search.Merges(found, "ties"), tried)
    for path in fresh.glob("cells/*.json"):
        path.unlink()
    assert (
        hyperparameter_search.search(
            hyperparameter_search.Merges(replace(found, test=[]), "ties"), tried
        ).records
        == seeing.records
    )


def test_the_first_seeds_choice_serves_every_seed(fresh, monkeypatch):
    toy_size(monkeypatch, candidates=2)
    searched, find = [], benchmark.search

    def counted(merges, tried):
        searched.append(merges.spec)
        return find(merges, tried)

    monkeypatch.setattr(benchmark, "search", counted)
    report = compare("toy", size="toy", methods=["ties", "divmerge/task"], seeds=[0, 1], epochs=1)
    assert searched == ["ties", "divmerge/task"]
    by_seed = {(fit["method"], fit["seed"]): fit["options"] for fit in report.fits}
    assert by_seed["ties", 0] == by_seed["ties", 1]
    assert by_seed["divmerge/task", 1] == {**by_seed["divmerge/task", 0], "seed": 1}


def test_a_candidate_that_diverges_is_recorded_and_not_chosen(fresh, monkeypatch):
    toy_size(monkeypatch, candidates=2)
    run = hyperparameter_search.run_method

    def fragile(experiment, spec, options, *rest):
        if options["scale"] == 0.3:
            raise Diverged("task_arithmetic: NaN at step 7")
        return run(experiment, spec, options, *rest)

    monkeypatch.setattr(hyperparameter_search, "run_method", fragile)
    report = compare("toy", size="toy", methods=["task_arithmetic"], published=True)
    (fit,) = report.fits  # the published options gave nothing that could be reported
    assert fit["options"] == {"scale": 0.2}
    assert fit["search"][0]["error"] == "task_arithmetic: NaN at step 7"


def test_a_method_whose_candidates_all_diverge_stops_with_the_cause(fresh, monkeypatch):
    toy_size(monkeypatch, candidates=2)

    def fragile(*rest):
        raise Diverged("NaN at step 7")

    monkeypatch.setattr(hyperparameter_search, "run_method", fragile)
    with pytest.raises(Diverged, match="ties: every candidate diverged; the first: NaN at step 7"):
        compare("toy", size="toy", methods=["ties"])


def test_a_fit_that_runs_off_names_the_method_its_options_and_the_step(fresh):
    with pytest.raises(Diverged, match=r"divmerge/task with .*'lr': 5000.* at step \d"):
        compare("toy", size="toy", methods=["divmerge/task"], lr=5000.0)


# --- what a merge needs and costs -----------------------------------------------------------------


def test_a_new_method_is_compared_and_tabled_by_itself(fresh, monkeypatch):
    """One function and its facts: it is among all methods, searched, and a row of the table."""

    def halfway(problem, *, share: float = 0.5):
        return problem.vectors.merge([share] * len(problem.vectors.tasks))

    facts = {"needs": "nothing", "cost": "weights", "symmetric": True}
    facts["search"] = ({"share": 0.5}, {"share": 0.4})
    monkeypatch.setitem(METHODS, "halfway", halfway)
    monkeypatch.setitem(METHODS.facts, "halfway", facts)
    assert "halfway" in every_method()
    report = compare("toy", size="toy", methods=["average", "halfway"], budget=6, published=True)
    table = big_table(summary(report, "mood+place"))
    assert table.loc[("no data", "halfway"), "tried"] == "2"


def test_a_method_of_exactly_two_experts_is_left_out_of_larger_subsets(fresh, monkeypatch):
    assert benchmark.takes("slerp", 2) and not benchmark.takes("slerp", 3)
    with pytest.raises(ValueError, match=r"slerp merges exactly 2 experts, here are \[8\]"):
        compare("embedded", methods=["average", "slerp"])
    report = compare("toy", size="toy", methods=["slerp"])
    assert set(report.rows.method) == {"expert", "base", "slerp"}


def test_a_method_that_needs_a_second_base_says_so():
    with pytest.raises(ValueError, match="logits_fusion needs a second, larger base"):
        compare("embedded", methods=["logits_fusion"])


def test_costs_stand_beside_the_answers(fresh, monkeypatch):
    toy_size(monkeypatch, calls=8)
    methods = ["average", "divmerge/task", "emr", "evolved_coefficients", "fisher"]
    report = compare("toy", size="toy", methods=methods, inputs=4, epochs=1)
    cost = {fit["method"]: fit["cost"] for fit in report.fits}
    size = experiment.prepare("toy", size="toy").problem.vectors.base.nbytes
    assert cost["average"]["stored_bytes"] == size
    assert cost["emr"]["stored_bytes"] > 2 * size
    assert cost["average"]["inputs"] == 0 == cost["divmerge/task"]["calls"]
    assert cost["divmerge/task"]["inputs"] == cost["fisher"]["inputs"] == 2 * 4
    assert (
        0 < cost["evolved_coefficients"]["calls"] <= SIZES["toy"].calls + 6
    )  # the start, and a step
    assert all(c["seconds"] >= 0 and c["answer_ms"] > 0 for c in cost.values())
    assert all(c["peak_bytes"] > 0 for c in cost.values())


def test_a_predictors_answers_are_not_counted_as_its_inputs(fresh):
    found = experiment.prepare("toy", size="toy")
    made = hyperparameter_search.run_method(found, "emr", {})
    for task, exam in enumerate(found.test):
        made.merged.logits(task, exam.batches[0])
    assert made.cost["inputs"] == 0


# --- the packaged model and texts -----------------------------------------------------------------


def test_real_experts_are_compared_from_one_call(real, monkeypatch):
    """BERT-tiny on questions and film reviews, at the size of a smoke run."""
    methods = ["average", "divmerge/task"]
    report = compare("embedded", ["trec", "movie"], size="smoke", methods=methods)
    assert list(report.rows.method.unique()) == ["expert", "base", *methods]
    assert {len(answers) for answers in report.rows.predicted} == {100}
    exact = report.metrics().query("metric == 'accuracy'").set_index(["method", "task"]).value
    assert exact["expert", "trec"] > report.majority()["embedded", "trec"] + 0.1
    assert exact["expert", "trec"] > exact["base", "trec"]

    # An expert is base + task vector: its accuracy comes back from the merge's own forward pass.
    found = experiment.prepare("embedded", ["trec", "movie"], size="smoke")
    vectors = found.problem.vectors
    for number, task in enumerate(vectors.tasks):
        merged = vectors.base + 1.0 * vectors.deltas[number]
        rows = benchmark.evaluate(found.problem, merged, found.test)
        right = [p == g for p, g in zip(rows.predicted[number], rows.gold[number], strict=True)]
        assert sum(right) / 100 == pytest.approx(exact["expert", task])

    monkeypatch.setattr(hyperparameter_search, "run_method", forbid)
    monkeypatch.setattr(finetuning, "train", forbid)
    again = compare("embedded", ["trec", "movie"], size="smoke", methods=methods)
    pd.testing.assert_frame_equal(report.rows, again.rows)


def test_the_names_of_all_methods_can_be_parsed():
    assert {parse(spec)[0] for spec in ALL_METHODS} <= set(benchmark.METHODS)
