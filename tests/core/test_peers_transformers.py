"""Small random BERT, GPT-2 and Qwen2 models, in float32: what peers make of them is ours."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from divmerge_core.merging.layer_inputs import layer_inputs
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.adaptive import adamerging
from divmerge_core.methods.arithmetic import average, dare, task_arithmetic, ties
from divmerge_core.methods.continual import opcm
from divmerge_core.methods.masked import breadcrumbs
from divmerge_core.methods.regression import regmean
from divmerge_core.methods.shifts import doge
from divmerge_core.methods.spectral import iso_c, iso_cts
from divmerge_core.methods.spherical import model_stock, multi_slerp, slerp
from divmerge_core.methods.statistical import fisher, fisher_diagonal

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and their imports announce

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TASKS = ("one", "two", "three")
WEIGHTS = [1.0, 0.5, 2.0]
# Sizes are multiples of ten, so that shares of tensors come out even; no dropout.
SMALL = {"vocab_size": 40, "hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
AWAKE = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
KINDS = {
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            **SMALL, **STILL, num_attention_heads=2, max_position_embeddings=20
        ),
        add_pooling_layer=False,
    ),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(
            **AWAKE, vocab_size=40, n_embd=20, n_layer=2, n_head=2, n_positions=20
        )
    ),
    "qwen2": lambda: transformers.Qwen2Model(
        transformers.Qwen2Config(**SMALL, num_attention_heads=2, num_key_value_heads=1)
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def answer(output) -> torch.Tensor:
    """Four logits: numbers of the last token's hidden state."""
    return output.last_hidden_state[:, -1, :4]


@cache
def models(kind: str, scale: float = 0.02) -> tuple[nn.Module, ...]:
    """A random base and three experts around it."""
    generator = torch.Generator().manual_seed(0)
    made = [KINDS[kind]().eval().requires_grad_(False) for _ in range(1 + len(TASKS))]
    for tensors in zip(*(model.parameters() for model in made), strict=True):
        for number, tensor in enumerate(tensors):
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.2 * drawn if number == 0 else tensors[0] + scale * drawn)
    return tuple(made)


def states(kind: str, **options) -> list[dict[str, torch.Tensor]]:
    """State dicts of the base and of every expert."""
    return [{k: v.clone() for k, v in m.named_parameters()} for m in models(kind, **options)]


def problem_of(kind: str, num_tasks: int = 3, **options) -> MergeProblem:
    """Ours of the same models, with one batch of inputs per task."""
    base, *experts = states(kind, **options)
    module, generator = models(kind, **options)[0], torch.Generator().manual_seed(1)
    batches = [
        [Batch({"input_ids": torch.randint(40, (6, 8), generator=generator)}, torch.ones(6) / 6)]
        for _ in TASKS[:num_tasks]
    ]

    def forward(parameters, pairs):
        found = (functional_call(module, dict(parameters), (), dict(b.inputs)) for _, b in pairs)
        return [answer(output) for output in found]

    named = dict(zip(TASKS[:num_tasks], experts, strict=False))
    return MergeProblem(TaskVectors.from_states(base, named), batches, forward, module)


def changes(problem: MergeProblem) -> list[dict[str, torch.Tensor]]:
    """Every task vector as a state dict."""
    return [problem.vectors.layout.unflatten(row) for row in problem.vectors.deltas]


