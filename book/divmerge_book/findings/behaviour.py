"""Findings on answers, layers, forecasts and coefficients of merged models."""

import pandas as pd

from divmerge_book.evaluation.statistics import format_correlation
from divmerge_book.figures import title
from divmerge_book.figures.conflict import COVARIATES
from divmerge_book.findings import each, listed, span
from divmerge_book.studies import mergeability
from divmerge_book.studies.mantel import VIEWS
from divmerge_book.studies.prediction_churn import MERGES

PLAIN, OURS, SUMS = "average", "divmerge/layer", "task_arithmetic"
LEVEL = 0.05  # of corrected p-values


def layers(depth: pd.DataFrame, source: str) -> str:
    """How similar last layers are, and the common share of a shift; depth: `layer_similarity`."""
    mean = depth.groupby(["layer", "model"])[["cka", "common"]].mean()
    first, end = mean.loc[0], mean.loc[depth.layer.max()]
    merged, low = end.cka[[name for name in MERGES if name in end.index]], end.cka["base"]
    return (
        f"In {source}, at the last layer, the base has a CKA of {low:.2f} with the expert; of the "
        f"merges, {title(merged.idxmax())} has the highest, {merged.max():.2f}: "
        f"{100 * (merged.max() - low) / (1 - low):.0f} % of the way to the expert. "
        f"{100 * first.common.mean():.0f} % of the squared shift of the embeddings is the same for "
        f"all inputs, and {100 * end.common.mean():.0f} % of the last layer's."
    )


def layers_and_losses(depth: pd.DataFrame, turns: pd.DataFrame, source: str) -> str:
    """Rank correlations over tasks of the last layer's numbers with the net change in accuracy.

    depth: of `layer_similarity`; turns: of `churn_by_task`.
    """
    stay = depth[(depth.layer == depth.layer.max()) & depth.model.isin(MERGES)]
    stay, columns = stay.merge(turns, on=["seed", "model", "task"]), ["cka", "shift", "common"]
    rho = stay.groupby(["seed", "model"])[[*columns, "net"]].corr("spearman").net
    words = {"cka": "CKA", "shift": "shift", "common": "share of the shift common to all inputs"}
    rho, count = rho.groupby(level=2).mean()[columns].map(format_correlation), stay.task.nunique()
    best = stay.groupby("model")[["cka", "net"]].mean().idxmax().map(title)
    return (
        "Rank correlation over tasks of the last layer's number with the change in accuracy, mean "
        f"over merges and seeds, in {source}: {each(rho, '{}', words, ', ')}. With {count} tasks, "
        f"one such correlation has a standard error of about {1 / (count - 1) ** 0.5:.2f}. Between "
        f"merges: {best.cka} has the highest mean CKA, {best.net} the highest accuracy."
    )


def churn(turns: pd.DataFrame, spread: pd.DataFrame, source: str) -> str:
    """What the average and DivMerge per layer lose and gain, and whether their intervals overlap.

    turns: of `churn_by_task`; spread: of `churn_intervals`.
    """
    mean = 100 * turns.groupby("model")[["lost", "gained"]].mean()
    plain, ours, gap = mean.loc[PLAIN], mean.loc[OURS], mean.loc[OURS] - mean.loc[PLAIN]
    net = turns.groupby(["task", "model"]).net.mean().unstack()
    behind = [f"`{task}`" for task in net.index[net[OURS] < net[PLAIN]]]
    ends = spread[spread.model.isin([PLAIN, OURS])].groupby("what")
    apart = (ends.low.max() > ends.high.min()).map(
        {True: "intervals do not overlap", False: "intervals overlap"}
    )
    return (
        f"In {source} the average loses {plain.lost:.1f} % of all rows and gains "
        f"{plain.gained:.1f} %; DivMerge per layer loses {ours.lost:.1f} % and gains "
        f"{ours.gained:.1f} %. The losses differ by {gap.lost:+.1f} points ({apart.lost}), the "
        f"gains by {gap.gained:+.1f} ({apart.gained}). DivMerge per layer is behind the average "
        f"on: {listed(behind, 'no task')}."
    )


def losses_by_margin(doubt: pd.DataFrame, source: str) -> str:
    """Losses on the rows with the largest and the smallest margin; doubt: `flips_by_margin`."""
    parts = doubt.set_index("model").groupby("part")
    least, most = parts.get_group(doubt.part.min()), parts.get_group(doubt.part.max())
    lines = [
        f"{title(m)} loses {100 * most.lost[m]:.0f} % of the most confident fifth and "
        f"{100 * least.lost[m]:.0f} % of the least confident (AUC {most.auc[m]:.2f})"
        for m in (PLAIN, OURS, "base")
    ]
    return (
        f"In {source} the experts' mean margin in their most confident fifth is "
        f"{100 * most.margin.iloc[0]:.0f} points. {'; '.join(lines)}."
    )


def calibrated(states: pd.DataFrame, source: str) -> str:
    """Confidence beside accuracy, and calibration; states: `calibration_table`."""
    mean = 100 * states.groupby("model").mean(numeric_only=True).loc[["expert", SUMS, PLAIN, OURS]]
    sure = [
        f"{title(row.Index)} {row.confidence:.0f} % at an accuracy of {row.accuracy:.0f} %"
        for row in mean.itertuples()
    ]
    return (
        f"Mean confidence in {source}: {'; '.join(sure)}. ECE of all tasks' rows "
        f"together, points, lowest first: {each(mean.ece.sort_values())}. Task by task, "
        f"confidence and accuracy differ by: {each(mean.uneven.sort_values())}."
    )


