"""The paper's printed numbers, analysed again, and their figures."""

import numpy as np
import pytest
from divmerge_book.figures import evidence as draw
from divmerge_book.published import paper, paper_reanalysis
from helpers import places


def test_the_printed_correlations_are_pearsons_to_the_last_digit():
    table = paper_reanalysis.which_correlation()
    assert len(table) == 14
    assert (table.printed - table.pearson).abs().max() < 0.0005
    assert (table.printed - table.spearman).abs().max() > 0.3


def test_rows_behind_percentages():
    assert paper_reanalysis.rows_behind([33.33, 66.67]) == 3
    assert paper_reanalysis.rows_behind([28.88, 26.71, 75.81]) == 277
    with pytest.raises(ValueError, match="no number of rows"):
        paper_reanalysis.rows_behind([1 / 7, 0.0101])


def test_spread_by_hand():
    row = paper_reanalysis.spread().loc["MRPC"]
    rest = paper.table(5)["MRPC"].drop("MRPC")
    assert row["rows"] == 400 and row.highest - row.lowest == pytest.approx(rest.max() - rest.min())
    assert row.error == pytest.approx(np.sqrt((rest * (100 - rest) / 400).mean()))


def test_a_row_of_multiples_lies_on_its_grid_and_a_random_one_does_not():
    steps = np.arange(0.2, 1.0, 0.0005)
    even = 100 - 0.25 * np.array([0, 1, 3, 4, 9, 14])
    gaps = paper_reanalysis.grid_gap(even, steps)
    assert gaps.min() < 1e-9 and steps[gaps.argmin()] == pytest.approx(0.25)
    odd = np.array([99.9, 99.63, 98.21, 97.4, 96.37])
    assert paper_reanalysis.grid_gap(odd, steps).min() > 0.01


def test_every_row_of_two_tables_is_a_cell_of_both():
    table = paper_reanalysis.two_tables().set_index(["tasks", "method"])
    assert len(table) == 18
    for (tasks, method), row in table.iterrows():
        assert row.pairs == paper.table(3).loc[method, tasks]
        assert row["row"] == paper.table(paper_reanalysis.PLACES[tasks]).loc[2, method]


def test_js_is_compared_with_kl_and_with_others_in_every_cell():
    table = paper_reanalysis.js_and_kl()
    assert table.groupby("table").size().to_dict() == {3: 4, 6: 12, 7: 6}
    assert (table.gain == (table.js - table.kl).round(2)).all()
    rivals = paper_reanalysis.js_and_others()
    assert len(rivals) == 18 and not rivals.other.str.contains("KL|JS").any()


def test_steps_add_up_to_the_whole_change():
    change = paper_reanalysis.steps(6).sum()
    whole = paper.table(6).loc[7] - paper.table(6).loc[2]
    assert (change - whole).abs().max() < 0.02


def test_a_star_stands_at_the_printed_value_and_a_circle_at_the_others(ax):
    table, _ = paper_reanalysis.without_the_point()
    some = table[(table.how == "pearson") & (table.divergence == "JS")]
    draw.own_expert_effect(ax, some)
    assert places(ax, "*") == [[value, y] for y, value in enumerate(some.kept)]
    assert places(ax, "o") == [[value, y] for y, value in enumerate(some.value)]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(some.task)


def test_the_line_is_fitted_to_the_others_alone(ax):
    x, y = np.array([0.0, -1.0, -2.0, -3.0]), np.array([0.9, 0.3, 0.2, 0.1])
    draw.expert_scatter(ax, x, y, "a task")
    (line,) = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    np.testing.assert_allclose(line.get_data(), [[-3, -1], [10, 30]])
    assert places(ax, "*") == [[0, 90]] and ax.get_title() == "a task"


def test_both_tables_are_drawn_method_by_method(ax):
    some = paper_reanalysis.two_tables().query("tasks == 'generation'")
    draw.two_tables(ax, some, ("first", "second"))
    diamonds = places(ax, "D")
    assert [[value, y] for y, value in enumerate(some["row"])] == diamonds[:9]


def test_gains_have_a_line_per_kind_and_level(ax):
    table = paper_reanalysis.js_and_kl()
    draw.js_gains(ax, table[table.table != 3])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        *("classification, per task", "classification, per layer"),
        *("generation, per task", "generation, per layer"),
    ]
