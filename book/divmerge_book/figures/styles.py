"""One colour, marker and line style per method, divergence and group, the same in every figure.

Looks map a name to its label and its look, as the functions of `primitives` take them.
"""

from collections.abc import Iterable, Mapping

import seaborn as sns

PALETTE = [*sns.color_palette("colorblind")]
PALETTE[6], PALETTE[8] = (0.36, 0.17, 0.53), (0.5, 0.45, 0.0)  # its pink and yellow are pale
BLUE, GREEN, GREY = (PALETTE[n] for n in (0, 2, 7))
TITLES = {
    **{"expert": "Experts, one per task", "base": "Base model", "majority": "Majority class"},
    **{"divmerge": "DivMerge", "divmerge+": "DivMerge+"},
    **{"adamerging": "AdaMerging", "adamerging++": "AdaMerging++"},
    **{"average": "Average", "task_arithmetic": "Task arithmetic", "slerp": "Slerp"},
    **{"multi_slerp": "Multi-SLERP", "model_stock": "Model stock", "ties": "TIES", "dare": "DARE"},
    **{"lines": "LiNeS", "breadcrumbs": "Breadcrumbs", "consensus": "Consensus", "doge": "DOGE"},
    **{"pcb": "PCB-Merging", "fisher": "Fisher merging", "regmean": "RegMean", "wudi": "WUDI"},
    **{"regmean_plus_plus": "RegMean++", "esm": "ESM", "esm_pp": "ESM++", "knots": "KnOTS"},
    **{"tsv_m": "TSV-M", "iso_c": "Iso-C", "iso_cts": "Iso-CTS", "logits_fusion": "Logits fusion"},
    **{"emr": "EMR-Merging", "wemoe": "WEMoE", "twin": "Twin-Merging", "prodistill": "ProDistill"},
    **{"surgery": "Representation surgery", "distillation": "Distillation", "opcm": "OPCM"},
    **{"running_average": "Running average", "sequential_ties": "Sequential TIES"},
    **{"sequential_task_arithmetic": "Sequential task arithmetic"},
    **{"dp_mixture": "Dirichlet process mixture", "layer_evolution": "Layer evolution"},
    **{"evolved_coefficients": "Evolved coefficients", "selection_policy": "Selection policy"},
}


def title(spec: str) -> str:
    """`divmerge/layer` -> `DivMerge, per layer`."""
    name, _, grouping = spec.partition("/")
    return TITLES.get(name, name) + (f", per {grouping}" if grouping else "")


def colour(spec: str):
    """The colour of a method's family."""
    family = spec.partition("/")[0].rstrip("+")
    return {"divmerge": GREEN, "adamerging": BLUE}.get(family, GREY)


def line(spec: str) -> str:
    """The line style of a method's grouping."""
    return {"block": "--", "layer": ":"}.get(spec.partition("/")[2], "-")


def mark(number: int, marker: str, **more) -> dict:
    """A colour of the palette and a marker."""
    return {"color": PALETTE[number], "marker": marker, **more}


LOOKS: Mapping[str, tuple[int, str]] = {  # place in the palette, marker
    **{"base": (5, "v"), "average": (7, "s"), "multi_slerp": (5, "P"), "task_arithmetic": (1, "^")},
    **{"ties": (4, "D"), "consensus": (6, "<"), "tsv_m": (3, "v"), "iso_c": (8, ">")},
    **{"regmean": (9, "X"), "fisher": (8, "h"), "adamerging/task": (0, "o")},
    **{"adamerging/layer": (0, "p"), "divmerge/task": (2, "D"), "divmerge/layer": (2, "o")},
    "divmerge+": (2, "*"),
}


def style(spec: str) -> dict:
    """A method's colour, marker and line: broken where one coefficient serves a whole task.

    Methods without a look of their own share one; `expert` is black.
    """
    if spec == "expert":
        return {"color": "black", "marker": "o", "linestyle": "-", "markersize": 5}
    dash = "--" if spec.endswith("/task") else "-"
    return {**mark(*LOOKS.get(spec, (7, "."))), "linestyle": dash, "markersize": 5}


# --- looks: name -> (label, look) -----------------------------------------------------------------

Looks = Mapping[str, tuple[str, Mapping]]


def methods(specs: Iterable[str]) -> Looks:
    """Titles and looks of methods."""
    return {spec: (title(spec), style(spec)) for spec in specs}


def numbered(names: Iterable, *, markers: str = "os^DvPX*", form: str = "{}") -> dict:
    """Looks of tasks, seeds or other groups, in the order of the palette. form: of labels."""
    return {
        name: (form.format(name), mark(n % 10, markers[n % len(markers)]))
        for n, name in enumerate(dict.fromkeys(names))
    }


def marks(**looks: tuple[int, str]) -> dict[str, dict]:
    """Looks alone: name -> place in the palette and marker."""
    return {name: mark(*look) for name, look in looks.items()}


def labels(looks: Looks) -> dict[str, str]:
    """The labels alone, by name."""
    return {name: label for name, (label, _) in looks.items()}


CONTINUAL: Looks = {
    name: (title(name), look)
    for name, look in marks(
        opcm=(0, "o"), running_average=(7, "s"), sequential_task_arithmetic=(1, "^"),
        sequential_ties=(4, "D"),
    ).items()
}  # fmt: skip
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
SEARCHERS = marks(evolution=(0, "o"), evolution_small=(9, "P"), random=(7, "s"), greedy=(1, "^"))
ROUTING: Looks = {
    "one": ("one set for all", mark(2, "o")),
    "input": ("computed from the input", mark(1, "s")),
    "task": ("chosen by the task", mark(0, "^")),
}
GROUPINGS: Looks = {
    name: (f"per {name}", look)
    for name, look in marks(task=(0, "o"), block=(4, "D"), layer=(1, "s")).items()
}
OPTIMISERS = marks(adam=(7, "o"), annealed_adam=(0, "^"), lbfgs=(2, "s"), gauss_newton=(3, "D"))
KINDS = marks(embedding=(4, "D"), attention=(0, "o"), MLP=(1, "s"), norm=(2, "^"), other=(7, "x"))
SOURCES = {**marks(subsets=(0, "o"), seeds=(1, "s")), "test rows": mark(7, "^")}  # of variance
OBJECTIVES: Mapping[str, dict] = {  # divergences, entropy, and the labels' own loss
    **marks(js=(2, "o"), kl=(0, "s"), reverse_kl=(1, "^"), chi_squared=(3, "D")),
    **marks(total_variation=(4, "v"), squared_l2=(5, "P"), logit_mse=(6, "X")),
    **marks(hidden_cosine=(8, "<"), entropy=(9, ">")),
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
IMPLEMENTATIONS = marks(
    ours=(2, "o"), ours_buffer=(2, "o"), dictionary=(7, "s"), compiled=(4, "D"),
    fusion_bench=(0, "^"), mergekit=(1, "v"), liger=(1, "v"),
)  # fmt: skip
