"""Sentences about outcomes: each says one thing of one table by hand, and the other of another."""

import json
from itertools import product

import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.stored_tables import load
from divmerge_book.findings import behaviour, beyond, bullets, evidence, interference, listed, span
from divmerge_book.findings import learn as first
from divmerge_book.findings import scaling as count
from divmerge_book.published import paper, paper_reanalysis
from divmerge_book.studies import landscapes, model_selection
from divmerge_book.studies.continual_merging import BATCH
from helpers import RESULTS
from scipy.stats import spearmanr

RUN = "this run"


def holds(text: str, *said: str, unsaid: str = "no such words") -> None:
    for words in said:
        assert words in text
    assert unsaid not in text


def test_words_are_listed_and_numbers_span():
    said = {"": "none", "a": "a", "ab": "a and b", "abc": "a, b and c"}
    assert {words: listed(words) for words in said} == said
    assert span([1.02, 3.0, 2.0]) == "1.0 to 3.0" and span([1.01, 1.02]) == "1.0"
    assert span([-1.0, 1.0], 0, sign=True) == "-1 to +1"
    assert bullets(["a", "b"]) == "- a\n- b"
    assert bullets(["a\n\n- b", "c"]) == "- a\n  \n  - b\n- c", "a list in a list"


# --- the number of tasks --------------------------------------------------------------------------
def by_count(values: dict, column: str, name: str) -> pd.DataFrame:
    """A row per key of `values` and T = 2, 3, ..."""
    return pd.DataFrame(
        {name: key, "T": number, column: value}
        for key, own in values.items()
        for number, value in enumerate(own, 2)
    )


@pytest.mark.parametrize(
    ("average", "leads", "gap"),
    [
        ([0.8, 0.7], "TIES at T = 2; Average at T = 3", "to -10.0 (Average); it is negative for 2"),
        ([0.5, 0.55], "TIES at T = 2 and 3", "to +5.0 (Average); it is negative for 1 of 2"),
    ],
)
def test_the_leader_at_every_number_of_tasks_is_named(average, leads, gap):
    means = by_count({"ties": [0.9, 0.6], "average": average}, "value", "method")
    holds(count.leaders(means, RUN), "-30.0 points (TIES)", leads, gap)


@pytest.mark.parametrize(
    ("average", "said"), [([0.4, 0.8], "by 0.0, less than"), ([0.9, 0.5], "no less than")]
)
def test_paired_differences_vary_less_only_where_they_do(average, said):
    rows = {"seed": 0, "subset": ["a+0", "a+1"], "T": 2}
    parts = [pd.DataFrame({**rows, "method": "ties", "anp": [0.5, 0.9]})]
    parts.append(pd.DataFrame({**rows, "method": "average", "anp": average}))
    holds(count.paired(pd.concat(parts), RUN), said)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ([0.6, 0.9], ["50 % at $T = 2$", "`a` in a, b by TIES, 60 %"]),
        ([0.9, 0.9], [" 0 % at $T = 2$", "No merge does worse"]),
    ],
)
def test_merges_below_the_majority_are_counted_and_named(ratio, said):
    table = {"task": ["a", "b"], "subset": "a+b", "method": "ties", "T": 2, "ratio": ratio}
    floor = pd.Series({"a": 0.8, "b": 0.5})
    holds(count.below_majority(pd.DataFrame(table), floor, RUN), *said)


@pytest.mark.parametrize(
    ("methods", "end"), [(["ties"], " Not drawn beside the paper's: TL JS."), (["x"], "and TL JS.")]
)
def test_methods_of_the_paper_that_were_not_merged_are_named(methods, end):
    columns = {name: paper.METHODS_HERE[name] for name in ("TIES", "TL JS")}
    assert count.beside(paper.table(6), columns, methods).endswith(end)


@pytest.mark.parametrize(
    ("average", "scale", "said"),
    [
        ([0.9, 0.7], 0.5, ["loses 20.0 points", "has 10.0 points more", "50 % of the drop"]),
        ([0.9, 0.7], 0.1, ["has 0.0 points more", "explains 0 % of the drop"]),
        ([0.7, 0.9], 0.5, ["no drop to explain"]),
    ],
)
def test_dilution_explains_what_a_larger_coefficient_saves(average, scale, said):
    grid = by_count({False: average, True: [0.8, 0.8]}, "anp", "fixed")
    grid["scale"] = (1 / grid["T"]).mask(grid.fixed, scale)
    holds(count.dilution(grid, RUN), *said)


