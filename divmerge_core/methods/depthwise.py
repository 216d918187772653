"""Layer scaling (LiNeS): the change of any merge, scaled by depth."""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.methods import METHODS
from divmerge_core.methods.arithmetic import moved
from divmerge_core.methods.checks import require_finite


def depths(layout: Layout) -> list[float]:
    """How deep each tensor lies in its stack of blocks: 0 for the first block, 1 for the last.

    A block is the first number in a name, its stack what stands before. Tensors outside all blocks
    lie at 0. Raises ValueError where no tensor is in a block.
    """
    found = [re.match(r"(?:(.*?)\.)?(\d+)\.", name) for name in layout.names]
    last: dict[str | None, int] = {}
    for match in filter(None, found):
        last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    if not last:
        raise ValueError(
            f"lines scales by depth, and no tensor's name has a block number: {layout.names[:3]}; "
            "name blocks as in 'encoder.layer.0.dense.weight'"
        )
    return [int(match[2]) / max(last[match[1]], 1) if match else 0.0 for match in found]


@METHODS.register(
    "lines",
    source="Wang et al. 2025",
    cite="wang2025lines",
    needs="validation labels, for the scale",
    between=False,  # alone, an expert's last block is scaled by 1 + beta
    search=tuple({"beta": beta} for beta in (0.5, 0.2, 0.3, 0.4, 0.7, 1.0)),
)
def lines(
    problem: MergeProblem,
    *,
    rule: str = "task_arithmetic",
    options: Mapping[str, object] | None = None,
    alpha: float | None = None,
    beta: float = 0.5,
) -> Float[Tensor, " N"]:
    r"""Any rule's merge, its change scaled by depth: `alpha` in the first block, then more.

    $$
    \theta^{(l)} = \theta_0^{(l)} + \Big(\alpha + \beta\, \frac{l - 1}{L - 1}\Big)\, \Delta^{(l)},
    \qquad l = 1, \ldots, L
    $$

    Idea: Early blocks compute features that all tasks need, which fine-tuning should preserve. Late
    blocks are specific to a task, so their change may be larger.

    $\Delta$ is what the rule changes. Tensors outside the blocks, such as embeddings and a final
    norm, receive alpha. A block is the first number in a tensor's name, counted within what stands
    before it. `rule`: any method that returns parameters, called with `options`, and at scale 1
    where it has a scale and none is given; data is needed where the rule needs some. `alpha`: None
    for the L1 norm of the summed task vectors over T times that of $\Delta$, which is 1/T for task
    arithmetic. Choose `beta` on validation rows, like a scale. For one expert the paper takes a
    small alpha and beta = 1 - alpha.

    Pitfalls: It needs blocks, so it does not apply to a model without numbered layers. A rule that
    scales by depth itself, such as one coefficient per block, is scaled twice.

    Raises ValueError for an unknown rule, one without a single vector, itself, numbers that are not
    finite, and a model without blocks.

    Source: Wang et al. 2025 (arXiv 2410.17146).
    """
    from divmerge_core.methods import options_of  # defined after the methods are imported

    function = METHODS[rule]
    require_finite(beta=beta, **({} if alpha is None else {"alpha": alpha}))
    if rule == "lines" or METHODS.facts[rule].get("returns") == "predictor":
        raise ValueError(f"rule must be another method that returns parameters, got {rule!r}")
    share, vectors = depths(problem.vectors.layout), problem.vectors
    given = {"scale": 1.0} if "scale" in options_of(rule) else {}
    change = function(problem, **{**given, **(options or {})}) - vectors.base
    if alpha is None:
        whole, size = dense(vectors.deltas).sum(dim=0).abs().sum(), change.abs().sum()
        alpha = float(whole / torch.where(size > 0, size, 1)) / len(vectors.tasks)
    for (start, stop), depth in zip(vectors.layout.bounds, share, strict=True):
        change[start:stop] *= alpha + beta * depth
    return moved(problem, change)
