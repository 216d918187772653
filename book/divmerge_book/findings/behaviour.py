"""What answers, layers, forecasts and coefficients say of interference, in sentences."""

import pandas as pd

from divmerge_book.evaluation.statistics import format_correlation
from divmerge_book.figures import title
from divmerge_book.figures.conflict import COVARIATES
from divmerge_book.findings import listed, span
from divmerge_book.studies import mergeability
from divmerge_book.studies.mantel import VIEWS
from divmerge_book.studies.prediction_churn import MERGES

PLAIN, OURS, SUMS = "average", "divmerge/layer", "task_arithmetic"


def layers(depth: pd.DataFrame, source: str) -> str:
    """How alike the last layer is to the expert's, and what share of a shift all inputs share.

    depth: of `flips.depths`.
    """
    mean = depth.groupby(["model", "layer"])[["cka", "common"]].mean()
    end = mean.xs(depth.layer.max(), level="layer")
    alike = end.cka[[name for name in MERGES if name in end.index]]
    low, first = end.cka["base"], mean.xs(0, level="layer").common.mean()
    way = (alike.max() - low) / (1 - low)
    return (
        f"In {source}, at the last layer, the base has a CKA of {low:.2f} with the expert; of the "
        f"merges, {title(alike.idxmax())} has most, {alike.max():.2f}: {100 * way:.0f} % of the "
        f"way to the expert. {100 * first:.0f} % of the squared shift of the embeddings is the "
        f"same for all inputs, and {100 * end.common.mean():.0f} % of the last layer's."
    )


def layers_and_losses(depth: pd.DataFrame, turns: pd.DataFrame, source: str) -> str:
    """Rank correlations over tasks of the last layer's numbers with the net change in accuracy.

    depth: of `flips.depths`; turns: of `flips.turned`.
    """
    stay = depth[(depth.layer == depth.layer.max()) & depth.model.isin(MERGES)]
    stay = stay.merge(turns, on=["seed", "model", "task"])
    best = stay.groupby("model")[["cka", "net"]].mean().idxmax().map(title)
    tied = []
    for column in ("cka", "shift", "common"):
        each = stay.groupby(["seed", "model"])[[column, "net"]].corr("spearman")
        tied.append(f"{column} {format_correlation(each.xs('net', level=2)[column].mean())}")
    count = stay.task.nunique()
    return (
        "Rank correlation over tasks of the last layer's number with the change in accuracy, mean "
        f"over merges and seeds, in {source}: {', '.join(tied)}. With {count} tasks, a single one "
        f"of these correlations has a standard error of about {1 / (count - 1) ** 0.5:.2f}. "
        f"Between merges: {best.cka} has the highest mean CKA, {best.net} the highest accuracy."
    )


def turned(turns: pd.DataFrame, spread: pd.DataFrame, source: str) -> str:
    """What the average and DivMerge per layer lose and gain, and whether their intervals meet.

    turns: of `flips.turned`; spread: of `flips.resampled`.
    """
    mean = 100 * turns.groupby("model")[["lost", "gained", "net"]].mean()
    plain, ours = mean.loc[PLAIN], mean.loc[OURS]
    by = turns[turns.model.isin([PLAIN, OURS])].groupby(["task", "model"]).net.mean().unstack()
    behind = [f"`{task}`" for task in by.index[by[OURS] < by[PLAIN]]]
    ends = spread.set_index(["model", "what"])
    apart = {
        what: ends.low[PLAIN, what] > ends.high[OURS, what]
        or ends.low[OURS, what] > ends.high[PLAIN, what]
        for what in ("lost", "gained")
    }
    words = {True: "intervals do not overlap", False: "intervals overlap"}
    return (
        f"In {source} the average loses {plain.lost:.1f} % of all rows and gains "
        f"{plain.gained:.1f} %; DivMerge per layer loses {ours.lost:.1f} % and gains "
        f"{ours.gained:.1f} %. The losses differ by {ours.lost - plain.lost:+.1f} points "
        f"({words[apart['lost']]}), the gains by {ours.gained - plain.gained:+.1f} "
        f"({words[apart['gained']]}). DivMerge per layer is behind the average on: "
        f"{listed(behind, 'no task')}."
    )


def doubtful(doubt: pd.DataFrame, source: str) -> str:
    """What is lost of the rows that experts are surest of, and what the margin says.

    doubt: of `flips.by_margin`.
    """
    ends = {
        name: doubt[doubt.part == part].set_index("model")
        for name, part in (("least", doubt.part.min()), ("most", doubt.part.max()))
    }
    least, most = ends["least"].lost, ends["most"].lost
    said = [
        f"{title(m)} loses {100 * most[m]:.0f} % of the surest fifth and {100 * least[m]:.0f} % "
        f"of the least sure (AUC {ends['most'].auc[m]:.2f})"
        for m in (PLAIN, OURS, "base")
    ]
    return (
        f"In {source} the experts' mean margin in their surest fifth is "
        f"{100 * ends['most'].margin.iloc[0]:.0f} points. {'; '.join(said)}."
    )