def test_pairs_add_up_where_their_sum_is_the_loss():
    table = pd.DataFrame({"T": [3, 3], "loss": [0.2, 0.4]})
    found = {
        "average": table.assign(sum=2 * table.loss),
        "task_arithmetic": table.assign(sum=table.loss[::-1].to_numpy()),
    }
    said = "add up for: Task arithmetic. They do not for: Average."
    holds(count.added_up(found, RUN), "Average 2.0; Task arithmetic 1.0", said)
    none = {"average": table[:0].assign(sum=[])}
    holds(count.added_up(none, RUN), "merged no three tasks")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ([-0.5, -0.1, 0.0], ["`a` is number 1 of 3 by its own loss; `a` loses most"]),
        ([0.0, -0.1, -0.5], ["3 of 3 by its own loss; `c` loses most", "is number 3 by harm"]),
        ([-0.5, None, 0.0], ["`a` is number 1 of 2 by its own loss"]),
        ([-0.5, None, None], ["too few tasks count in the ANP"]),
    ],
)
def test_who_harms_and_who_loses_may_be_one_task_or_two(own, said):
    table = pd.DataFrame({"task": list("abc"), "marginal_effect": [-0.3, -0.1, 0.0]})
    table["own_change"] = pd.Series(own, dtype=float)
    holds(count.effects({"ties": table}, RUN), *said, unsaid="nan")


# --- beyond one vector ----------------------------------------------------------------------------
def arrivals(gap: float) -> pd.DataFrame:
    rows = [{"method": name, "order": -1, "ratio": 0.8, "bwt": None} for name in BATCH.values()]
    rows += [
        {"method": name, "order": n, "ratio": 0.8 + gap * (name == "opcm"), "bwt": -0.1 * place}
        for n in range(2)
        for place, name in enumerate(BATCH)
    ]
    return pd.DataFrame(rows).astype({"bwt": float})


@pytest.mark.parametrize(
    ("gap", "said"),
    [(-0.1, "OPCM (-10.0); these are not: "), (0.1, "none; these are not: OPCM (+10")],
)
def test_a_continual_rule_is_behind_only_where_it_is(gap, said):
    holds(beyond.arriving(arrivals(gap), RUN), f"these rules are worse (points): {said}")


@pytest.mark.parametrize(
    ("best", "said"),
    [("running_average", "Running average, 40.0 %, with 3.0"), ("opcm", "OPCM, 40.0 %")],
)
def test_the_highest_kept_margin_of_a_continual_rule_is_named(best, said):
    found = arrivals(0.1).assign(below=3)
    found["kept_margin"] = found.method.map({best: 0.4}).fillna(0.2)
    holds(beyond.arriving(found, RUN), f"kept margin of a continual rule is that of {said}")


def test_the_mixture_is_above_other_groupings_by_each_score_that_is_stored():
    rows = [("dp_mixture", 2, 0.9), ("k_means", 2, 0.8), ("random", 2, 0.7)]
    rows += [("k_means", models, 1.0) for models in (1, 3)]
    table = pd.DataFrame(rows, columns=["how", "models", "anp"])
    table["groups"] = table.how + table.models.astype(str)
    lower = table.replace({"anp": {0.9: 0.75}})
    missing = "no accuracies by task, so no kept margin"
    holds(beyond.mixture(table, RUN), "above k-means for 1 of 1", missing)
    holds(beyond.mixture(lower, RUN), "above k-means for 0 of 1")
    both = "mean ANP is above k-means for 1 of 1", "mean kept margin is above k-means for 0 of 1"
    text = beyond.mixture(table.assign(kept_margin=-table.anp), RUN)
    holds(text, *both, unsaid="no kept margin")


def pool(policy: float, control: float, merged: float) -> pd.DataFrame:
    rows = {"policy": (policy, merged), "shuffled": (control, 0.7)}
    rows |= {"all": (None, 0.8), "oracle": (None, 0.9)}
    return pd.DataFrame(
        {"method": name, "auc": auc, "anp": anp, "share": share, "kind": "flip", "calls": 12}
        for name, (auc, anp) in rows.items()
        for share in (0.2, 0.4)
    )


