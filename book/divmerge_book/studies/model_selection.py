"""The tables of `random_merges`: correlations over models, and what choosing by them costs.

Intervals of correlations resample models within a seed of experts, which are as they are; those of
a choice are over seeds.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd

from divmerge_book.evaluation.statistics import CORRELATIONS, mean_interval, middle
from divmerge_book.studies.margins import scored
from divmerge_book.studies.random_merges import MEASURES

AMONG = {"all": 1.0, "best half": 0.5, "best tenth": 0.1}  # share kept, by validation ANP
CRITERIA = (*MEASURES, "validation")  # what a model may be chosen by; the last one needs labels
FEWEST = 5  # models that a correlation is worked out over


def model_scores(
    models: pd.DataFrame, cross: pd.DataFrame, majority: pd.Series | None = None
) -> pd.DataFrame:
    """Every model as one row: sums over tasks, and average normalised performance.

    majority: the majority class's share of test rows, by task. Columns: draws, experts, seed,
    model, MEASURES (nats, summed over tasks), anp (on test rows) and validation (ANP on validation
    rows), both divided by the experts' in `cross`; with a majority also kept_margin and below (how
    many tasks), as of `margins.scored`.
    """
    own = cross[cross.task == cross.model].set_index(["seed", "task"])
    own = own[["accuracy", "validation"]].loc[list(zip(models.seed, models.task, strict=True))]
    ratio = models[["accuracy", "validation"]].to_numpy() / own.to_numpy()
    table = models.assign(anp=ratio[:, 0], validation=ratio[:, 1])
    groups = table.groupby(["draws", "experts", "seed", "model"], sort=False)
    sums = {name: (name, "sum") for name in MEASURES}
    if majority is not None:
        margins = scored(table.assign(expert=own.accuracy.to_numpy()), majority)
        groups = margins.groupby(["draws", "experts", "seed", "model"], sort=False)
        sums |= {"kept_margin": ("kept_margin", "mean"), "below": ("below", "sum")}
    return groups.agg(**sums, anp=("anp", "mean"), validation=("validation", "mean")).reset_index()


def negative_divergence(table: pd.DataFrame, criterion: str) -> np.ndarray:
    """Minus a measure, so that high should be good; validation accuracy as it is."""
    values = table[criterion].to_numpy()
    return values if criterion == "validation" else -values


def top_models(whole: pd.DataFrame, among: str) -> np.ndarray:
    """Numbers of the rows with the highest validation ANP: the share that AMONG says.

    Validation rows decide, so that the noise of neither side of a correlation does.
    """
    count = round(AMONG[among] * len(whole))
    return np.argsort(-whole.validation.to_numpy(), kind="stable")[:count]


def correlated(
    close: np.ndarray, goal: np.ndarray, how: str, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations over models, `[criteria, goals]`, and resampled `[criteria, goals, draws]`.

    close: `[criteria, goals, M]`; goal: `[goals, M]`. The same models are drawn for all.
    """
    generator, correlation = np.random.default_rng(seed), CORRELATIONS[how]
    chosen = generator.integers(goal.shape[-1], size=(draws, goal.shape[-1]))
    return correlation(close, goal[None]), correlation(close[..., chosen], goal[:, chosen])


def groups(
    models: pd.DataFrame, cross: pd.DataFrame, majority: pd.Series | None = None
) -> Iterator[tuple[dict, pd.DataFrame, np.ndarray, np.ndarray]]:
    """Every draw, set of experts and seed: labels, its models whole, closeness and accuracy.

    The labels hold the names of the tasks too; the arrays are `[criteria, T, M]` and `[T, M]`.
    """
    names = ["draws", "experts", "seed"]
    whole = dict(iter(model_scores(models, cross, majority).groupby(names, sort=False)))
    for key, some in models.groupby(names, sort=False):
        tasks = list(dict.fromkeys(some.task))
        wide = some.pivot(index="task", columns="model", values=[*CRITERIA, "accuracy"]).loc[tasks]
        x = np.stack([negative_divergence(wide, name) for name in CRITERIA])
        labels = dict(zip(names, key, strict=True)) | {"tasks": tasks}
        yield labels, whole[key], x, wide["accuracy"].to_numpy()


