"""Methods that match statistics of experts: Fisher information, layer inputs."""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.activations import linear_layers, watch_inputs
from divmerge_core.coefficients import groups_of
from divmerge_core.kernels.stores import dense
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import limit
from divmerge_core.problem import Batch, MergeProblem

RIDGE = 1e-8  # of every column's mean square: enough to decide where the inputs leave a choice


# --- Fisher merging -------------------------------------------------------------------------------


@METHODS.register(
    "fisher",
    source="Matena and Raffel 2022",
    needs="unlabelled inputs",
    cost="gradients",
    symmetric=True,
    search=({}, {"floor": 1e-12}),
)
def fisher(
    problem: MergeProblem,
    *,
    floor: float = 1e-6,
    normalise: bool = True,
    inputs: int = 256,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """The mean of the experts, parameter by parameter, weighted by their Fisher information.

    theta = sum_t c_t F_t theta_t / sum_t c_t F_t on every parameter, embeddings and biases alike
    (arXiv 2111.09832). F_t is `fisher_diagonal` on the task's own inputs, raised to `floor` where
    it is lower; c_t is 1, or with `normalise` one over the Euclidean length of F_t before that.

    floor: above 0, in squared nats per squared unit of a parameter. Where every F_t is below it,
    experts weigh as c_t alone, and so the surest, whose F_t is shortest, weighs most: a floor that
    is large beside F_t decides the merge. inputs: per task, at least 1.

    Widespread public code (MergeLM, FusionBench) sums sqrt(p) log p over answers and over a batch
    before it squares, so that terms cancel: of two answers, an undecided input counts for nothing.
    It adds the floor. The authors floor one chosen expert only, and search weights of experts.
    Raises ValueError for values out of range, a task without inputs, and logits that are not
    finite.
    """
    if not 0 < floor < float("inf"):
        raise ValueError(f"floor must be above 0 and finite, got {floor}; 1e-6 is usual")
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
    exact, with no drawn labels, and meant for classifiers. Raises ValueError at logits that are
    not finite.
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
        answers = [1] * size if batch.answer is None else batch.answer.sum(dim=1).tolist()
        for row, weight in enumerate(batch.weight.split(answers)):
            here = slice(row, row + 1)
            yield replace(
                batch,
                inputs={name: value[here] for name, value in batch.inputs.items()},
                weight=weight * size / sum(sizes),
                answer=None if batch.answer is None else batch.answer[here],
            )


# --- RegMean --------------------------------------------------------------------------------------


@METHODS.register(
    "regmean",
    source="Jin et al. 2023",
    needs="unlabelled inputs",
    cost="inputs",
    symmetric=True,
    search=({}, {"off_diagonal": 0.6}),
)
def regmean(
    problem: MergeProblem,
    *,
    off_diagonal: float = 0.95,
    inputs: int = 256,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Linear layers that come closest, in least squares, to what every expert's layer puts out.

    For the weight W [M, K] of a linear layer, W = (sum_t W_t G_t) (sum_t G_t)^-1 with G_t = X_t^T
    X_t / n over the n tokens that the layer reads in expert t, entries off its diagonal times
    `off_diagonal` (arXiv 2212.09849). All other tensors, biases and embeddings too, are averaged.
    Where the inputs leave a choice, as for a feature that is always 0, the weights are those
    nearest to the average; public code inverts the singular matrix all the same.

    off_diagonal: in [0, 1]; 0 weighs the columns one by one, 1 is plain least squares. Public
    settings are 0.95 for CLIP and 0.6 for GPT-2. inputs: per task, at least 1. Padding is left out
    here and counted in public code. Only nn.Linear counts: GPT-2's Conv1D is averaged. Raises
    ValueError for values out of range, a task without inputs, and a problem without its module.
    """
    problem.require_inputs("regmean")
    return regressed(limit(problem, inputs, "task"), "task", off_diagonal, progress)


@METHODS.register(
    "regmean_plus_plus",
    source="Nguyen et al. 2025",
    needs="unlabelled inputs",
    cost="inputs",
    symmetric=True,
    search=({}, {"off_diagonal": 0.6}),
)
def regmean_plus_plus(
    problem: MergeProblem,
    *,
    grouping: str = "block",
    off_diagonal: float = 0.95,
    inputs: int = 256,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """RegMean from front to back: each block reads what the blocks merged before it put out.

    A block's G_t come from expert t's block behind the merged embeddings and earlier blocks (arXiv
    2508.03121); then the block is merged as in `regmean`. Blocks are merged in the layout's order,
    which must be that of the forward pass. As many passes over the inputs as there are blocks.

    grouping: what counts as a block; at "task" nothing is merged before, which is RegMean. Other
    options, and differences to public code, as in `regmean`. Raises ValueError as `regmean` does,
    and for an unknown grouping.
    """
    problem.require_inputs("regmean_plus_plus")
    return regressed(limit(problem, inputs, "task"), grouping, off_diagonal, progress)


def regressed(
    problem: MergeProblem, grouping: str, off_diagonal: float, progress: bool
) -> Float[Tensor, " N"]:
    """Average everything, then solve for the linear layers, one group after the other."""
    if not 0 <= off_diagonal <= 1:
        raise ValueError(
            f"off_diagonal must be in [0, 1], got {off_diagonal}; 0.95 is close to least squares"
        )
    vectors, layers = problem.vectors, linear_layers(problem)
    mean = dense(vectors.deltas).mean(dim=0)
    merged = vectors.base + mean
    groups, numbers = groups_of(vectors.layout, grouping)
    places = [slice(*bounds) for bounds in vectors.layout.bounds]
    named = list(zip(vectors.layout.names, places, numbers, strict=True))
    done: list[slice] = []
    for group in tqdm(range(len(groups)), "blocks", disable=not progress, leave=False):
        linear = {name: p for name, p, number in named if number == group and name in layers}
        equations = normal_equations(problem, merged, done, set(linear), off_diagonal)
        for name, (gram, moment) in equations.items():
            place = linear[name]
            delta = solution(gram, moment, mean[place].view(moment.shape))
            merged[place] = vectors.base[place] + delta.to(merged).flatten()
        done += [place for _, place, number in named if number == group]
    return merged


def normal_equations(
    problem: MergeProblem,
    merged: Float[Tensor, " N"],
    done: Sequence[slice],
    names: Set[str],
    off_diagonal: float,
) -> dict[str, tuple[Float[Tensor, "K K"], Float[Tensor, "M K"]]]:
    """(sum_t G_t, sum_t D_t G_t) of every layer named, in float64.

    G_t is taken in expert t with the places that are `done` as in `merged`.
    """
    vectors, found = problem.vectors, {}
    if not names:
        return found
    for number, task in enumerate(vectors.tasks):
        model = vectors.expert(task)
        for place in done:
            model[place] = merged[place]
        deltas = vectors.layout.unflatten(dense(vectors.select([task]).deltas)[0])
        for name, gram in grams(problem, model, number, names).items():
            gram = gram * off_diagonal + gram.diagonal().diag() * (1 - off_diagonal)
            total, moment = found.get(name, (0, 0))
            found[name] = (total + gram, moment + deltas[name].double() @ gram)
    return found


def grams(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, names: Set[str]
) -> dict[str, Float[Tensor, "K K"]]:
    """X^T X / n over the n tokens that each layer named reads, in float64."""
    sums, counts = {}, Counter()

    def see(name: str, x: Tensor) -> None:
        if name in names:
            x = x.double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] += len(x)

    watch_inputs(problem, flat, task, see)
    return {name: total / counts[name] for name, total in sums.items()}


def solution(
    gram: Float[Tensor, "K K"], moment: Float[Tensor, "M K"], mean: Float[Tensor, "M K"]
) -> Float[Tensor, "M K"]:
    """moment gram^-1, and what is nearest to `mean` where gram has no inverse."""
    squares = gram.diagonal()
    ridge = torch.where(squares > 0, RIDGE * squares, 1.0)  # [K]
    return torch.linalg.solve(gram + ridge.diag(), moment + mean * ridge, left=False)
