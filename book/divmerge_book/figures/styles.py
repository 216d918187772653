"""One colour, marker and line style per method, divergence and group, the same in every figure."""

from collections.abc import Iterable, Mapping

import seaborn as sns

PALETTE = [*sns.color_palette("colorblind")]
PALETTE[6], PALETTE[8] = (0.36, 0.17, 0.53), (0.5, 0.45, 0.0)  # its pink and yellow are pale
BLUE, GREEN, GREY = (PALETTE[n] for n in (0, 2, 7))
TITLES = {
    "expert": "Experts, one per task",
    "base": "Base model",
    "majority": "Majority class",
    "divmerge": "DivMerge",
    "adamerging": "AdaMerging",
    "adamerging++": "AdaMerging++",
    "average": "Average",
    "task_arithmetic": "Task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "lines": "LiNeS",
    "running_average": "Running average",
    "sequential_task_arithmetic": "Sequential task arithmetic",
    "sequential_ties": "Sequential TIES",
    "opcm": "OPCM",
    "dp_mixture": "Dirichlet process mixture",
    "distillation": "Distillation",
    "surgery": "Representation surgery",
    "layer_evolution": "Layer evolution",
    "evolved_coefficients": "Evolved coefficients",
    "selection_policy": "Selection policy",
    "prodistill": "ProDistill",
    "breadcrumbs": "Breadcrumbs",
    "consensus": "Consensus",
    "pcb": "PCB-Merging",
    "emr": "EMR-Merging",
    "wemoe": "WEMoE",
    "twin": "Twin-Merging",
    "logits_fusion": "Logits fusion",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "knots": "KnOTS",
    "slerp": "Slerp",
    "multi_slerp": "Multi-slerp",
    "model_stock": "Model stock",
    "fisher": "Fisher merging",
    "regmean": "RegMean",
    "regmean_plus_plus": "RegMean++",
    "esm": "ESM",
    "esm_pp": "ESM++",
    "doge": "DOGE",
    "wudi": "WUDI",
}


def title(spec: str) -> str:
    """`divmerge/layer` -> `DivMerge, per layer`."""
    name, _, grouping = spec.partition("/")
    return TITLES.get(name, name) + (f", per {grouping}" if grouping else "")


def colour(spec: str):
    """The colour of a method's family."""
    name = spec.partition("/")[0]
    return {"divmerge": GREEN, "adamerging": BLUE}.get(name, GREY)


def line(spec: str) -> str:
    """The line style of a method's grouping."""
    return {"block": "--", "layer": ":"}.get(spec.partition("/")[2], "-")


Look = tuple[int, str]  # place in the palette, marker
LOOKS: Mapping[str, Look] = {
    **{"base": (5, "v"), "average": (7, "s"), "multi_slerp": (5, "P"), "task_arithmetic": (1, "^")},
    **{"ties": (4, "D"), "consensus": (6, "<"), "tsv_m": (3, "v"), "iso_c": (8, ">")},
    **{"regmean": (9, "X"), "fisher": (8, "v"), "adamerging/task": (0, "o")},
    **{"adamerging/layer": (0, "p"), "divmerge/task": (2, "D"), "divmerge/layer": (2, "o")},
}
OTHER: Look = (7, ".")


def style(spec: str) -> dict:
    """A method's colour, marker and line: broken where one coefficient serves a whole task.

    Methods without a look of their own share one; `expert` is black.
    """
    if spec == "expert":
        return {"color": "black", "marker": "o", "linestyle": "-", "markersize": 5}
    dash = "--" if spec.endswith("/task") else "-"
    return {**mark(*LOOKS.get(spec, OTHER)), "linestyle": dash, "markersize": 5}


def methods(specs: Iterable[str]) -> dict[str, tuple[str, dict]]:
    """Name -> (title, look) of methods, as the functions of `primitives` take them."""
    return {spec: (title(spec), style(spec)) for spec in specs}


def mark(number: int, marker: str, **more) -> dict:
    """A colour of the palette and a marker."""
    return {"color": PALETTE[number], "marker": marker, **more}


def labels(looks: Mapping[str, tuple[str, Mapping]]) -> dict[str, str]:
    """The labels alone, by name."""
    return {name: label for name, (label, _) in looks.items()}


