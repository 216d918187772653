"""Divergences without models: gradients against a wrong expert, and ratios to the Fisher metric."""

import pandas as pd
import torch

from divmerge_core.divergences import DIVERGENCES, objective


def against_wrong_expert(odds: torch.Tensor) -> pd.DataFrame:
    """Value and gradient norm, over the merged model's log-odds for the right one of two classes.

    The expert is confident of the other class (log-odds 6). Columns: objective, odds, value, pull.
    """
    merged, rows = torch.stack([torch.zeros_like(odds), odds], -1), []  # class 1 is right
    expert = torch.tensor([6.0, 0.0], dtype=odds.dtype).expand_as(merged)
    for name in DIVERGENCES:
        z = merged.clone().requires_grad_()
        value = objective(name)(expert, z)
        (slope,) = torch.autograd.grad(value.sum(), z)
        found = {"odds": odds, "value": value.detach(), "pull": slope.norm(dim=-1)}
        rows.append(pd.DataFrame(found).assign(objective=name))
    return pd.concat(rows, ignore_index=True)


def gradients() -> pd.DataFrame:
    """Gradient norms where expert and merge are confident of different classes, by divergence.

    Columns: with 2 and with 3 classes, the merge as confident as the expert and twice as confident.
    """
    table = {}
    for classes in (2, 3):
        logits = 6 * torch.eye(classes, dtype=torch.float64)
        for words, times in (("as confident", 1.0), ("twice as confident", 2.0)):
            column = {}
            for name in DIVERGENCES:
                z = (times * logits[1:2]).requires_grad_()
                loss = objective(name)(logits[:1], z).sum()
                column[name] = torch.autograd.grad(loss, z)[0].norm().item()
            table[f"{classes} classes, {words}"] = column
    return pd.DataFrame(table)


def fisher_ratios(*, step: float = 1e-3, seed: int = 0) -> pd.DataFrame:
    """Every divergence after a small random step of the logits, over half its Fisher metric.

    60 answers and directions with 2 and with 3 classes. Columns: objective, classes, ratio.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for classes in (2, 3):
        a, h = torch.randn(2, 60, classes, generator=generator).double()
        p = (2 * a).softmax(-1)
        fisher = (p * h**2).sum(-1) - (p * h).sum(-1) ** 2
        for name in DIVERGENCES:
            near = objective(name)(2 * a, 2 * a + step * h) / (fisher * step**2 / 2)
            data = {"objective": name, "classes": classes, "ratio": near}
            rows.append(pd.DataFrame(data))
    return pd.concat(rows, ignore_index=True)
