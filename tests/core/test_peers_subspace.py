"""DOGE and WUDI against fusion_bench's, on small random models."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.shifts import doge, wudi

pytest.importorskip("fusion_bench")
pytestmark = [  # what importing the peer warns of is not ours
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("num_tasks", [1, 2, 4]),
]

EXACT = {"rtol": 0, "atol": 1e-5}


class Network(nn.Module):
    """Two matrices that DOGE treats, and a head and biases that it does not."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(30, 24), nn.Linear(24, 18))
        self.embeddings = nn.Embedding(7, 30)


def networks(num_tasks: int, scale: float) -> tuple[Network, dict[str, Network]]:
    """A random base, and experts whose entries lie about `scale` from it, each on its own scale."""
    generator = torch.Generator().manual_seed(0)

    def around(state: dict[str, torch.Tensor], size: float) -> Network:
        network = Network()
        drawn = {k: torch.randn(v.shape, generator=generator) for k, v in state.items()}
        network.load_state_dict({k: state[k] + size * drawn[k] for k in state})
        return network.requires_grad_(False)

    base = around({k: torch.zeros_like(v) for k, v in Network().state_dict().items()}, 1.0)
    experts = {f"task{t}": around(base.state_dict(), scale * (1 + t / 2)) for t in range(num_tasks)}
    return base, experts


def problem_of(base: Network, experts: dict[str, Network]) -> MergeProblem:
    vectors = TaskVectors.from_states(
        base.state_dict(), {task: expert.state_dict() for task, expert in experts.items()}
    )
    return MergeProblem(vectors, [[] for _ in experts], lambda parameters, pairs: [])


def test_doge_is_fusion_benchs_where_as_many_entries_are_kept(num_tasks, capsys):
    import lightning
    from fusion_bench import BaseModelPool
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    base, experts = networks(num_tasks, 0.01)
    problem = problem_of(base, experts)
    peer = DOGE_TA_Algorithm(subspace=6, K=30, lamda=0.07)
    peer.fabric = lightning.Fabric(accelerator="cpu", devices=1)
    expected = peer.run(BaseModelPool({"_pretrained_": base, **experts})).state_dict()
    treated = 30 * 24 + 24 * 18
    keep = (int(0.3 * treated) + 1) / treated
    merged = doge(problem, eta=0.07, lr=1e-4, units="absolute", keep=keep, progress=False)
    flat = problem.vectors.layout.flatten(expected)
    assert (flat - problem.vectors.base).abs().max() > 1e-3
    assert_close(merged, flat, **EXACT)


@pytest.mark.parametrize("steps", [300, 400])
def test_wudi_is_fusion_benchs(num_tasks, steps, capsys):
    from fusion_bench.method.wudi.wudi import wudi_merging

    base, experts = networks(num_tasks, 0.001)
    problem = problem_of(base, experts)
    layout = problem.vectors.layout
    deltas = [layout.unflatten(row) for row in problem.vectors.deltas]
    expected = wudi_merging([dict(d) for d in deltas], accelerator="cpu", iter_num=steps)
    merged = wudi(problem, steps=steps, progress=False)
    flat = problem.vectors.base + layout.flatten(expected)
    started = problem.vectors.base + problem.vectors.deltas.sum(0)
    assert num_tasks == 1 or (flat - started)[: 30 * 24].abs().max() > 1e-3
    assert_close(merged, flat, **EXACT)
