"""Tables of scores and losses that the tests of chapter 10's studies share."""

from itertools import combinations

import pandas as pd


def toy_scores(values: dict[tuple, float]) -> pd.DataFrame:
    """`by_subset` rows from {(seed, method, subset): anp}."""
    rows = [(*key, key[2].count("+") + 1, value) for key, value in values.items()]
    return pd.DataFrame(rows, columns=["seed", "method", "subset", "T", "anp"])


def losses_by(rule, tasks: str = "abcde") -> pd.DataFrame:
    """`ratios` rows of all subsets whose losses are `rule(task, partners)`."""
    rows = [
        ("+".join(s), n, task, 1 - rule(task, [o for o in s if o != task]))
        for n in range(1, len(tasks) + 1)
        for s in combinations(tasks, n)
        for task in s
    ]
    return pd.DataFrame(rows, columns=["subset", "T", "task", "ratio"])
