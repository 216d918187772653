"""Searches for paths: equal budgets, the expert as start, the best as result."""

from dataclasses import replace

import numpy as np
import pytest
from divmerge_book.studies import searches as module

from divmerge_core.methods.paths import Path, Pool


@pytest.mark.parametrize("name", module.SEARCHES)
@pytest.mark.parametrize("calls", [5, 17, 33])
def test_a_search_spends_its_calls_from_the_expert_to_the_best(linear, name, calls, monkeypatch):
    """The score here is proximity to a target that no expert is."""
    vectors = linear.problem.vectors
    target = Pool.of(linear.problem, "block").model(Path(((1, 1.0), (0, 0.5), (3, 0.25))))

    def proximity(experiment, flat, tasks=None) -> list[float]:
        return [50 - float((flat - target).norm())]

    monkeypatch.setattr(module, "accuracies", proximity)
    score = module.ValidationScore(linear, calls)
    paths = module.SEARCHES[name](linear, score, 0)
    assert len(score.given) == 4 * calls and len(paths.flats) == 4
    rows, best = np.reshape(score.given, (4, calls)), score.best()
    assert best == sorted(best)
    assert best == pytest.approx([rows[:, : n + 1].max(1).mean() for n in range(calls)])
    for task, expert in enumerate(vectors.tasks):
        assert rows[task, 0] == pytest.approx(proximity(None, vectors.expert(expert))[0])
        if name != "evolution_small":  # the published one weighs size too
            assert proximity(None, paths.flats[task])[0] == pytest.approx(rows[task].max())


def test_every_search_is_compared_with_the_experts_at_calls_that_make_generations(linear):
    small = replace(linear, digest="fewer rows")
    table = module.compare_searches({(0, 15): linear, (0, 8): small}, calls=5)
    last = table[table.test.notna()]
    assert len(last) == len(last.groupby(["rows", "search"])) == 2 * (len(module.SEARCHES) + 1)
    assert set(table.search) == {*module.SEARCHES, "expert"} and set(table["rows"]) == {15, 8}
    expert = last[last.search == "expert"].iloc[0]
    assert expert.validation == expert.test == 1 and expert.gap == 0 and expert.call == 1
    assert expert.bytes == 4 * linear.problem.vectors.base.nbytes
    assert (last.gap == last.validation - last.test).all()
    with pytest.raises(ValueError, match="1 plus a multiple of 4"):
        module.compare_searches({(0, 15): linear}, calls=12)
