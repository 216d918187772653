"""Minimisers of functions of few numbers, where each value and gradient is dear.

A value with its gradient costs one pass. Both minimisers stop when the passes that they are given
are spent, and return the best point that was looked at.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[float, Tensor]]  # point -> value, gradient
Product = Callable[[Tensor], Tensor]  # v -> M v, for a matrix M that is nowhere written down
EASIER, HARDER = 0.75, 0.25  # share of the fall predicted that loosens or tightens the damping


class Spent(Exception):
    """All passes are made."""


@dataclass
class Account:
    """A function that may be asked until its passes are spent, and the best point so far."""

    evaluate: Evaluate
    passes: int | float
    lowest: float = float("inf")
    best: Tensor | None = None

    def spend(self, price: int | float) -> None:
        """Take passes from the account. Raises Spent where too few are left."""
        if price > self.passes + 1e-9:
            raise Spent
        self.passes -= price

    def __call__(self, point: Tensor) -> tuple[float, Tensor]:
        self.spend(1)
        point = point.detach().clone()
        value, slope = self.evaluate(point)
        if value < self.lowest or self.best is None:
            self.lowest, self.best = value, point
        return value, slope


def lbfgs(evaluate: Evaluate, start: Tensor, passes: int, *, history: int = 20) -> Tensor:
    """Limited-memory BFGS with a line search that meets the strong Wolfe conditions.

    `history` pairs of steps and changes of the gradient stand in for the curvature. Source: Nocedal
    and Wright 2006, algorithms 7.5 and 3.5, as in torch.optim.LBFGS.
    """
    account, point = Account(evaluate, passes), start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=passes,
        max_eval=passes,
        history_size=history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value, point.grad = account(point)
        return torch.tensor(value, dtype=torch.float64)

    with suppress(Spent):
        optimizer.step(closure)
    return account.best


def conjugate_gradients(
    product: Product, slope: Tensor, damping: float, *, rounds: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """A step x that nearly solves (M + damping I) x = -slope, and M x.

    Ends when the residual has fallen to `tolerance` of the slope's norm, or after `rounds`
    products. Source: Nocedal and Wright 2006, algorithm 5.2.
    """
    step, change = torch.zeros_like(slope), torch.zeros_like(slope)
    residual = -slope
    direction, size = residual.clone(), residual.square().sum()
    enough = tolerance**2 * size
    for _ in range(rounds):
        along = product(direction)
        length = size / (direction * (along + damping * direction)).sum()
        step, change = step + length * direction, change + length * along
        residual = residual - length * (along + damping * direction)
        before, size = size, residual.square().sum()
        if size <= enough:
            break
        direction = residual + size / before * direction
    return step, change


def gauss_newton(
    evaluate: Evaluate,
    products: Callable[[Tensor], Product],
    start: Tensor,
    passes: int,
    *,
    price: int | float = 2,
    damping: float = 1e-3,
    rounds: int = 8,
    tolerance: float = 0.1,
) -> Tensor:
    """Damped Gauss-Newton steps by conjugate gradients (Levenberg and Marquardt).

    products(point) is the product with the Gauss-Newton matrix there, each of which costs `price`
    passes. A step that does not lower the value is taken back; the damping is loosened where the
    quadratic model foretells the fall well and tightened where it does not. Source: Martens 2010.
    """
    account, point = Account(evaluate, passes), start.detach().clone()
    with suppress(Spent):
        value, slope = account(point)
        while slope.abs().max() > 1e-7 and damping < 1e6:
            multiply = products(point)

            def paid(direction: Tensor, multiply: Product = multiply) -> Tensor:
                account.spend(price)
                return multiply(direction)

            limits = {"rounds": rounds, "tolerance": tolerance}
            step, change = conjugate_gradients(paid, slope, damping, **limits)
            foretold = -float((slope * step).sum() + 0.5 * (step * change).sum())
            reached, new = account(point + step)
            share = (value - reached) / foretold if foretold > 0 else 0.0
            damping *= 4 if share < HARDER else 1 / 3 if share > EASIER else 1
            if reached < value:
                point, value, slope = point + step, reached, new
    return account.best
