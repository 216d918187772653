"""The choice of an objective: the ablation, its summary, and its figures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from divmerge_book.figures import choice as draw
from divmerge_book.studies.choice import ablation, summary
from divmerge_book.studies.objective_fits import FitConfig, fit_result
from divmerge_book.studies.predictions import packed

SHORT = FitConfig(epochs=1, rates=(1e-2, 0.3), rate=0.1)


def test_every_objective_chooses_a_step_size_and_is_compared_with_js(experiment):
    options = {"specs": ["js", "kl"], "groupings": ["task"], "counts": [2]}
    found = ablation({0: experiment}, **options, config=SHORT)
    table, fits = summary(found["scores"], draws=200), found["fits"]
    own = table[table.objective == "js"].set_index("search")
    assert (own.difference == 0).all() and own.p.isna().all()
    for row in table[table.objective == "kl"].itertuples():
        assert row.difference == pytest.approx(row.anp - own.anp[row.search])
        assert row.from_low <= row.difference <= row.from_high
    start = table[table.objective == "start"]
    assert start.anp.nunique() == 1 and start.difference.isna().all()
    assert set(fits[fits.search == "same"].rate) == {SHORT.rate} and len(fits) == 4
    for row in fits[fits.search == "searched"].itertuples():
        tried = {
            rate: fit_result(experiment, row.objective, row.grouping, rate, SHORT)["validation"]
            for rate in SHORT.rates
        }
        assert row.rate == max(tried, key=tried.get)
        assert row.validation == tried[row.rate]


def test_without_js_there_is_no_reference():
    with pytest.raises(ValueError, match="differences are from 'js'; add it"):
        ablation({}, specs=["kl"], groupings=["task"], counts=[2])


def summed(answers: dict[str, object], draws: int = 2000) -> pd.DataFrame:
    """The summary of these answers to one task, by objective; the expert's are the gold ones."""
    label = {"search": "s", "count": 1, "seed": 0, "task": "a", "gold": answers["expert"]}
    rows = [{**label, "method": method, "predicted": said} for method, said in answers.items()]
    return summary(packed(rows), draws=draws).set_index("objective")


def test_a_summary_by_hand():
    """kl is right where js is wrong on one row of four: a quarter more, of an expert at 1."""
    table = summed({"expert": "0101", "js/task": "0100", "kl/task": "0101"}, draws=500)
    assert table.anp.to_dict() == {"js": 0.75, "kl": 1.0}
    assert table.difference["kl"] == 0.25
    # of a majority of two in four, js has kept half the expert's lead
    assert table.kept_margin.to_dict() == {"js": 0.5, "kl": 1.0}
    assert table.kept_difference["kl"] == 0.5 and table.below.tolist() == [0, 0]
    assert table.from_low["kl"] < 0.0 < table.p["kl"]  # one row of four says little


def test_the_same_answers_differ_by_nothing_and_p_agrees_with_the_interval():
    gold = [0, 1] * 30
    wrong = {"expert": 0, "js/task": 12, "kl/task": 12, "far/task": 30}
    table = summed(
        {name: [1 - g if n < k else g for n, g in enumerate(gold)] for name, k in wrong.items()}
    )
    assert table.p["kl"] == 1 and table.difference["kl"] == 0 and np.isnan(table.p["js"])
    assert table.p["far"] < 0.001 and table.from_high["far"] < 0
    assert table.holm["far"] == pytest.approx(2 * table.p["far"])  # of two comparisons


def test_in_the_forest_only_what_survives_correction_is_filled():
    rows = [
        {"objective": "kl", "count": 2, "holm": 0.01, "difference": 0.02},
        {"objective": "entropy", "count": 2, "holm": 0.4, "difference": -0.1},
    ]
    table = pd.DataFrame(rows).assign(from_low=-0.2, from_high=0.1)
    ax = draw.forest(plt.figure().gca(), table, order=["kl", "entropy"])
    marks = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in marks] == [2.0, -10.0]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, True]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["kl", "entropy (AdaMerging)"]
    assert "points" in ax.get_xlabel()
    plt.close("all")


def test_a_gradient_that_vanishes_is_drawn_at_the_floor():
    odds = pd.DataFrame({"objective": ["js"] * 2, "odds": [0.0, 1.0], "pull": [1.0, 0.0]})
    ax = draw.objective_values(plt.figure().gca(), odds, ["js"], "pull")
    assert ax.lines[-1].get_ydata()[-1] == draw.FLOOR
    plt.close("all")
