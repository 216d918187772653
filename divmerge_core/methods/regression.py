"""RegMean and RegMean++: linear layers fitted to what every expert's layer puts out."""

from collections.abc import Sequence, Set

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.layer_inputs import layer_inputs, linear_layers, require_module
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import limit

SHARES = tuple({"off_diagonal": share} for share in (0.95, 0.9, 0.8, 0.6, 0.3, 0.1))
RIDGE = 1e-8  # of every column's mean square: enough to decide where the inputs leave a choice


@METHODS.register(
    "regmean",
    source="Jin et al. 2023",
    cite="jin2023",
    needs="unlabelled inputs",
    cost="inputs",
    search=SHARES,
)
def regmean(
    problem: MergeProblem, *, off_diagonal: float = 0.95, inputs: int = 256, progress: bool = True
) -> Float[Tensor, " N"]:
    r"""Linear layers fitted by least squares to the outputs of every expert's layer.

    $$
    W = \Big(\sum_t W_t\, G_t\Big) \Big(\sum_t G_t\Big)^{-1}, \qquad
    G_t = \alpha\, \frac{X_t^\top X_t}{n} + (1 - \alpha) \operatorname{diag}\frac{X_t^\top X_t}{n}
    $$

    Idea: A layer matters through its outputs on the inputs that reach it. On each task's inputs the
    merged layer should have the outputs of that task's expert: linear regression.

    For the weight [M, K] of every linear layer, over the n tokens $X_t$ that the layer reads in
    expert t. All other tensors, biases and embeddings too, are averaged. `off_diagonal` is
    $\alpha$, in [0, 1]: 0 weighs the columns one by one, 1 is plain least squares; public settings
    are 0.95 for CLIP and 0.6 for GPT-2. `inputs`: per task, at least 1; public code takes 256.

    Pitfalls: Each layer is fitted behind the expert's own earlier layers, which the merged model
    does not have. Only `nn.Linear` counts, so GPT-2's `Conv1D` is averaged. Where inputs leave a
    choice, as for a feature that is always 0, the weights are those nearest to the average.

    Peers: Where inputs leave a choice, public code inverts a singular matrix all the same; and it
    counts padding, which is left out here.

    Raises ValueError for values out of range, a task without inputs, a problem without module.

    Source: Jin et al. 2023 (arXiv 2212.09849).
    """
    problem.require_inputs("regmean")
    require_module(problem, "regmean")
    return regressed(limit(problem, inputs, "task"), "task", off_diagonal, progress)


@METHODS.register(
    "regmean_plus_plus",
    source="Nguyen et al. 2025",
    cite="nguyen2025",
    needs="unlabelled inputs",
    cost="inputs",
    search=SHARES,
)
def regmean_plus_plus(
    problem: MergeProblem,
    *,
    grouping: str = "block",
    off_diagonal: float = 0.95,
    inputs: int = 256,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""RegMean block by block: each block is fitted to the outputs of the merged earlier blocks.

    $$
    W^{(l)} = \Big(\sum_t W_t^{(l)} G_t^{(l)}\Big) \Big(\sum_t G_t^{(l)}\Big)^{-1}, \qquad
    G_t^{(l)} \text{ on inputs from the merged blocks } 1, \ldots, l - 1
    $$

    Idea: RegMean fits each layer to inputs that the merged model never produces. Fitted in order,
    behind the merged earlier blocks, each block can compensate for their errors.

    A block's G come from expert t's block behind the merged embeddings and earlier blocks; then the
    block is merged as in `regmean`. Blocks are merged in the layout's order, which must be that of
    the forward pass. `grouping`: what counts as a block; at `task` nothing is merged before, which
    is RegMean. Other options as in `regmean`.

    Pitfalls: As many passes over the inputs as there are blocks, and errors of the first blocks
    reach all later ones.

    Peers: As in `regmean`. The authors' code also leaves the tensors after the last block as in the
    base, where they are averaged, or regressed, here.

    Raises ValueError as `regmean` does, and for an unknown grouping.

    Source: Nguyen et al. 2025 (arXiv 2508.03121).
    """
    problem.require_inputs("regmean_plus_plus")
    require_module(problem, "regmean_plus_plus")
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
        for name, seen in layer_inputs(problem, model, number, names).items():
            gram = seen.gram / seen.count  # X^T X / n
            gram = gram * off_diagonal + gram.diagonal().diag() * (1 - off_diagonal)
            total, moment = found.get(name, (0, 0))
            found[name] = (total + gram, moment + deltas[name].double() @ gram)
    return found


def solution(
    gram: Float[Tensor, "K K"], moment: Float[Tensor, "M K"], mean: Float[Tensor, "M K"]
) -> Float[Tensor, "M K"]:
    """moment gram^-1, and what is nearest to `mean` where gram has no inverse."""
    squares = gram.diagonal()
    ridge = torch.where(squares > 0, RIDGE * squares, 1.0)  # [K]
    return torch.linalg.solve(gram + ridge.diag(), moment + mean * ridge, left=False)
