"""Distillation: all weights of one model learn the experts' answers."""

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.divergences import objective
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.merged_model import expert_logits, schedule
from divmerge_core.merging.problem import Diverged, MergeProblem
from divmerge_core.methods import METHODS, checks
from divmerge_core.methods.divmerge import limit


@METHODS.register(
    "distillation",
    source="Hinton et al. 2015",
    needs="unlabelled inputs",
    cost="training",
    cite="hinton2015",
    search=({}, {"lr": 1e-3}, {"lr": 3e-4}, {"lr": 3e-5}, {"init": 0.3}, {"init": 0.3, "lr": 1e-3}),
)
def distillation(
    problem: MergeProblem,
    *,
    divergence: str = "js",
    init: float | None = None,
    inputs: int | None = None,
    epochs: int = 4,
    lr: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Distil all experts into all weights of one model, each expert on its own inputs.

    $$
    \min_{\theta} \sum_{t=1}^{T} \mathbb{E}_{x \sim X_t}\,
      D\big(p_t(\cdot \mid x),\, q_\theta(\cdot \mid x)\big), \qquad
    \theta \text{ from } \theta_0 + \lambda \sum_{t=1}^{T} \tau_t
    $$

    Idea: DivMerge's objective, minimised over all weights instead of T G coefficients. The loss it
    reaches separates the cost of merging from that of the experts and inputs.

    Every parameter that some expert changed learns, be it matrix, bias or embedding; the others
    stay the base's. Adam starts at base plus `init` times the sum of task vectors, None for 1/T,
    and takes a batch of every task per step.

    divergence: a name in DIVERGENCES; `kl` is the classic one at temperature 1. inputs: per task,
    None for DivMerge's 200. lr: none is published; this one is usual for fine-tuning.
    epochs: passes over the inputs.

    Pitfalls: It is an upper reference and not a merge: it trains N parameters. It overfits few
    inputs, and may then be worse than a merge on other rows.

    Raises ValueError for unknown names, values out of range, a task without inputs, a loss that
    stops being finite, and parameters 100 times as far from the base as any expert.

    Source: Hinton et al. 2015, arXiv 1503.02531; the objective is that of DivMerge, Eq. 4.
    """
    distance = objective(divergence)
    checks.require_positive(epochs=epochs, lr=lr)
    checks.require_finite(init=init or 0.0)
    problem.require_inputs("distillation")
    problem = limit(problem, inputs, "task")
    vectors, experts = problem.vectors, expert_logits(problem)
    num_tasks = len(vectors.tasks)
    live = vectors.merge([1 / num_tasks if init is None else init] * num_tasks)
    leaves = vectors.layout.unflatten(live)
    free, reach = dense(vectors.deltas).any(dim=0), vectors.norms().max()  # [N], []
    every = [leaf.requires_grad_() for leaf in leaves.values()]
    adam = torch.optim.Adam(every, lr=lr, fused=True)
    steps = schedule([len(b) for b in problem.batches], epochs, torch.Generator().manual_seed(seed))
    for number, chosen in enumerate(tqdm(steps, "distilling", disable=not progress, leave=False)):
        pairs = [(task, problem.batches[task][index]) for task, index in enumerate(chosen)]
        taught = zip(experts, chosen, pairs, problem.forward(leaves, pairs), strict=True)
        try:
            loss = sum(b.weight @ distance(e[n], logits) for e, n, (_, b), logits in taught)
        except ValueError as error:  # a divergence's own, of logits that are NaN
            raise Diverged(
                f"distillation: step {number}, lr {lr} (lower it if too high): {error}"
            ) from error
        checks.check_finite("distillation", loss, number, lr)
        adam.zero_grad()
        loss.backward()
        for leaf, (start, stop) in zip(leaves.values(), vectors.layout.bounds, strict=True):
            if leaf.grad is not None:  # a tensor that forward does not use has none
                leaf.grad *= free[start:stop].view_as(leaf)
        adam.step()
        checks.check_distance("distillation", torch.dist(live, vectors.base), reach, number, lr)
    return live
