"""What a merging method is called, and how it looks: one colour and one marker in every figure."""

from collections.abc import Mapping

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
    **{"regmean": (9, "X"), "adamerging/task": (0, "o"), "adamerging/layer": (0, "p")},
    **{"divmerge/task": (2, "D"), "divmerge/layer": (2, "o")},
}
OTHER: Look = (7, ".")


def style(spec: str) -> dict:
    """A method's colour, marker and line: broken where one coefficient serves a whole task.

    Methods without a look of their own share one; `expert` is black.
    """
    number, marker = LOOKS.get(spec, OTHER)
    colour = "black" if spec == "expert" else PALETTE[number]
    dash = "--" if spec.endswith("/task") else "-"
    marker = "o" if spec == "expert" else marker
    return {"color": colour, "marker": marker, "linestyle": dash, "markersize": 5}
