"""Spectral and statistical methods against FusionBench: equal, or different where we say so."""

from functools import partial

import pytest
import torch
from helpers import linear_problem
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.layer_inputs import watch_inputs
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import ties
from divmerge_core.methods.regression import regmean, regmean_plus_plus
from divmerge_core.methods.spectral import iso_c, iso_cts, knots, tsv_m
from divmerge_core.methods.statistical import fisher, fisher_diagonal

pytest.importorskip("fusion_bench", reason="FusionBench is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # what the peer's imports announce

near = partial(assert_close, rtol=1e-5, atol=1e-5)
QUIET = {"progress": False}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(num_tasks: int = 2) -> MergeProblem:
    """Matrices of three shapes and two vectors, without inputs.

    In float64: where tasks' directions are nearly dependent, polar factors amplify rounding, and
    in float32 neither side has five digits.
    """
    shapes = {"high": (20, 12), "wide": (12, 20), "square": (15, 15), "bias": (7,), "gain": (3,)}
    base = {name: normal(*shape, seed=0).double() for name, shape in shapes.items()}
    experts = {
        f"task{t}": {name: value + normal(*value.shape, seed=t) for name, value in base.items()}
        for t in range(1, num_tasks + 1)
    }
    vectors = TaskVectors.from_states(base, experts)
    return MergeProblem(vectors, [[] for _ in experts], lambda parameters, pairs: [])


def changes(problem: MergeProblem) -> list[dict[str, torch.Tensor]]:
    """The peer's task vectors: one state dict per task."""
    return [problem.vectors.layout.unflatten(row) for row in dense(problem.vectors.deltas)]


def compare(problem: MergeProblem, found: torch.Tensor, peer: dict, scale: float = 1.0) -> None:
    """Our merged vector is the base plus `scale` times the peer's merged task vector."""
    base = problem.vectors.layout.unflatten(problem.vectors.base)
    for name, tensor in problem.vectors.layout.unflatten(found).items():
        near(tensor, base[name] + scale * peer[name], msg=lambda text, name=name: f"{name}: {text}")


# --- spectral -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
def test_iso_c_is_the_peers(num_tasks):
    from fusion_bench.method.isotropic_merging import iso_utils

    problem = given(num_tasks)
    peer = iso_utils.iso_c(changes(problem), accelerator="cpu")
    compare(problem, iso_c(problem, scale=1.5), peer, scale=1.5)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("common", [0.2, 0.8, 1.0])
def test_iso_cts_is_the_peers(num_tasks, common):
    from fusion_bench.method.isotropic_merging import iso_utils

    problem = given(num_tasks)
    peer = iso_utils.iso_cts(changes(problem), common, accelerator="cpu")
    compare(problem, iso_cts(problem, common=common, scale=1.5), peer, scale=1.5)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
def test_tsv_m_is_the_peers_at_full_rank(num_tasks):
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    problem = given(num_tasks)
    peer = TSVM_utils.compute_and_sum_svd_mem_reduction(changes(problem), accelerator="cpu")
    compare(problem, tsv_m(problem, scale=1.5), peer, scale=1.5)


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_knots_is_ties_of_the_peers_aligned_pieces(num_tasks):
    from fusion_bench.method.knots.knots_utils import subspace_alignment

    experts = given(num_tasks)
    parts = [row["high"] for row in changes(experts)]
    names = experts.vectors.tasks
    states = {name: {"weight": part} for name, part in zip(names, parts, strict=True)}
    vectors = TaskVectors.from_states({"weight": torch.zeros(20, 12).double()}, states)
    problem = MergeProblem(vectors, [[] for _ in names], experts.forward)
    basis, values, pieces = subspace_alignment(parts)
    pieces = {n: {"p": values[:, None] * p} for n, p in zip(names, pieces, strict=True)}
    inner = TaskVectors.from_states({"p": torch.zeros(len(values), 12).double()}, pieces)
    merged = ties(MergeProblem(inner, problem.batches, problem.forward), keep=0.2, scale=0.6)
    near(knots(problem).view(20, 12), basis @ merged.view(-1, 12))


# --- RegMean --------------------------------------------------------------------------------------


def test_regmean_is_the_peers_on_the_same_inputs():
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    problem = linear_problem(dtype=torch.float32, batches=6)
    parameters, grams = {name: [] for name in problem.vectors.layout.names}, []
    for number, task in enumerate(problem.vectors.tasks):
        flat, seen = problem.vectors.expert(task), {}
        for name, tensor in problem.vectors.layout.unflatten(flat).items():
            parameters[name].append(tensor)
        watch_inputs(
            problem, flat, number, lambda n, x, seen=seen: seen.setdefault(n, []).append(x)
        )
        xs = {name.removesuffix(".weight"): torch.cat(parts) for name, parts in seen.items()}
        grams.append({name: x.T @ x / len(x) for name, x in xs.items()})
    peer = merging_with_regmean_weights(parameters, grams, reduce_non_diagonal_ratio=0.95)
    found = problem.vectors.layout.unflatten(regmean(problem, **QUIET))
    for name, tensor in found.items():
        near(tensor, peer[name])


class Block(nn.Module):
    """Two linear layers with a gate between them, around a shortcut."""

    def __init__(self):
        super().__init__()
        self.rise, self.fall, self.norm = nn.Linear(6, 9), nn.Linear(9, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.fall(torch.relu(self.rise(x))))


class Tower(nn.Module):
    """Embeddings, three blocks, and the mean over tokens as logits."""

    def __init__(self, seed: int):
        super().__init__()
        self.embeddings = nn.Embedding(11, 6)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Block() for _ in range(3))
        with torch.no_grad():
            for number, tensor in enumerate(self.parameters()):
                tensor.copy_(0.5 * normal(*tensor.shape, seed=100 * seed + number))
        self.double().requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(tokens)
        for block in self.encoder.layer:
            x = block(x)
        return x.mean(dim=1)


