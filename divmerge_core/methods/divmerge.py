"""DivMerge: coefficients that keep the merged model's predictions close to every expert's."""

from collections.abc import Callable
from dataclasses import replace
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

PAPER_INPUTS = {"task": 200, "block": 200, "layer": 400}  # per task; the paper has no blocks


def limit(problem: MergeProblem, inputs: int | None, grouping: str) -> MergeProblem:
    """The problem with `inputs` inputs per task, in whole batches taken evenly from all of them.

    Rounded up to whole batches; all inputs where there are fewer. None means PAPER_INPUTS (Table 9
    of the paper).
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
    grouping: str,
    link: str,
    init: float | None,
    inputs: int | None,
    **options,
) -> Float[Tensor, " N"]:
    """Fit coefficients to any objective: what DivMerge and AdaMerging share."""
    problem = limit(problem, inputs, grouping)
    coefficients = Coefficients(
        problem.vectors.layout, len(problem.vectors.tasks), grouping=grouping, link=link, init=init
    ).to(problem.vectors.base.device)
    return fit_coefficients(problem, coefficients, loss, **options)


@METHODS.register(
    "divmerge",
    source="Touayouch et al. 2026",
    needs="unlabelled inputs",
    cost="gradients",
    symmetric=True,
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
    colon, as in `skew_js:0.1`. temperature: what both sides' logits are divided by. grouping: one
    coefficient per task, per task and block, or per task and tensor. link: none in the paper;
    `clamp` cuts coefficients to [0, 1], `sigmoid` and `softmax` bound them smoothly. init: None for
    1/T (the paper's Algorithm 1), where its Table 9 says 0.5. inputs: per task, None for the
    paper's 200, or 400 by layer. optimizer: `adam`, the paper's; `annealed_adam` with `lr` 0.1 gets
    near its loss in a tenth of the steps; `lbfgs` sees all inputs in every step and needs the
    fewest passes for a low loss: give it 32 inputs and 10 to 20 epochs, and more inputs by layer,
    where it overfits few. `epochs` and `lr`: passes over the inputs, and Adam's step size.
    checkpoint: a file from which an interrupted fit resumes. callback: called with every step.

    Pitfalls: It copies the experts, mistakes included, and needs inputs of the test distribution.
    Tasks are weighted equally, whatever their number of classes: one with large divergences
    dominates the fit. Coefficients are free to be negative or above 1. With `clamp` a coefficient
    that has left [0, 1] has no gradient, so it usually stays at that end.

    Peers: No code of the paper's authors is known. A public implementation of 2026
    (appier-research/broader_model_merging) clamps coefficients to [0, 1] in the forward pass
    (`link="clamp"`), reads unlabelled test inputs and takes 1000 steps of size 0.01; without the
    clamp its step is the one taken here. A later comparison (arXiv 2610.07819) reports 100 steps of
    size 0.01 with 200 inputs and `js`.

    Raises ValueError for unknown names, values out of range, a task without inputs, and a fit that
    diverges.

    Source: Touayouch et al. 2026, arXiv 2509.02108, Eq. 4 and Algorithm 1.
    """
    problem.require_inputs("divmerge")
    return learn(
        problem,
        objective(divergence, temperature),
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
