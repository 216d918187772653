"""How much every study runs at each size: one table for all of them."""

from collections.abc import Mapping
from types import SimpleNamespace

FREE = (
    *("average", "model_stock", "multi_slerp", "task_arithmetic", "ties", "dare", "breadcrumbs"),
    *("pcb", "consensus", "tsv_m", "iso_c", "iso_cts", "doge", "opcm"),
)
FITTED = (
    *("regmean", "fisher", "adamerging/task", "adamerging/layer"),
    *("divmerge/task", "divmerge/layer"),
)

# Study -> size -> settings; what stands under "all" holds for every size that does not differ.
SETTINGS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    # specs: objectives of the ablation, () for all; watched: those whose trajectory is recorded, at
    # `followed` seeds and `every` so many steps; stressed, kinds, temperatures: of the robustness
    # studies. counts: numbers of tasks. inputs, validation, test: rows per task. rates: of Adam.
    "choice": {
        "all": {"epochs": 4, "rates": (3e-2, 1e-1), "followed": 1, "every": 4, "counts": (2,)},
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
            **{"inputs": 24, "validation": 50, "test": 150},
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
            **{"tasks": 4, "large": 8, "inputs": 32, "published": 200, "steps": 32},
            "grid": {"init": (0.0, 0.5, 1.0), "lr": (1e-3, 3e-2, 1e-1), "epochs": (1, 8)},
            **{"counts": (0, 1, 4, 16, 100, 400), "several": (2, 8)},
            **{"adam": 400, "passes": 40, "rows": 300},
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