def towers() -> tuple[MergeProblem, dict[str, Tower]]:
    models = {f"task{n}": Tower(n) for n in range(1, 4)}
    base, batches = Tower(0), []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(11, (4, 7), generator=draw) for _ in range(5)]
        batches.append([Batch({"tokens": ids}, torch.full((4,), 1 / 4).double()) for ids in tokens])

    def forward(parameters, pairs):
        return [functional_call(base, dict(parameters), b.inputs["tokens"]) for _, b in pairs]

    states = {name: model.state_dict() for name, model in models.items()}
    vectors = TaskVectors.from_states(base.state_dict(), states)
    return MergeProblem(vectors, batches, forward, base), models


def test_regmean_plus_plus_is_the_peers_on_the_same_inputs():
    from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
    from fusion_bench.modelpool import BaseModelPool

    problem, models = towers()

    class Peer(RegMeanAlgorithmPlusPlus):
        """The peer's algorithm, told where a tower's parts are."""

        def merge_embedding_layer(self, models_to_merge_dict):
            tables = [model.embeddings.weight for model in models_to_merge_dict.values()]
            return {"embeddings.weight": torch.stack(tables).mean(dim=0)}

        def get_input_for_first_layer(self, model, train_dataset):
            return [model.embeddings(batch.inputs["tokens"]) for batch in train_dataset]

        def get_layers(self, model):
            return model.encoder.layer

        def update_merged_params_dict(self, merged_params_dict, new_merged_params, layer_idx):
            named = {f"encoder.layer.{layer_idx}.{n}": t for n, t in new_merged_params.items()}
            return {**merged_params_dict, **named}

        def layer_batches_forward(self, layer, batches_input):
            return [layer(x) for x in batches_input]

        def get_regmean_weights(self, model_name, layer, batches_input, linear_modules_to_merge):
            seen = {name: [] for name in linear_modules_to_merge}
            hooks = [
                module.register_forward_pre_hook(
                    lambda m, x, n=n: seen[n].append(x[0].flatten(0, 1))
                )
                for n, module in linear_modules_to_merge.items()
            ]
            self.layer_batches_forward(layer, batches_input)
            for hook in hooks:
                hook.remove()
            xs = {name: torch.cat(parts) for name, parts in seen.items()}
            return {name: x.T @ x / len(x) for name, x in xs.items()}

    pool = BaseModelPool(
        {"_pretrained_": Tower(0), **models},
        train_datasets=dict(zip(models, problem.batches, strict=True)),
    )
    pool.load_train_dataset = lambda name: pool._train_datasets[name]
    peer = Peer(
        num_regmean_examples=20,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=0.95,
        weight_transpose=True,
    ).run(pool)
    found = problem.vectors.layout.unflatten(regmean_plus_plus(problem, **QUIET))
    for name, tensor in peer.state_dict().items():
        near(found[name], tensor)


