"""How a merging method looks: one colour and one marker each, the same in every figure."""

from collections.abc import Mapping

from divmerge_core.figures import PALETTE

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
