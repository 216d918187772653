"""How much every study runs at each size: one table for all of them."""

import math
from collections.abc import Mapping
from types import SimpleNamespace

from divmerge_book.evaluation.sizes import STANDARD

FREE = (
    *("average", "model_stock", "multi_slerp", "task_arithmetic", "ties", "dare", "breadcrumbs"),
    *("pcb", "consensus", "tsv_m", "iso_c", "iso_cts", "doge", "opcm"),
)
FITTED = (
    *("regmean", "fisher", "adamerging/task", "adamerging/layer"),
    *("divmerge/task", "divmerge/layer"),
)

PLAIN = ("average", "sum", "ties")
ZETAS = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, math.inf)
LEAN = {
    "divmerge/layer": {"epochs": 2, "inputs": 16},
    "esm_pp": {"inputs": 16},
    "surgery": {"steps": 100},
    "wemoe": {"steps": 20},
    "twin": {"steps": 200},
    "dp_mixture": {"zeta": 0.1},
    "layer_evolution": {"steps": 2},
}
FULL = {
    "divmerge/layer": {"epochs": 4, "inputs": 100},
    "wemoe": {"steps": 150},
    "dp_mixture": {"zeta": 0.1},
    "layer_evolution": {"steps": 8},
}

# Study -> size -> settings; what stands under "all" holds for every size that does not differ.
SETTINGS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    # specs: objectives of the ablation, () for all; watched: those whose trajectory is recorded, at
    # `followed` seeds and `every` so many steps; stressed, kinds, temperatures: of the robustness
    # studies. counts: numbers of tasks. inputs, validation, test: rows per task. rates: of Adam.
    "choice": {
        "all": dict(
            epochs=STANDARD["epochs"], rates=(3e-2, 1e-1), followed=1, every=4, counts=(2,)
        ),
        "smoke": {
            **{"specs": ("js", "kl", "entropy", "labels"), "groupings": ("task",)},
            **{"inputs": 8, "validation": 30, "test": 60, "epochs": 2, "rates": (3e-2,)},
            **{"stressed": ("js", "kl"), "kinds": ("none", "wrong"), "temperatures": (1.0, 4.0)},
            "watched": ("js", "kl"),
        },
        "default": {
            "specs": ("js", "kl", "reverse_kl", "squared_l2", "hidden_cosine", "entropy", "labels"),
            **{"groupings": ("task", "layer"), "inputs": 16, "validation": 50, "test": 150},
            **{"stressed": ("js", "kl"), "temperatures": (1.0, 4.0)},
            "kinds": ("none", "noise", "wrong", "overconfident"),
            "watched": ("js", "kl", "hidden_cosine", "entropy", "labels"),
        },
        "full": {
            **{"specs": (), "groupings": ("task", "block", "layer"), "counts": (2, 4, 8)},
            **{"inputs": STANDARD["inputs"], "validation": 50, "test": STANDARD["rows"]},
            "stressed": ("js", "kl", "reverse_kl", "squared_l2", "logit_mse"),
            "kinds": ("none", "noise", "permuted", "wrong", "overconfident"),
            **{"temperatures": (1.0, 2.0, 4.0, 8.0), "watched": (), "followed": 2, "every": 6},
        },
    },
    # tasks: merged in the ablations; large: in the one on the start, where 1/T and 0.5 differ most.
    # inputs: per task, of the default; published: the paper's data set size of one coefficient per
    # task. steps: of fits on few or shifted inputs, by `counts` of inputs and `shares` of shifted
    # ones. several: numbers of tasks in the comparison of optimizers, which all see `pool` inputs a
    # task, for `adam` steps of Adam and `passes` of the others. rows: test rows a task.
    "protocol": {
        "all": {"groupings": ("task", "layer"), "shares": (0.5, 1.0), "pool": 16},
        "smoke": {
            **{"tasks": 2, "large": 3, "inputs": 8, "published": 8, "steps": 4, "several": (2,)},
            "grid": {"init": (0.0,), "lr": (1e-1,), "epochs": (1,)},
            **{"counts": (0, 4), "shares": (1.0,), "pool": 8, "adam": 10, "passes": 4, "rows": 40},
        },
        "default": {
            **{"tasks": 2, "large": 4, "inputs": 16, "published": 16, "steps": 16, "several": (2,)},
            "grid": {"init": (0.0, 1.0), "lr": (1e-1,), "epochs": (1,)},
            **{"counts": (0, 1, 4, 16), "adam": 60, "passes": 12, "rows": 100},
        },
        "full": {
            **{"tasks": 4, "large": 8, "inputs": STANDARD["inputs"], "published": 200, "steps": 32},
            "grid": {"init": (0.0, 0.5, 1.0), "lr": (1e-3, 3e-2, 1e-1), "epochs": (1, 8)},
            **{"counts": (0, 1, 4, 16, 100, 400), "several": (2, 8)},
            **{"adam": 400, "passes": 40, "rows": 300},
        },
    },
    # tasks: how many of the suite's, None for all. bases at the largest number of tasks; counts: of
    # tasks, for two bases. rates: step sizes tried. inputs and test rows per task; epochs of fits.
    # tested: test rows of the fits beside ProDistill's.
    "bases": {
        "all": {"groupings": ("task",), "tasks": None, "rates": (0.2, 0.05, 0.005), "epochs": 2},
        "smoke": {
            **{"bases": ("raw", "tsv:3"), "tasks": 2, "counts": (), "rates": (0.1,), "epochs": 1},
            **{"validation": 30, "rows": 40, "inputs": 8, "tested": 40},
        },
        "default": {
            **{"bases": ("raw", "svd:3", "tsv", "tsv:3"), "tasks": 4, "counts": (2,)},
            **{"validation": 50, "rows": 100, "inputs": 64, "rates": (0.1,), "tested": 100},
        },
        "full": {
            "bases": ("raw", "ties", "svd:3", "essential", "isotropic", "tsv", "tsv:2", "tsv:3"),
            **{"counts": (2, 4), "validation": 100, "rows": 300, "inputs": 200, "tested": 500},
        },
    },
    # tasks: how many of the suite's, None for all. subsets: of every number of tasks at the first
    # seed, or all there are for the numbers in `whole` (below 0: counted from the number of tasks);
    # `repeated` of these at each other seed. budget: candidates that a search scores. scales: of
    # task arithmetic with fixed coefficients; every: these for all subsets.
    "scaling": {
        "all": {
            **{"tasks": None, "subsets": 5, "repeated": 1, "whole": (2,), "budget": 3},
            **{"scales": (0.1, 0.2, 0.3, 0.5, 1.0, 1.5), "every": True},
        },
        "smoke": {
            "methods": ("average", "task_arithmetic", "divmerge/layer"),
            **{"tasks": 3, "repeated": 2, "budget": 1, "scales": (0.3, 1.0)},
        },
        "default": {
            "methods": ("average", "task_arithmetic", "ties", "divmerge/layer"),
            **{"tasks": 4, "budget": 1, "scales": (0.1, 0.3, 0.5, 1.0)},
        },
        "full": {"methods": (*FREE, *FITTED), "subsets": 3},
    },
    # Models per seed of experts: of all experts by the samplers task, layer and near, and of every
    # pair of neighbours in the list of tasks. merge, validation, test: rows per task.
    "random_merges": {
        "smoke": dict(task=6, layer=0, near=0, pair=0, merge=8, validation=16, test=24),
        "default": dict(task=20, layer=5, near=5, pair=0, merge=16, validation=32, test=64),
        "full": dict(task=100, layer=30, near=30, pair=10, merge=64, validation=64, test=160),
    },
    # orders: of arrival. rows: test rows per task where a study scores many merges; scored: of the
    # others. few: tasks of the suite, None for all. zetas, sigmas, draws: of the mixture. shares:
    # of corrupted experts. policy: draws that a policy learns from, on `looked` validation rows per
    # task. calls: scores per task of every search for paths, on `searched` validation rows; counts
    # after the first at the first seed. repeats: of every timing. options: of methods that learn.
    "beyond": {
        "all": {
            **{"orders": 2, "rows": 40, "scored": 40, "zetas": ZETAS, "sigmas": (0.25,)},
            **{"draws": 2, "shares": (0.0, 0.4), "looked": 25, "few": None, "options": LEAN},
        },
        "smoke": {
            **{"few": 3, "zetas": (0.0, 0.1, math.inf), "draws": 1, "policy": 12, "looked": 16},
            **{"calls": 9, "searched": (16,), "repeats": 2},
        },
        "default": {"few": 4, "policy": 60, "calls": 33, "searched": (32,), "repeats": 3},
        "full": {
            **{"orders": 10, "rows": 64, "scored": 100, "sigmas": (0.25, 0.5), "draws": 3},
            **{"shares": (0.0, 0.2, 0.4, 0.6), "policy": 100, "calls": 97, "searched": (32, 128)},
            **{"repeats": 7, "options": FULL},
        },
    },
    # side: points along an axis of a plane; pairs: planes; points: along each of the lines; rows:
    # test rows per task; answered: of the study of predictions.
    "landscapes": {
        "all": {"pairs": 2},
        "smoke": dict(side=6, points=5, lines=3, rows=20, answered=40),
        "default": dict(side=11, points=7, lines=4, rows=40, answered=100),
        "full": dict(side=16, points=7, lines=8, rows=STANDARD["rows"], answered=STANDARD["rows"]),
    },
    # merges: names of `mergeability.MERGES`. rows: test rows per task. inputs, epochs: of DivMerge.
    # draws: of bootstrap and permutations. seeds: of experts.
    "mergeability": {
        "smoke": dict(seeds=(0,), merges=PLAIN[:2], rows=40, inputs=16, epochs=1, draws=60),
        "default": dict(seeds=(0,), merges=PLAIN[::2], rows=48, inputs=16, epochs=2, draws=500),
        "full": {
            **{"seeds": (0, 1, 2), "merges": (*PLAIN, "tsv_m", "divmerge")},
            **{"rows": STANDARD["rows"], "inputs": STANDARD["inputs"], "epochs": 2, "draws": 5000},
        },
    },
    # counts: numbers of tasks, the first of the suite.
    "coefficients": {
        "all": {"groupings": ("block",), "counts": (2, 4, 8), "seeds": (0,)},
        "smoke": dict(counts=(2, 3), inputs=16, epochs=1, draws=60),
        "default": dict(inputs=16, epochs=2, draws=500),
        "full": dict(inputs=48, epochs=4, seeds=(0, 1, 2), draws=5000),
    },
}


def settings(study: str, size: str, **own: object) -> SimpleNamespace:
    """The settings of a study at a size; those in `own` that are not None, 0 or empty replace them.

    Raises ValueError for a size that the study does not have.
    """
    sizes = [name for name in SETTINGS[study] if name != "all"]
    if size not in sizes:
        raise ValueError(f"study {study!r} has the sizes {', '.join(sizes)}, not {size!r}")
    given = {name: value for name, value in own.items() if value}
    return SimpleNamespace(**{**SETTINGS[study].get("all", {}), **SETTINGS[study][size], **given})
