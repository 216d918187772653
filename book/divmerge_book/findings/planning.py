"""What a suite needs of a GPU, in sentences made of `planning.language_plans`."""

import pandas as pd

from divmerge_book.findings import bullets, listed, span
from divmerge_book.planning.memory import Plan


def summary(fit: Plan, forecast: pd.DataFrame, device: str) -> str:
    """Memory of the fit, which GPUs hold it, and how the least time divides.

    fit: planned for one GPU. forecast: of `language_plans.suite_forecast`.
    """
    vectors = sum(line.nbytes for line in fit.lines if line.what == "task vectors")
    share = 100 * (1 - forecast["the fit, s"] / forecast["experts and fit, s"])
    small = forecast.index[forecast.preset == "smaller"]
    verdict = "fits" if fit.fits else "does not fit"
    return bullets(
        [
            f"By the plan the fit holds {fit.total / 1e9:.1f} GB and {verdict} "
            f"{fit.device}; {100 * vectors / fit.total:.0f} % of it is task vectors.",
            f"Planned memory is enough on {listed(forecast.index[forecast.fits.astype(bool)])}. "
            f"With fewer rows and int8 task vectors: {listed(small)}.",
            f"Experts and fit take at least {span(forecast['experts and fit, s'] / 60)} minutes; "
            f"{span(share, 0)} % of that is the experts.",
            f"This page ran on {device}; the numbers above are plans and no measurements.",
        ]
    )
