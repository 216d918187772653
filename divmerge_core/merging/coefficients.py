"""How much of each task vector each group of parameters receives: Lambda, `[T, G]`."""

import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.registry import Registry

GROUPINGS = Registry("grouping")
LINKS = Registry("link")


@GROUPINGS.register("task")
def task(name: str) -> str:
    """One coefficient per task: every tensor is in one group (the paper's task level)."""
    return "model"


@GROUPINGS.register("block")
def block(name: str) -> str:
    """One per task and transformer block; embeddings, and what follows the blocks, have their own.

    The block of `encoder.layer.3.output.dense.weight` is `encoder.layer.3`, that of
    `model.layers.3.mlp.up_proj.weight` is `model.layers.3`; `model.norm.weight` is in `model.norm`.
    """
    numbered = re.match(r"(.*?\.\d+)\.", name)
    whole = re.match(r"(?:(?:model|transformer)\.)?[^.]+", name)  # the part that holds it all
    return numbered[1] if numbered else whole[0]


@GROUPINGS.register("layer")
def layer(name: str) -> str:
    """One per task and parameter tensor: what AdaMerging's code and its heirs call a layer."""
    return name


def identity(raw: Tensor) -> Tensor:
    """No constraint: coefficients may be negative or above 1, as in the paper."""
    return raw


def clamp(raw: Tensor) -> Tensor:
    """The nearest number in [0, 1]; the gradient outside it is 0, and 1 at its ends.

    The free parameter itself may leave [0, 1]: no gradient brings it back, and its coefficient
    stays at that end unless the optimizer's momentum moves it.
    """
    return raw.clamp(0, 1)


# A link maps free parameters to coefficients; its inverse turns the initial value into parameters.
LINKS.register("identity", inverse=identity)(identity)
LINKS.register("sigmoid", inverse=torch.logit)(torch.sigmoid)
LINKS.register("softmax", inverse=torch.log)(lambda raw: torch.softmax(raw, dim=0))
LINKS.register("clamp", inverse=identity)(clamp)


def groups_of(layout: Layout, grouping: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names of the G groups, and each tensor's group number."""
    function: Callable[[str], str] = GROUPINGS[grouping]
    labels = [function(name) for name in layout.names]
    names = tuple(dict.fromkeys(labels))
    return names, tuple(names.index(label) for label in labels)


class Coefficients(nn.Module):
    """Lambda `[T, G]` as a trainable module: call it to get the coefficients.

    grouping: a name in GROUPINGS. link: `identity` (unconstrained, the paper's), `clamp` (cut to
    [0, 1]), `sigmoid` (each in (0, 1)) or `softmax` (over tasks, so that they sum to 1 in every
    group). init: the initial value of every coefficient; None means 1/T, as in the paper's
    Algorithm 1 (its Table 9 says 0.5); or one value per tensor of the layout: tensors of one group
    that start elsewhere become a group of their own. Raises ValueError for an initial value that
    the link cannot reach.
    """

    def __init__(
        self,
        layout: Layout,
        num_tasks: int,
        *,
        grouping: str = "task",
        link: str = "identity",
        init: float | Sequence[float] | None = None,
    ):
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"merging needs at least one task, got {num_tasks}")
        names, numbers = groups_of(layout, grouping)
        value = 1 / num_tasks if init is None else init
        values = list(value) if isinstance(value, Sequence) else [float(value)] * len(numbers)
        pairs = list(dict.fromkeys(zip(numbers, values, strict=True)))
        repeated = [number for number, _ in pairs]
        self.groups = tuple(
            names[n] if repeated.count(n) == 1 else f"{names[n]} from {start:.4g}"
            for n, start in pairs
        )
        own = [pairs.index(pair) for pair in zip(numbers, values, strict=True)]
        self.segments = Segments.of(layout.bounds, own)
        self.link = LINKS[link]
        start = torch.tensor([start for _, start in pairs]).expand(num_tasks, len(pairs))
        raw = LINKS.facts[link]["inverse"](start)
        self.raw = nn.Parameter(raw.clone())
        reached = self.link(raw)
        if not torch.isfinite(raw).all() or (reached - start).abs().max() > 1e-5:
            raise ValueError(
                f"init must be one that link {link!r} reaches, got {value}: sigmoid reaches "
                f"(0, 1), clamp [0, 1], softmax 1/T = {1 / num_tasks:.4g}; identity takes any "
                "finite number"
            )

    def forward(self) -> Float[Tensor, "T G"]:
        return self.link(self.raw)
