"""The published results carry their origin, and what the book promises of them holds."""

import math

import pytest
from divmerge_book import figures
from divmerge_book.evaluation import stored_tables as measured
from divmerge_book.evaluation.benchmark import ALL_METHODS
from divmerge_book.evaluation.report import Report, caption
from divmerge_book.kernel_benchmarks import disk_merges, merge_bandwidth
from divmerge_book.kernel_benchmarks.implementations import IMPLEMENTATIONS
from divmerge_book.kernel_benchmarks.step_time import STEPS
from helpers import RESULTS

from divmerge_core.methods import METHODS, parse

STORED = sorted(RESULTS.glob("*.json"))


@pytest.fixture(scope="module", params=STORED, ids=lambda path: path.stem)
def stored(request) -> Report:
    return Report.load(request.param)


def test_every_published_report_has_three_seeds_of_every_method_on_the_same_tasks(stored):
    cells = stored.rows.groupby(["method", "seed"]).task.agg(tuple)
    assert stored.rows.seed.nunique() >= 3
    assert set(stored.rows.method) == {"expert", "base", *ALL_METHODS}
    assert len(cells) == stored.rows.seed.nunique() * (len(ALL_METHODS) + 2)
    assert cells.nunique() == 1


def test_every_published_report_carries_its_origin_and_no_text(stored):
    assert stored.provenance["size"] == "full"
    for fact in ("encoder", "seeds", "date", "device", "precision", "torch", "rows_per_task"):
        assert stored.provenance[fact]
    assert stored.provenance["date"] in caption(stored)
    answers = [*stored.rows.predicted, *stored.rows.gold]
    assert all(isinstance(number, int) for row in answers for number in row)


def test_every_embedded_expert_beats_the_majority_by_ten_points():
    report = Report.load(RESULTS / "embedded.json")
    scores = report.metrics().query("metric == 'accuracy' and method == 'expert'")
    margin = scores.groupby("task").value.mean() - report.majority()["embedded"]
    assert margin.min() >= 0.10


def test_the_landing_text_is_made_of_the_stored_numbers(tmp_path):
    (tmp_path / "bases").mkdir()
    for path in (*STORED, *(RESULTS / "bases").glob("*_minilm.json")):
        (tmp_path / path.relative_to(RESULTS)).write_bytes(path.read_bytes())
    figures.landing(tmp_path)
    assert (tmp_path / "landing.svg").stat().st_size > 10_000
    written = (RESULTS / "landing.md").read_text("utf-8")
    assert (tmp_path / "landing.md").read_text("utf-8") == written


def test_the_readme_says_what_its_figure_shows():
    text = " ".join((RESULTS.parents[1] / "README.md").read_text("utf-8").split())
    for name in ("bases/embedded_minilm.json", "bases/glue_minilm.json"):
        report = Report.load(RESULTS / name)
        facts, most = report.provenance, figures.largest(report.rows).subset.iloc[0].count("+") + 1
        said = f"uite `{facts['suite']}`, encoder `{facts['encoder']}`, T = {most}, seeds: "
        assert f"{said}{report.rows.seed.nunique()} ([file](book/results/{name}))" in text


# --- all baselines --------------------------------------------------------------------------------

TABLES = sorted((RESULTS / "baselines").glob("*.json"))


@pytest.fixture(scope="module", params=TABLES, ids=lambda path: path.stem)
def table(request) -> Report:
    return Report.load(request.param)


def test_every_table_has_three_seeds_and_two_four_and_all_tasks(table):
    assert table.rows.seed.nunique() >= 3
    sizes = [subset.count("+") + 1 for subset in table.rows.subset.unique()]
    assert sizes[:2] == [2, 4] and sizes[2] == table.rows.task.nunique()
    counts = table.rows.groupby(["subset", "method"]).seed.nunique()
    assert (counts == table.rows.seed.nunique()).all()


def test_every_search_scored_as_many_its_best_is_used_and_costs_are_numbers(table):
    searches = [fit for fit in table.fits if "search" in fit]
    methods = {name for name in table.rows.method if not name.endswith(":published")}
    assert {fit["method"] for fit in searches} == methods - {"expert", "base"}
    for fit in searches:
        facts, records = METHODS.facts[parse(fit["method"])[0]], fit["search"]
        alone = not facts["search"] or facts["needs"] == "a validation score"
        assert len(records) == (1 if alone else table.provenance["budget"]), fit["method"]
        scores = {str(record["options"]): record.get("score", 0) for record in records}
        assert scores[str(fit["options"])] == max(scores.values()), fit["method"]
    for fit in table.fits:
        assert all(math.isfinite(value) and value >= 0 for value in fit["cost"].values())


