"""In short: the chapters that draw tables of studies."""

import pandas as pd

from divmerge_book.evaluation.statistics import mean_interval
from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.figures import title
from divmerge_book.figures.protocol import SETTINGS
from divmerge_book.findings import count, each, listed, paper, span
from divmerge_book.findings import evidence as evidence_of
from divmerge_book.findings import protocol as settled
from divmerge_book.findings.in_short import Stored
from divmerge_book.findings.scaling import dilution
from divmerge_book.published import paper_reanalysis
from divmerge_book.studies import choice as divergences
from divmerge_book.studies import (
    landscapes,
    mergeability,
    model_selection,
    prediction_churn,
    predictions,
    robustness,
    scores,
)
from divmerge_book.studies.objective_fits import named
from divmerge_book.studies.protocol import COLUMNS

OURS = "divmerge/layer"
LEVEL = 0.05  # of corrected p-values
COSTS = [(kind, objective) for kind in ("wrong", "none") for objective in ("js", "kl")]


def choice(stored: Stored) -> list[str]:
    """Whether another divergence than JS changes a merge, and what JS does not do."""
    run = predictions.scored(stored.tables("choice/ablation.json"), {}, divergences.summary)
    found = run["scores"].query("search == 'searched'").dropna(subset=["difference"])
    own = found[found.objective != "js"]
    mean = 100 * own.groupby("objective").difference.mean()
    better = own[(own.holm < LEVEL) & (own.difference > 0)]
    harm = predictions.scored(stored.tables("choice/strains.json"), {}, robustness.corruption_costs)
    cost = 100 * harm["rows"].groupby(["kind", "objective", "seed"]).cost.mean()
    said = {k: f"{cost[k].mean():+.1f} ({span(cost[k], sign=True)})" for k in COSTS}
    way = stored.tables("choice/courses.json")["rows"]
    even = divergences.balance(way[way.kind == "none"]).query("objective == 'js'")
    fits = divergences.disagreement(way[way.kind == "none"]).query("objective == 'js'")
    return [
        f"Of {len(own)} differences in ANP between another objective and JS, "
        f"{(own.holm < LEVEL).sum()} are significant after correction, {len(better)} of them in "
        "favour of the other objective.",
        f"Mean differences from JS range from {mean.min():+.1f} points ({named(mean.idxmin())}) to "
        f"{mean.max():+.1f} ({named(mean.idxmax())}).",
        "Against a merge without it, an expert with surely wrong answers costs the other tasks "
        f"{said['wrong', 'js']} points of ANP under JS and {said['wrong', 'kl']} under KL; an "
        f"unchanged one {said['none', 'js']} and {said['none', 'kl']}: means over "
        f"{count(len(cost['none', 'js']), 'expert')} (lowest to highest).",
        f"JS does not balance the tasks: gradient norms of {even.tasks.iloc[0]:.0f} tasks are as "
        f"uneven as if {even.effective_tasks.mean():.2f} had equal ones and the others none.",
        "During a fit by JS, falling loss and validation ANP correlate (ranks) by "
        f"{fits.correlation.mean():.2f} ({fits.records.max()} records, {len(fits)} seeds).",
    ]


def leader(per: pd.DataFrame, means: pd.Series) -> str:
    """The first method at one T and its lead over the next; per: of `scores.by_subset`."""
    first, second = means.nlargest(2).index
    own = per[per["T"] == means.name]
    several = own.subset.nunique() > 1
    own = (scores.first_seed(own) if several else own).set_index(["subset", "seed", "method"])
    own, mean = 100 * own.anp, 100 * own.groupby("method").anp.mean()
    lead = (own.xs(first, level="method") - own.xs(second, level="method")).to_numpy()
    return (
        f"at T = {means.name} {title(first)} with {mean[first]:.1f} % (Average: "
        f"{mean['average']:.1f} %), {lead.mean():+.1f} points from {title(second)} (95 % over "
        f"{count(len(lead), 'subset' if several else 'seed')}: "
        f"{span(mean_interval(lead), sign=True)})"
    )


