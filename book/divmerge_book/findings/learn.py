"""Summaries of the chapters that explain the method and its kernel: a list each, of a run's tables.

`this run` is the reader's own. Every function returns Markdown.
"""

import math
from collections.abc import Mapping

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.report import Report
from divmerge_book.figures import intervals_of
from divmerge_book.findings import SCORES, bullets, each, listed, span
from divmerge_book.studies.objective_fits import named


def kept(report: Report, subset: str, methods: list[str]) -> str:
    """`by ANP: Average 90.0 %, ...; by kept margin: ...`, of a subset."""
    found = {name: 100 * intervals_of(report, subset, name).value[methods] for name in SCORES}
    return "; ".join(f"by {SCORES[n]}: {each(v, '{:.1f} %', end=', ')}" for n, v in found.items())


def quickstart(report: Report, counts: pd.DataFrame, stored: tuple[int, int]) -> str:
    """What is gained and lost by the merges of a Report.

    counts: a row per task with `lost`, `won`, `both right`; stored: parameters before and after.
    """
    suite, subset = report.rows[["suite", "subset"]].iloc[0]
    methods = [m for m in report.rows.method.unique() if m not in ("expert", "base")]
    total = counts.sum()
    by_task = [f"`{task}` {row.lost} and {row.won}" for task, row in counts.iterrows()]
    lines = [
        f"**Gained** in this run: one model of {stored[1] / 1e6:.1f} million parameters instead of "
        f"{len(counts)} with {stored[0] / 1e6:.1f} million.",
        f"**Lost**: of the rows that its expert has right, DivMerge has {total.lost} of "
        f"{total.lost + total['both right']} wrong; it has {total.won} right that the expert has "
        f"wrong (lost and won by task: {'; '.join(by_task)}).",
    ]
    if report.counted(suite):
        lines.insert(1, f"What the merges keep, {kept(report, subset, methods)}.")
    return bullets(lines)


def task_vectors(
    relative: Float[Tensor, "T G"],
    cosines: pd.Series,
    conflict: Mapping[str, float],
    shared: Mapping[tuple[str, ...], pd.DataFrame],
) -> str:
    """How far fine-tuning goes, in which directions, and what one coefficient for all keeps.

    relative: lengths over the base's; cosines: one per pair; conflict: mean sign conflict by what
    was counted; shared: by tasks, accuracy in % of the expert's, a row per common coefficient.
    """
    low, high = (100 * value.item() for value in relative.aminmax())
    signs = [f"{100 * value:.0f} % ({kind})" for kind, value in conflict.items()]
    lines = [
        f"Fine-tuning adds a small step: in this run, a block's task vector is {low:.1f} to "
        f"{high:.1f} % as long as the base's parameters there.",
        f"Task vectors stand at cosines of {span(cosines, 2, sign=True)}. Two tasks pull "
        f"{listed(signs)} of the parameters in opposite directions.",
    ]
    for tasks, ratio in shared.items():
        best = ratio.mean(axis=1).idxmax()
        price = ratio.max() - ratio.loc[best]
        lines.append(
            f"T = {len(tasks)}: the best common coefficient, {best:g}, keeps "
            f"{ratio.loc[best].mean():.1f} % of the experts' accuracy. The task that pays most for "
            f"sharing it, `{price.idxmax()}`, loses {price.max():.1f} points by it."
        )
    return bullets(lines)


def divergences(
    odds: Tensor, values: Mapping[str, Tensor], pulls: Mapping[str, Tensor], sure: float
) -> str:
    """What each divergence gives a model that is confidently wrong, and how hard it pulls.

    odds: the merged model's log-odds, ascending; values (nats) and pulls (nats per nat): by
    divergence, one number each; sure: the expert's probability of its answer.
    """
    far = pd.Series({name: value[0].item() for name, value in values.items()})
    pull = pd.Series({name: value[0].item() for name, value in pulls.items()})
    peak = {name: odds[value.argmax()].item() for name, value in pulls.items()}
    return bullets(
        [
            f"A merged model at log-odds {odds[0]:g} against an expert that is {sure:.0%} sure: "
            f"{each(far, '{:.2f} nats', named, ', ')}. Of these, only JS has a bound for all "
            f"answers, log 2 = {math.log(2):.2f}.",
            f"There the gradients are {each(pull, '{:.2f}', named, ', ')} nats per unit of logit. "
            f"JS pulls hardest at log-odds {peak['js']:.1f}, KL at {peak['kl']:.1f}.",
        ]
    )


def objective(table: pd.DataFrame, bends: Mapping[str, float]) -> str:
    """Where the fits end, by objective and by right answers.

    table: indexed by divergence and point (start, end of Adam, grid minimum), with the columns
    `task 1`, `task 2`, `objective (nats)` and `right answers`; bends: the share of second
    differences below zero, by divergence.
    """
    lines = []
    for name, rows in table.groupby(level=0, sort=False):
        value = rows.droplevel(0)["objective (nats)"]
        right = 100 * rows.droplevel(0)["right answers"]
        place = rows.droplevel(0).loc["grid minimum", ["task 1", "task 2"]]
        lines.append(
            f"{named(name)}: in this run Adam takes the objective from "
            f"{value['start']:.3f} to {value['end of Adam']:.3f} nats (grid minimum "
            f"{value['grid minimum']:.3f}, at {place.iloc[0]:.2f} and {place.iloc[1]:.2f}). The "
            f"right answers, which it never sees, go from {right['start']:.1f} to "
            f"{right['end of Adam']:.1f} %. The surface bends downwards in "
            f"{100 * bends[name]:.0f} % of the grid's second differences."
        )
    return bullets(lines)


def kernel(aims: pd.DataFrame, storages: pd.DataFrame, source: str) -> str:
    """Which aims of speed are reached, and what rounding the task vectors changes.

    aims: a row each with `aim` and `reached`; storages: by dtype, the JS to float32 and to the
    experts in nats.
    """
    known = aims.dropna()
    said = [f"{name}: {row.reached:.2f} ({row.aim:g})" for name, row in known.iterrows()]
    rounded = storages.drop(index="float32")["JS to float32"]
    return bullets(
        [
            f"In {source}, {(known.reached >= known.aim).sum()} of {len(known)} aims are reached. "
            f"Each with its aim in brackets: {'; '.join(said)}.",
            "How far each storage of task vectors moves the merged model's answers in this run, "
            f"in nats of JS: {each(rounded, '{:.2g}', str, ', ')}; the merge itself is "
            f"{storages['JS to the experts']['float32']:.2g} nats from the experts.",
        ]
    )


def components(table: pd.DataFrame, source: str) -> str:
    """How long a merge with its gradient takes from a basis's components, beside task vectors.

    table: `merge_bandwidth.summary` of `benchmark_basis`.
    """
    both = table.pivot_table("milliseconds", "tasks", "contestant", aggfunc="sum")
    times = (both["tsv:2"] / both["ours"]).rename(index="at T = {}:".format)
    return (
        f"In {source} a merge with its gradient takes, {each(times, '{:.1f}', str, ', ')} times as "
        "long from components as from task vectors."
    )