# --- what merging costs ---------------------------------------------------------------------------

DISK = RESULTS / "kernel" / "from_disk.json"
BASES = RESULTS / "kernel" / "bases.json"
COSTS = sorted(set((RESULTS / "kernel").glob("*.json")) - {DISK, BASES})


@pytest.fixture(scope="module", params=COSTS, ids=lambda path: path.stem)
def costs(request):
    return measured.load(request.param)


def test_published_costs_were_measured_with_every_peer_in_one_run(costs):
    tables, facts = costs
    counts = tables["rows"].groupby(["tasks", "parameters", "contestant", "part"]).size()
    assert set(tables["rows"].contestant) == {"copy", *IMPLEMENTATIONS}
    assert set(counts) == {facts["repeats"]} and facts["repeats"] >= 10
    assert set(tables["steps"].contestant) == set(STEPS)
    for fact in ("model", "dtype", "device", "machine", "threads", "torch", "date", "peers"):
        assert facts[fact], fact
    assert facts["date"] in merge_bandwidth.caption(facts)


def test_a_basis_was_measured_beside_task_vectors_which_move_the_floor():
    tables, facts = measured.load(BASES)
    table = merge_bandwidth.summary(tables["rows"])
    assert sorted(set(table.tasks)) == facts["counts"] == [2, 8, 20] and facts["repeats"] >= 10
    plain = table[table.contestant == "ours"]
    floor = plain.tasks + plain.part.map({"forward": 2, "backward": 1})
    assert list(plain.moved) == pytest.approx(list(floor), rel=0.01)
    assert set(table.contestant) == {"copy", "ours", "tsv:2"} and table.milliseconds.min() > 0


def test_published_costs_count_the_bytes_that_the_formulas_say(costs):
    tables, _ = costs
    keys = ["tasks", "parameters", "contestant", "part"]
    table = merge_bandwidth.summary(tables["rows"]).set_index(keys)
    for (tasks, _, name, part), row in table.iterrows():
        floor = {"forward": tasks + 2, "backward": tasks + 1}[part]
        usual = {"forward": 5 * tasks, "backward": 4 * tasks}[part]
        expected = {"copy": 2, "ours": floor, "dictionary": usual}.get(name)
        if name == "fusion_bench":
            expected = usual * (tasks if part == "backward" else 1)
        if expected is not None:
            assert row.moved == pytest.approx(expected, rel=0.05), (tasks, name, part)


def test_merges_from_disk_were_measured_beside_mergekit_in_one_run():
    """Both commands as often for every method, in turn; how busy the machine was is in the rows."""
    tables, facts = measured.load(DISK)
    rows = tables["rows"]
    assert set(rows.method) == set(disk_merges.METHODS) and set(rows.command) == {*disk_merges.BOTH}
    assert (rows.groupby(["shape", "method", "round"]).command.nunique() == 2).all()
    assert rows.load.notna().all() and facts["peers"]["mergekit"] and facts["machine"]


# --- the analysis ---------------------------------------------------------------------------------

TOPICS = ("choice", "protocol", "scaling", "evidence", "interference")
ANALYSES = sorted(path for topic in TOPICS for path in (RESULTS / topic).glob("*.json"))
# seeds, as the chapters say
FEWER = {"fixed": 1, "planes": 1, "optimisers": 1, "courses": 2}


@pytest.mark.parametrize("path", ANALYSES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_table_of_the_analysis_is_of_size_full_and_carries_its_origin(path):
    tables, facts = measured.load(path)
    assert tables and all(len(table) for table in tables.values())
    assert facts["size"] == "full"
    assert len(facts["seeds"]) >= FEWER.get(path.stem, 3)
    for table in tables.values():
        assert "seed" not in table or set(table.seed) == set(facts["seeds"])
    for fact in ("encoder", "suite", "tasks", "device", "machine", "torch", "date"):
        assert facts[fact], fact
    assert facts["date"] in measured.described(facts)
