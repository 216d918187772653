"""Methods that return no single model: they route inputs to experts, or fuse experts' answers."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from divmerge_core.divergences import entropy, kl
from divmerge_core.linalg import matrices, truncated
from divmerge_core.methods import METHODS
from divmerge_core.methods.mixture import Router, Twins, features, mlps, untrained
from divmerge_core.problem import Batch, MergeProblem, Predictor, schedule
from divmerge_core.vectors import Layout

WEIGHTS = tuple(n / 10 for n in range(21))  # that logits_fusion tries for every answer: 0 to 2


def check_fit(method: str, steps: int, lr: float) -> None:
    """Raise ValueError unless there are 0 or more steps, of a size above 0."""
    if steps < 0 or not 0 < lr < float("inf"):
        raise ValueError(
            f"{method}: steps must be 0 or more and lr above 0 and finite, got {steps} and {lr}"
        )


def check_course(method: str, numbers: Tensor, step: int, lr: float) -> None:
    """Raise ValueError where the logits or the loss of a step hold NaN or +inf."""
    if not (numbers < math.inf).all():
        raise ValueError(
            f"{method}: NaN or inf at step {step}; lower lr (now {lr}) or check the experts for "
            "extreme logits"
        )


# --- weights put together for every input ---------------------------------------------------------


@METHODS.register(
    "wemoe",
    source="Tang et al. 2024",
    needs="unlabelled inputs",
    cost="training",
    symmetric=False,
    returns="predictor",
    search=({}, {"router_layers": 1}),
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
    """Merge each block's MLP anew for every input, with weights that a router reads from it.

    Weights and biases of linear layers outside attention in numbered blocks are routed:
    theta_0 + sum_t w_t tau_t, where w is the mean over tokens of a router's output at the MLP's
    input (no softmax; padding left out). All else, embeddings too, is task arithmetic at `scale`,
    which is also where w starts. The routers learn alone, by Adam, minimising the answers' entropy
    summed over tasks, with one batch of each task per step and w averaged over the batch; the
    result answers with a w of each input's own. Source: arXiv 2402.00433.

    router_layers: matrices of a router; 0 is one constant vector, so that steps=0 gives task
    arithmetic, and 2 of them need d x d numbers per block. Not symmetric: initial weights are drawn
    expert by expert. The published runs train on test inputs in batches of 16. Their code as
    packaged in FusionBench 0.2.33 asks for a w per input after training, but sets this on the whole
    model instead of its MLPs: those go on averaging, and an answer depends on its batch. Entropy
    alone may collapse to one answer.

    Raises ValueError for options out of range, a task without inputs, a problem without a module
    or without such layers, and logits that are not finite.
    """
    if router_layers not in (0, 1, 2):
        raise ValueError(f"router_layers must be 0, 1 or 2, got {router_layers}")
    check_fit("wemoe", steps, lr)
    problem.require_inputs("wemoe")
    mixture = untrained(problem, mlps(problem), scale, router_layers, seed)
    parameters = [p for router in mixture.routers.values() for p in router.parameters()]
    adam, counts = torch.optim.Adam(parameters, lr=lr), [len(b) for b in problem.batches]
    plan = schedule(counts, -(-steps // max(counts)), torch.Generator().manual_seed(seed))[:steps]
    for number, chosen in enumerate(tqdm(plan, "wemoe", disable=not progress, leave=False)):
        for task, index in enumerate(chosen):  # one task's graph at a time
            batch = problem.batches[task][index]
            logits = mixture.answers(task, batch, reduce=True)
            check_course("wemoe", logits, number, lr)
            (batch.weight @ entropy(logits)).backward()
        adam.step()
        adam.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return mixture


def compressed(delta: Float[Tensor, " N"], layout: Layout, keep: float) -> Float[Tensor, " N"]:
    """Every matrix at its best approximation of `keep` times full rank; all else as it is."""
    result = delta.clone()
    for _, here, shape in matrices(layout):
        left, values, right = truncated(delta[here].view(shape), max(1, int(keep * min(shape))))
        result[here] = ((left * values) @ right).flatten()
    return result


@METHODS.register(
    "twin",
    source="Lu et al. 2024",
    needs="unlabelled inputs",
    cost="training",
    symmetric=False,
    returns="predictor",
    search=({}, {"keep": 0.2}),
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
    """Add to task arithmetic, for every input, what it lacks of the experts that fit the input.

    The shared model theta* is task arithmetic at `scale`. Each expert's rest, theta_t - theta*, is
    kept at `keep` times full rank in every matrix (at least rank 1), and whole elsewhere. An input
    x is answered by theta* + sum_t w_t(x) rest_t, where w is the softmax of a router that reads
    theta*'s mean last hidden state (padding left out) and was trained to tell from it which task an
    input is of. Source: arXiv 2406.15479.

    steps: of Adam on the cross-entropy of all inputs at once. The task's number is the only label.
    The published router has two hidden layers of twice the width, batch normalisation and dropout;
    here it has one hidden layer and standardised inputs, as inputs are few. The public code picks
    the router's best epoch on test inputs and leaves out biases, which then come from the expert of
    the task that the input is known to be of; here they are added as all else is. Memory: T N
    numbers beside the task vectors. Not symmetric: initial weights are drawn expert by expert.

    Raises ValueError for options out of range, a task without inputs, a problem without a module,
    and a loss that is not finite.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}; 0.1 keeps a tenth of full rank")
    check_fit("twin", steps, lr)
    problem.require_inputs("twin")
    if problem.module is None:
        raise ValueError("twin's router reads hidden states: give MergeProblem its `module`")
    vectors = problem.vectors
    shared = vectors.merge([scale] * len(vectors.tasks))
    router, mean, spread = task_router(problem, shared, steps, lr, seed, progress)
    rests = torch.empty(len(vectors.tasks), len(shared), dtype=shared.dtype, device=shared.device)
    for row, task in zip(rests, vectors.tasks, strict=True):
        row[:] = compressed(vectors.expert(task).sub_(shared), vectors.layout, keep)
    return Twins(problem, shared, rests, router, mean, spread)


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
        check_course("twin", loss, number, lr)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return router.requires_grad_(False), mean, spread


