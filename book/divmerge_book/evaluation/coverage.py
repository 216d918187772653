"""Coverage of 95 % intervals in simulated experiments whose true value is known.

    python -m divmerge_book.evaluation.coverage 1000

An expert and two merges answer the test rows of four tasks, for several seeds. A row has a
difficulty shared by all methods and seeds, and one per method; two seeds of a method agree on about
five answers of six, like the book's. Seeds add normal effects to the logit of an accuracy.
"""

import sys

import numpy as np
import pandas as pd
from scipy import special
from tqdm import tqdm

from divmerge_book.evaluation.metrics import combine
from divmerge_book.evaluation.statistics import crossed, row_means

LOGITS = np.array(  # of the accuracies of the expert and two merges, by task
    [[2.2, 1.2, 1.1], [1.8, 0.8, 1.0], [2.6, 1.6, 1.5], [1.6, 0.9, 0.7]]
)
ROWS = 150  # per task
HARD, OWN, EASY = 3.3, 1.5, 1.0  # spread of rows, of rows for a method; how easy the majority is
MAJORITY = 0.55  # share of the majority class
SCALE = np.sqrt(1 + 0.346 * (HARD**2 + OWN**2))  # an accuracy's logit to a row's, roughly
EFFECTS = ("shared by tasks", "each task's own")
STATISTICS = {  # of the first merge, or less that of the second
    "ANP": ("anp", (0, 1, 0)),
    "kept margin": ("kept_margin", (0, 1, 0)),
    "difference of ANP": ("anp", (0, 1, -1)),
    "difference of kept margins": ("kept_margin", (0, 1, -1)),
}


def accuracies(effects: np.ndarray) -> np.ndarray:
    """Exact accuracies `[tasks, 3, K]` over all rows, where a seed's effect is each of these K."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(121)
    rows = np.hypot(HARD, OWN) * nodes
    middle = SCALE * (LOGITS[:, :, None, None] + effects[:, None])
    of_class = [(special.expit(middle + rows + easy) @ weights) for easy in (EASY, 0.0)]
    shares = MAJORITY, 1 - MAJORITY
    return sum(share * some for share, some in zip(shares, of_class, strict=True)) / weights.sum()


def truth(spread: float) -> dict[str, np.ndarray]:
    """The exact mean over seeds and rows of every method's ANP and kept margin, `[3]` each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    every = accuracies(spread * nodes)
    mean, inverse = every @ weights, (1 / every[:, :1]) @ weights
    anp = np.concatenate([np.ones((len(mean), 1)), mean[:, 1:] * inverse], axis=1)
    kept = (mean - MAJORITY) / (mean[:, :1] - MAJORITY)
    return {"anp": anp.mean(0), "kept_margin": kept.mean(0)}


def answered(
    num_seeds: int, spread: float, effects: str, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One experiment: accuracies `[tasks, 1 + draws, S, 3]` and majorities `[tasks, 1 + draws]`."""
    shape = (1 if effects == EFFECTS[0] else len(LOGITS), num_seeds, 3)
    moved = np.broadcast_to(spread * generator.standard_normal(shape), (len(LOGITS), num_seeds, 3))
    right, floor = [], []
    for logits, own in zip(LOGITS, moved, strict=True):
        common = generator.random(ROWS) < MAJORITY
        rows = HARD * generator.standard_normal((ROWS, 1)) + EASY * common[:, None]
        rows = rows + OWN * generator.standard_normal((ROWS, 3))
        chance = special.expit(SCALE * (logits + own) + rows[:, None])  # [n, S, 3]
        correct = (generator.random(chance.shape) < chance).reshape(ROWS, -1)
        most = common if 2 * common.sum() >= ROWS else ~common  # the majority class of these rows
        means = row_means(np.column_stack([correct, most]).astype(float), draws, generator)
        right.append(means[:, :-1].reshape(-1, num_seeds, 3))
        floor.append(means[:, -1])
    return np.stack(right), np.stack(floor)


def simulated(
    num_seeds: int, spread: float, effects: str, *, experiments=1000, draws=400, seed=0
) -> pd.DataFrame:
    """Share of experiments whose interval contains the true value: a row per statistic.

    spread: standard deviation of the seeds' effects, on the logit of an accuracy. effects: one of
    EFFECTS. Columns: seeds, spread, effects, statistic, coverage (%), width (mean, of the
    interval), error (standard, of a coverage of 95 %, in points).
    """
    generator, exact, rows = np.random.default_rng(seed), truth(spread), []
    what = f"{num_seeds} seeds, spread {spread}, {effects}"
    for _ in tqdm(range(experiments), what, leave=False):
        right, floor = answered(num_seeds, spread, effects, draws, generator)
        for name, (statistic, contrast) in STATISTICS.items():
            found = combine(right, floor, 0, statistic) @ contrast  # [1 + draws, S]
            low, high = crossed(found[0], found[1:].T, len(LOGITS) * (ROWS - 1)).interval()
            covered = low <= exact[statistic] @ contrast <= high
            rows.append({"statistic": name, "coverage": 100 * covered, "width": high - low})
    table = pd.DataFrame(rows).groupby("statistic", sort=False).mean().reset_index()
    label = {"seeds": num_seeds, "spread": spread, "effects": effects}
    return table.assign(**label, error=100 * (0.95 * 0.05 / experiments) ** 0.5)


if __name__ == "__main__":  # few and more seeds that differ little and much
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    settings = [(seeds, spread, e) for e in EFFECTS for seeds in (3, 5) for spread in (0.05, 0.3)]
    tables = [simulated(*setting, experiments=count) for setting in settings]
    print(pd.concat(tables).to_string(index=False, float_format="{:.3f}".format))