def scaling(stored: Stored) -> list[str]:
    """What is lost as more tasks are merged, by which methods, and what explains it."""
    run, fixed = (stored.tables(f"scaling/{name}.json") for name in ("sample", "scales"))
    rows = run["answers"]
    per = scores.by_subset(scores.ratios(rows, rows))
    wide = 100 * scores.over_subsets(per).pivot(index="method", columns="T", values="value")
    low, high = min(wide), max(wide)
    best = [leader(per, wide[n]) for n in (low, high)]
    drop = wide[low] - wide[high]
    most, least = drop.idxmax(), drop.idxmin()
    glue = stored.tables("scaling/glue_encoder_minilm/sample.json")["answers"]
    counted = scores.floor(glue).index
    of_glue = scores.by_subset(scores.ratios(glue, glue))
    other = 100 * scores.over_subsets(of_glue).pivot(index="method", columns="T", values="value")
    there = [leader(of_glue, other[n]) for n in (min(other), max(other) - 1)]
    grid = scores.by_scale(fixed["curves"].assign(method="task_arithmetic"), rows)
    spread = scores.spreads(rows).dropna().query("T == @low").groupby("source").sd
    noise = {name: 100 * (values**2).mean() ** 0.5 for name, values in spread}
    return [
        f"Of {len(wide)} methods with {run.facts['budget']} candidates each, fewer than in All "
        f"baselines, the one of highest ANP is {listed(best)}.",
        f"On subsets of GLUE's tasks with MiniLM, of which {listed(counted)} count, it is, of "
        f"{len(other)} methods, {listed(there)}.",
        f"From T = {low} to {high} the ANP changes by {-drop[most]:+.1f} points ({title(most)}) to "
        f"{-drop[least]:+.1f} ({title(least)}, which starts from {wide[low][least]:.1f} %).",
        f"At T = {low}, the standard deviation of a method's ANP over subsets of tasks is "
        f"{noise['subsets']:.1f} points, over seeds {noise['seeds']:.1f}, over test rows "
        f"{noise['test rows']:.1f}.",
        dilution(grid, "the stored run"),
    ]


def ranks(run: ResultTable) -> str:
    """Rank correlations of divergences with the ANP, over merges drawn per task."""
    merges = run["models"].rename(columns={"draws": "sampler"})
    mean = evidence_of.spearman(model_selection.over_models(merges, run["cross"])[1], goal="sum")
    own = mean[(mean.sampler == "task") & (mean.among == "all")].set_index("criterion").value
    said = each(own[["reverse_kl", "js", "kl"]].sort_values()[::-1], "{:.2f}", evidence_of.NAMES)
    return f"{said} (`{run.facts['suite']}`, `{run.facts['encoder']}`)"


def least(run: ResultTable) -> str:
    """The ANP of merges drawn per task that least JS chooses, beside other choices."""
    merges, facts = run["models"].rename(columns={"draws": "sampler"}), run.facts
    whole = model_selection.model_scores(merges, run["cross"]).query("sampler == 'task'")
    table = model_selection.choices(whole).pivot(index="seed", columns="criterion", values="anp")
    gap, mean = 100 * (table.js - table.validation).to_numpy(), 100 * table.mean()
    low, high = mean_interval(gap)
    return (
        f"{mean.js:.1f} % (least entropy {mean.entropy:.1f}, best score on "
        f"{facts['validation_rows']} labels a task {mean.validation:.1f}, mean of all "
        f"{mean.none:.1f}; JS minus labels {gap.mean():+.1f} [{low:+.1f}, {high:+.1f}] points; "
        f"`{facts['suite']}`, `{facts['encoder']}`)"
    )


def evidence(stored: Stored) -> list[str]:
    """What the paper's correlations show, and what divergences tell of merged models."""
    names = ("embedded_bert_tiny", "glue_encoder_minilm")
    run, glue = (stored.tables(f"evidence/{name}.json") for name in names)
    table, means = paper_reanalysis.without_the_point()
    mean = means.set_index(["divergence", "how"]).loc[("JS", "pearson")]
    return [
        f"The paper supports its objective with correlations over seven experts, one of which is "
        f"the task's own. {paper.inside(table)} Without it, the mean correlation for JS falls from "
        f"{mean.kept:.2f} to {mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}].",
        paper.js_and_kl(paper_reanalysis.js_and_kl()).partition(" Not ahead")[0],
        f"Of {glue.facts['models']} random merges a seed with a coefficient per task, that of "
        f"least JS on unlabelled inputs has a test ANP of {least(run)}; {least(glue)}.",
        f"Rank correlations with the ANP over such merges, of minus each divergence: {ranks(run)}; "
        f"{ranks(glue)}.",
    ]


