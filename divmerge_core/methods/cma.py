"""Covariance matrix adaptation: a search without gradients that learns which way is up."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


class CmaEs:
    """The (mu/mu_w, lambda)-CMA-ES: `ask` for points, `tell` their values, higher being better.

    Hansen's tutorial (arXiv 1604.00772) with its default constants, positive weights alone, and no
    bounds or restarts: lambda = 4 + floor(3 ln n) points a step, the better half of which moves the
    mean. All in float64 on the CPU. Rotating the space, or an increasing function of the values,
    changes nothing. Ties keep the order in which the points were asked for.
    """

    def __init__(self, start: Float[Tensor, " n"], sigma: float, generator: torch.Generator):
        size = len(start)
        self.generator, self.mean, self.sigma, self.step = generator, start.double(), sigma, 0
        self.count = 4 + int(3 * math.log(size))  # lambda
        ranks = torch.arange(1, self.count // 2 + 1, dtype=torch.float64)
        weights = math.log((self.count + 1) / 2) - ranks.log()
        self.weights = weights / weights.sum()  # [mu]
        self.mass = mass = 1 / self.weights.square().sum().item()  # mu_eff
        self.c_sigma = (mass + 2) / (size + mass + 5)
        self.damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + self.c_sigma
        self.c_c = (4 + mass / size) / (size + 4 + 2 * mass / size)
        self.c_1 = 2 / ((size + 1.3) ** 2 + mass)
        self.c_mu = min(1 - self.c_1, 2 * (mass - 2 + 1 / mass) / ((size + 2) ** 2 + mass))
        self.covariance = torch.eye(size, dtype=torch.float64)
        self.path = torch.zeros(size, dtype=torch.float64)  # p_c, of the mean
        self.path_sigma = torch.zeros(size, dtype=torch.float64)  # of the mean, whitened

    def ask(self) -> Float[Tensor, "L n"]:
        """lambda points drawn from N(mean, sigma^2 C)."""
        squares, self.axes = torch.linalg.eigh(self.covariance)
        self.lengths = squares.clamp(min=1e-30).sqrt()
        shape = (self.count, len(self.mean))
        normal = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.moves = normal * self.lengths @ self.axes.T  # N(0, C)
        return self.mean + self.sigma * self.moves

    def tell(self, values: Float[Tensor, " L"]) -> None:
        """Move mean, covariance and step size towards the better half of the points asked for."""
        self.step += 1
        best = self.moves[values.argsort(descending=True, stable=True)[: len(self.weights)]]
        move = self.weights @ best
        self.mean = self.mean + self.sigma * move
        size, mass, c_c = len(self.mean), self.mass, self.c_c
        whitened = self.axes @ (self.axes.T @ move / self.lengths)  # C^(-1/2) move
        self.path_sigma = (1 - self.c_sigma) * self.path_sigma + whitened * math.sqrt(
            self.c_sigma * (2 - self.c_sigma) * mass
        )
        expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))  # of N(0, I)
        ratio = self.path_sigma.norm().item() / expected
        settled = math.sqrt(1 - (1 - self.c_sigma) ** (2 * self.step))
        slow = float(ratio / settled < 1.4 + 2 / (size + 1))  # 0 while the step size jumps up
        self.path = (1 - c_c) * self.path + slow * math.sqrt(c_c * (2 - c_c) * mass) * move
        kept = 1 - self.c_1 - self.c_mu + (1 - slow) * self.c_1 * c_c * (2 - c_c)
        self.covariance = (
            kept * self.covariance
            + self.c_1 * self.path.outer(self.path)
            + self.c_mu * (best.T * self.weights) @ best
        )
        self.sigma *= math.exp(self.c_sigma / self.damping * (ratio - 1))