def test_a_ranking_must_beat_the_shuffled_one_and_a_merge_that_of_all():
    good, poor = pool(0.9, 0.5, 0.85), pool(0.5, 0.6, 0.75)
    merges = "mean ANP of merging all 80.0 %, the policy's choice 85.0 %"
    holds(beyond.detected(good, RUN), "every share: learned policy (0.90); not: none", merges)
    holds(beyond.detected(poor, RUN), "every share: none; not: learned policy (0.50)")
    said = "merging all for sign flip, and than honest experts alone for no kind"
    holds(beyond.paid_off(good, RUN), said)
    holds(beyond.paid_off(poor, RUN), "merging all for no kind of corruption")


def found_by(test: float) -> pd.DataFrame:
    rows = {"search": ["random", "expert"], "test": [test, 0.8], "gap": [0.9 - test, 0.1]}
    return pd.DataFrame({**rows, "seed": 0, "rows": 32, "call": 5, "validation": 0.9})


def test_searches_beat_the_experts_only_where_they_do():
    for test, beaten in ((0.85, 1), (0.75, 0)):
        holds(beyond.searched(found_by(test), RUN), f"{beaten} of 1 searches beat the experts")


def test_more_rows_are_compared_at_the_same_seeds():
    few, more = found_by(0.7), found_by(0.85).assign(rows=128)
    table = pd.concat([few, few.assign(seed=1, gap=0.9), more], ignore_index=True)
    said = "smaller for 1 of 1 searches (+20.0 becomes +5.0 points)"
    holds(beyond.searched(table, RUN), said)


@pytest.mark.parametrize(
    ("small", "gain", "better"), [(0.8, "+5.0", "*proxy, own*"), (0.87, "-2.0", "none")]
)
def test_fusion_is_better_than_the_small_experts_only_where_it_is(small, gain, better):
    rows = {"large base": 0.4, "small expert": small, "large expert": 0.9, "proxy, own": 0.85}
    table = pd.DataFrame(rows.items(), columns=["model", "accuracy"])
    text = beyond.steered(table.assign(milliseconds=1.0, task="a"), RUN)
    holds(text, f"{gain} points", f"than the small experts: {better}.")


@pytest.mark.parametrize(
    ("anp", "slower", "small", "blind", "slow"),
    [
        ([0.7, 0.9, 0.8], [1, 14, 3], "EMR-Merging 80.0", "Twin-Merging 90.0", "Twin-Merging 14.0"),
        ([0.95, 0.9, 0.8], [9.0, 2, 3], "Average 95.0", "Average 95.0", "Average 9.0"),
    ],
)
def test_the_best_by_bytes_and_the_slowest_are_found(anp, slower, small, blind, slow):
    names = {"method": ["average", "twin", "emr"], "finds": ["one", "input", "task"]}
    table = pd.DataFrame({**names, "models": [1.0, 1.8, 1.2], "slower": slower, "anp": anp})
    (best, top), (other, rest) = small.split(), blind.split()
    said = f"{best} has the highest ANP in this run: {top} %", f"{other} has the highest: {rest} %"
    holds(beyond.stored_well(table, RUN), *said)
    assert beyond.slowest(table, RUN).split(": ")[1].startswith(slow)


# --- divergence and success -----------------------------------------------------------------------
def test_experts_on_other_tasks_are_held_against_the_majority():
    cross = pd.DataFrame({"task": list("aabb"), "model": list("abab"), "accuracy": [0.9] * 4})
    majority = pd.Series({"a": 0.95, "b": 0.5})
    text = evidence.crossed(cross, majority, RUN)
    holds(text, "50 % of the accuracies", "They all are on `a`.")
    holds(evidence.crossed(cross, majority - 0.5, RUN), "They all are on no task.")


def correlations(js: float, entropy: float, best: float = 0.0) -> pd.DataFrame:
    values = {"js": js, "entropy": entropy, "kl": 0.1, "reverse_kl": 0.2}
    return pd.DataFrame(
        {"sampler": "task", "among": among, "how": "spearman", "goal": goal, "criterion": name}
        | {"value": values[name] + best * (among != "all")}
        for name, among, goal in product(values, ("all", "best half"), ("task", "sum"))
    )


