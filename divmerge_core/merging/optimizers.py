"""A full-batch optimizer with an evaluation budget, for few variables and expensive gradients."""

import math
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[float, Tensor]]  # point -> value, gradient


class BudgetExhausted(Exception):
    """The evaluation budget is spent."""


def lbfgs(evaluate: Evaluate, start: Tensor, passes: int, *, history: int = 20) -> Tensor:
    """Limited-memory BFGS with a line search that meets the strong Wolfe conditions.

    A value with its gradient costs one pass; the best point that `passes` of them reached is
    returned. Where the value or the gradient is not finite the line search halves its step. It is
    in float64, since its cubic model takes fourth powers of the gradient. `history` pairs of steps
    and changes of the gradient stand in for the curvature. Source: Nocedal and Wright 2006,
    algorithms 7.5 and 3.5, as in torch.optim.LBFGS.
    """
    best, lowest, made = start.detach().clone(), math.inf, 0
    point = start.detach().clone().double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=passes,
        max_eval=passes,
        history_size=history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        nonlocal best, lowest, made
        if made == passes:
            raise BudgetExhausted
        made += 1
        tried = point.detach().clone().to(start)
        value, slope = evaluate(tried)
        point.grad = slope.double()
        if not (math.isfinite(value) and point.grad.isfinite().all()):
            # Above every other value, and with no slope to interpolate with: the step is halved.
            point.grad, value = torch.full_like(point, math.nan), math.inf
        if value < lowest:
            lowest, best = value, tried
        return torch.tensor(value, dtype=torch.float64)

    with suppress(BudgetExhausted):
        optimizer.step(closure)
    return best
