"""Both suites by name: identifiers, toy models made here, experiments, and their figures."""

import os
from pathlib import Path

import pytest
from divmerge_book.data import downloads
from divmerge_book.figures.published import by_task, scale_curve
from divmerge_book.published import glue, suites, t5
from divmerge_book.published.leaderboard_summary import measured, published, sweep
from divmerge_book.published.suites import published as paths_of
from divmerge_book.user_models import merge_and_score
from matplotlib.figure import Figure

FEW = {"merge": 8, "validation": 10, "test": 20}


@pytest.mark.parametrize("suite", suites.TASKS)
def test_a_suite_runs_from_its_name_to_a_table(suite, cache, tmp_path, monkeypatch):
    two = {name: tasks[:2] for name, tasks in suites.TASKS.items()}
    monkeypatch.setitem(suites.TOYS, "test", (two, 2))
    monkeypatch.delenv("DIVMERGE_GLUE_DIR", raising=False)
    paths = suites.toy_suite(suite, tmp_path / "made", size="test")
    bench = suites.prepare_published(paths, tmp_path / "suite", rows=FEW, progress=False)
    assert bench.problem.vectors.tasks == tuple(paths.experts)
    found = merge_and_score(bench, ["average"], budget=1, suite=suite, progress=False)
    assert set(found.report.rows.suite) == {suite} == {found.report.provenance["suite"]}
    table = measured(found.report)
    assert table.shape == (3, 2) and table.notna().all(axis=None)
    assert "DIVMERGE_GLUE_DIR" not in os.environ
    downloads.verify.cache_clear()


def test_published_identifiers_are_the_defaults_and_others_may_replace_them():
    own = paths_of(glue.SUITE)
    assert own.base == "openai-community/gpt2" and own.experts["rte"] == "tanganke/gpt2_rte"
    assert list(own.experts) == list(suites.TASKS[glue.SUITE]) and not own.data
    named = {"base": "b", "experts": ["e1", "e2"], "data": ["d1", "d2"]}
    other = paths_of(t5.SUITE, ["imdb", "squad"], **named)
    assert (other.base, other.sources["squad"].expert) == ("b", "e2")
    assert other.table().loc["squad", "data"] == "d2"
    assert other.table().loc["squad", "reads"] == "question: {question}  context: {context}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paths_of("clip"), "'clip'; choose one of: gpt2_glue, t5_generation"),
        (lambda: suites.toy_suite("clip", Path("made")), "unknown published suite"),
        (lambda: suites.toy_suite(t5.SUITE, Path("made"), size="huge"), "one of: smoke, default"),
        (lambda: paths_of(t5.SUITE, ["imdb", "squad"], experts=["one"]), "experts must be 2 for"),
        (lambda: paths_of(glue.SUITE, ["cola", "rte"], data=["a", "b"]), "data must be 1 for"),
        (lambda: paths_of(glue.SUITE, ["imdb", "squad"]), "two or more distinct tasks of cola"),
        (lambda: glue.describe(Path("made"), ["cola", "cola"]), "two or more distinct tasks"),
        (lambda: paths_of(t5.SUITE, ["imdb"]), "two or more distinct tasks of imdb, qasc"),
        (lambda: paths_of(t5.SUITE, ["imdb", "wmt"]), "two or more distinct tasks of imdb, qasc"),
    ],
)
def test_unknown_suites_tasks_and_lists_of_another_length_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_memory_is_that_of_all_copies():
    found = suites.memory()
    sizes = found["parameters"] * (found["experts"] + 3) * 4 / 1e9
    assert list(sizes) == pytest.approx(list(found["GB in float32"]))
    assert 124e6 < found.loc[glue.SUITE, "parameters"] < 125e6  # GPT-2's name is 124M
    assert 222e6 < found.loc[t5.SUITE, "parameters"] < 223e6  # and T5-base's 220M


def test_figures_draw_published_and_measured_tables_alike():
    axes = Figure().subplots(1, 2)
    one = by_task(axes[0], published())
    assert [text.get_text() for text in one.get_yticklabels()] == list(published().columns)
    assert len(one.lines) == len(published()) and "accuracy" in one.get_xlabel()
    two = scale_curve(axes[1], sweep(), "RTE")
    assert len(two.lines) == 4 and two.get_title() and two.get_xlabel() and two.get_ylabel()
