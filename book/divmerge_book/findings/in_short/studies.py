"""In short: the chapters that draw tables of studies."""

from divmerge_book.figures import title
from divmerge_book.findings import listed, span
from divmerge_book.findings.in_short import Stored
from divmerge_book.studies import landscapes, mergeability, prediction_churn

OURS = "divmerge/layer"
LEVEL = 0.05  # of corrected p-values


def interference(stored: Stored) -> list[str]:
    """Where task vectors conflict, and whether conflict predicts what a merge loses."""
    weights = stored.tables("interference/weights.json")
    mean = weights["pairs"].groupby("counted").conflict.mean()
    shares = 100 * weights["idle"].groupby("task").parameters.mean()
    shared = weights["overlap"].query("within == 'tensor'").groupby("share").overlap.mean()
    overlap = [f"{100 * v:.1f} % of their largest {100 * cut:.0f} %" for cut, v in shared.items()]
    found = stored.tables("interference/prediction.json")["correlations"].dropna(subset=["rho"])
    some, inputs = found.p_max <= LEVEL, found.number.isin(mergeability.INPUTS)
    table = stored.tables("interference/coefficients.json")["followed"]
    last = table[(table["view"] == "within") & (table["count"] == table["count"].max())]
    row = last[last.clue == "conflict"].iloc[0]
    return [
        f"Weight decay alone changed {span(shares, 0)} % of a task vector's entries. Over all "
        f"entries the mean sign conflict is {mean['all']:.2f}; without those it is "
        f"{mean['touched']:.2f}, and random signs give 0.5.",
        f"Within a tensor, two tasks share {listed(overlap)} of entries on average.",
        f"Of {(~inputs).sum()} correlations between a number of the weights and the damage of a "
        f"merge, {(some & ~inputs).sum()} are significant after correction; of {inputs.sum()} with "
        f"the JS on a few unlabelled inputs, {(some & inputs).sum()} are.",
        f"DivMerge's coefficients per {row.grouping} have a rank correlation of {row.rho:+.2f} "
        f"[{row.low:+.2f}, {row.high:+.2f}] with the sign conflict at T = {row['count']}.",
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