def test_the_leading_measure_is_the_one_with_the_highest_correlation():
    said = "JS in 2 of 2 rows (JS above entropy in 2)"
    holds(evidence.leading(correlations(0.9, 0.5), RUN), said)
    holds(evidence.leading(correlations(0.3, 0.5), RUN), "entropy in 2 of 2 rows")


def test_ranks_of_another_suite_are_those_of_its_file():
    """By scipy: a mean over tasks of one seed's merges drawn per task."""
    path = RESULTS / "evidence" / "glue_encoder_minilm.json"
    models = load(path)[0]["models"].query("sampler == 'task'")
    by = [spearmanr(-t.js, t.accuracy)[0] for _, t in models.groupby("task")]
    text = evidence.ranked_elsewhere(path)
    assert f"| all experts, per task: all | {sum(by) / len(by):.2f} |" in text
    assert "`minilm`" in text and evidence.ranked_elsewhere(path / "none") == ""


# --- interference ---------------------------------------------------------------------------------
def ways_to_cost(sms: float, other: float, shuffled: float = 0.0) -> pd.DataFrame:
    cost = {"sms": sms, "trec": other, "bbc": other}
    others = {"shuffled": shuffled, "averaged": 0.2, "halved": 0.1}
    return pd.DataFrame(
        {"rule": rule, "task": task, "other": added, "accuracy": js / 2, "js": js, "seed": 0}
        for added, task in product(cost, cost)
        if task != added
        for rule, js in {"added": cost[added], **others}.items()
    )


def test_the_expert_that_costs_most_is_named_with_the_next():
    said = "added is `sms` (0.300 nats on average), then `trec` (0.100)"
    holds(interference.asymmetric(ways_to_cost(0.3, 0.1), RUN), said)
    said = "added is `trec` (0.200 nats on average)", "least `sms` (0.100)"
    holds(interference.asymmetric(ways_to_cost(0.1, 0.2), RUN), *said)


def test_direction_or_length_may_cost():
    small, large = (ways_to_cost(0.3, 0.3, shuffled) for shuffled in (0.01, 0.29))
    said = "direction of the other vector costs more", "costs 50 % of that"
    holds(interference.causes(small, RUN), *said)
    holds(interference.causes(large, RUN), "length alone explains half")


@pytest.mark.parametrize(("conflict", "near"), [(0.49, "near"), (0.3, "not near")])
def test_signs_are_near_a_coins_only_where_they_are(conflict, near):
    pairs = {"counted": ["all", "touched"], "conflict": [0.2, conflict], "cosine": 0.0}
    idle = pd.DataFrame({"task": ["a"], "parameters": [0.8], "length": [0.0]})
    text = interference.counted(pd.DataFrame(pairs), idle, RUN)
    holds(text, f"{conflict:.2f} without idle rows, {near} the 0.5 of random signs")


def test_stable_ranks_are_compared_by_answers():
    table = pd.DataFrame({"stable": [1.1, 1.3, 3.0], "answers": [2, 2, 6]})
    holds(interference.ranks(table, RUN), ", above all of those")
    holds(interference.ranks(table.assign(stable=[1.1, 3.3, 3.0]), RUN), "not above all")
    holds(interference.ranks(table[:2], RUN), unsaid="more answers")


@pytest.mark.parametrize(("middle", "named", "share"), [(0.5, "a+b (30.0)", 0), (0.9, "none", 100)])
def test_barriers_are_named_where_they_exceed_the_noise(middle, named, share):
    rows = {"seed": 0, "pair": "a+b", "task": "a", "at": [0.0, 0.5, 1.0], "nll": 1.0}
    rows = pd.DataFrame({**rows, "accuracy": [0.8, middle, 0.8]})
    text = interference.barriers(rows, landscapes.barriers(rows), 100, RUN)
    holds(text, f"than that are: {named}.", f"In {share} % of pairs")


