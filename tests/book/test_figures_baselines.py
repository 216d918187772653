"""The table of all methods: what stands in it is what the report holds."""

import pandas as pd
import pytest
from divmerge_book import Report, figures
from divmerge_book.evaluation.benchmark import every_method
from divmerge_book.figures import baselines as draw
from matplotlib.figure import Figure

from divmerge_core.methods import METHODS

RIGHT = {"expert": 10, "base": 4, "average": 5, "ties": 6, "emr": 9, "divmerge/task": 7}
SUBSET = "mood+place"


@pytest.fixture
def report() -> Report:
    """Methods that get known numbers of 10 rows right, and what their merges cost."""
    rows, fits, gold = [], [], [0, 1] * 5
    for seed in (0, 1):
        for method, count in {**RIGHT, "ties:published": 5}.items():
            labels = {"suite": "toy", "subset": SUBSET, "method": method, "seed": seed}
            labels["gold"] = gold
            said = gold[:count] + [1 - answer for answer in gold[count:]]
            rows += [{**labels, "task": task, "predicted": said} for task in SUBSET.split("+")]
            cost = {"seconds": count + seed, "peak_bytes": 1e6, "inputs": 8, "calls": 0}
            cost |= {"stored_bytes": 250 if method == "emr" else 100, "model_bytes": 100}
            fit = {**labels, "options": {}, "cost": {**cost, "answer_ms": 1.0}}
            if method not in ("expert", "base"):
                fits.append(fit | ({"search": [{}] * 6} if method == "ties" and not seed else {}))
    return Report.of(pd.DataFrame(rows), fits)


@pytest.fixture
def table(report) -> pd.DataFrame:
    return draw.summary(report, SUBSET)


def test_the_summary_holds_scores_and_mean_costs(table):
    assert list(table.index) == ["expert", "base", "emr", "ties", "average", "divmerge/task"]
    assert table.value["ties"] == pytest.approx(0.6) and table.published["ties"] == 0.5
    assert table.published["average"] == table.value["average"]
    assert table.seconds["ties"] == 6.5 and table.tried["ties"] == 6
    assert table.stored["emr"] == 2.5 and table.stored["ties"] == 1
    assert table.worst["emr"] == pytest.approx(0.9)
    assert table.kept["emr"] == pytest.approx(0.8) and table.kept["average"] == 0
    assert table.kept_published["ties"] == 0 and table.kept["ties"] == pytest.approx(0.2)
    assert table.below["base"] == table.counted["base"] == 2 and table.below["average"] == 0


def test_the_table_is_grouped_by_what_a_method_looks_at(table):
    shown = draw.benchmark_table(table)
    assert [*shown.index.get_level_values(0)] == ["reference", *["no data"] * 3, draw.INPUTS]
    ties = shown.loc[("no data", "TIES")]
    assert ties["ANP, %"].startswith("60.0 [") and ties["kept margin, %"].startswith("20.0 [")
    columns = ["published, %", "published kept, %", "below majority"]
    assert list(ties[columns]) == ["50.0", "0.0", "0 of 2"]
    page = draw.styled(shown, "a toy").to_html()
    assert "a toy" in page and "TIES" in page and "font-size" in page


def test_the_figures_draw_every_method(table):
    first, *others = Figure().subplots(1, 3)
    draw.ranking([first], {"T = 2": table})
    names = ["EMR-Merging", "TIES", "Average", "DivMerge, per task"]
    assert [label.get_text() for label in first.get_yticklabels()] == names
    drawn = [(float(line.get_xdata()[0]), line.get_ydata()[0]) for line in first.lines]
    assert (0.6, 1) in drawn  # TIES: the ANP on its row, the kept margin below
    assert (pytest.approx(0.2), 1.4) in drawn
    draw.score_against_cost(others, table)
    assert others[0].get_xscale() == "log" and "seconds" in others[1].get_xlabel()
    assert [ax.get_ylabel().partition(",")[0] for ax in others] == ["ANP", "kept margin"]
    first.figure.draw_without_rendering()


def test_anp_and_kept_margin_stand_side_by_side(report):
    """The base gets 4 of 10 rows right: ANP 40 %, and below the majority, which gets 5."""
    table = figures.score_intervals(report, SUBSET).set_index("method")
    assert table.value["base"] == pytest.approx(0.4)
    assert table.kept["base"] == pytest.approx(-0.2) and table.below["base"] == 2
    shown = figures.score_table(report, SUBSET)
    assert shown.loc["Base model", "below the majority"] == "2 of 2"
    assert shown.loc["DivMerge, per task", "kept margin, %"].startswith("40.0 [")
    ax = figures.forest(Figure().subplots(), table.reset_index())
    assert ax.get_yticklabels()[0].get_text() == "Base model (2)"
    assert "kept margin" in ax.get_xlabel()


def test_the_place_says_both_scores_and_who_is_below_the_majority(report):
    said = figures.rank_summary(report)
    assert "By ANP: DivMerge, per task is number 2 of 5 (70.0 %)." in said
    assert "By kept margin: DivMerge, per task is number 2 of 5 (40.0 %)." in said
    assert "0 of 5 methods are below the majority" in said


def test_a_difference_of_kept_margins_is_told_without_the_task_that_decides_it(report):
    """DivMerge gets 7 of 10 right, the average all of the second task: (7 - 10) / 5 there."""
    first, second = SUBSET.split("+")
    some = (report.rows.method == "average") & (report.rows.task == second)
    report.rows.loc[some, "predicted"] = report.rows[some].gold
    said = figures.without_one(report, "toy", SUBSET, "divmerge/task", "average")
    assert said.startswith(f" Without `{first}`, whose experts are 50.0 points above")
    assert said.endswith("it differs by -60.0 points.")


@pytest.mark.parametrize(
    ("one", "said"), [("average", "By ANP: no DivMerge."), ("divmerge/task", "1 of 1 (70.0 %).\n")]
)
def test_one_method_has_a_place_and_a_landing_page(report, one, said, tmp_path):
    """Whatever the file's name: it need not be the suite's."""
    report.provenance.update(encoder="toy", size="toy", device="cpu", precision="float32")
    kept = report.rows[report.rows.method.isin(["expert", "base", one])]
    Report(kept.reset_index(drop=True), [], report.provenance).save(tmp_path / "mine.json")
    figures.landing(tmp_path)
    assert said in (tmp_path / "landing.md").read_text("utf-8")


def test_every_method_has_a_block():
    assert {draw.block(spec) for spec in every_method()} == set(draw.BLOCKS[1:])
    names = {spec.partition("/")[0] for spec in every_method()}
    assert names == set(METHODS) - {"logits_fusion"}
