"""ProDistill: the merged model learns the experts' features, one block after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.coefficients import GROUPINGS
from divmerge_core.merging.layer_inputs import require_module
from divmerge_core.merging.merged_model import schedule
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods import METHODS, checks
from divmerge_core.methods.divmerge import limit
from divmerge_core.methods.forward import hooked


@dataclass(frozen=True)
class StageCall:
    """One call of a stage: what the merged model feeds it, and what the expert's own makes."""

    args: tuple
    kwargs: Mapping[str, object]
    target: Float[Tensor, "*rows K"]
    mask: Bool[Tensor, "B S"] | None

    def distance(self, output: Tensor) -> Float[Tensor, ""]:
        """Mean over positions, without padding, of the squared distance from the target."""
        off = (first(output) - self.target).square().sum(-1)
        # GPT-2's positions come as one row for the whole batch: these have no padding
        masked = self.mask is not None and off.shape == self.mask.shape
        return (off[self.mask] if masked else off).mean()


def first(output: object) -> Tensor:
    """A module's main output: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def cast(value: object, dtype: torch.dtype) -> object:
    """A floating tensor in `dtype` (a forward in bfloat16 makes others); all else as it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def parts(problem: MergeProblem, name: str) -> dict[str, str]:
    """Merged parameters of the module `name`: from their names in the layout to those within it."""
    prefix = f"{name}." if name else ""
    names = problem.vectors.layout.names
    return {full: full.removeprefix(prefix) for full in names if full.startswith(prefix)}


@torch.no_grad()
def stages(problem: MergeProblem) -> dict[str, nn.Module]:
    """The modules to be merged one after another, by name, in the order in which they finish.

    A stage is a module that runs, holds merged parameters of one block (see GROUPINGS) alone, and
    lies in no larger one. Raises ValueError where nothing of the module runs.
    """
    ran: dict[str, nn.Module] = {}

    def watch(name: str) -> Callable:
        def see(part: nn.Module, *call: object) -> None:
            ran.setdefault(name, part)

        return see

    candidates = {
        part: watch(name)
        for name, part in require_module(problem, "prodistill").named_modules()
        if len({GROUPINGS["block"](full) for full in parts(problem, name)}) == 1
    }
    with hooked(candidates):
        problem.logits(problem.vectors.base, 0, problem.batches[0][0])
    if not ran:
        raise ValueError(
            "no part of the problem's module with merged parameters ran: give MergeProblem as "
            "`module` the network that forward calls, with the layout's names"
        )
    within = [n for n in ran if any(n.startswith(f"{o}." if o else "") for o in ran if o != n)]
    return {name: part for name, part in ran.items() if name not in within}


@torch.no_grad()
def stage_calls(
    problem: MergeProblem, flat: Float[Tensor, " N"], module: nn.Module
) -> list[list[list[StageCall]]]:
    """What a stage learns from: `[task][batch]`, one per call of the stage in a forward."""
    vectors, calls = problem.vectors, []

    def keep(part: nn.Module, args: tuple, kwargs: Mapping, output: object) -> None:
        calls.append((args, kwargs, output))

    def seen(flat: Tensor, task: int, batch: Batch) -> list[tuple]:
        calls.clear()
        problem.logits(flat, task, batch)
        return calls.copy()

    def stage_call(given: tuple, made: tuple, batch: Batch) -> StageCall:
        mask = batch.inputs.get("attention_mask")
        return StageCall(
            tuple(cast(value, flat.dtype) for value in given[0]),
            {key: cast(value, flat.dtype) for key, value in given[1].items()},
            cast(first(made[2]), flat.dtype),
            None if mask is None else mask.bool(),
        )

    found = []
    with hooked({module: keep}):
        for task, name in enumerate(vectors.tasks):
            expert, of_task = vectors.expert(name), []
            for batch in problem.batches[task]:
                pairs = zip(seen(flat, task, batch), seen(expert, task, batch), strict=True)
                of_task.append([stage_call(given, made, batch) for given, made in pairs])
            found.append(of_task)
    return found


def length(parts: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, " n"]:
    """Euclidean length of every row of matrices that stand side by side."""
    return sum(part.square().sum(dim=1) for part in parts).sqrt()


