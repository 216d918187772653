"""DivMerge: coefficients that keep the merged model's predictions close to every expert's."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences import objective
from divmerge_core.divergences.parse import Objective
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import Step, fit_coefficients
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.basis import basis as components_of

PAPER_INPUTS = {"task": 200, "block": 200, "layer": 400}  # per task; the paper has no blocks


def limit(problem: MergeProblem, inputs: int | None, grouping: str) -> MergeProblem:
    """The problem with `inputs` inputs per task, in whole batches taken evenly from all of them.

    Rounded up to whole batches; all inputs where there are fewer. None: PAPER_INPUTS (its Table 9).
    """
    inputs = PAPER_INPUTS.get(grouping, 200) if inputs is None else inputs
    if inputs < 1:
        raise ValueError(f"inputs must be 1 or more per task, got {inputs}; the paper uses 200")
    kept = []
    for batches in problem.batches:
        size = max((len(next(iter(batch.inputs.values()))) for batch in batches), default=1)
        count = min(len(batches), -(-inputs // size))
        every = torch.linspace(0, len(batches) - 1, count).round().long() if count else []
        kept.append([batches[int(number)] for number in every])
    return replace(problem, batches=kept)


def learn(
    problem: MergeProblem,
    loss: Objective,
    *,
    basis: str,
    grouping: str,
    link: str,
    init: float | None,
    inputs: int | None,
    **options,
) -> Float[Tensor, " N"]:
    """Fit coefficients to any objective: what DivMerge and AdaMerging share."""
    problem = limit(problem, inputs, grouping)
    vectors, starts = components_of(problem, basis)
    init = starts if init is None else init
    shape = (vectors.layout, len(vectors.tasks))
    coefficients = Coefficients(*shape, grouping=grouping, link=link, init=init)
    coefficients.to(vectors.base.device)
    return fit_coefficients(problem, coefficients, loss, vectors=vectors, **options)


@METHODS.register(
    "divmerge",
    source="Touayouch et al. 2026",
    needs="unlabelled inputs",
    cost="gradients",
    groupings=("task", "block", "layer"),
    cite="touayouch2026",
    search=(
        {},
        {"init": 0.5},
        {"lr": 3e-2},
        {"lr": 3e-3},
        {"init": 0.3},
        {"init": 0.5, "lr": 3e-2},
    ),
)
def divmerge(
    problem: MergeProblem,
    *,
    divergence: str = "js",
    temperature: float = 1.0,
    basis: str = "raw",
    grouping: str = "task",
    link: str = "identity",
    init: float | None = None,
    inputs: int | None = None,
    optimizer: str = "adam",
    epochs: int = 4,
    lr: float = 1e-2,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    callback: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Learn the coefficients that minimise the divergence from every expert's predictions.

    $$
    \min_{\Lambda} \sum_{t=1}^{T} \mathbb{E}_{x \sim X_t}\,
      D\big(p_t(\cdot \mid x),\, q_\Lambda(\cdot \mid x)\big),
    \qquad \theta(\Lambda)_n = \theta_{0,n} + \sum_{t=1}^{T} \lambda_{t,g(n)}\, \tau_{t,n}
    $$

    Idea: An expert's predictions on its own inputs describe what to preserve, without labels. So
    the merged model should match each expert's predictions on that expert's inputs.

    All tensors take part, matrices, biases, norms and embeddings alike. The experts' answers are
    computed once; each step of Adam sees one batch of every task.

    divergence: a name in DIVERGENCES, `js` in the paper's main results; a parameter follows a
    colon, as in `skew_js:0.1`. temperature: what both sides' logits are divided by. basis: what the
    coefficients scale, a name in BASES: `raw` task vectors in the paper; see `divmerge+`. grouping:
    one coefficient per task, per task and block, or per task and tensor. link: none in the paper;
    `clamp` cuts coefficients to [0, 1], `sigmoid` and `softmax` bound them smoothly. init: None for
    the basis's start, 1/T with `raw` (the paper's Algorithm 1; its Table 9 says 0.5). inputs: per
    task, None for the paper's 200, or 400 by layer. optimizer: `adam`, the paper's; `annealed_adam`
    with `lr` 0.1 gets near its loss in a tenth of the steps; `lbfgs` sees all inputs in every step
    and needs the fewest passes for a low loss: give it 32 inputs and 10 to 20 epochs, and more
    inputs by layer, where it overfits few. epochs: passes over the inputs. lr: the first step
    size. checkpoint: a file from which a killed fit resumes. callback: called with every step.

    Pitfalls: It copies the experts, mistakes included, and needs inputs of the test distribution.
    Tasks are weighted equally, whatever their number of classes: one with large divergences
    dominates the fit. Coefficients are free to be negative or above 1. With `clamp` a coefficient
    that has left [0, 1] has no gradient, so it usually stays at that end.

    Peers: No code of the paper's authors is known. A public implementation of 2026
    (appier-research/broader_model_merging) clamps coefficients to [0, 1] in the forward pass
    (`link="clamp"`), reads unlabelled test inputs and takes 1000 steps of size 0.01; without the
    clamp its step is the one taken here. A later comparison (arXiv 2610.07819) reports 100 steps of
    size 0.01 with 200 inputs and `js`.

    Raises ValueError for unknown names, values out of range, a task without inputs, divergence.

    Source: Touayouch et al. 2026, arXiv 2509.02108, Eq. 4 and Algorithm 1.
    """
    problem.require_inputs("divmerge")
    return learn(
        problem,
        objective(divergence, temperature),
        basis=basis,
        grouping=grouping,
        link=link,
        init=init,
        inputs=inputs,
        optimizer=optimizer,
        epochs=epochs,
        lr=lr,
        seed=seed,
        checkpoint=checkpoint,
        callback=callback,
        progress=progress,
    )