def calibrated(states: pd.DataFrame, source: str) -> str:
    """Confidence beside accuracy, and calibration pooled and task by task.

    states: of `flips.calibrated`.
    """
    mean = 100 * states.groupby("model", sort=False).mean().drop(columns="seed")
    shown = ("expert", SUMS, PLAIN, OURS)
    said = [
        f"{title(m)} {mean.confidence[m]:.0f} % at an accuracy of {mean.accuracy[m]:.0f} %"
        for m in shown
    ]
    order = {
        name: [
            f"{title(m)} {mean[name][m]:.1f}"
            for m in mean[name].loc[list(shown)].sort_values().index
        ]
        for name in ("ece", "uneven")
    }
    return (
        f"Mean confidence in {source}: {'; '.join(said)}. Pooled ECE, points, lowest first: "
        f"{'; '.join(order['ece'])}. Task by task, confidence and accuracy differ by: "
        f"{'; '.join(order['uneven'])}."
    )


def predicted(found: pd.DataFrame) -> pd.DataFrame:
    """By question: how many correlations of weight numbers stand out, and the strongest.

    found: of `mergeability.correlations`.
    """
    own, lines = found[~found.number.isin(mergeability.INPUTS)].dropna(subset=["rho"]), []
    for view, some in own.groupby("view", sort=False):
        best = some.loc[some.rho.abs().idxmax()]
        lines.append(
            {
                "question": VIEWS.facts[view]["label"],
                "asked": len(some),
                "p below 0.05": (some.p <= 0.05).sum(),
                "after correction": (some.p_max <= 0.05).sum(),
                "strongest": mergeability.label_of(best.number),
                "method": best.method,
                "damage": best.damage,
                "rho": best.rho,
                "p": best.p,
                "corrected p": best.p_max,
                "needed": best.threshold,
            }
        )
    return pd.DataFrame(lines)


def told(lines: pd.DataFrame, source: str) -> str:
    """By question: whether a weight number predicts damage. lines: of `predicted`."""
    said = [
        f"*{row['question']}*: {row['after correction']} of {row['asked']} correlations are "
        f"significant after correction; the strongest is {row['strongest']} for {row['method']} "
        f"and {row['damage']}, {row['rho']:+.2f}, where {row['needed']:.2f} is needed"
        for row in lines.to_dict("records")
    ]
    return f"Weight numbers and damage in {source}. {'; '.join(said)}."


def reference(found: pd.DataFrame, source: str) -> str:
    """The JS on unlabelled inputs beside weight numbers. found: of `mergeability.correlations`."""
    inputs = found.number.isin(mergeability.INPUTS)
    after, own = found[inputs], found[~inputs].dropna(subset=["rho"])
    drop = after[after.damage == "drop"]
    wrong = own.rho * own.number.map(mergeability.expected_sign) < 0
    kept, count = (after.p_max <= 0.05).sum(), (own.p_max <= 0.05).sum()
    return (
        f"In {source} the JS on unlabelled inputs ranks the accuracy lost with correlations from "
        f"{span(drop.rho, 2, sign=True)} over methods and questions; {kept} of its {len(after)} "
        f"correlations with damage are significant after correction, and {count} of {len(own)} of "
        f"the weight numbers'. {100 * wrong.mean():.0f} % of the latter have the unexpected sign."
    )


def coefficients(block: pd.DataFrame, source: str) -> str:
    """Sums of coefficients over T, and what their variance goes with. block: per task and block."""
    largest = block["count"].max()
    sums = block.groupby("count").coefficient.mean()
    sums = sums * sums.index
    mean = block[block["count"] == largest].pivot_table("coefficient", "task", "group")
    task, group = (100 * mean.mean(axis=n).var(ddof=0) / mean.stack().var(ddof=0) for n in (1, 0))
    return (
        f"In {source} a group's coefficients sum to {sums.iloc[0]:.2f} at T = {sums.index[0]} and "
        f"to {sums.iloc[-1]:.2f} at T = {largest}; the average's to 1. At T = {largest} the task "
        f"alone explains {task:.0f} % of the coefficients' variance, the block {group:.0f} %."
    )


def followed(found: pd.DataFrame, source: str) -> str:
    """Which candidates the coefficients follow within groups at the largest T, after correction.

    found: of `responses.followed`.
    """
    inside = found[(found["view"] == "within") & (found["count"] == found["count"].max())]
    said = {True: [], False: []}
    for row in inside.itertuples():
        said[row.p_max <= 0.05].append(
            f"{COVARIATES[row.clue]} per {row.grouping} ($\\rho$ = {row.rho:+.2f} [{row.low:+.2f}, "
            f"{row.high:+.2f}], corrected p = {row.p_max:.2f})"
        )
    return (
        f"Within groups, T = {found['count'].max()}, in {source}, coefficients correlate "
        f"significantly with: {'; '.join(said[True]) or 'nothing'}; not with: "
        f"{'; '.join(said[False]) or 'nothing'}."
    )
