"""The optimisation of coefficients that all methods which learn them share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.divergences.parse import Objective
from divmerge_core.kernels.expert_cache import Undefined
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit_checkpoint import (
    FitCheckpoint,
    LossAndGradient,
    code_of,
    digest,
    package_digest,
)
from divmerge_core.merging.merged_model import (
    GRADIENTS,
    Answers,
    MergedModel,
    expert_logits,
    schedule,
    validate_targets,
)
from divmerge_core.merging.optimizers import lbfgs
from divmerge_core.merging.problem import Diverged, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.registry import Registry

OPTIMIZERS = Registry("optimizer")  # name -> function(model, context) -> number of steps
LIMIT = 100.0  # of a coefficient; converging fits stay far below


@dataclass(frozen=True)
class Step:
    """The state of a fit, passed to the callback before each update, and once at the end."""

    number: int
    loss: float | None  # nats, summed over tasks; None at the end, where no batch was drawn
    coeffs: Float[Tensor, "T G"]
    merged: Callable[[], Tensor] = field(repr=False)
    scaled: tuple[str, ...]  # what the rows of coeffs scale: tasks, or components of a basis
    groups: tuple[str, ...]

    @property
    def flat(self) -> Float[Tensor, " N"]:
        """The merged parameters, overwritten by the next step: clone them to keep them."""
        return self.merged()


@dataclass(frozen=True)
class FitContext:
    """What an optimizer needs besides the merged model."""

    epochs: int
    lr: float
    seed: int
    callback: Callable[[Step], None] | None
    progress: bool
    checkpoint: FitCheckpoint

    def merge(self, model: MergedModel) -> Float[Tensor, "T G"]:
        """Merge, unless the checkpoint has the next gradient and there is no callback."""
        if self.checkpoint.replaying and self.callback is None:
            return model.coefficients()
        return model.merge()

    def report(self, model: MergedModel, number: int, loss: float | None, coeffs: Tensor) -> None:
        """Call the callback."""
        if self.callback is not None:
            names = (model.vectors.tasks, model.coefficients.groups)
            self.callback(Step(number, loss, coeffs.detach().clone(), model.whole, *names))


def is_bounded(loss: float | None, coeffs: Float[Tensor, "T G"]) -> bool:
    """Whether the loss is finite, where there is one, and all coefficients are within LIMIT."""
    return math.isfinite(loss or 0.0) and bool(coeffs.detach().abs().max() <= LIMIT)


def require_bounded(number: int, loss: float | None, coeffs: Tensor, advice: str) -> None:
    """Raise Diverged, with advice, where the loss or a coefficient diverged."""
    if not is_bounded(loss, coeffs):
        raise Diverged(
            f"fit_coefficients: the loss is {loss} at step {number}, the largest coefficient "
            f"{coeffs.detach().abs().max():.3g}; {advice} or check the experts for extreme logits"
        )


def loss_and_gradient(model: MergedModel, chosen: Sequence[int]) -> LossAndGradient:
    """The loss on the chosen batches, and its gradient in the coefficients."""
    loss = model.loss(chosen)
    loss.backward()
    return model.total(loss.item()), model.collect()


@OPTIMIZERS.register("adam", label="Adam")
def adam(model: MergedModel, context: FitContext, *, anneal: bool = False) -> int:
    """Adam on one batch of every task per step; returns the number of steps.

    anneal: the step size decreases linearly to 0.
    """
    problem, raw = model.problem, model.coefficients.parameters()
    optimizer = torch.optim.Adam(raw, lr=context.lr)
    generator = torch.Generator().manual_seed(context.seed)
    steps = schedule([len(batches) for batches in problem.batches], context.epochs, generator)
    bar = tqdm(steps, "fitting", disable=not context.progress, leave=False)
    advice = f"lower lr (now {context.lr})"
    for number, chosen in enumerate(bar):
        if anneal:
            optimizer.param_groups[0]["lr"] = context.lr * (1 - number / len(steps))
        coeffs = context.merge(model)
        try:
            loss, gradient = context.checkpoint.next(partial(loss_and_gradient, model, chosen))
        except Undefined as error:
            if number == 0:  # the start itself is undefined: nothing has diverged
                raise
            raise Diverged(f"fit_coefficients: at step {number} {error}; or {advice}") from error
        require_bounded(number, loss, coeffs, advice)
        context.report(model, number, loss, coeffs)
        optimizer.zero_grad()
        coeffs.backward(gradient.to(coeffs))
        optimizer.step()
    require_bounded(len(steps), None, model.coefficients(), advice)
    return len(steps)


OPTIMIZERS.register("annealed_adam", label="Adam, annealed")(partial(adam, anneal=True))


def full_loss_and_gradient(model: MergedModel) -> LossAndGradient:
    """The loss on all inputs and its gradient; NaN where the merged model gives no distribution."""
    try:
        return model.backward_all(), model.collect()
    except Undefined:
        return math.nan, torch.full_like(model.collect(), math.nan)


@OPTIMIZERS.register("lbfgs", label="L-BFGS")
def full_lbfgs(model: MergedModel, context: FitContext) -> int:
    """L-BFGS on all inputs at once, at most `context.epochs` passes; returns their number.

    The line search backtracks from points where the loss is not finite or a coefficient exceeds
    LIMIT. Raises Diverged where the start is such a point, or all points but the start are.
    """
    raw, passes, defined = model.coefficients.raw, 0, 0
    no_slope = torch.full_like(raw, math.nan)

    def evaluate(point: Tensor) -> tuple[float, Tensor]:
        nonlocal passes, defined
        raw.data.copy_(point)
        coeffs, loss = model.coefficients(), math.nan
        number, passes = passes, passes + 1
        bar.update()
        if is_bounded(None, coeffs):  # beyond LIMIT the logits may be undefined
            coeffs = context.merge(model)
            loss, gradient = context.checkpoint.next(partial(full_loss_and_gradient, model))
        if number == 0:
            require_bounded(0, loss, coeffs, "start elsewhere (init)")
        if not (is_bounded(loss, coeffs) and gradient.isfinite().all()):
            return math.inf, no_slope
        defined += 1
        context.report(model, number, loss, coeffs)
        return loss, torch.autograd.grad(coeffs, raw, gradient.to(coeffs))[0]

    with tqdm(
        total=context.epochs, desc="fitting", disable=not context.progress, leave=False
    ) as bar:
        raw.data.copy_(lbfgs(evaluate, start=raw.detach().clone(), passes=context.epochs))
    if defined <= 1 < passes:
        raise Diverged(
            f"fit_coefficients: none of {passes - 1} steps from the start has a finite loss and "
            f"coefficients within {LIMIT:g}; start elsewhere (init), choose optimizer='adam' with "
            "a low lr, or check the experts for extreme logits"
        )
    return passes


@torch.no_grad()
def fingerprint(
    problem: MergeProblem,
    vectors: TaskVectors,
    coefficients: Coefficients,
    objective: Objective,
    targets: Sequence[Sequence[Answers]],
    settings: Mapping[str, object],
) -> dict[str, object]:
    """All that determines a fit, by name: settings as they are, tensors and code by digests.

    `model`, the forward pass with heads and precision: by the base's logits on a batch per task.
    """
    answers = [
        problem.logits(vectors.base, task, batches[0])
        for task, batches in enumerate(problem.batches)
    ]
    return {
        **settings,
        "code": digest(package_digest(), code_of(OPTIMIZERS[settings["optimizer"]])),
        "torch": str(torch.__version__),
        "device": str(vectors.base.device),
        "tasks": list(vectors.tasks),
        "layout": digest(vectors.layout),
        "base": digest(vectors.base),
        "task vectors": digest(vectors.deltas),
        "grouping": digest(coefficients.segments),
        "link": code_of(coefficients.link),
        "start": digest(coefficients.raw),
        "inputs": digest(list(problem.batches)),
        "model": digest(answers),
        "objective": code_of(objective),
        "targets": digest(list(targets)),
    }


def fit_coefficients(
    problem: MergeProblem,
    coefficients: Coefficients,
    objective: Objective,
    *,
    vectors: TaskVectors | None = None,
    targets: Sequence[Sequence[Answers]] | None = None,
    optimizer: str = "adam",
    epochs: int = 4,
    lr: float = 1e-2,
    seed: int = 0,
    gradients: str = "stream",
    checkpoint: Path | str | None = None,
    callback: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Coefficients that minimise sum_t E_x objective(expert_t(x), merged(x)).

    Unweighted sum over tasks (DivMerge Eq. 4 and Algorithm 1). The experts' logits are cached and
    the merged parameters are written into one buffer whose views are the model's leaves; autograd
    does not run through the merge. `coefficients` is trained in place; returns merged parameters.

    vectors: what the coefficients scale, where not the problem's task vectors: components of these
    on the same base and layout. targets: logits per task and batch, or TopKLogProbs, in place of
    the experts'. optimizer: a name in OPTIMIZERS. `adam`, the paper's, sees one batch of every task
    per step; `annealed_adam` lets its step size fall to 0. `lbfgs` sees all inputs per step, finds
    its own step size, and keeps the best point: give it few inputs and 20 epochs or more. epochs:
    passes over the inputs, at least 1. lr: Adam's step size, above 0. gradients: `stream` takes
    every tensor's gradient as it comes and frees it; `buffer` keeps all N for one pass at the end
    (a problem on several devices always streams). checkpoint: a file of all losses and gradients so
    far: an interrupted fit, called again with the same arguments, replays them and ends at the same
    coefficients bit for bit (`fingerprint` identifies a fit). callback: gets a Step before updates.

    Raises ValueError for a checkpoint of another fit or on several devices, unknown names, values
    outside these ranges, a task without inputs, and targets that do not fit the batches; and
    Diverged where the loss stops being finite or a coefficient leaves [-LIMIT, LIMIT], with `lbfgs`
    at the start or at every other point.
    """
    if epochs < 1 or not 0 < lr < math.inf:
        raise ValueError(
            f"epochs must be 1 or more and lr above 0 and finite, got {epochs} and {lr}"
        )
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENTS)}, got {gradients!r}")
    problem.require_inputs("fit_coefficients")
    if checkpoint is not None and problem.reducer:
        raise ValueError(
            "a fit on several devices keeps no checkpoint: leave it out; ranks that were killed "
            "between two writes would go on from different steps"
        )
    find, vectors = OPTIMIZERS[optimizer], vectors or problem.vectors
    own = problem.vectors
    if vectors.layout != own.layout or not torch.equal(vectors.base, own.base):
        raise ValueError("vectors have another layout or base than the problem's: use its own")
    targets = expert_logits(problem) if targets is None else targets
    validate_targets(problem, targets)
    settings = {"optimizer": optimizer, "epochs": epochs, "lr": lr, "seed": seed}
    settings |= {"gradients": gradients}
    parts = (problem, vectors, coefficients, objective, targets)
    known = fingerprint(*parts, settings) if checkpoint else {}
    stored = FitCheckpoint.open(checkpoint, known)
    model = MergedModel.of(*parts, gradients)
    context = FitContext(epochs, lr, seed, callback, progress, stored)
    steps = find(model, context)
    stored.save()
    context.report(model, steps, None, model.merge())
    return model.whole()