# --- Fisher ---------------------------------------------------------------------------------------


def peer_information(problem: MergeProblem, flat: torch.Tensor, task: int) -> list[torch.Tensor]:
    """The peer's formula, for every input by itself: (d sum_y sqrt(p) log p)^2, p held fixed."""
    leaf, found = flat.clone().requires_grad_(), []
    for batch in problem.batches[task]:
        for row in batch.inputs["x"]:
            one = Batch({"x": row[None]}, batch.weight[:1])
            log_p = problem.logits(leaf, task, one).log_softmax(-1)
            (grad,) = torch.autograd.grad((log_p.detach().exp().sqrt() * log_p).sum(), leaf)
            found.append(grad.square())
    return found


def test_at_two_answers_the_peers_information_is_ours_times_the_gap_of_the_roots():
    """(sqrt p - sqrt(1 - p))^2 for each input: nothing where the expert is undecided."""
    problem = linear_problem(num_tasks=1, classes=2, rows=1, dtype=torch.float32)
    flat = problem.vectors.expert("task0")
    for number, peer in enumerate(peer_information(problem, flat, 0)):
        batch = problem.batches[0][number]
        one = MergeProblem(problem.vectors, [[batch]], problem.forward)
        roots = problem.logits(flat, 0, batch).softmax(-1)[0].sqrt()
        near(peer, fisher_diagonal(one, flat, 0) * (roots[0] - roots[1]).square())


def test_at_more_answers_the_peers_information_is_another():
    problem = linear_problem(num_tasks=1, dtype=torch.float32)
    flat = problem.vectors.expert("task0")
    peer = torch.stack(peer_information(problem, flat, 0)).mean(dim=0)
    assert (peer / fisher_diagonal(problem, flat, 0)).median() < 0.9


@pytest.mark.parametrize("normalise", [True, False])
def test_the_fisher_merge_is_the_peers_given_the_same_information(normalise):
    """At a floor that decides nothing: the peer adds it, we raise what is lower."""
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    problem = linear_problem(dtype=torch.float32)
    layout = problem.vectors.layout
    parameters, information = {name: [] for name in layout.names}, []
    for number, task in enumerate(problem.vectors.tasks):
        flat = problem.vectors.expert(task)
        for name, tensor in layout.unflatten(flat).items():
            parameters[name].append(tensor)
        information.append(layout.unflatten(fisher_diagonal(problem, flat, number)))
    peer = merging_with_fisher_weights(
        parameters,
        information,
        fisher_scaling_coefficients=torch.ones(3) / 3,
        normalize_fisher_weight=normalise,
        minimal_fisher_weight=1e-12,
    )
    found = layout.unflatten(fisher(problem, floor=1e-12, normalise=normalise, **QUIET))
    for name, tensor in found.items():
        near(tensor, peer[name])
