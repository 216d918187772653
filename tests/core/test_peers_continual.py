"""OPCM and its baselines give what FusionBench gives, and differ where the docstring says so."""

import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.continual import (
    opcm,
    running_average,
    sequential_task_arithmetic,
    sequential_ties,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("fusion_bench")
    from transformers.models.clip import modeling_clip

    # Newer transformers have no such class; FusionBench names it on import and never needs it here.
    if not hasattr(modeling_clip, "CLIPVisionTransformer"):
        modeling_clip.CLIPVisionTransformer = nn.Module
    from fusion_bench.method.opcm import (
        ContinualTaskArithmeticForCLIP,
        ContinualTiesMergingForCLIP,
        ContinualWeightAverageForCLIP,
        OPCMForCLIP,
    )
    from fusion_bench.method.opcm.opcm_general import OPCM

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {"shuffle_order": False, "save_on_every_step": False}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Encoder(nn.Module):
    """Every kind of tensor that the methods tell apart, and one that lies on a parent module."""

    def __init__(self, token: bool):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.wide, self.tall = nn.Linear(6, 9), nn.Linear(9, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        if token:
            self.token = nn.Parameter(torch.zeros(6))


def models(num_tasks: int = 4, *, rank: int | None = None, token: bool = False) -> list[nn.Module]:
    """A random base and experts around it; `rank` is that of every matrix's change."""
    generator = torch.Generator().manual_seed(0)
    base = Encoder(token)
    made = [base, *(deepcopy(base) for _ in range(num_tasks))]
    for tensors in zip(*(model.parameters() for model in made), strict=True):
        shape = tensors[0].shape
        for number, tensor in enumerate(tensors):
            change = torch.randn(shape, generator=generator)
            if rank and number and len(shape) == 2:
                right = torch.randn(rank, shape[1], generator=generator)
                change = torch.randn(shape[0], rank, generator=generator) @ right
            tensor.data = change if number == 0 else tensors[0].data + 0.3 * change
    return made


def problem_of(made: list[nn.Module]) -> MergeProblem:
    base, *experts = (model.state_dict() for model in made)
    named = {f"task{number}": expert for number, expert in enumerate(experts)}
    vectors = TaskVectors.from_states(base, named)
    return MergeProblem(vectors, [[] for _ in experts], lambda *_: [], made[0])


def of_peer(algorithm, made: list[nn.Module]) -> torch.Tensor:
    """What a peer's algorithm merges, as a flat vector; it works on copies."""
    base, *experts = made
    pool = SimpleNamespace(
        model_names=[str(number) for number in range(len(experts))],
        load_pretrained_model=lambda: deepcopy(base),
        load_model=lambda name: deepcopy(experts[int(name)]),
    )
    algorithm._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={}))
    merged = algorithm.run(pool).state_dict()
    return problem_of(made).vectors.layout.flatten(merged)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("peer", [OPCM, OPCMForCLIP])
def test_opcm_is_theirs(share, peer):
    made = models()
    found = opcm(problem_of(made), share=share, progress=False)
    assert_close(found, of_peer(peer(alpha=share, **QUIET), made), **CLOSE)


def test_at_share_1_theirs_protects_less():
    """No share exceeds 1 but by rounding, and of an index not found they make 0."""
    made = models()
    found = opcm(problem_of(made), share=1.0, progress=False)
    assert (found - of_peer(OPCM(alpha=1.0, **QUIET), made)).abs().max() > 1e-2


def test_for_changes_of_low_rank_theirs_takes_out_more():
    """Of a null space they remove a diagonal, in whatever basis the SVD returns."""
    made = models(2, rank=1)
    found = opcm(problem_of(made), progress=False)
    assert (found - of_peer(OPCM(alpha=0.5, **QUIET), made)).abs().max() > 1e-2


def test_a_parameter_that_lies_on_a_parent_module_keeps_their_first_experts_change():
    """Up to the common factors; ours takes every expert's."""
    made = models(3, token=True)
    problem = problem_of(made)
    base, unflatten = problem.vectors.base, problem.vectors.layout.unflatten
    changes = torch.stack([unflatten(row)["token"] for row in problem.vectors.deltas])  # [T, 6]
    theirs = unflatten(of_peer(OPCM(alpha=0.5, **QUIET), made) - base)["token"]
    ours = unflatten(opcm(problem, progress=False) - base)["token"]

    def cosine(one, other):
        return torch.nn.functional.cosine_similarity(one, other, dim=0)

    assert_close(cosine(theirs, changes[0]), torch.ones(()), **CLOSE)
    assert_close(cosine(ours, changes.sum(dim=0)), torch.ones(()), **CLOSE)


def test_the_running_average_is_theirs():
    made = models()
    found = running_average(problem_of(made))
    assert_close(found, of_peer(ContinualWeightAverageForCLIP(**QUIET), made), **CLOSE)


def test_sequential_task_arithmetic_is_theirs():
    made = models()
    found = sequential_task_arithmetic(problem_of(made), scale=0.3)
    peer = ContinualTaskArithmeticForCLIP(scaling_factor=0.3, **QUIET)
    assert_close(found, of_peer(peer, made), **CLOSE)


def test_sequential_ties_is_theirs_with_one_entry_more():
    made = models()
    problem = problem_of(made)
    size = problem.vectors.layout.size
    peer = ContinualTiesMergingForCLIP(scaling_factor=0.5, threshold=20, **QUIET)
    found = sequential_ties(problem, keep=(int(0.2 * size) + 1) / size, scale=0.5)
    assert_close(found, of_peer(peer, made), **CLOSE)
