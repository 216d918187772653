"""Sentences about outcomes: each says one thing of one table by hand, and the other of another."""

import json
from pathlib import Path

import pandas as pd
import pytest
from divmerge_book.evaluation.stored_tables import load
from divmerge_book.figures import title
from divmerge_book.findings import behaviour, beyond, bullets, evidence, interference, listed, span
from divmerge_book.findings import scaling as count
from divmerge_book.published import paper, paper_reanalysis
from divmerge_book.studies import model_selection, pairwise_interference
from divmerge_book.studies import scores as scoring
from divmerge_book.studies import task_attribution as attribution
from divmerge_book.studies.continual_merging import BATCH, backward_transfer

RESULTS = Path(__file__).resolve().parents[2] / "book" / "results"
RUN = "this run"


def test_words_are_listed_and_numbers_span():
    assert [listed(list(words)) for words in ("", "a", "ab", "abc")] == [
        *("none", "a", "a and b", "a, b and c")
    ]
    assert span([1.02, 3.0, 2.0]) == "1.0 to 3.0" and span([1.01, 1.02]) == "1.0"
    assert span([-1.0, 1.0], 0, sign=True) == "-1 to +1"
    assert bullets(["a", "b"]) == "- a\n- b"


# --- the number of tasks --------------------------------------------------------------------------


def means(**methods: list[float]) -> pd.DataFrame:
    rows = [
        {"method": name, "T": number, "value": value}
        for name, values in methods.items()
        for number, value in enumerate(values, 2)
    ]
    return pd.DataFrame(rows)


def test_the_leader_at_every_number_of_tasks_is_named():
    text = count.leaders(means(ties=[0.9, 0.6], average=[0.8, 0.7]), RUN)
    assert "TIES at T = 2; Average at T = 3" in text
    assert "-30.0 points (TIES) to -10.0 (Average); it is negative for 2 of 2" in text
    text = count.leaders(means(ties=[0.9, 0.6], average=[0.5, 0.55]), RUN)
    assert "TIES at T = 2 and 3" in text and "+5.0 (Average); it is negative for 1 of 2" in text


