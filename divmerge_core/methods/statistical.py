"""Fisher merging: the mean of the experts, weighted by their Fisher information."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import require_positive
from divmerge_core.methods.divmerge import limit
from divmerge_core.methods.forward import rows


@METHODS.register(
    "fisher",
    source="Matena and Raffel 2022",
    cite="matena2022",
    needs="unlabelled inputs",
    cost="gradients",
    search=tuple(
        {"floor": floor, "normalise": normalise}
        for normalise in (True, False)
        for floor in (1e-6, 1e-12, 1e-9)
    ),
)
def fisher(
    problem: MergeProblem,
    *,
    floor: float = 1e-6,
    normalise: bool = True,
    inputs: int = 256,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""The mean of the experts, parameter by parameter, weighted by their Fisher information.

    $$
    \theta = \frac{\sum_t c_t F_t \odot \theta_t}{\sum_t c_t F_t}, \qquad
    F_t = \mathbb{E}_{x \sim X_t} \sum_{v=1}^{V} p_t(v \mid x)\,
    \big(\nabla_\theta \log p_t(v \mid x)\big)^2
    $$

    Idea: The Fisher information measures how much an expert's predictions depend on a parameter.
    Each parameter is weighted towards the experts that depend on it.

    On every parameter, embeddings and biases alike; heads are not merged. $F_t$ is
    `fisher_diagonal` on the task's own inputs, with no labels drawn, raised to `floor` where it is
    lower. `normalise` takes for $c_t$ one over the Euclidean length of $F_t$ before that, else 1.
    `floor`: above 0, in squared nats per squared unit of a parameter; 1e-6 is usual. `inputs`: per
    task, at least 1; public code takes 256.

    Pitfalls: One backward pass per input and answer. Where every $F_t$ is below the floor, experts
    are weighted by $c_t$ alone, which is largest for the most confident expert: a floor that is
    large beside $F_t$ decides the merge. Words in no input of a task have no information.

    Peers: MergeLM and FusionBench sum root p times log p over answers and over a batch before they
    square, so that terms cancel: of two answers, an undecided input counts for nothing. They add
    the floor. The authors floor one chosen expert only, and search weights of experts.

    Raises ValueError for values out of range, a task without inputs, and infinite logits or NaN.

    Source: Matena and Raffel 2022 (arXiv 2111.09832).
    """
    require_positive(floor=floor)
    problem.require_inputs("fisher")
    problem = limit(problem, inputs, "task")
    above = torch.zeros_like(problem.vectors.base)
    below = torch.zeros_like(problem.vectors.base)
    tasks = tqdm(problem.vectors.tasks, "Fisher information", disable=not progress, leave=False)
    for number, task in enumerate(tasks):
        weight = fisher_diagonal(problem, problem.vectors.expert(task), number)
        norm = weight.square().sum().sqrt().clamp(min=floor) if normalise else 1.0
        weight = weight.clamp(min=floor) / norm
        above.addcmul_(weight, dense(problem.vectors.select([task]).deltas)[0].to(weight))
        below += weight
    return problem.vectors.base + above / below


def fisher_diagonal(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int
) -> Float[Tensor, " N"]:
    """Mean over a task's inputs of sum_y p(y) (d log p(y) / d theta)^2, with p the model's own.

    One backward pass for every input (every answer position of a language model) and answer:
    exact, with no drawn labels, and for classifiers. Raises ValueError at infinite logits or NaN.
    """
    leaves = problem.vectors.layout.unflatten(flat.detach().clone())
    for leaf in leaves.values():
        leaf.requires_grad_()
    diagonal = torch.zeros_like(flat)
    places = problem.vectors.layout.unflatten(diagonal)
    for number, example in enumerate(examples(problem.batches[task])):
        log_p = problem.forward(leaves, [(task, example)])[0].log_softmax(-1)  # [A, V]
        if not torch.isfinite(log_p).all():
            raise ValueError(
                f"the expert of {problem.vectors.tasks[task]!r} gives logits that are not finite "
                f"at input {number}; check its checkpoint"
            )
        shares = example.weight[:, None] * log_p.detach().exp()  # [A, V]
        for share, answer in zip(shares.flatten().tolist(), log_p.flatten(), strict=True):
            grads = torch.autograd.grad(
                answer, list(leaves.values()), retain_graph=True, allow_unused=True
            )
            for place, grad in zip(places.values(), grads, strict=True):
                if grad is not None:
                    place.addcmul_(grad, grad, value=share)
    return diagonal


def examples(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Every row as a batch of its own; weights sum to 1 over all rows, each row alike."""
    sizes = [len(next(iter(batch.inputs.values()))) for batch in batches]
    for size, batch in zip(sizes, batches, strict=True):
        for row in rows(batch):
            yield replace(row, weight=row.weight * size / sum(sizes))