def same(problem: MergeProblem, found: torch.Tensor, peer: dict[str, torch.Tensor]) -> None:
    """Tensor by tensor, with the name of the first that differs."""
    for name, tensor in problem.vectors.layout.unflatten(found).items():
        assert_close(tensor, peer[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# --- mergekit -------------------------------------------------------------------------------------

MERGEKIT = {  # its method, its parameters, ours
    "linear": ({"weight": 1.0}, average),
    "task_arithmetic": ({"weight": 0.3}, task_arithmetic),
    "ties": (
        {"weight": WEIGHTS, "density": 0.3, "normalize": True, "lambda": 0.7},
        lambda p: ties(p, keep=0.3, scale=0.7, coeffs=WEIGHTS, trim="tensor", weights="before"),
    ),
    "breadcrumbs": (
        {"weight": 0.4, "density": 0.2, "gamma": 0.1},
        lambda p: breadcrumbs(p, keep=0.2, remove=0.1, scale=0.4),
    ),
    "multislerp": ({"weight": WEIGHTS}, lambda p: multi_slerp(p, weights=WEIGHTS)),
    "model_stock": ({}, model_stock),
}


@every_kind
@pytest.mark.parametrize("method", MERGEKIT)
def test_mergekits_merge_is_ours(kind, method):
    api = pytest.importorskip("mergekit.merge_methods.api")
    parameters, ours = MERGEKIT[method]
    given, options = states(kind), {"base": 0}
    if method == "linear":
        given, options = given[1:], {}
    problem = problem_of(kind)
    same(
        problem,
        ours(problem),
        api.merge_state_dicts(given, method, parameters=parameters, **options),
    )


@every_kind
def test_mergekits_slerp_is_ours(kind):
    api = pytest.importorskip("mergekit.merge_methods.api")
    problem, (_, first, second, _) = problem_of(kind, 2, scale=0.3), states(kind, scale=0.3)
    found = api.merge_state_dicts([first, second], "slerp", parameters={"t": 0.3}, base=0)
    same(problem, slerp(problem, t=0.3), found)


@every_kind
def test_mergekits_dare_is_ours_on_the_same_draws(kind, monkeypatch):
    """It asks for the entries that stay tensor by tensor, and within a tensor task by task."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    problem, generator = problem_of(kind), torch.Generator().manual_seed(0)
    stays = [torch.rand(len(row), generator=generator) >= 0.6 for row in problem.vectors.deltas]
    bounds = dict(zip(problem.vectors.layout.names, problem.vectors.layout.bounds, strict=True))
    queue = iter([row[slice(*bounds[name])] for name in states(kind)[0] for row in stays])
    monkeypatch.setattr(torch, "bernoulli", lambda chance: next(queue).view_as(chance).to(chance))
    options = {"weight": 0.3, "density": 0.4, "rescale": True}
    found = api.merge_state_dicts(states(kind), "dare_linear", parameters=options, base=0)
    same(problem, dare(problem, drop=0.6, rescale="l1"), found)


# --- FusionBench, from weights --------------------------------------------------------------------


@every_kind
def test_fusion_benchs_global_ties_is_ours_with_one_entry_more(kind):
    peer = pytest.importorskip("fusion_bench.method.ties_merging.ties_merging_utils")
    problem = problem_of(kind)
    size = problem.vectors.layout.size
    total = peer.ties_merging(problem.vectors.deltas, reset_thresh=0.2, merge_func="mean")
    found = ties(problem, keep=(int(0.2 * size) + 1) / size, scale=0.3)
    assert_close(found, problem.vectors.base + 0.3 * total, **CLOSE)


@every_kind
@pytest.mark.parametrize("method", [iso_c, iso_cts])
def test_fusion_benchs_isotropic_merges_are_ours(kind, method):
    peer = pytest.importorskip("fusion_bench.method.isotropic_merging.iso_utils")
    problem = problem_of(kind)
    rest = {iso_c: (), iso_cts: (0.8,)}[method]
    merged = getattr(peer, method.__name__)(changes(problem), *rest, accelerator="cpu")
    base = states(kind)[0]
    same(problem, method(problem, scale=1.5), {n: base[n] + 1.5 * merged[n] for n in base})


def pool_of(made: list[nn.Module]):
    """What FusionBench takes models from, by number; copies, as it may change them."""
    from copy import deepcopy

    base, *experts = made
    return SimpleNamespace(
        model_names=[str(number) for number in range(len(experts))],
        load_pretrained_model=lambda: deepcopy(base),
        load_model=lambda name: deepcopy(experts[int(name)]),
    )


@every_kind
def test_fusion_benchs_opcm_is_ours(kind):
    pytest.importorskip("fusion_bench")
    from transformers.models.clip import modeling_clip

    # Newer transformers have no such class; FusionBench names it on import.
    if not hasattr(modeling_clip, "CLIPVisionTransformer"):
        modeling_clip.CLIPVisionTransformer = nn.Module
    from fusion_bench.method.opcm.opcm_general import OPCM

    problem = problem_of(kind)
    peer = OPCM(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    peer._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={}))
    found = dict(peer.run(pool_of(models(kind))).named_parameters())
    same(problem, opcm(problem, progress=False), found)


class Renamed(nn.Module):
    """A model's matrices but for embeddings, under `encoder`: there DOGE's peer looks for them."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.encoder, self.rest = nn.ModuleDict(), nn.ParameterDict()
        for name, tensor in state.items():
            key, value = name.replace(".", "_"), nn.Parameter(tensor.clone(), requires_grad=False)
            if tensor.ndim == 2 and not ("embed" in name or "wte" in name or "wpe" in name):
                self.encoder[key] = nn.ParameterDict({"weight": value})
            else:
                self.rest[str(len(self.rest))] = value


@every_kind
def test_fusion_benchs_doge_is_ours_where_as_many_entries_are_kept(kind, capsys):
    """An `embed` in a name keeps our own from a tensor; the matrices' names have lost none."""
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("fusion_bench")
    from fusion_bench import BaseModelPool
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    made = [Renamed(state) for state in states(kind)]
    peer = DOGE_TA_Algorithm(subspace=6, K=30, lamda=0.07)
    peer.fabric = lightning.Fabric(accelerator="cpu", devices=1)
    named = dict(zip(("_pretrained_", *TASKS), made, strict=True))
    found = peer.run(BaseModelPool(named)).state_dict()
    problem = problem_of(kind)
    treated = sum(tensor.numel() for name, tensor in made[0].encoder.named_parameters())
    keep = (int(0.3 * treated) + 1) / treated
    merged = doge(problem, eta=0.07, lr=1e-4, units="absolute", keep=keep, progress=False)
    old = {
        name: found.get(f"encoder.{name.replace('.', '_')}.weight", tensor)
        for name, tensor in states(kind)[0].items()
    }
    assert (merged - problem.vectors.base).abs().max() > 1e-3
    same(problem, merged, old)


# --- FusionBench, from inputs ---------------------------------------------------------------------


def parameters_of(problem: MergeProblem, dtype=torch.float32) -> dict[str, list[torch.Tensor]]:
    """Every tensor's value in every expert."""
    flats = [problem.vectors.expert(task).to(dtype) for task in TASKS]
    parts = [problem.vectors.layout.unflatten(flat) for flat in flats]
    return {name: [part[name] for part in parts] for name in problem.vectors.layout.names}


@every_kind
def test_fusion_benchs_regmean_is_ours_on_the_same_inputs(kind):
    """In float64, as we solve: their inverse of a Gram matrix has four digits in float32."""
    peer = pytest.importorskip("fusion_bench.method.regmean.regmean")
    problem, grams = problem_of(kind), []
    for number, task in enumerate(TASKS):
        seen = layer_inputs(problem, problem.vectors.expert(task), number)
        grams.append({n.removesuffix(".weight"): s.gram / s.count for n, s in seen.items()})
    found = peer.merging_with_regmean_weights(
        parameters_of(problem, torch.float64), grams, reduce_non_diagonal_ratio=0.95
    )
    found = {name: tensor.float() for name, tensor in found.items()}
    same(problem, regmean(problem, progress=False), found)


@every_kind
def test_fusion_benchs_fisher_merge_is_ours_given_the_same_information(kind):
    """With the floor in it: the peer would add one, we raise what is lower."""
    peer = pytest.importorskip("fusion_bench.method.fisher_merging.fisher_merging")
    problem = problem_of(kind)
    unflatten = problem.vectors.layout.unflatten
    information = [
        unflatten(fisher_diagonal(problem, problem.vectors.expert(task), number).clamp(min=1e-9))
        for number, task in enumerate(TASKS)
    ]
    found = peer.merging_with_fisher_weights(
        parameters_of(problem),
        information,
        fisher_scaling_coefficients=torch.ones(3) / 3,
        normalize_fisher_weight=False,
        minimal_fisher_weight=0.0,
    )
    same(problem, fisher(problem, floor=1e-9, normalise=False, progress=False), found)


@every_kind
def test_adamergings_steps_are_those_of_fusion_benchs_loop(kind):
    pytest.importorskip("fusion_bench")
    from copy import deepcopy

    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from fusion_bench.models.wrappers.layer_wise_fusion import (
        LayerWiseMergedModel,
        get_layer_wise_weights,
    )
    from omegaconf import DictConfig

    problem, steps = problem_of(kind), 4

    class Adaptation(LayerWiseAdaMergingAlgorithm):
        modelpool = SimpleNamespace(model_names=list(TASKS))

        def get_shuffled_test_loader_iter(self, task):
            batches = problem.batches[TASKS.index(task)]
            return iter([(batches[0].inputs["input_ids"],)])

        def compute_logits(self, module, images, task):
            return answer(module(input_ids=images))

    base, *experts = (deepcopy(model) for model in models(kind))
    names = [name for name, tensor in base.named_parameters()]
    module = LayerWiseMergedModel(
        get_layer_wise_weights(len(TASKS), len(names), 0.3),
        base.requires_grad_(True),
        [expert.requires_grad_(True) for expert in experts],
        clamp_weights=False,
        tie_weights=True,
        strict=False,
    )
    config = {"optimizer": "adam", "lr": 1e-2, "max_steps": steps, "fabric": None}
    module = Adaptation(DictConfig(config)).test_time_adaptation(module)
    found = dict(module.merge_and_unload().named_parameters())
    merged = adamerging(problem, epochs=steps, lr=1e-2, progress=False)
    assert (merged - task_arithmetic(problem)).abs().max() > 1e-3
    same(problem, merged, {name: tensor.detach() for name, tensor in found.items()})
