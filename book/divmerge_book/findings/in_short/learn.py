"""In short: the chapters that explain the method, on the experts of the stored runs."""

import math

from divmerge_book.figures import intervals_of, title
from divmerge_book.findings import SCORES, each, listed, span
from divmerge_book.findings.contests import standing
from divmerge_book.findings.in_short import Stored
from divmerge_book.findings.learn import kept
from divmerge_book.studies.objective_fits import named

MERGES = ["average", "task_arithmetic", "divmerge/task"]


def quickstart(stored: Stored) -> list[str]:
    """What three merges of two experts keep, and what is stored."""
    report = stored.report("embedded.json")
    subset = min(report.rows.subset, key=len)
    found = {name: 100 * intervals_of(report, subset, name).value for name in SCORES}
    tasks, seeds = subset.split("+"), report.rows.seed.nunique()
    best = found["kept_margin"][MERGES].idxmax()
    lost = 100 - found["kept_margin"][best]
    return [
        f"Two experts, for {listed(f'`{task}`' for task in tasks)}, are merged into one encoder: "
        f"one model is stored instead of {len(tasks)} (means over {seeds} seeds of experts).",
        "ANP is merged over expert accuracy, kept margin the same for what lies above the majority "
        f"class. Three merges keep, {kept(report, subset, MERGES)}.",
        f"The base model, with the experts' heads, has {found['anp']['base']:.1f} % by ANP and "
        f"{found['kept_margin']['base']:.1f} % by kept margin.",
        f"No merge is free: {title(best)} keeps most and loses {lost:.1f} % of the experts' lead "
        "over the majority class.",
    ]


def task_vectors(stored: Stored) -> list[str]:
    """Angles and signs of task vectors, and the price of one coefficient."""
    weights, report = stored.tables("interference/weights.json"), stored.report("embedded.json")
    pairs = weights["pairs"].query("counted == 'all'")
    trained = weights["places"].query("place != 'embeddings embedding'")
    subsets = sorted(report.rows.subset.unique(), key=len)
    kept = [100 * intervals_of(report, one, "anp").value["task_arithmetic"] for one in subsets]
    ends = [one.count("+") + 1 for one in subsets]
    return [
        f"The cosines of {weights.facts['encoder']}'s task vectors are "
        f"{span(pairs.cosine, 2, sign=True)} over all pairs of {len(weights.facts['tasks'])} tasks "
        f"and {pairs.seed.nunique()} seeds; 0 is orthogonal.",
        f"Weight decay alone moved {100 * weights['idle'].parameters.mean():.0f} % of these "
        "experts' parameters: rows of the embedding table that their texts never use.",
        f"In the other parts of the model, two tasks pull {100 * trained.conflict.mean():.0f} % of "
        f"the parameters in opposite directions (mean over parts); chance gives half.",
        f"Task arithmetic of {report.provenance['encoder']}, with the best of a few coefficients, "
        f"keeps {kept[0]:.1f} % ANP at T = {ends[0]} and {kept[-1]:.1f} % at T = {ends[-1]}.",
    ]


def divergences(stored: Stored) -> list[str]:
    """How large JS, KL and reverse KL are on real merges, and how they rank them."""
    run = stored.tables("evidence/embedded_bert_tiny.json")
    table = run["models"]
    names = ["js", "kl", "reverse_kl"]
    most = table[names].max()
    rho = table.groupby(["seed", "draws", "experts", "task"])[[*names, "accuracy"]]
    rho = rho.corr("spearman").groupby(level=4).mean()
    return [
        f"Over {len(table):,} pairs of a random merge and a task, the mean JS of its answers is at "
        f"most {most.js:.2f} nats; the bound is log 2 = {math.log(2):.2f}.",
        f"KL and reverse KL, without a bound, reach {most.kl:.1f} and {most.reverse_kl:.1f} nats.",
        f"The rank correlation of JS over merges is {rho.js.kl:.2f} with KL and "
        f"{rho.js.reverse_kl:.2f} with reverse KL (means over tasks and sets of merges).",
        "Their rank correlations with accuracy are "
        f"{each(rho.accuracy[names], '{:+.2f}', named, ', ')}.",
    ]


def objective(stored: Stored) -> list[str]:
    """Whether the objective, which sees no label, ranks merges by accuracy."""
    run = stored.tables("evidence/embedded_bert_tiny.json")
    keys, scores = ["seed", "draws", "experts", "model"], ["js", "entropy", "accuracy"]
    merges = run["models"].groupby(keys)[scores].mean()
    rho = merges.groupby(keys[:-1])[scores].corr("spearman").accuracy.unstack()
    whole = rho[rho.index.get_level_values("experts") == "all"].js
    pairs = rho.js.drop(whole.index)
    own = run["cross"].query("task == model")
    return [
        "DivMerge minimises the sum over tasks of the JS between each expert's answers and the "
        f"merged model's; an expert on its own task has {abs(own.js).max():.3f} nats.",
        f"The objective sees no label, but it ranks merges: its rank correlation with the mean "
        f"accuracy has the median {whole.median():+.2f} ({span(whole, 2, sign=True)}) over "
        f"{len(whole)} sets of random merges of all experts, and {pairs.median():+.2f} "
        f"({span(pairs, 2, sign=True)}) over {len(pairs)} of two.",
        f"The entropy of its answers, which AdaMerging minimises, has {rho.entropy.median():+.2f}.",
        "What is proved holds for the tasks' own inputs and for the value of the objective, not "
        "for accuracy: that is measured.",
    ]


def merge(stored: Stored) -> list[str]:
    """Where DivMerge stands among few baselines, on two suites."""
    lines = []
    for name in ("embedded", "glue_encoder"):
        report = stored.report(f"{name}.json")
        first, _, rest = standing(report, "the stored run").partition(". ")
        lines += [f"{first}.", rest]
    return lines
