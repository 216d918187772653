"""DivMerge: coefficients that keep the merged model's answers close to every expert's."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.coefficients import Coefficients
from divmerge_core.divergences import DIVERGENCES
from divmerge_core.methods import METHODS
from divmerge_core.problem import MergeProblem, Objective, Step, fit_coefficients

PAPER_INPUTS = {"task": 200, "block": 200, "layer": 400}  # per task; the paper has no blocks


def limit(problem: MergeProblem, inputs: int | None, grouping: str) -> MergeProblem:
    """The problem with at most `inputs` inputs per task, drawn evenly from its batches.

    None means PAPER_INPUTS (its Table 9).
    """
    inputs = PAPER_INPUTS.get(grouping, 200) if inputs is None else inputs
    if inputs < 1:
        raise ValueError(f"inputs must be 1 or more per task, got {inputs}; the paper uses 200")
    kept = []
    for batches in problem.batches:
        size = max((batch.weight.shape[0] for batch in batches), default=1)
        count = min(len(batches), -(-inputs // size))
        every = torch.linspace(0, len(batches) - 1, count).round().long() if count else []
        kept.append([batches[int(number)] for number in every])
    return replace(problem, batches=kept)


def learn(
    problem: MergeProblem,
    objective: Objective,
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
    return fit_coefficients(problem, coefficients, objective, **options)


@METHODS.register(
    "divmerge",
    source="Touayouch et al. 2026",
    needs="unlabelled inputs",
    cost="gradients",
    symmetric=True,
    search=({}, {"init": 0.5}),
)
def divmerge(
    problem: MergeProblem,
    *,
    divergence: str = "js",
    grouping: str = "task",
    link: str = "identity",
    init: float | None = None,
    inputs: int | None = None,
    epochs: int = 4,
    lr: float = 1e-2,
    seed: int = 0,
    watch: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Minimise sum_t E_x D(expert_t(x), merged(x)) over the coefficients (DivMerge Eq. 4).

    divergence: a name in DIVERGENCES. grouping: one coefficient per task, per task and block, or
    per task and layer. init: None for 1/T (the paper's Algorithm 1); its Table 9 says 0.5. inputs:
    per task, None for the paper's 200 or 400. Raises ValueError for unknown names, values out of
    range, and a task without inputs.
    """
    objective = DIVERGENCES[divergence]
    return learn(
        problem,
        objective,
        grouping=grouping,
        link=link,
        init=init,
        inputs=inputs,
        epochs=epochs,
        lr=lr,
        seed=seed,
        watch=watch,
        progress=progress,
    )