def fit_stage(
    problem: MergeProblem,
    flat: Float[Tensor, " N"],
    name: str,
    module: nn.Module,
    steps: list[list[int]],
    *,
    init: float,
    lr: float,
    progress: bool,
) -> dict[str, Tensor]:
    """A stage's merged parameters, by their names in the layout, after its own distillation."""
    layout, names = problem.vectors.layout, parts(problem, name)
    base = layout.unflatten(problem.vectors.base)
    rows = [layout.unflatten(row) for row in dense(problem.vectors.deltas)]
    deltas = {full: torch.stack([row[full] for row in rows]) for full in names}
    coeffs = {full: torch.full_like(d, init, requires_grad=True) for full, d in deltas.items()}
    adam = torch.optim.Adam(coeffs.values(), lr=lr, fused=True)
    calls = stage_calls(problem, flat, module)
    reach = length([delta.flatten(1) for delta in deltas.values()]).max()

    def merged(full: str) -> Tensor:
        return base[full] + (coeffs[full] * deltas[full]).sum(dim=0)

    own = {full: merged(full) for full in names}
    bar = tqdm(steps, f"distilling {name}", disable=not progress, leave=False)
    for number, chosen in enumerate(bar):
        where, given = f"{number} of stage {name!r}", {names[f]: t for f, t in own.items()}
        loss = sum(
            call.distance(functional_call(module, given, call.args, dict(call.kwargs)))
            for of_task, index in zip(calls, chosen, strict=True)
            for call in of_task[index]
        )
        checks.check_finite("prodistill", loss, where, lr)
        adam.zero_grad()
        loss.backward()
        adam.step()
        own = {full: merged(full) for full in names}
        way = length([(own[full].detach() - base[full]).view(1, -1) for full in names]).max()
        checks.check_distance("prodistill", way, reach, where, lr)
    return {full: tensor.detach() for full, tensor in own.items()}


@METHODS.register(
    "prodistill",
    source="Xu et al. 2025",
    needs="unlabelled inputs",
    cost="gradients",
    cite="xu2025",
    search=({}, {"lr": 1e-3}, {"lr": 3e-3}, {"lr": 3e-2}, {"init": 0.2}, {"init": 0.5}),
)
def prodistill(
    problem: MergeProblem,
    *,
    init: float = 0.3,
    inputs: int | None = 64,
    epochs: int = 50,
    lr: float = 1e-2,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Fit one coefficient per task and parameter, block by block, to the experts' own features.

    $$
    \min_{\lambda^{l}} \sum_{t=1}^{T} \mathbb{E}_{x \sim X_t}
      \big\lVert f^{l}_{\theta(\lambda)}(z^{l-1}) - f^{l}_{\theta_t}(z_t^{l-1}) \big\rVert^2, \qquad
    \theta(\lambda)_n = \theta_{0,n} + \sum_{t=1}^{T} \lambda_{t,n}\, \tau_{t,n}
    $$

    Idea: If a block matches the outputs of the expert's block, later blocks have little to repair.
    Only one block is trained at a time, so memory does not grow with depth.

    The stages come in the order in which they run (see `stages`): the embeddings, then every
    transformer block. $z$ comes out of the stages merged before, $z_t$ out of the expert alone.
    Matrices, biases, norms and embeddings of a stage are all fitted; what lies in no stage keeps
    the coefficient `init`. One batch of every task per step of Adam; the square is summed over
    features and averaged over tokens without padding. A language model must run without its cache.

    init: of every coefficient, published as 0.3. lr: step size, published as 0.01. inputs: per
    task, published as 64 for text; None for DivMerge's 200. epochs: passes, published as 50.

    Pitfalls: T N coefficients are more than the parameters of the model itself, so few inputs are
    soon overfitted. Errors of early blocks propagate, and no step uses the predictions.

    Peers: The authors' code for text takes a batch of one task per step, counts padding, leaves
    embeddings at `init`, and dropout on in the block that learns; none of these is done here.

    Raises ValueError for values out of range, a task without inputs, a problem without a module
    that runs, a loss that is not finite, a stage 100 times as far from the base as any expert's.

    Source: Xu et al. 2025, arXiv 2502.12706.
    """
    checks.require_positive(epochs=epochs, lr=lr)
    checks.require_finite(init=init)
    problem.require_inputs("prodistill")
    problem = limit(problem, inputs, "task")
    vectors, found = problem.vectors, stages(problem)
    flat = vectors.merge([init] * len(vectors.tasks))
    places = vectors.layout.unflatten(flat)
    steps = schedule([len(b) for b in problem.batches], epochs, torch.Generator().manual_seed(seed))
    options = {"init": init, "lr": lr, "progress": progress}
    for name, module in found.items():
        for full, tensor in fit_stage(problem, flat, name, module, steps, **options).items():
            places[full].copy_(tensor)
    return flat
