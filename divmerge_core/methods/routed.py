"""Methods that merge a model for every input, with weights from a router."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from divmerge_core.divergences import entropy
from divmerge_core.merging.fit import LIMIT
from divmerge_core.merging.layer_inputs import require_module
from divmerge_core.merging.merged_model import schedule
from divmerge_core.merging.problem import MergeProblem, Predictor
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import check_finite, check_size, check_steps, require_finite
from divmerge_core.methods.mixture import Router, Twins, compressed, features, mlps, untrained


def check_routers(method: str, learnt: Iterable[Tensor], step: int, lr: float) -> None:
    """Raise Diverged where a router's number is NaN or above LIMIT: it weighs by less than 1."""
    largest = torch.stack([numbers.detach().abs().max() for numbers in learnt]).max()
    check_size(method, "a router's largest number", largest, LIMIT, step, lr)


@METHODS.register(
    "wemoe",
    source="Tang et al. 2024",
    needs="unlabelled inputs",
    cost="training",
    symmetric=False,
    passes="steps",
    returns="predictor",
    cite="tang2024wemoe",
    search=(
        {},
        {"lr": 1e-3},
        {"lr": 1e-2},
        {"router_layers": 1},
        {"router_layers": 1, "lr": 1e-3},
        {"scale": 0.5},
    ),
)
def wemoe(
    problem: MergeProblem,
    *,
    scale: float = 0.3,
    router_layers: int = 2,
    steps: int = 1000,
    lr: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> Predictor:
    r"""Merge each block's MLP separately for every input, with weights from a router.

    $$
    \theta^{\text{mlp}}(x) = \theta_0^{\text{mlp}} + \sum_{t=1}^{T} w_t(x)\, \tau_t^{\text{mlp}},
    \qquad w(x) = \frac{1}{S} \sum_{s=1}^{S} r(h_s), \qquad
    \theta^{\text{rest}} = \theta_0^{\text{rest}} + \lambda \sum_{t=1}^{T} \tau_t^{\text{rest}}
    $$

    Idea: Experts differ most in their MLPs. Instead of one compromise, a small network chooses a
    mixture of experts for each input.

    Weights and biases of linear layers outside attention in numbered blocks are routed; $h$ is the
    input of the block's first such layer, and padding is left out of the mean. All else, embeddings
    too, is task arithmetic at `scale`, which is also where the weights $w$ start; they may be
    negative. The routers learn alone, by Adam, to lower the answers' entropy summed over tasks, one
    batch of each task per step, with $w$ averaged over the batch; an input's own $w$ answers it.

    scale: published as 0.3. router_layers: matrices of a router, published as 2 and 1; with 0 it is
    a constant vector, so that `steps=0` gives task arithmetic. Published: 1000 steps, lr 0.0001.

    Pitfalls: Entropy alone may collapse to one answer. All experts' MLPs have to be stored, and two
    matrices per router add d x d numbers per block. Published runs train on test inputs. Initial
    weights are drawn expert by expert, so the order of tasks matters a little.

    Peers: The authors' own code takes a $w$ per input in training too, and lets the step size fall
    by a cosine; one $w$ per batch and a constant step size are FusionBench's configuration.
    FusionBench 0.2.33 asks for a $w$ per input after training, but sets this on the whole
    model instead of its MLPs: those go on averaging over the batch, and an answer depends on its
    batch. With the same router and the same averaging a routed MLP is the same.

    Raises ValueError for options out of range, a task without inputs, a problem without a module or
    without such layers; Diverged for logits that are not finite and a router that runs off.

    Source: Tang et al. 2024, arXiv 2402.00433.
    """
    if router_layers not in (0, 1, 2):
        raise ValueError(f"router_layers must be 0, 1 or 2, got {router_layers}")
    require_finite(scale=scale)
    check_steps("wemoe", steps, lr)
    problem.require_inputs("wemoe")
    require_module(problem, "wemoe")
    mixture = untrained(problem, mlps(problem), scale, router_layers, seed)
    parameters = [p for router in mixture.routers.values() for p in router.parameters()]
    adam, counts = torch.optim.Adam(parameters, lr=lr), [len(b) for b in problem.batches]
    plan = schedule(counts, -(-steps // max(counts)), torch.Generator().manual_seed(seed))[:steps]
    for number, chosen in enumerate(tqdm(plan, "wemoe", disable=not progress, leave=False)):
        for task, index in enumerate(chosen):  # one task's graph at a time
            batch = problem.batches[task][index]
            logits = mixture.answers(task, batch, reduce=True)
            check_finite("wemoe", logits, number, lr)
            (batch.weight @ entropy(logits)).backward()
        adam.step()
        adam.zero_grad()
        check_routers("wemoe", parameters, number, lr)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return mixture


@METHODS.register(
    "twin",
    source="Lu et al. 2024",
    needs="unlabelled inputs",
    cost="training",
    symmetric=False,
    returns="predictor",
    cite="lu2024",
    search=(
        {},
        {"keep": 0.2},
        {"keep": 0.5},
        {"lr": 5e-3},
        {"scale": 0.5},
        {"keep": 0.2, "lr": 5e-3},
    ),
)
def twin(
    problem: MergeProblem,
    *,
    scale: float = 0.29,
    keep: float = 0.1,
    steps: int = 2000,
    lr: float = 5e-4,
    seed: int = 0,
    progress: bool = True,
) -> Predictor:
    r"""Add to task arithmetic, for every input, compressed residuals of the experts that fit it.

    $$
    \theta(x) = \theta^* + \sum_{t=1}^{T} w_t(x)\, \mathrm{SVD}_k\big(\theta_t - \theta^*\big),
    \qquad \theta^* = \theta_0 + \lambda \sum_{t=1}^{T} \tau_t
    $$

    Idea: What all experts share is merged once, and what is specific to one compresses well. A
    router adds the specific part that an input needs.

    Each expert's rest is kept at `keep` times full rank in every matrix (at least rank 1), and
    whole elsewhere. $w$ is the softmax of a router that reads the mean last hidden state of
    $\theta^*$ (padding left out) and was trained to tell from it which task an input is of; that
    number is the only label.

    scale: $\lambda$, published as 0.29. keep: the share of the rank. `steps` and `lr`: of
    Adam on the cross-entropy of all inputs at once.

    Pitfalls: Inputs of like tasks look alike, and a router in doubt gives their average. Each input
    has a model and a forward pass of its own, and T N numbers lie in memory beside the task
    vectors. Initial weights are drawn expert by expert, so the order of tasks matters a little.

    Peers: The authors' router has two hidden layers of twice the width, batch normalisation and
    dropout; here it has one hidden layer and standardised inputs, as inputs are few. Their code
    rounds the rank down, to 0 in small matrices, whose rest is then dropped; here it is 1 or more.
    It picks the router's best epoch on test inputs and leaves out biases, which then come from the
    expert of the task that the input is known to be of; here they are added as all else is.

    Raises ValueError for options out of range, a task without inputs and a problem without a
    module; Diverged for a loss that is not finite and a router that runs off.

    Source: Lu et al. 2024, arXiv 2406.15479.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}; 0.1 keeps a tenth of full rank")
    require_finite(scale=scale)
    check_steps("twin", steps, lr)
    problem.require_inputs("twin")
    require_module(problem, "twin")
    vectors = problem.vectors
    shared = vectors.merge([scale] * len(vectors.tasks))
    router, mean, spread = task_router(problem, shared, steps, lr, seed, progress)
    rests = torch.empty(len(vectors.tasks), len(shared), dtype=shared.dtype, device=shared.device)
    for row, task in zip(rests, vectors.tasks, strict=True):
        row[:] = compressed(vectors.expert(task).sub_(shared), vectors.layout, keep)
    return Twins(problem, shared, rests, router, mean, spread, keep)


def task_router(
    problem: MergeProblem,
    flat: Float[Tensor, " N"],
    steps: int,
    lr: float,
    seed: int,
    progress: bool,
) -> tuple[Router, Float[Tensor, " d"], Float[Tensor, " d"]]:
    """A router that tells tasks apart by a model's features; the features' mean and spread."""
    parts = [
        torch.cat([features(problem, flat, task, batch) for batch in batches])
        for task, batches in enumerate(problem.batches)
    ]
    hidden = torch.cat(parts)  # [all inputs, d]
    counts = torch.tensor([len(part) for part in parts], device=flat.device)
    of_task = torch.arange(len(parts), device=flat.device).repeat_interleave(counts)
    mean, spread = hidden.mean(0), hidden.std(0, correction=0)
    spread[spread == 0] = 1
    generator = torch.Generator().manual_seed(seed)
    width = hidden.shape[1]
    router = Router(width, len(parts), layers=2, start=0.0, generator=generator, like=flat)
    adam = torch.optim.Adam(router.parameters(), lr=lr)
    for number in tqdm(range(steps), "twin", disable=not progress, leave=False):
        loss = nn.functional.cross_entropy(router((hidden - mean) / spread), of_task)
        check_finite("twin", loss, number, lr)
        adam.zero_grad()
        loss.backward()
        adam.step()
        check_routers("twin", router.parameters(), number, lr)
    return router.requires_grad_(False), mean, spread