def over_models(
    models: pd.DataFrame,
    cross: pd.DataFrame,
    majority: pd.Series | None = None,
    *,
    draws: int = 200,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Correlations over models of closeness and success: by task, and averaged.

    Closeness is minus a measure on merge rows, or, as a reference, the accuracy on labelled
    validation rows; success the task's test accuracy, or, for the goals `sum` and (with a majority)
    `kept_margin`, the ANP and the kept margin, with closeness summed over tasks. `among` says which
    models are looked at (AMONG), where these are FEWEST or more. The first table: draws, experts,
    seed, among, how, task, criterion, value. The second averages over tasks, sets of experts and
    seeds (where accuracy or closeness is constant, a task does not count): draws, among, how, goal
    (`task` or another), criterion, value, low, high (95 %, resampled models), lead and its low and
    high (value minus js's, the same models drawn).
    """
    each, cells = [], {}
    scores = {"sum": "anp"} | ({} if majority is None else {"kept_margin": "kept_margin"})
    for labels, whole, x, y in groups(models, cross, majority):
        goals = np.concatenate([y, whole[list(scores.values())].to_numpy().T])  # [T + 1 or 2, M]
        close = np.concatenate([x, *[x.sum(1, keepdims=True)] * len(scores)], axis=1)
        names = [*labels.pop("tasks"), *scores]
        parts = {"task": slice(len(y))}
        parts |= {name: slice(len(y) + n, len(y) + n + 1) for n, name in enumerate(scores)}
        for among, how in product(AMONG, CORRELATIONS):
            rows = top_models(whole, among)
            if len(rows) < FEWEST:
                continue
            value, drawn = correlated(close[..., rows], goals[:, rows], how, draws, seed)
            each += [
                {**labels, "among": among, "how": how, "task": task, "criterion": name, "value": v}
                for name, line in zip(CRITERIA, value, strict=True)
                for task, v in zip(names, line, strict=True)
            ]
            for goal, part in parts.items():
                key = (labels["draws"], among, how, goal)
                cells.setdefault(key, []).append((value[:, part], drawn[:, part]))
    means = [row for key, parts in cells.items() for row in averaged(key, parts)]
    return pd.DataFrame(each), pd.DataFrame(means)


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """The mean along axis 1 over what is not NaN; NaN where nothing is defined."""
    count = np.isfinite(values).sum(1)
    return np.where(count, np.nansum(values, axis=1) / np.maximum(count, 1), np.nan)


def tails(values: np.ndarray) -> np.ndarray:
    """The middle 95 % along axis 1, `[2, criteria]`, of draws in which all are defined."""
    return middle(values[:, np.isfinite(values).all(0)].T)


def averaged(key: tuple, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """Rows of the second table of `over_models`: one per criterion."""
    value = mean_of_defined(np.concatenate([value for value, _ in parts], axis=1))
    drawn = mean_of_defined(np.concatenate([drawn for _, drawn in parts], axis=1))
    labels = dict(zip(("draws", "among", "how", "goal"), key, strict=True))
    (low, high), (below, above) = tails(drawn), tails(drawn - drawn[0])
    return [
        {
            **labels,
            **{"criterion": name, "value": value[n], "low": low[n], "high": high[n]},
            **{"lead": value[n] - value[0], "lead_low": below[n], "lead_high": above[n]},
        }
        for n, name in enumerate(CRITERIA)
    ]


def best_of_n_probability(count: int, drawn: int) -> np.ndarray:
    """How likely the model of each rank is the best of `drawn` taken without replacement, `[M]`.

    The best has rank 0. Raises ValueError unless 1 <= drawn <= count.
    """
    if not 1 <= drawn <= count:
        raise ValueError(f"of {count} models 1 to {count} can be drawn, got {drawn}")
    alive, found = 1.0, np.zeros(count)  # alive: no better model has been drawn
    for rank in range(count - drawn + 1):
        found[rank] = alive * drawn / (count - rank)
        alive -= found[rank]
    return found


def choices(whole: pd.DataFrame, counts: Sequence[int]) -> pd.DataFrame:
    """The test ANP of the model that a criterion chooses out of `candidates` random ones.

    An exact mean over all sets of candidates of that size. Columns: draws, experts, seed,
    criterion, candidates, anp, and kept_margin where `whole` has it. Criteria: the least of a
    measure summed over tasks; the highest validation ANP; `test`, the highest ANP on the test rows
    themselves, which nobody knows; and `none`, the mean of all models. Counts above the number of
    models are left out.
    """
    rows = []
    for key, some in whole.groupby(["draws", "experts", "seed"], sort=False):
        labels = dict(zip(("draws", "experts", "seed"), key, strict=True))
        reached = some[[name for name in ("anp", "kept_margin") if name in some]]
        scores = {name: negative_divergence(some, name) for name in CRITERIA} | {
            "test": some.anp.to_numpy()
        }
        for count in [count for count in counts if count <= len(some)]:
            chance, label = best_of_n_probability(len(some), count), {**labels, "candidates": count}
            for name, score in scores.items():
                values = chance @ reached.iloc[np.argsort(-score, kind="stable")].to_numpy()
                found = dict(zip(reached.columns, values, strict=True))
                rows.append({**label, "criterion": name, **found})
            rows.append({**label, "criterion": "none", **reached.mean()})
    return pd.DataFrame(rows)


def selection_regret(whole: pd.DataFrame) -> pd.DataFrame:
    """What a choice among all models of a set costs against the best by test, in points of ANP.

    A set holds the models of one draw, set of experts and seed; the row is a mean over the sets of
    a seed, and then over seeds. The best by test is the best of noisy scores, so every regret is
    somewhat too large. low, high: Student's 95 % interval over seeds of experts, NaN for one:
    models are not resampled, as the best of resampled ones is another maximum. Columns: draws,
    criterion, anp (%), regret, low, high, rank (of the model chosen, 1 is best), models (in the
    smallest set), and kept_margin (%) and below of the model chosen where `whole` has them.
    """
    found = []
    for (kind, experts, seed), some in whole.groupby(["draws", "experts", "seed"], sort=False):
        labels = {"draws": kind, "experts": experts, "seed": seed, "models": len(some)}
        anp = some.anp.to_numpy()
        for name in CRITERIA:
            place = negative_divergence(some, name).argmax()
            taken = anp[place]
            more = {"criterion": name, "rank": 1 + (anp > taken).sum()}
            if "kept_margin" in some:
                more |= {"kept_margin": 100 * some.kept_margin.iloc[place]}
                more |= {"below": some.below.iloc[place]}
            row = {"anp": 100 * taken, "regret": 100 * (anp.max() - taken)}
            found.append({**labels, **row, **more})
    keys = ["draws", "criterion"]
    sets = pd.DataFrame(found)
    means = [name for name in ("anp", "regret", "rank", "kept_margin", "below") if name in sets]
    sets = sets.groupby([*keys, "seed"], sort=False)
    seeds = sets.agg(dict.fromkeys(means, "mean") | {"models": "min"})
    rows = []
    for key, some in seeds.groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True)) | some[means].mean().to_dict()
        row |= dict(zip(("low", "high"), mean_interval(some.regret.to_numpy()), strict=True))
        rows.append(row | {"models": some.models.min()})
    return pd.DataFrame(rows)


def squares(cross: pd.DataFrame, measure: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Closeness and accuracy of every seed's experts, `[T, T]`: rows tasks, columns models."""
    for _, some in cross.groupby("seed", sort=False):
        tasks = list(dict.fromkeys(some.task))
        wide = some.pivot(index="task", columns="model").loc[tasks]
        yield -wide[measure][tasks].to_numpy(), wide["accuracy"][tasks].to_numpy()