@pytest.mark.parametrize(
    ("anp", "place", "both"),
    [([0.1, 0.9, 0.8, 0.4], "(0.00, 1.00)", 40), ([0.1, 0.3, 0.8, 0.9], "(1.00, 1.00)", 90)],
)
def test_the_best_point_of_a_plane_may_lie_on_the_diagonal_or_off_it(anp, place, both):
    grid = {"pair": "a+b", "l1": [0, 0, 1, 1], "l2": [0, 1, 0, 1], "js": [3, 2, 1, 4], "anp": anp}
    text = interference.plane(pd.DataFrame(grid), "a+b", RUN)
    said = f"has 90.0 % at {place}, the best with one scale for both {both}.0 %"
    holds(text, said, "lowest JS 80.0 %; 25 % of the grid", "no kept margin")
    grid = pd.DataFrame(grid).assign(kept_margin=[-1.0, 0.2, 0.7, 0.4])
    text = interference.plane(grid, "a+b", RUN)
    holds(text, "by kept margin, in this run the best point of the grid has 70.0 % at (1.00")


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (0.2, ["-10.0 points (intervals do not overlap)", "behind the average on: no task"]),
        (0.31, ["+1.0 points (intervals overlap)", "behind the average on: `a`"]),
    ],
)
def test_losses_differ_where_their_intervals_do_not_overlap(ours, said):
    rows = {"model": ["average", "divmerge/layer"], "task": "a", "lost": [0.3, ours], "gained": 0.1}
    turns = pd.DataFrame(rows).assign(net=lambda t: t.gained - t.lost)
    ends = turns.melt("model", ["lost", "gained"], var_name="what", value_name="value")
    ends = ends.assign(low=ends.value - 0.02, high=ends.value + 0.02)
    holds(behaviour.churn(turns, ends, RUN), *said, "the gains by +0.0 (intervals overlap)")


def test_calibration_is_ranked_pooled_and_by_task():
    models = ["expert", "average", "task_arithmetic", "divmerge/layer"]
    states = {"model": models, "seed": 0, "accuracy": 0.8, "confidence": 0.9}
    states |= {"ece": [0.01, 0.1, 0.2, 0.05], "uneven": [0.01, 0.05, 0.2, 0.1]}
    holds(
        behaviour.calibrated(pd.DataFrame(states), RUN),
        "first: Experts, one per task 1.0; DivMerge, per layer 5.0; Average 10.0",
        "by: Experts, one per task 1.0; Average 5.0; DivMerge, per layer 10.0",
    )


@pytest.mark.parametrize(("cosine", "answers"), [(0.01, 0.2), (0.2, 0.01)])
def test_a_number_predicts_after_correction_or_does_not(cosine, answers):
    row = {"view": "pair", "method": "ties", "damage": "drop", "rho": 0.8, "p": 0.01}
    numbers = {"number": ["cosine", "answers"], "p_max": [cosine, answers], "threshold": 0.7}
    found = pd.DataFrame({**row, **numbers})
    said = f"{int(cosine < 0.05)} of 1 are significant"
    holds(behaviour.predictors(found, RUN), said)
    said = f"{int(answers < 0.05)} of its 1 correlations", "100 % of the latter have the unexpected"
    holds(behaviour.reference(found, RUN), *said)


@pytest.mark.parametrize(("p", "said"), [(0.01, "not with: nothing"), (0.5, "with: nothing; not")])
def test_coefficients_follow_what_is_significant(p, said):
    row = {"view": "within", "count": 8, "grouping": "block", "clue": "js", "rho": 0.7}
    found = pd.DataFrame([{**row, "low": 0.1, "high": 0.9, "p_max": p}])
    holds(behaviour.coefficient_covariates(found, RUN), said, "the JS of the average per block")


# --- what the summaries print of the stored tables, recomputed from the files with plain loops ----
def stored(path: str, table: str) -> list[dict]:
    columns = json.loads((RESULTS / path).read_text("utf-8"))["tables"][table]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def mean(values) -> float:
    found = list(values)
    return sum(found) / len(found)


def test_the_stored_choice_by_js_is_that_of_a_loop():
    cross = stored("evidence/embedded_bert_tiny.json", "cross")
    own = {(r["seed"], r["task"]): r["accuracy"] for r in cross if r["task"] == r["model"]}
    models: dict[int, dict] = {}
    for row in stored("evidence/embedded_bert_tiny.json", "models"):
        if row["draws"] == "task":
            models.setdefault(row["seed"], {}).setdefault(row["model"], []).append(row)
    taken = []
    for seed, some in models.items():
        best = min(some.values(), key=lambda rows: sum(row["js"] for row in rows))
        taken.append(mean(row["accuracy"] / own[seed, row["task"]] for row in best))
    tables, _ = load(RESULTS / "evidence" / "embedded_bert_tiny.json")
    models = tables["models"].rename(columns={"draws": "sampler"})
    whole = model_selection.model_scores(models, tables["cross"])
    whole = whole[whole.sampler == "task"]
    text = evidence.chosen(model_selection.selection_regret(whole), whole, "the stored run")
    holds(text, f"JS {100 * mean(taken):.1f} %")


