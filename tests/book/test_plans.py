"""The studies of chapter 07: what they run on, what they store, and what is drawn from it."""

import json
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from divmerge_book.evaluation.experiment import SIZES
from divmerge_book.evaluation.stored_tables import load, save
from divmerge_book.figures import beyond as draw
from divmerge_book.studies import plans as module
from divmerge_book.studies.continual_merging import backward_transfer
from helpers import RESULTS, forbid
from test_inference_cost import QUICK

DRAWN = {
    "arrivals": [
        draw.continual_curve,
        lambda ax, table: draw.scores_by_order(ax, backward_transfer(table), "ratio"),
        lambda ax, table: draw.scores_by_order(ax, backward_transfer(table), "bwt"),
    ],
    "mixture": [draw.model_counts, draw.score_by_size],
    "pools": [
        lambda ax, table: draw.selection_by_corruption(ax, table, "flip", "auc"),
        lambda ax, table: draw.selection_by_corruption(ax, table, "noise", "anp"),
    ],
    "evolution": [draw.search_curves, draw.generalisation_gaps],
    "fusion": [draw.proxy_tuning],
    "storage": [
        lambda ax, table: draw.score_against_cost(ax, table, "models"),
        lambda ax, table: draw.score_against_cost(ax, table, "slower"),
    ],
}


def drawn(name: str, table) -> None:
    for figure in DRAWN[name]:
        ax = figure(plt.figure().gca(), table)
        ax.figure.canvas.draw()
        assert ax.lines and not any(math.isnan(x) for x in ax.get_xlim())
        plt.close(ax.figure)


@pytest.mark.parametrize("name", module.STUDIES)
def test_every_study_is_stored_with_its_origin(name, fresh, monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setattr(module, "SMALL", str(tiny_folder))
    monkeypatch.setitem(SIZES, "smoke", replace(SIZES["toy"], recipe=SIZES["toy"].recipe))
    quick = {"options": QUICK, "calls": 5, "policy": 3, "shares": (0.0, 0.5), "repeats": 1}
    own = module.plan("toy", size="smoke", seeds=[0], encoder=str(tiny_folder), **quick)
    path = tmp_path / "beyond" / f"{name}.json"
    table = module.run(name, own)["rows"]
    scored = module.with_margins(name, table, module.facts_of(name, own))
    assert ("kept_margin" in scored) == (name != "evolution")
    drawn(name, scored)
    assert len(table) and table.columns.is_unique
    save(path, {"rows": table}, **module.facts_of(name, own))
    (found,), facts = load(path)[0].values(), load(path)[1]
    assert len(found) == len(table) and list(found.columns) == list(table.columns)
    assert facts["study"] == name and facts["tasks"] == ["mood", "place"]
    for fact in ("encoder", "small", "seeds", "date", "torch", "machine", "device"):
        assert facts[fact], fact
    assert facts["date"] in module.caption(facts)
    json.loads(path.read_text(), parse_constant=forbid)


def test_a_plan_takes_what_is_given_and_the_size_says_the_rest():
    found = module.plan("embedded", size="full", seeds=[4], orders=2)
    assert (found.seeds, found.orders, found.encoder) == ((4,), 2, SIZES["full"].encoder)
    assert len(found.tasks) == 8 and found.size == "full"
    few = module.plan("embedded", size="smoke")
    assert len(few.tasks) < 8 and few.encoder == "bert_tiny"
    assert module.plan("embedded", tasks=["sms", "bbc"]).tasks == ("sms", "bbc")
    with pytest.raises(ValueError, match="merges two or more"):
        module.plan("embedded", tasks=["sms"])


@pytest.mark.parametrize("name", module.STUDIES)
def test_published_studies_carry_their_origin_and_are_drawn(name):
    tables, facts = load(RESULTS / "beyond" / f"{name}.json")
    assert facts["size"] == "full" and facts["date"] in module.caption(facts)
    drawn(name, module.with_margins(name, tables["rows"], facts))