def numbered(names: Iterable, *, markers: str = "os^DvPX*") -> dict:
    """Name -> (name, look) of tasks, seeds or other groups, in the order of the palette."""
    return {
        name: (f"{name}", mark(n % 10, markers[n % len(markers)]))
        for n, name in enumerate(dict.fromkeys(names))
    }


# --- groups that are no merging methods: name -> (label, look) ------------------------------------

Looks = Mapping[str, tuple[str, Mapping]]
CONTINUAL = {
    name: (title(name), mark(*look))
    for name, look in {
        **{"opcm": (0, "o"), "running_average": (7, "s")},
        **{"sequential_task_arithmetic": (1, "^"), "sequential_ties": (4, "D")},
    }.items()
}
CLUSTERINGS: Looks = {
    "dp_mixture": ("mixture", mark(0, "o")),
    "k_means": ("k-means", mark(1, "s")),
    "random": ("random groups", mark(7, "x", linestyle="none")),
}
SELECTORS: Looks = {
    "policy": ("learned policy", mark(0, "o")),
    "leave_one_out": ("leave one out", mark(1, "s")),
    "cosine": ("cosine", mark(2, "^")),
    "norm": ("norm", mark(4, "D")),
    "shuffled": ("policy, shuffled reward", mark(7, "x")),
    "all": ("merge all", mark(5, "v")),
    "oracle": ("honest only", mark(3, "*")),
}
SEARCHERS: Mapping[str, dict] = {
    **{"evolution": mark(0, "o"), "evolution_small": mark(9, "P")},
    **{"random": mark(7, "s"), "greedy": mark(1, "^")},
}
ROUTING: Looks = {
    "one": ("one set for all", mark(2, "o")),
    "input": ("read from the input", mark(1, "s")),
    "task": ("the task's number", mark(0, "^")),
}
GROUPINGS: Looks = {
    name: (f"per {name}", mark(*look))
    for name, look in {"task": (0, "o"), "block": (4, "D"), "layer": (1, "s")}.items()
}
OPTIMISERS: Mapping[str, dict] = {
    **{"adam": mark(7, "o"), "annealed_adam": mark(0, "^")},
    **{"lbfgs": mark(2, "s"), "gauss_newton": mark(3, "D")},
}
KINDS: Mapping[str, dict] = {  # of parameters
    **{"embedding": mark(4, "D"), "attention": mark(0, "o"), "MLP": mark(1, "s")},
    **{"norm": mark(2, "^"), "other": mark(7, "x")},
}
SOURCES: Mapping[str, dict] = {  # of variance
    **{"subsets": mark(0, "o"), "seeds": mark(1, "s"), "test rows": mark(7, "^")}
}
OBJECTIVES: Mapping[str, dict] = {  # divergences, entropy, and the labels' own loss
    **{"js": mark(2, "o"), "kl": mark(0, "s"), "reverse_kl": mark(1, "^")},
    **{"chi_squared": mark(3, "D"), "total_variation": mark(4, "v"), "squared_l2": mark(5, "P")},
    **{"logit_mse": mark(6, "X"), "hidden_cosine": mark(8, "<"), "entropy": mark(9, ">")},
    "labels": {"color": "black", "marker": "*"},
}
CRITERIA: Looks = {  # of model selection
    "js": ("JS", OBJECTIVES["js"]),
    "kl": ("KL(expert || merged)", OBJECTIVES["kl"]),
    "reverse_kl": ("KL(merged || expert)", OBJECTIVES["reverse_kl"]),
    "entropy": ("entropy", OBJECTIVES["entropy"]),
    "validation": ("labelled validation rows", mark(7, "P")),
    "test": ("the test rows themselves", {"color": "black", "marker": "*", "linestyle": "--"}),
    "none": ("a random model", {"color": "black", "marker": "_", "linestyle": ":"}),
}
IMPLEMENTATIONS: Mapping[str, dict] = {
    **{"ours": mark(2, "o"), "ours_buffer": mark(2, "o"), "dictionary": mark(7, "s")},
    **{"compiled": mark(4, "D"), "fusion_bench": mark(0, "^"), "mergekit": mark(1, "v")},
    "liger": mark(1, "v"),
}
