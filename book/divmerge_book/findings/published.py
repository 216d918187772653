"""What others' printed numbers say beyond their means, in sentences."""

import pandas as pd

from divmerge_book.figures import title
from divmerge_book.findings import bullets, listed
from divmerge_book.published import leaderboard_summary as board


def known_to(accuracies: pd.DataFrame, rows: pd.Series, few: str = "RTE", many: str = "QQP") -> str:
    """Who is below the base on the task of few rows, and how well rows alone tell methods apart.

    accuracies: methods by task, shares, with rows `expert` and `base`. rows: scored, by task.
    """
    found = board.summary(accuracies)
    half = 100 * board.margins(accuracies, rows)
    worse = found.index[found.below_base.str.contains(few)]
    first, second = found["mean"].nlargest(2).index
    gap = 100 * (found["mean"][first] - found["mean"][second])
    return bullets(
        [
            f"Below the unmerged base on {few}: {listed(map(title, worse))}.",
            f"{title(first)} and {title(second)} differ by {gap:.2f} points of the mean; test rows "
            f"alone give ±{half['mean'][[first, second]].max():.1f}.",
            f"{few} has {rows[few]} rows: one accuracy there is known to ±{half[few][first]:.1f} "
            f"points, on {many} ({rows[many]} rows) to ±{half[many][first]:.1f}.",
        ]
    )


def scales(swept: pd.DataFrame, task: str = "RTE") -> str:
    """What the scale of the best mean costs one task. swept: of `leaderboard_summary.sweep`."""
    said = []
    for method, rows in swept.groupby("method", sort=False):
        wide = 100 * rows.pivot(index="scale", columns="task", values="accuracy")
        mean, own = wide.mean(axis=1), wide[task]
        best, other = mean.idxmax(), own.idxmax()
        said.append(
            f"{title(method)} has its best mean ({mean[best]:.2f} %) at scale {best:g}, with "
            f"{own[best]:.1f} % on {task}; the best of {task} is {own[other]:.1f} % at scale "
            f"{other:g}, with a mean of {mean[other]:.1f} %"
        )
    return f"{'; '.join(said)}."