def calibration_columns(states: pd.DataFrame) -> pd.DataFrame:
    """Calibration by model in points, means over seeds. states: of `calibration_table`."""
    named = {"gap": "confidence minus accuracy", "uneven": "difference by task"}
    named |= {"ece": "ECE", "chance": "ECE by chance"}
    mean = 100 * states.groupby("model", sort=False).mean().drop(columns="seed")
    return mean.loc["expert":].rename(index=title, columns=named).rename_axis("points")


def strongest_predictors(found: pd.DataFrame) -> pd.DataFrame:
    """By question: how many predictors are significant, and the strongest.

    found: of `mergeability.correlations`.
    """
    own = found[~found.number.isin(mergeability.INPUTS)].dropna(subset=["rho"])
    groups, words = own.groupby("view", sort=False), mergeability.OUTCOMES
    best = own.loc[groups.rho.apply(lambda rho: rho.abs().idxmax())].set_index("view")
    table = pd.DataFrame(
        {
            "correlations": groups.size(),
            "p below 0.05": groups.p.agg(lambda p: (p <= LEVEL).sum()),
            "after correction": groups.p_max.agg(lambda p: (p <= LEVEL).sum()),
            "strongest": best.number.map(mergeability.LABELS),
            "method": best.method.map(lambda name: mergeability.MERGES.facts[name]["label"]),
            "damage": best.damage.map(lambda name: words[name].partition(",")[0]),
            **{"rho": best.rho, "p": best.p},
            **{"corrected p": best.p_max, "needed": best.threshold},
        }
    )
    labels = table.index.map(lambda view: VIEWS.facts[view]["label"])
    return table.set_index(labels.rename("question")).reset_index()


def predictors(found: pd.DataFrame, source: str) -> str:
    """By question: whether a weight number predicts damage; found: `mergeability.correlations`."""
    lines = [
        f"For *{row['question']}*, {row['after correction']} of {row['correlations']} are "
        f"significant after correction; the strongest is that of {row['strongest']} with the "
        f"{row['damage']} ({row['method']}), {row['rho']:+.2f}; {row['needed']:.2f} is needed."
        for row in strongest_predictors(found).to_dict("records")
    ]
    return f"Correlations of weight numbers with damage in {source}. {' '.join(lines)}"


def reference(found: pd.DataFrame, source: str) -> str:
    """The JS on unlabelled inputs beside weight numbers; found: `mergeability.correlations`."""
    inputs = found.number.isin(mergeability.INPUTS)
    js, own = found[inputs], found[~inputs].dropna(subset=["rho"])
    wrong = (own.rho * own.number.map(mergeability.SIGNS) < 0).mean()
    both = (js.rho.abs() >= js["view"].map(own.groupby("view").threshold.max())).sum()
    return (
        f"In {source} the JS on unlabelled inputs ranks the accuracy lost with correlations from "
        f"{span(js.rho[js.damage == 'drop'], 2, sign=True)} over methods and questions; "
        f"{(js.p_max <= LEVEL).sum()} of its {len(js)} correlations with damage are significant "
        f"after correction for these, {both} above the threshold of the weight numbers, and "
        f"{(own.p_max <= LEVEL).sum()} of {len(own)} of the weight numbers'. "
        f"{100 * wrong:.0f} % of the latter have the unexpected sign."
    )


def coefficients(block: pd.DataFrame, source: str) -> str:
    """Sums of coefficients over T, and their variance by task and block; block: a row each."""
    mean = block.groupby("count").coefficient.mean()
    sums, largest = mean * mean.index, mean.index[-1]
    wide = block[block["count"] == largest].pivot_table("coefficient", "task", "group")
    task, group = (100 * wide.mean(axis=n).var(ddof=0) / wide.stack().var(ddof=0) for n in (1, 0))
    return (
        f"In {source} a group's coefficients sum to {sums.iloc[0]:.2f} at T = {sums.index[0]} and "
        f"to {sums.iloc[-1]:.2f} at T = {largest}; the average's to 1. At T = {largest} the task "
        f"alone explains {task:.0f} % of the coefficients' variance, the block {group:.0f} %."
    )


def coefficient_covariates(found: pd.DataFrame, source: str) -> str:
    """Which covariates correlate with coefficients within groups at the largest T.

    found: the correlations of `coefficient_analysis`.
    """
    largest = found["count"].max()
    said = {True: [], False: []}
    for row in found[(found["view"] == "within") & (found["count"] == largest)].itertuples():
        said[row.p_max <= LEVEL].append(
            f"{COVARIATES[row.clue]} per {row.grouping} ($\\rho$ = {row.rho:+.2f} [{row.low:+.2f}, "
            f"{row.high:+.2f}], corrected p = {row.p_max:.2f})"
        )
    some, others = ("; ".join(said[side]) or "nothing" for side in (True, False))
    return (
        f"Within groups, T = {largest}, in {source}, coefficients correlate significantly with: "
        f"{some}; not with: {others}."
    )