def protocol(stored: Stored) -> list[str]:
    """Which settings of a fit matter, and how many inputs and passes it needs."""
    settings = predictions.scored(stored.tables("protocol/settings.json"), COLUMNS)
    inputs = predictions.scored(stored.tables("protocol/inputs.json"), COLUMNS)
    run = stored.tables("protocol/optimisers.json")
    ends, last = run["ends"], run["ends"].query("optimizer == 'lbfgs'").iloc[-1]
    one, source, rows = ["anp"], "the stored run", settings["changed"].query("setting != 'default'")
    order = rows.sort_values("difference")
    low, high = (
        f"{SETTINGS[row.setting]} {row.value}, per {row.grouping} ({settled.gap(row)} points)"
        for row in (order.iloc[0], order.iloc[-1])
    )
    return [
        f"{len(predictions.significant(rows))} of {len(rows)} changes of start, step size or "
        f"epochs change the ANP significantly (Holm's correction); the most "
        f"harmful is {low}, the best {high}.",
        settled.readings(settings["kinds"], settings["read"], one, source),
        settled.needed(inputs["needed"], one, source),
        settled.shifted(inputs["wrong"], one, source),
        f"{settled.optimisers(ends, source)} With {last.tasks} tasks, {run.facts['pool']} inputs "
        f"each, per {last.grouping}, the ANP of L-BFGS minus Adam's is {settled.gap(last)} points.",
    ]


def interference(stored: Stored) -> list[str]:
    """Where task vectors conflict, and whether conflict predicts what a merge loses."""
    weights = stored.tables("interference/weights.json")
    mean = weights["pairs"].groupby("counted").conflict.mean()
    shares = 100 * weights["idle"].groupby("task").parameters.mean()
    shared = weights["overlap"].query("within == 'tensor'").groupby("share").overlap.mean()
    overlap = [f"{100 * v:.1f} % of their largest {100 * cut:.0f} %" for cut, v in shared.items()]
    found = stored.tables("interference/prediction.json")["correlations"].dropna(subset=["rho"])
    some, inputs = found.p_max <= LEVEL, found.number.isin(mergeability.INPUTS)
    limit = found[~inputs].groupby("view").threshold.max()
    both = inputs & (found.rho.abs() >= found["view"].map(limit))
    table = stored.tables("interference/coefficients.json")["followed"]
    last = table[(table["view"] == "within") & (table["count"] == table["count"].max())]
    row = last[last.clue == "conflict"].iloc[0]
    return [
        f"Weight decay alone changed {span(shares, 0)} % of a task vector's entries. Over all "
        f"entries the mean sign conflict is {mean['all']:.2f}; without those it is "
        f"{mean['touched']:.2f}, and random signs give 0.5.",
        f"Within a tensor, two tasks share {listed(overlap)} of entries on average; chance gives "
        f"{listed(f'{100 * cut:.0f} %' for cut in shared.index)}.",
        f"Of {(~inputs).sum()} correlations between a number of the weights and the damage of a "
        f"merge, {(some & ~inputs).sum()} are significant after correction; of {inputs.sum()} with "
        f"the JS on a few unlabelled inputs, {both.sum()} are above the same threshold.",
        f"Within groups, the rank correlation of DivMerge's coefficients per {row.grouping} with "
        f"sign conflict is {row.rho:+.2f} [{row.low:+.2f}, {row.high:+.2f}] at T = {row['count']}.",
    ]


def answers(stored: Stored) -> list[str]:
    """What experts cost each other, and which rows and how much calibration a merge loses."""
    costs = stored.tables("interference/costs.json")["rows"]
    js, rule = landscapes.matrix(costs, "added", "js"), costs.groupby("rule").js.mean()
    ways = stored.tables("interference/segments.json")["rows"]
    over = 100 * landscapes.barriers(ways).groupby("pair").error_chord.mean()
    table = stored.tables("interference/answers.json")["rows"]
    turns = 100 * prediction_churn.churn_by_task(table).groupby("model")[["lost", "gained"]].mean()
    states = prediction_churn.calibration_table(table, draws=1)
    ece = 100 * states.groupby("model").ece.mean()
    sure = [f"{title(n)} {ece[n]:.1f}" for n in ("expert", "average", "task_arithmetic", OURS)]
    return [
        f"Added to another expert, `{js.mean().idxmax()}` costs most ({js.mean().max():.3f} nats "
        f"of JS on average), and `{js.mean(axis=1).idxmax()}` is the task that loses most "
        f"({js.mean(axis=1).max():.3f} nats).",
        f"A shuffled vector of the same length costs {rule.shuffled:.4f} nats and the real one "
        f"{rule.added:.4f}. Half of the own vector with nothing added costs "
        f"{100 * rule.halved / rule.averaged:.0f} % of what an average of two costs.",
        f"On the line between two experts the error rises {span(over)} points above the straight "
        f"line between its ends, mean {over.mean():.1f} over {len(over)} pairs.",
        f"The average of all experts loses {turns.lost['average']:.1f} % of the test rows and "
        f"gains {turns.gained['average']:.1f} %; DivMerge per layer loses {turns.lost[OURS]:.1f} % "
        f"and gains {turns.gained[OURS]:.1f} %.",
        f"Expected calibration error in points: {listed(sure)}.",
    ]