def test_what_the_page_says_of_the_papers_tables_holds():
    """The printed numbers do not change, so the sentences about them stand in the page."""
    gains = paper_reanalysis.js_and_kl()
    kind = gains.tasks + ", " + gains.level
    assert (gains.gain[gains.tasks == "generation"] > 0.5).all()
    assert gains.gain[kind == "classification, layer"].abs().max() < 0.6
    task = gains[(kind == "classification, task") & (gains.table == 6)].set_index("T").gain
    assert task[[2, 3]].abs().max() <= 0.1 and task[4] < -0.5 and task[[5, 6, 7]].min() > 0.5
    six = paper.table(6).loc[3:]
    others = six.drop(columns=["TL KL", "LL KL", "TL JS", "LL JS"]).max(axis=1)
    assert (six["LL KL"] > others + 3).all() and (six["LL JS"] > others + 3).all()
    _, means = paper_reanalysis.without_the_point()
    means = means.set_index(["divergence", "how"])
    assert (means.value > 0).all() and (means.value["JS"] > means.value["KL"]).all()
    assert (means.alone.xs("pearson", level="how") > 0.9 * means.kept["JS", "pearson"]).all()


# --- the chapters that explain the method ---------------------------------------------------------
def test_the_summaries_of_the_first_chapters_say_what_a_run_gave():
    ratio = pd.DataFrame({"a": [90.0, 100.0], "b": [100.0, 80.0]}, index=[0.5, 1.0])
    text = first.task_vectors(
        torch.tensor([[0.01, 0.02]]), pd.Series([-0.1, 0.2]), {"all": 0.5}, {("a", "b"): ratio}
    )
    holds(text, "1.0 to 2.0 %", "-0.10 to +0.20", "50 % (all)", "coefficient, 0.5, keeps 95.0 %")
    holds(text, "`a`, loses 10.0 points")
    values = {"kl": torch.tensor([7.0, 0.0]), "js": torch.tensor([0.5, 0.0])}
    text = first.divergences(torch.tensor([-8.0, 1.0]), values, values, 0.95)
    holds(text, "log-odds -8", "KL 7.00 nats, JS 0.50 nats", "JS pulls hardest at log-odds -8.0")
    rows = pd.MultiIndex.from_product([["js"], ["start", "end of Adam", "grid minimum"]])
    columns = ["task 1", "task 2", "objective (nats)", "right answers"]
    table = pd.DataFrame([[0.5, 0.5, 0.9, 0.7], [1, 1, 0.4, 0.8], [1, 1, 0.3, 0.8]], rows, columns)
    holds(first.objective(table, {"js": 0.25}), "0.900 to 0.400", "70.0 to 80.0 %", "in 25 %")
    aims = pd.DataFrame({"aim": [0.8, 2.0], "reached": [0.9, 1.5]}, index=["merge", "step"])
    dtypes = pd.Index(["float32", "int8"])
    stored = pd.DataFrame({"JS to float32": [0, 0.01], "JS to the experts": [0.2, 0.2]}, dtypes)
    text = first.kernel(aims, stored, RUN)
    holds(text, "1 of 2 aims", "merge: 0.90 (0.8)", "nats of JS: int8 0.01;", "is 0.2 nats")


def test_components_are_compared_with_task_vectors_over_merge_and_gradient():
    """(3 + 6) / (1 + 2) at T = 2, and (2 + 2) / (4 + 4) at T = 8."""
    rows = [(2, "ours", 1.0), (2, "ours", 2.0), (2, "tsv:2", 3.0), (2, "tsv:2", 6.0)]
    rows += [(8, "ours", 4.0), (8, "ours", 4.0), (8, "tsv:2", 2.0), (8, "tsv:2", 2.0)]
    table = pd.DataFrame(rows, columns=["tasks", "contestant", "milliseconds"])
    holds(first.components(table, RUN), "takes, at T = 2: 3.0, at T = 8: 0.5 times as long")
