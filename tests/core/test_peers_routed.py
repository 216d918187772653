"""WEMoE beside FusionBench's: one routed MLP, with the same router."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.routed import wemoe

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peer's own dependencies
pytest.importorskip("fusion_bench")


class Block(nn.Module):
    """Two linear layers with a bend between them: the MLP of a transformer block."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, hidden):
        return self.fc2(nn.functional.gelu(self.fc1(hidden)))


class Model(nn.Module):
    """One block on seven tokens, and the mean over them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Block()])

    def forward(self, x):
        return self.layer[0](x.view(-1, 7, 6)).mean(1)


def problem_of(models: list[nn.Module], x: torch.Tensor) -> MergeProblem:
    base, *experts = [{k: v.detach() for k, v in model.named_parameters()} for model in models]
    module = models[0].requires_grad_(False)

    def forward(parameters, pairs):
        return [functional_call(module, dict(parameters), b.inputs["x"]) for _, b in pairs]

    batches = [[Batch({"x": x.flatten(1)}, torch.full((len(x),), 1 / len(x)))] for _ in experts]
    named = {f"task{n}": state for n, state in enumerate(experts)}
    return MergeProblem(TaskVectors.from_states(base, named), batches, forward, module)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("reduce", [False, True])
def test_a_routed_mlp_is_fusion_benchs(layers, reduce):
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    torch.manual_seed(0)
    models, x = [Model() for _ in range(4)], torch.randn(5, 7, 6)
    ours = wemoe(problem_of(models, x), router_layers=layers, steps=10, lr=0.1, progress=False)
    blocks = [copy.deepcopy(model.layer[0]) for model in models]
    for block in blocks:
        block.requires_grad_(True)  # the peer routes what could be trained
    peer = WeightEnsemblingMoE(
        hidden_size=6,
        base_model=blocks[0],
        expert_models=blocks[1:],
        init_lambda=0.3,
        batch_first=True,
        router_hidden_layers=layers,
        batch_reduce=reduce,
    )
    router = ours.routers["layer.0"]
    linears = [module for module in peer.gate.modules() if isinstance(module, nn.Linear)]
    for linear, matrix, bias in zip(linears, router.matrices, router.biases, strict=False):
        linear.weight.data, linear.bias.data = matrix.data, bias.data
    if not layers:
        peer.gate.weight.data = router.biases[0].data
    with torch.no_grad():
        found = ours.answers(0, ours.problem.batches[0][0], reduce=reduce)
        assert_close(found, peer(x).mean(1), rtol=1e-5, atol=1e-5)
