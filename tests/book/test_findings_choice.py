"""Sentences on divergences, on the paper's tables and on settings; divergences by hand."""

import pandas as pd
import pytest
import torch
from divmerge_book.findings import choice, paper, protocol
from divmerge_book.published import paper_reanalysis
from divmerge_book.studies import divergence_shapes

RUN = "this run"


def test_gradients_against_a_wrong_expert_are_those_of_the_formulas():
    """KL's gradient is q - p; that of chi-squared grows with p / q."""
    odds = torch.tensor([0.0, 4.0], dtype=torch.float64)
    table = divergence_shapes.against_wrong_expert(odds).set_index(["objective", "odds"]).pull
    p = torch.tensor([6.0, 0.0], dtype=torch.float64).softmax(0)
    for z in odds:
        q = torch.stack([0 * z, z]).softmax(0)
        assert table["kl", z.item()] == pytest.approx((q - p).norm().item())
    strength = divergence_shapes.gradients()
    said = choice.letting_go(strength)
    fading, _, growing = said.partition(" falls to less than half")
    assert "JS" in fading and "chi squared" in growing.partition("KL keeps")[0]


def test_smooth_divergences_are_the_fisher_metric_near_the_expert():
    close = divergence_shapes.fisher_ratios()
    mean = close[close.objective == "js"].ratio.mean()
    assert mean == pytest.approx(0.25, rel=1e-2)
    assert "divergences that declare a factor have it within" in choice.near_fisher(close)


def test_significant_differences_are_named_by_side():
    rows = {"grouping": "task", "count": 2, "anp": 0.9, "low": 0.8, "high": 1.0, "p": 0.0}
    rows |= {"from_low": 0.0, "from_high": 0.0}
    table = pd.DataFrame(
        [
            {**rows, "objective": "kl", "difference": 0.02, "holm": 0.01},
            {**rows, "objective": "entropy", "difference": -0.1, "holm": 0.04},
            {**rows, "objective": "hellinger", "difference": 0.0, "holm": 1.0},
        ]
    )
    text = choice.differences(table, ["anp"], RUN)
    assert "Of 3 differences from JS in ANP, in this run, 2 are significant" in text
    assert "above: KL, +2.0 points (per task, T = 2)" in text and "Hellinger" not in text


def test_a_cost_is_said_only_where_another_task_counts():
    harm = pd.DataFrame({"kind": ["none"] * 3, "objective": ["js", "js", "kl"], "seed": [0, 1, 0]})
    said = choice.corrupted(harm.assign(cost=[0.1, 0.3, 0.2], kept_cost=float("nan")), RUN)
    assert "| ANP | as it is | +20.0 (+10.0 to +30.0) | +20.0 (+20.0) |" in said
    assert said.endswith("| kept margin | as it is | no other task counts | no other task counts |")


def test_the_papers_tables_say_what_they_print():
    both = paper_reanalysis.which_correlation()
    assert "All 14 cells of the paper's Table 2 are Pearson's" in paper.which_correlation(both)
    table, means = paper_reanalysis.without_the_point()
    assert "of the 14 printed numbers" in paper.inside(table) and "JS" in paper.pooled(means)
    assert "Not ahead: Table 6" in paper.js_and_kl(paper_reanalysis.js_and_kl())


def test_the_fewest_inputs_with_nine_tenths_of_the_gain_are_named():
    table = pd.DataFrame({"inputs": [0, 5, 50], "anp": [0.5, 0.69, 0.7]})
    table = table.assign(grouping="task", low=0.0, high=1.0, difference=table.anp - 0.7)
    table = table.assign(from_low=-0.3, from_high=[-0.1, 0.0, 0.0], p=1.0, holm=1.0)
    sure = "+20.0 [+10.0, +30.0] points of ANP with coefficients per task"
    assert f"{sure} (5 give nine tenths of it)" in protocol.needed(table, ["anp"], RUN)
    assert "nine tenths" not in protocol.needed(table.assign(from_high=0.1), ["anp"], RUN)