# --- answers steered by experts' answers ----------------------------------------------------------


@dataclass(frozen=True)
class Fusion:
    """The base of `large`, whose logits the experts of `problem` shift; weight None: searched."""

    problem: MergeProblem
    large: MergeProblem
    weight: float | None

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """Three or more forward passes: the large base's, the small base's, every expert's."""
        vectors = self.problem.vectors
        large = self.large.logits(self.large.vectors.base, task, batch)
        base = self.problem.logits(vectors.base, task, batch)
        if large.shape != base.shape:
            raise ValueError(
                f"logits_fusion adds logits: the large model gives {list(large.shape)}, the small "
                f"one {list(base.shape)}; both need the same answers in the same order"
            )
        experts = torch.stack(
            [self.problem.logits(vectors.expert(name), task, batch) for name in vectors.tasks]
        )
        if self.weight is not None:
            return large + self.weight * (experts - base).sum(0)
        return steered(large, base, experts)


def steered(
    large: Float[Tensor, "A V"], base: Float[Tensor, "A V"], experts: Float[Tensor, "T A V"]
) -> Float[Tensor, "A V"]:
    """At each position, large + a (expert_t - base) with the best of all experts t and a.

    The best moves `large` as far, in both Kullback-Leibler divergences, as the experts moved the
    small base: least sum_u (KL(new, large) - KL(u, base))^2 + (KL(large, new) - KL(base, u))^2.
    """
    moved = [(kl(expert, base), kl(base, expert)) for expert in experts]  # [A] each
    least, best = large.new_full(large.shape[:1], math.inf), large
    for expert in experts:
        for weight in WEIGHTS:
            new = large + weight * (expert - base)
            there, back = kl(new, large), kl(large, new)
            miss = sum((there - far).square() + (back - near).square() for far, near in moved)
            best = torch.where((miss < least)[:, None], new, best)
            least = torch.minimum(miss, least)
    return best


@METHODS.register(
    "logits_fusion",
    source="Fan et al. 2024",
    needs="nothing",
    cost="inputs",
    symmetric=True,
    returns="predictor",
    search=({}, *({"weight": weight} for weight in (1.0, 0.5, 0.3, 1.5, 2.0))),
)
def logits_fusion(
    problem: MergeProblem, *, large: MergeProblem | None = None, weight: float | None = None
) -> Predictor:
    """Steer a large model's answers by what fine-tuning did to small models' answers.

    No weight changes: at every answer position the logits are large + a (expert_t - base). One
    expert t and one a out of 0, 0.1, ..., 2 are chosen there so that the large model is moved as
    far as the experts moved their base (see `steered`). Source: arXiv 2406.15480. With `weight` the
    shifts of all experts are added at that weight instead; 1 is proxy-tuning (arXiv 2401.08565).

    large: the problem whose base is steered, with the same tasks, answers and inputs; its experts
    are not used. Without it the problem's own base is steered: with one expert a is then 1, and the
    answers are that expert's. The paper fuses generated tokens and leaves classifiers out; the rule
    is the same at every position, and every expert is asked on every task's inputs, whose head all
    of them share.

    Raises ValueError for a weight that is not finite, a large problem of other tasks, and, when it
    answers, for logits of different shapes.
    """
    if weight is not None and not math.isfinite(weight):
        raise ValueError(f"weight must be finite, got {weight}; 1 is proxy-tuning, None searches")
    large = problem if large is None else large
    if large.vectors.tasks != problem.vectors.tasks:
        raise ValueError(
            f"logits_fusion needs one order of tasks: large has {list(large.vectors.tasks)}, the "
            f"problem {list(problem.vectors.tasks)}; use large.select(problem.vectors.tasks)"
        )
    return Fusion(problem, large, weight)