def subset_scores(ties: list[float], average: list[float]) -> pd.DataFrame:
    rows = [
        {"seed": 0, "method": method, "subset": f"a+{n}", "T": 2, "anp": value}
        for method, values in (("ties", ties), ("average", average))
        for n, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_paired_differences_vary_less_only_where_they_do():
    shared = subset_scores([0.5, 0.9], [0.4, 0.8])
    assert "by 0.0, less than" in count.paired(shared, RUN)
    opposed = subset_scores([0.5, 0.9], [0.9, 0.5])
    assert "no less than" in count.paired(opposed, RUN)


def test_merges_below_the_majority_are_counted_and_named():
    floor = pd.Series({"a": 0.8, "b": 0.5})
    rows = {"task": ["a", "b"], "subset": "a+b", "method": "ties", "T": 2}
    low = count.below_majority(pd.DataFrame({**rows, "ratio": [0.6, 0.9]}), floor, RUN)
    assert "50 % at $T = 2$" in low and "`a` in a, b by TIES, 60 %" in low
    fine = count.below_majority(pd.DataFrame({**rows, "ratio": [0.9, 0.9]}), floor, RUN)
    assert " 0 % at $T = 2$" in fine and "No merge does worse" in fine


def test_methods_of_the_paper_that_were_not_merged_are_named():
    columns = {name: paper.METHODS_HERE[name] for name in ("TIES", "TL JS")}
    assert "and not on the left: TL JS." in count.beside(paper.table(6), columns, ["ties"])
    whole = count.beside(paper.table(6), columns, ["ties", "divmerge/task"])
    assert "and not on the left: none." in whole


def over_scales(average: list[float], best: list[float]) -> pd.DataFrame:
    rows = [
        {"T": number, "fixed": fixed, "anp": value}
        for fixed, values in ((False, average), (True, best))
        for number, value in enumerate(values, 2)
    ]
    return pd.DataFrame(rows)


def test_dilution_explains_what_a_coefficient_saves():
    text = count.dilution(over_scales([0.9, 0.7], [0.8, 0.75]), RUN)
    assert "loses 20.0 points" in text and "explains 25 % of the drop" in text
    assert "no drop to explain" in count.dilution(over_scales([0.7, 0.9], [0.8, 0.8]), RUN)


def test_pairs_add_up_where_their_sum_is_the_loss():
    table = pd.DataFrame({"T": [3, 3], "loss": [0.2, 0.4]})
    found = {
        "average": table.assign(sum=2 * table.loss),
        "task_arithmetic": table.assign(sum=table.loss[::-1].to_numpy()),
    }
    text = count.added_up(found, RUN)
    assert "Average 2.0; Task arithmetic 1.0" in text
    assert "add up for: Task arithmetic. They do not for: Average." in text
    assert "merged no three tasks" in count.added_up({"average": table[:0].assign(sum=[])}, RUN)


def test_who_harms_and_who_loses_may_be_one_task_or_two():
    table = pd.DataFrame({"task": list("abc"), "marginal_effect": [-0.3, -0.1, 0.0]})
    same = count.effect("ties", table.assign(own_change=[-0.5, -0.1, 0.0]))
    assert "`a` is number 1 of 3 by its own loss; `a` loses most" in same
    other = count.effect("ties", table.assign(own_change=[0.0, -0.1, -0.5]))
    assert "`a` is number 3 of 3 by its own loss; `c` loses most" in other
    assert "and is number 3 by harm" in other


# --- beyond one vector ----------------------------------------------------------------------------


def courses(gap: float) -> pd.DataFrame:
    rows = [{"method": name, "order": -1, "ratio": 0.8, "bwt": None} for name in BATCH.values()]
    rows += [
        {"method": name, "order": n, "ratio": 0.8 + gap * (name == "opcm"), "bwt": -0.1 * place}
        for n in range(2)
        for place, name in enumerate(BATCH)
    ]
    return pd.DataFrame(rows).astype({"bwt": float})


def test_a_continual_rule_is_behind_only_where_it_is():
    assert "these rules are behind: OPCM (-10.0)" in beyond.arriving(courses(-0.1), RUN)
    assert "these rules are behind: none; these are not: OPCM (+10.0)" in beyond.arriving(
        courses(0.1), RUN
    )


def groupings(mixture: float) -> pd.DataFrame:
    rows = [("dp_mixture", mixture), ("k_means", 0.8), ("random", 0.7)]
    table = [{"how": how, "models": 2, "groups": how, "anp": value} for how, value in rows]
    ends = [{"how": "k_means", "models": n, "groups": n, "anp": 1.0} for n in (1, 3)]
    return pd.DataFrame([*table, *ends])


def test_the_mixture_is_above_other_groupings_only_where_it_is():
    assert "above k-means for 1 of 1" in beyond.mixture(groupings(0.9), RUN)
    assert "above k-means for 0 of 1" in beyond.mixture(groupings(0.75), RUN)


def test_kept_margins_rank_by_themselves_and_are_missed_where_they_are_not_stored():
    table = groupings(0.9)
    assert "no accuracies by task, so no kept margin" in beyond.mixture(table, RUN)
    both = beyond.mixture(table.assign(kept_margin=-table.anp), RUN)
    assert "mean ANP is above k-means for 1 of 1" in both and "no kept margin" not in both
    assert "mean kept margin is above k-means for 0 of 1" in both
    found = courses(0.1).assign(kept_margin=0.2, below=3)
    found.loc[found.method == "running_average", "kept_margin"] = 0.4
    text = beyond.arriving(found, RUN)
    assert "kept margin of a continual rule is that of Running average, 40.0 %, with 3.0" in text
    assert "OPCM, 30.0 %" in beyond.arriving(
        found.assign(kept_margin=[0.3 if m == "opcm" else 0.1 for m in found.method]), RUN
    )


def pool(policy: float, control: float, merged: float) -> pd.DataFrame:
    rows = {"policy": (policy, merged), "shuffled": (control, 0.7)}
    rows |= {"all": (None, 0.8), "oracle": (None, 0.9)}
    table = [
        {"method": name, "auc": auc, "anp": anp, "share": share, "kind": "flip", "calls": 12}
        for name, (auc, anp) in rows.items()
        for share in (0.2, 0.4)
    ]
    return pd.DataFrame(table)


def test_a_ranking_must_beat_the_shuffled_one_and_a_merge_that_of_all():
    good, poor = pool(0.9, 0.5, 0.85), pool(0.5, 0.6, 0.75)
    assert "every share: learned policy (0.90); not: none" in beyond.detected(good, RUN)
    assert "mean ANP of merging all 80.0 %, the policy's choice 85.0 %" in beyond.detected(
        good, RUN
    )
    assert "every share: none; not: learned policy (0.50)" in beyond.detected(poor, RUN)
    assert "merging all for sign flip, and than honest experts alone for no kind" in (
        beyond.paid_off(good, RUN)
    )
    assert "merging all for no kind of corruption" in beyond.paid_off(poor, RUN)


def found_by(test: float) -> pd.DataFrame:
    row = {"seed": 0, "rows": 32, "call": 5, "validation": 0.9}
    return pd.DataFrame(
        [
            {**row, "search": "random", "test": test, "gap": 0.9 - test},
            {**row, "search": "expert", "test": 0.8, "gap": 0.1},
        ]
    )


def test_searches_beat_the_experts_only_where_they_do():
    assert "1 of 1 searches beat the experts" in beyond.searched(found_by(0.85), RUN)
    assert "0 of 1 searches beat the experts" in beyond.searched(found_by(0.75), RUN)


def test_more_rows_are_compared_at_the_same_seeds():
    few, more = found_by(0.7), found_by(0.85).assign(rows=128)
    other = few.assign(seed=1, gap=0.9)
    text = beyond.searched(pd.concat([few, other, more], ignore_index=True), RUN)
    assert "smaller for 1 of 1 searches (+20.0 becomes +5.0 points)" in text


def test_fusion_is_better_than_the_small_experts_only_where_it_is():
    rows = {"large base": 0.4, "small expert": 0.8, "large expert": 0.9, "proxy, own": 0.85}
    table = pd.DataFrame({"model": list(rows), "accuracy": list(rows.values())})
    table = table.assign(milliseconds=1.0, task="a")
    assert "+5.0 points" in beyond.steered(table, RUN)
    assert "than the small experts: *proxy, own*." in beyond.steered(table, RUN)
    table.loc[1, "accuracy"] = 0.87
    assert "than the small experts: none." in beyond.steered(table, RUN)


def test_the_best_by_bytes_and_the_slowest_are_found():
    table = pd.DataFrame(
        {
            "method": ["average", "twin", "emr"],
            "finds": ["one", "input", "task"],
            "models": [1.0, 1.8, 1.2],
            "slower": [1.0, 14.0, 3.0],
            "anp": [0.7, 0.9, 0.8],
        }
    )
    text = beyond.stored_well(table, RUN)
    assert (
        "EMR-Merging has the highest ANP in this run: 80.0 %" in text
        and "Twin-Merging has: 90.0 %" in text
    )
    turned = table.assign(anp=[0.95, 0.9, 0.8], slower=[9.0, 2.0, 3.0])
    text = beyond.stored_well(turned, RUN)
    assert (
        "Average has the highest ANP in this run: 95.0 %" in text and "Average has: 95.0 %" in text
    )
    assert beyond.slowest(table, RUN).split(": ")[1].startswith("Twin-Merging 14.0")
    assert beyond.slowest(turned, RUN).split(": ")[1].startswith("Average 9.0")


# --- divergence and success -----------------------------------------------------------------------


def test_experts_on_other_tasks_are_held_against_the_majority():
    cross = pd.DataFrame({"task": list("aabb"), "model": list("abab"), "accuracy": [0.9] * 4})
    majority = pd.Series({"a": 0.95, "b": 0.5})
    text = evidence.crossed(cross, majority, RUN)
    assert "50 % of the accuracies" in text and "all of them on: `a`." in text
    assert "all of them on: no task." in evidence.crossed(cross, majority - 0.5, RUN)


def judged(js: float, entropy: float, best: float) -> pd.DataFrame:
    rows = [
        {"draws": "task", "among": among, "how": "spearman", "goal": goal, "criterion": name}
        | {"value": value if among == "all" else value + best}
        for name, value in (("js", js), ("entropy", entropy), ("kl", 0.1), ("reverse_kl", 0.2))
        for among in ("all", "best half")
        for goal in ("task", "sum")
    ]
    return pd.DataFrame(rows)


def test_the_leading_measure_is_the_one_with_the_highest_correlation():
    text = evidence.leading(judged(0.9, 0.5, 0.0), RUN)
    assert "JS in 2 of 2 rows (JS above entropy in 2)" in text
    text = evidence.leading(judged(0.3, 0.5, 0.0), RUN)
    assert "entropy in 2 of 2 rows (JS above entropy in 0)" in text


def test_a_narrower_range_lowers_a_correlation_only_where_it_does():
    assert "not lower for none" in evidence.narrowed(judged(0.9, 0.5, -0.1), RUN)
    assert "is lower than among all models for none" in evidence.narrowed(
        judged(0.9, 0.5, 0.05), RUN
    )


# --- interference ---------------------------------------------------------------------------------


def ways_to_cost(sms: float, other: float, shuffled: float = 0.0) -> pd.DataFrame:
    rows = [
        {"rule": rule, "task": task, "other": added, "accuracy": js / 2, "js": js, "seed": 0}
        for added, cost in (("sms", sms), ("trec", other), ("bbc", other))
        for task in ("sms", "trec", "bbc")
        if task != added
        for rule, js in (
            ("added", cost),
            ("shuffled", shuffled),
            ("averaged", 0.2),
            ("halved", 0.1),
        )
    ]
    return pd.DataFrame(rows)


def test_the_expert_that_costs_most_is_named_with_the_next():
    text = interference.asymmetric(ways_to_cost(0.3, 0.1), RUN)
    assert "added is `sms` (0.300 nats on average), then `trec` (0.100)" in text
    text = interference.asymmetric(ways_to_cost(0.1, 0.2), RUN)
    assert "added is `trec` (0.200 nats on average)" in text and "least `sms` (0.100)" in text


def test_direction_or_length_may_cost():
    small = interference.causes(ways_to_cost(0.3, 0.3, shuffled=0.01), RUN)
    assert "direction of the other vector costs more" in small and "costs 50 % of that" in small
    large = interference.causes(ways_to_cost(0.3, 0.3, shuffled=0.29), RUN)
    assert "length alone explains half" in large


def test_signs_are_near_a_coins_only_where_they_are():
    pairs = pd.DataFrame({"counted": ["all", "touched"], "conflict": [0.2, 0.49], "cosine": 0.0})
    idle = pd.DataFrame({"task": ["a"], "parameters": [0.8], "length": [0.0]})
    assert "0.49 without idle rows, near a coin's" in interference.counted(pairs, idle, RUN)
    pairs.loc[1, "conflict"] = 0.3
    assert "0.30 without idle rows, not near a coin's" in interference.counted(pairs, idle, RUN)


def test_stable_ranks_are_compared_by_answers():
    table = pd.DataFrame({"stable": [1.1, 1.3, 3.0], "answers": [2, 2, 6]})
    assert ", above all of those" in interference.ranks(table, RUN)
    assert "not above all" in interference.ranks(table.assign(stable=[1.1, 3.3, 3.0]), RUN)
    assert "more answers" not in interference.ranks(table[:2], RUN)


def test_barriers_are_named_where_they_exceed_the_noise():
    at = [0.0, 0.5, 1.0]
    walk = {"seed": 0, "pair": "a+b", "task": "a"}
    for middle, named, share in ((0.5, "a+b (30.0)", 0), (0.9, "none", 100)):
        rows = pd.DataFrame([{**walk, "at": x, "accuracy": y, "nll": 1.0} for x, y in
                             zip(at, [0.8, middle, 0.8], strict=True)])  # fmt: skip
        text = interference.barriers(rows, pairwise_interference.barriers(rows), 100, RUN)
        assert f"than that are: {named}." in text and f"In {share} % of pairs" in text


def test_the_best_point_of_a_plane_may_lie_on_the_diagonal_or_off_it():
    ends = pd.DataFrame({"pair": ["a+b"], "method": ["average"], "l1": 0.5, "l2": 0.5, "anp": 0.7})
    grid = pd.DataFrame({"pair": "a+b", "l1": [0, 0, 1, 1], "l2": [0, 1, 0, 1], "js": [3, 2, 1, 4]})
    text = interference.plane(grid.assign(anp=[0.1, 0.9, 0.8, 0.4]), ends, "a+b", RUN)
    assert "has 90.0 % at (0.00, 1.00), the best with one scale for both 40.0 %" in text
    assert "lowest JS 80.0 %; 25 % of the grid" in text
    assert "no kept margin" in text
    margins = {"anp": [0.1, 0.9, 0.8, 0.4], "kept_margin": [-1.0, 0.2, 0.7, 0.4]}
    text = interference.plane(grid.assign(**margins), ends.assign(kept_margin=0.3), "a+b", RUN)
    assert "by kept margin, in this run: Average 30.0 %" in text and "has 70.0 % at (1.00" in text
    text = interference.plane(grid.assign(anp=[0.1, 0.3, 0.8, 0.9]), ends, "a+b", RUN)
    assert "has 90.0 % at (1.00, 1.00), the best with one scale for both 90.0 %" in text


def lost_and_gained(ours: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    models = {"average": 0.3, "divmerge/layer": ours}
    turns = [{"model": m, "task": "a", "lost": x, "gained": 0.1, "net": 0.1 - x}
             for m, x in models.items()]  # fmt: skip
    spread = [
        {"model": m, "what": what, "low": x - 0.02, "high": x + 0.02}
        for m, value in models.items()
        for what, x in (("lost", value), ("gained", 0.1))
    ]
    return pd.DataFrame(turns), pd.DataFrame(spread)


def test_losses_differ_where_their_intervals_do_not_overlap():
    text = behaviour.churn(*lost_and_gained(0.2), RUN)
    assert "-10.0 points (intervals do not overlap), the gains by +0.0 (intervals overlap)" in text
    assert "behind the average on: no task" in text
    text = behaviour.churn(*lost_and_gained(0.31), RUN)
    assert "+1.0 points (intervals overlap)" in text and "behind the average on: `a`" in text


def test_calibration_is_ranked_pooled_and_by_task():
    models = ["expert", "average", "task_arithmetic", "divmerge/layer"]
    states = pd.DataFrame({"model": models, "seed": 0, "accuracy": 0.8, "confidence": 0.9})
    text = behaviour.calibrated(
        states.assign(ece=[0.01, 0.1, 0.2, 0.05], uneven=[0.01, 0.05, 0.2, 0.1]), RUN
    )
    assert "first: Experts, one per task 1.0; DivMerge, per layer 5.0; Average 10.0" in text
    assert "by: Experts, one per task 1.0; Average 5.0; DivMerge, per layer 10.0" in text


def correlated(p: float, reference: float) -> pd.DataFrame:
    row = {"view": "pair", "method": "ties", "damage": "drop", "rho": 0.8, "p": 0.01}
    row |= {"threshold": 0.7}
    numbers = (("cosine", p), ("answers", reference))
    return pd.DataFrame([{**row, "number": name, "p_max": value} for name, value in numbers])


def test_a_number_predicts_after_correction_or_does_not():
    found = correlated(0.01, 0.2)
    assert "1 of 1 correlations are significant" in behaviour.predictors(found, RUN)
    assert "0 of its 1 correlations" in behaviour.reference(found, RUN)
    assert "100 % of the latter have the unexpected sign" in behaviour.reference(found, RUN)
    found = correlated(0.2, 0.01)
    assert "0 of 1 correlations are significant" in behaviour.predictors(found, RUN)
    assert "1 of its 1 correlations" in behaviour.reference(found, RUN)


@pytest.mark.parametrize(("p", "where"), [(0.01, "with: JS"), (0.5, "not with: JS")])
def test_coefficients_follow_what_is_significant(p, where):
    row = {"view": "within", "count": 8, "grouping": "block", "clue": "js", "rho": 0.7}
    found = pd.DataFrame([{**row, "low": 0.1, "high": 0.9, "p_max": p}])
    text = behaviour.coefficient_covariates(found, RUN)
    assert ("correlate significantly with: nothing" in text) == (p > 0.05)


# --- what the summaries print of the stored tables ------------------------------------------------
# Recomputed from the stored files with plain loops.


def stored(path: str, table: str) -> list[dict]:
    columns = json.loads((RESULTS / path).read_text("utf-8"))["tables"][table]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def mean(values) -> float:
    found = list(values)
    return sum(found) / len(found)


def accuracy(packed: str) -> float:
    bits = f"{int(packed, 16):b}"[1:]
    return bits.count("1") / len(bits)


@pytest.fixture(scope="module")
def sample() -> dict:
    tables, _ = load(RESULTS / "scaling" / "sample.json")
    return tables


def test_the_stored_leaders_are_those_of_a_loop(sample):
    rows, own = stored("scaling/sample.json", "answers"), {}
    for row in rows:
        if row["method"] == "expert":
            own[row["seed"], row["task"]] = accuracy(row["right"])
    ratio: dict[tuple, list] = {}
    for row in rows:
        if row["seed"] == 0 and row["method"] not in ("expert", "commonest answer"):
            value = accuracy(row["right"]) / own[0, row["task"]]
            ratio.setdefault((row["method"], row["subset"]), []).append(value)
    anp: dict[tuple, list] = {}
    for (method, subset), values in ratio.items():
        anp.setdefault((subset.count("+") + 1, method), []).append(mean(values))
    best = {}
    for (number, method), values in anp.items():
        if mean(values) > best.get(number, (0, ""))[0]:
            best[number] = mean(values), method
    scores = scoring.by_subset(scoring.ratios(sample["answers"], sample["answers"]))
    text = count.leaders(scoring.over_subsets(scores), "the stored run")
    for method in {method for _, method in best.values()}:
        numbers = [f"{number}" for number in sorted(best) if best[number][1] == method]
        assert f"{title(method)} at T = {listed(numbers)}" in text


def test_the_stored_sums_of_pairs_are_those_of_a_loop(sample):
    own = {
        row["task"]: accuracy(row["right"])
        for row in stored("scaling/sample.json", "answers")
        if row["method"] == "expert" and row["seed"] == 0
    }
    lost = {}
    for row in stored("scaling/fixed.json", "every"):
        key = row["fixed"], row["task"], frozenset(row["subset"].split("+"))
        lost[key] = 1 - accuracy(row["right"]) / own[row["task"]]
    tables, _ = load(RESULTS / "scaling" / "fixed.json")
    every = tables["every"].assign(seed=0, method="task_arithmetic")
    every.loc[~every.fixed, "method"] = "average"
    ratios = scoring.ratios(every, sample["answers"])
    text = count.added_up(
        {m: attribution.pair_forecasts(ratios[ratios.method == m]) for m in ratios.method.unique()},
        "the stored run",
    )
    for fixed, name in ((False, "Average"), (True, "Task arithmetic")):
        sums = [
            lost[fixed, t, frozenset([t])]
            + sum(
                lost[fixed, t, frozenset([t, o])] - lost[fixed, t, frozenset([t])]
                for o in own
                if o != t
            )
            for t in own
        ]
        times = mean(sums) / mean(lost[fixed, t, frozenset(own)] for t in own)
        assert f"{name} {times:.1f}" in text


def test_the_stored_arrivals_are_those_of_a_loop():
    rows, ratio = stored("beyond/arrivals.json", "rows"), {}
    for row in rows:
        if row["arrived"] == 8:
            key = row["method"], row["order"]
            ratio.setdefault(key, []).append(row["accuracy"] / row["expert"])
    final = {m: mean(mean(v) for (n, _), v in ratio.items() if n == m) for m, _ in ratio}
    table, _ = load(RESULTS / "beyond" / "arrivals.json")
    text = beyond.arriving(backward_transfer(table["rows"]), "the stored run")
    for rule, whole in BATCH.items():
        gap = round(100 * (final[rule] - final[whole]), 1) + 0.0  # no minus before a zero
        assert f"{title(rule)} ({gap:+.1f})" in text


def test_the_stored_costs_are_those_of_a_loop():
    js: dict[str, list] = {}
    for row in stored("interference/costs.json", "rows"):
        if row["rule"] == "added":
            js.setdefault(row["other"], []).append(row["js"])
    cost = {other: mean(values) for other, values in js.items()}
    first, second, *_ = sorted(cost, key=cost.get, reverse=True)
    tables, _ = load(RESULTS / "interference" / "costs.json")
    text = interference.asymmetric(tables["rows"], "the stored run")
    said = f"`{first}` ({cost[first]:.3f} nats on average), then `{second}` ({cost[second]:.3f})"
    assert said in text


def test_the_stored_barriers_are_those_of_a_loop():
    error: dict[tuple, dict] = {}
    rows = stored("interference/segments.json", "rows")
    for row in rows:
        line = error.setdefault((row["pair"], row["seed"]), {})
        line[row["at"]] = line.get(row["at"], 0) + (1 - row["accuracy"]) / 2
    chord: dict[str, list] = {}
    for (pair, _), line in error.items():
        over = [e - (1 - at) * line[0.0] - at * line[1.0] for at, e in line.items()]
        chord.setdefault(pair, []).append(max(over))
    noise = (mean(r["accuracy"] * (1 - r["accuracy"]) for r in rows) / 150) ** 0.5
    high = [f"{p} ({100 * mean(v):.1f})" for p, v in chord.items() if mean(v) > noise]
    tables, facts = load(RESULTS / "interference" / "segments.json")
    ways = tables["rows"]
    text = interference.barriers(
        ways, pairwise_interference.barriers(ways), facts["rows"], "the stored run"
    )
    assert f"than that are: {listed(high)}." in text


def test_the_stored_choice_by_js_is_that_of_a_loop():
    cross = stored("evidence/embedded_bert_tiny.json", "cross")
    own = {(r["seed"], r["task"]): r["accuracy"] for r in cross if r["task"] == r["model"]}
    models: dict[tuple, list] = {}
    for row in stored("evidence/embedded_bert_tiny.json", "models"):
        if row["draws"] == "task":
            models.setdefault((row["seed"], row["model"]), []).append(row)
    taken = []
    for seed in {seed for seed, _ in models}:
        some = [rows for (n, _), rows in models.items() if n == seed]
        best = min(some, key=lambda rows: sum(row["js"] for row in rows))
        taken.append(mean(row["accuracy"] / own[seed, row["task"]] for row in best))
    tables, _ = load(RESULTS / "evidence" / "embedded_bert_tiny.json")
    whole = model_selection.model_scores(tables["models"], tables["cross"])
    whole = whole[whole.draws == "task"]
    text = evidence.chosen(model_selection.selection_regret(whole), whole, "the stored run")
    assert f"JS {100 * mean(taken):.1f} %" in text


def test_what_the_page_says_of_the_papers_tables_holds():
    """The printed numbers do not change, so the sentences about them stand in the page."""
    gains = paper_reanalysis.js_and_kl()
    kind = gains.tasks + ", " + gains.level
    assert (gains.gain[gains.tasks == "generation"] > 0.5).all()
    assert gains.gain[kind == "classification, layer"].abs().max() < 0.6
    task = gains[(kind == "classification, task") & (gains.table == 6)].set_index("T").gain
    assert task[[2, 3]].abs().max() <= 0.1 and task[4] < -0.5 and task[[5, 6, 7]].min() > 0.5
    six = paper.table(6)
    others = six.drop(columns=["TL KL", "LL KL", "TL JS", "LL JS"]).loc[3:].max(axis=1)
    assert (six["LL KL"].loc[3:] > others + 3).all() and (six["LL JS"].loc[3:] > others + 3).all()
    _, means = paper_reanalysis.without_the_point()
    means = means.set_index(["divergence", "how"])
    assert (means.value > 0).all() and (means.value["JS"] > means.value["KL"]).all()
    assert (means.alone.xs("pearson", level="how") > 0.9 * means.kept["JS", "pearson"]).all()