def with_defaults(method: Callable, **given: object) -> Callable[[Callable], Callable]:
    """Decorator: a function that takes a method's options, with other defaults for the given."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def preset(problem: MergeProblem, **options: object) -> Float[Tensor, " N"]:
            return function(problem, **{**given, **options})

        signature = inspect.signature(method)
        own = [
            one.replace(default=given.get(name, one.default))
            for name, one in signature.parameters.items()
        ]
        preset.__signature__ = signature.replace(parameters=own)
        return preset

    return decorate


@METHODS.register(
    "divmerge+",
    source="this book",
    needs="unlabelled inputs",
    cost="gradients",
    cite="touayouch2026,gargiulo2025",
    search=({}, {"lr": 0.1}, {"basis": "tsv:2"}, {"lr": 0.4}, {"basis": "tsv"}, {"lr": 0.05}),
)
@with_defaults(
    divmerge,
    **{"basis": "tsv:3", "grouping": "layer", "inputs": 200, "epochs": 2},
    **{"optimizer": "annealed_adam", "lr": 0.2},
)
def divmerge_plus(problem: MergeProblem, **options: object) -> Float[Tensor, " N"]:
    r"""DivMerge on cleaned directions: how much is fitted, of what TSV-M would add whole.

    $$
    \min_{\Lambda} \sum_{t=1}^{T} \mathbb{E}_{x \sim X_t}\,
      D\big(p_t(\cdot \mid x),\, q_\Lambda(\cdot \mid x)\big), \qquad
    W(\Lambda) = W_0 + \sum_{t=1}^{T} \sum_{b=1}^{3} \lambda_{t,b}\,
      \tilde U_{t,b} \operatorname{diag}(s_{t,b})\, \tilde V_{t,b}^\top
    $$

    Idea: DivMerge fits how much of each task vector to take, and leaves interference between
    vectors as it is. TSV-M removes interference and takes a fixed amount. This does both.

    Each matrix keeps a share 1/T of its singular directions per task, orthogonalised over tasks, in
    three bands: the leading sixteenth, the rest of the leading quarter, all others. Every tensor,
    task and band has a coefficient that starts at 1: the fit starts at TSV-M. Vectors and embedding
    tables keep their task vectors, and start at 1/T. All options are those of `divmerge`; what
    differs is `basis`, `grouping`, and the fit: annealed Adam from 0.2, 100 steps over 200 inputs a
    task, chosen on validation rows of eight tasks with BERT-tiny.

    Pitfalls: Those of `divmerge`. The rank per task falls with 1/T. Measured gains over task
    vectors: with many tasks, none with two, and none from more than one band.

    Peers: This method is the book's own, not the DivMerge paper's. aTLAS (Zhang et al. 2024, arXiv
    2407.02880) learns a coefficient per task and tensor of raw task vectors with labels or other
    losses. AdaRank (Lee et al. 2026, arXiv 2503.22178) learns binary masks of single singular
    directions by minimising entropy. Neither orthogonalises directions over tasks first.

    Raises ValueError and Diverged as `divmerge` does.

    Source: Touayouch et al. 2026 (arXiv 2509.02108) for the objective, Gargiulo et al. 2025 (arXiv
    2412.00081) for the directions.
    """
    problem.require_inputs("divmerge+")
    return divmerge(problem, **options)
