"""The same merges by mergekit, PEFT and FusionBench, on small models; where theirs differ."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from comparisons import by_task
from helpers import QUIET, LinearModel, batch_of, linear_problem, module_problem, state_of
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from divmerge_core.divergences import entropy
from divmerge_core.merging.layer_inputs import layer_inputs
from divmerge_core.merging.linalg import elected
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods import METHODS
from divmerge_core.methods.adaptive import adamerging, entropy_of_mean_logit
from divmerge_core.methods.arithmetic import average, dare, task_arithmetic, thinned, ties
from divmerge_core.methods.continual import opcm, running_average, sequential_ties
from divmerge_core.methods.corrected import surgery
from divmerge_core.methods.masked import breadcrumbs, emr, tall_masks
from divmerge_core.methods.regression import regmean, regmean_plus_plus
from divmerge_core.methods.routed import wemoe
from divmerge_core.methods.shifts import doge, wudi
from divmerge_core.methods.spectral import iso_c, iso_cts, knots, tsv_m
from divmerge_core.methods.spherical import model_stock, multi_slerp, slerp, stock_ratio
from divmerge_core.methods.statistical import fisher, fisher_diagonal

pytestmark = pytest.mark.filterwarnings("ignore")  # what peers and their imports announce

near = partial(assert_close, rtol=1e-5, atol=1e-5)
TASKS = ("one", "two", "three", "four")
WEIGHTS = [1.0, 0.5, 2.0]
# Sizes are multiples of ten, so that shares of tensors come out even; no dropout.
SMALL = {"vocab_size": 40, "hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
AWAKE = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
BERT = {**SMALL, **STILL, "num_attention_heads": 2, "max_position_embeddings": 20}
GPT2 = {**AWAKE, "vocab_size": 40, "n_embd": 20, "n_layer": 2, "n_head": 2, "n_positions": 20}
QWEN2 = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1}


class Token(nn.Module):
    """A layer, and a parameter that lies beside it on its parent."""

    def __init__(self):
        super().__init__()
        self.dense, self.token = nn.Linear(6, 9), nn.Parameter(torch.zeros(6))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: LinearModel(10, 10),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT), False),
    "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(**GPT2)),
    "qwen2": lambda: transformers.Qwen2Model(transformers.Qwen2Config(**QWEN2)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
numbers_of_tasks = pytest.mark.parametrize("num_tasks", [1, 2, 3, 4])


@cache
def models(kind: str, scale: float = 0.02, rank: int | None = None) -> list[nn.Module]:
    """A random base and four experts around it; `rank` is that of every matrix's change."""
    generator = torch.Generator().manual_seed(0)
    make = {**KINDS, "token": Token}[kind]
    made = [make().eval().requires_grad_(False) for _ in range(1 + len(TASKS))]
    for tensors in zip(*(model.parameters() for model in made), strict=True):
        shape = tensors[0].shape
        for number, tensor in enumerate(tensors):
            drawn = torch.randn(shape, generator=generator)
            if rank and number and len(shape) == 2:
                left = torch.randn(shape[0], rank, generator=generator)
                drawn = left @ torch.randn(rank, shape[1], generator=generator)
            tensor.copy_(0.2 * drawn if number == 0 else tensors[0] + scale * drawn)
    return made


def pair(kind: str, num_tasks: int = 3, **options) -> tuple[MergeProblem, list[nn.Module]]:
    """Our problem of the models, with one batch of inputs per task, and copies of the models."""
    made = deepcopy(models(kind, **options)[: 1 + num_tasks])
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(40, (6, 8), generator=generator) for _ in made[1:]]
    dense = [torch.randn(6, 10, generator=generator) for _ in made[1:]]
    if kind in ("linear", "token"):
        batches, answer = [[batch_of(x)] for x in dense], None
    else:
        batches = [[Batch({"input_ids": ids}, torch.ones(6) / 6)] for ids in words]
        answer = lambda parameters, b: answer_of(  # noqa: E731
            functional_call(made[0], parameters, (), dict(b.inputs))
        )
    named = dict(zip(TASKS, map(state_of, made[1:]), strict=False))
    return module_problem(made[0], named, batches, answer), deepcopy(made)


def answer_of(output) -> torch.Tensor:
    """A linear model's logits, or numbers of the last token's hidden state."""
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state[:, -1, :4]


def given(batch: Batch) -> torch.Tensor:
    return next(iter(batch.inputs.values()))


def parts_of(problem: MergeProblem, rows=None) -> list[dict[str, torch.Tensor]]:
    """Every task vector, or other rows, as a state dict."""
    rows = problem.vectors.deltas if rows is None else rows
    return list(map(problem.vectors.layout.unflatten, rows))


def same(problem: MergeProblem, found: torch.Tensor, peer: dict[str, torch.Tensor]) -> None:
    """Tensor by tensor, with the name of the first that differs."""
    for name, tensor in problem.vectors.layout.unflatten(found).items():
        near(tensor, peer[name].to(tensor), msg=lambda text, name=name: f"{name}: {text}")


def added(problem: MergeProblem, peer: dict[str, torch.Tensor], scale: float = 1.0) -> dict:
    """The base with a peer's merged task vector."""
    base = problem.vectors.layout.unflatten(problem.vectors.base)
    return {name: tensor + scale * peer[name] for name, tensor in base.items()}


def tiny(*deltas: list[float], base: float = 0.0) -> tuple[MergeProblem, list[dict]]:
    """A problem of one float32 tensor, and the models as mergekit takes them."""
    start = torch.full((len(deltas[0]),), base)
    states = [{"w": start}, *({"w": start + torch.tensor(delta)} for delta in deltas)]
    vectors = TaskVectors.from_states(states[0], dict(zip(TASKS, states[1:], strict=False)))
    return MergeProblem(vectors, [[] for _ in deltas], lambda *_: []), states


def fusion_bench(module: str):
    """One of FusionBench's modules; it names a class, in a hint, that newer transformers lack."""
    pytest.importorskip("fusion_bench")
    from transformers.models.clip import modeling_clip

    if not hasattr(modeling_clip, "CLIPVisionTransformer"):
        modeling_clip.CLIPVisionTransformer = nn.Module
    return pytest.importorskip(f"fusion_bench.{module}")


# --- mergekit
def by_mergekit(states: list[dict], method: str, *, base: bool = True, **parameters) -> dict:
    api = pytest.importorskip("mergekit.merge_methods.api")
    options = {"base": 0} if base else {}
    return api.merge_state_dicts(states, method, parameters=parameters, **options)


BEFORE = {"coeffs": WEIGHTS, "trim": "tensor", "weights": "before"}
MERGEKIT = [  # its method, its parameters, ours, its options
    ("linear", {"weight": 1.0}, average, {}),
    ("task_arithmetic", {"weight": 0.3}, task_arithmetic, {}),
    *(
        (
            "ties",
            {"weight": WEIGHTS, "density": 0.3, "normalize": combine == "mean", "lambda": 0.7},
            ties,
            {"keep": 0.3, "scale": 0.7, "combine": combine, **BEFORE},
        )
        for combine in ("mean", "sum")
    ),
    *(
        (
            "breadcrumbs",
            {"weight": 0.4, "density": keep, "gamma": remove},
            breadcrumbs,
            {"keep": keep, "remove": remove, "scale": 0.4},
        )
        for keep, remove in ((0.2, 0.1), (0.5, 0.3), (0.1, 0.0))
    ),
    ("multislerp", {"weight": WEIGHTS}, multi_slerp, {"weights": WEIGHTS, "origin": "base"}),
    ("multislerp", {"weight": WEIGHTS}, multi_slerp, {"weights": WEIGHTS, "origin": "zero"}),
    ("model_stock", {"filter_wise": 0}, model_stock, {"filter_wise": False}),
    ("model_stock", {"filter_wise": 1}, model_stock, {"filter_wise": True}),
    *(("slerp", {"t": t}, slerp, {"t": t}) for t in (0.0, 0.3, 0.5, 1.0)),
]


@every_kind
@pytest.mark.parametrize(("peer", "parameters", "method", "options"), MERGEKIT)
def test_mergekits_merge_is_ours(kind, peer, parameters, method, options):
    """At tasks almost parallel to almost orthogonal."""
    for scale in (0.003, 0.02, 3.0) if peer == "slerp" else (0.02,):
        problem, made = pair(kind, 2 if peer == "slerp" else 3, scale=scale)
        states = list(map(state_of, made))
        if peer in ("linear", "slerp") or options.get("origin") == "zero":
            states = states[1:]
        base = len(states) > len(problem.vectors.tasks) or peer == "slerp"
        found = by_mergekit(states, peer, base=base, **parameters)
        same(problem, method(problem, **options), found)


@every_kind
@pytest.mark.parametrize(
    ("peer", "parameters", "options"),
    [
        ("dare_linear", {"weight": 0.3, "rescale": True}, {"rescale": "l1"}),
        ("dare_linear", {"weight": 0.3, "rescale": False}, {"rescale": "none"}),
        (
            "dare_ties",
            {"weight": 1.0, "normalize": True, "lambda": 0.5},
            {"then": "ties", "rescale": "l1", "scale": 0.5, "keep": 1.0},
        ),
    ],
)
def test_mergekits_dare_is_ours_on_the_same_draws(kind, peer, parameters, options, monkeypatch):
    """It asks for the entries that stay tensor by tensor, and within a tensor task by task."""
    problem, made = pair(kind)
    generator, layout = torch.Generator().manual_seed(0), problem.vectors.layout
    stays = [torch.rand(len(row), generator=generator) >= 0.6 for row in problem.vectors.deltas]
    queue = iter([row[start:stop] for start, stop in layout.bounds for row in stays])
    monkeypatch.setattr(torch, "bernoulli", lambda chance: next(queue).view_as(chance).to(chance))
    found = by_mergekit(list(map(state_of, made)), peer, density=0.4, **parameters)
    same(problem, dare(problem, drop=0.6, **options), found)
    if "keep" in options:  # it does not trim a second time
        trimmed = dare(problem, drop=0.6, **{**options, "keep": 0.2})
        assert not torch.allclose(trimmed, layout.flatten(found))


def test_where_mergekit_and_peft_differ_in_ties():
    """It trims tensors and weighs before the election, PEFT after it; where votes cancel, plus."""
    problem, made = pair("linear")
    states, options = list(map(state_of, made)), {"keep": 0.3, "coeffs": WEIGHTS}
    parameters = {"weight": WEIGHTS, "density": 0.3, "normalize": True}
    found = problem.vectors.layout.flatten(by_mergekit(states, "ties", **parameters))
    for trim, weights in (("global", "before"), ("tensor", "after")):
        assert not torch.allclose(ties(problem, trim=trim, weights=weights, **options), found)
    peft = pytest.importorskip("peft.utils.merge_utils")
    theirs = {
        name: peft.ties(list(by_task(problem, name)), torch.tensor(WEIGHTS), 0.3)
        for name in problem.vectors.layout.names
    }
    ours = ties(problem, trim="tensor", weights="after", **options)
    same(problem, ours, added(problem, theirs))
    peer = fusion_bench("method.ties_merging.ties_merging_utils")  # it elects the majority
    problem, states = tiny([1.0, -1, -1], [-1.0, -1, -1])
    assert ties(problem, keep=1.0).tolist() == [0, -1, -1]
    assert by_mergekit(states, "ties", weight=1.0, density=1.0)["w"].tolist() == [1, -1, -1]
    theirs = peer.ties_merging(problem.vectors.deltas, reset_thresh=0.99, merge_func="mean")
    assert theirs.tolist() == [-1, -1, -1]


def test_where_mergekit_differs_on_small_and_on_short_tensors():
    """Breadcrumbs lose a tensor of four; parallel task vectors 1e-5 long count as orthogonal;
    the angle to a zero tensor counts as a right one, for FusionBench too."""
    problem, states = tiny([4.0, 3.0, 2.0, 1.0])
    found = by_mergekit(states, "breadcrumbs", weight=0.4, density=0.2, gamma=0.1)["w"]
    assert not found.any() and breadcrumbs(problem, keep=0.2, remove=0.1, scale=0.4).any()
    problem, states = tiny([5e-6] * 4, [5e-6] * 4)
    assert_close(model_stock(problem), torch.full((4,), 5e-6), rtol=1e-5, atol=0)
    assert (by_mergekit(states, "model_stock")["w"] < 5e-9).all()
    problem, (_, zero, moved) = tiny([0.0, 0.0], [4.0, 8.0])
    assert_close(slerp(problem), moved["w"] / 2)
    assert_close(by_mergekit([zero, moved], "slerp", t=0.5)["w"], moved["w"] * 0.5**0.5)
    peer = fusion_bench("method.slerp.slerp_utils")
    assert_close(peer.slerp(0.5, zero["w"], moved["w"]), moved["w"] * 0.5**0.5)


# --- FusionBench, from weights
@every_kind
def test_fusion_benchs_sums_masks_and_spheres_are_ours(kind, monkeypatch):
    """TIES and AdaMerging++ trim globally and keep one entry more."""
    problem, made = pair(kind)
    deltas, layout = problem.vectors.deltas, problem.vectors.layout
    peer = fusion_bench("method.ties_merging.ties_merging_utils")
    one_more = (int(0.2 * layout.size) + 1) / layout.size
    for combine in ("mean", "sum"):
        total = peer.ties_merging(deltas, reset_thresh=0.2, merge_func=combine)
        found = problem.vectors.base + 0.3 * total
        near(ties(problem, keep=one_more, scale=0.3, combine=combine), found)
        assert not torch.allclose(ties(problem, keep=0.2, scale=0.3, combine=combine), found)
    for keep in (0.2, 0.5, 1.0):
        count = round(keep * layout.size)
        entries, total = peer.ties_merging_split(deltas, (count - 0.5) / layout.size, "dis-sum")
        near((elected(deltas, keep), elected(deltas, keep).sum(0)), (entries, total))
    peer = fusion_bench("method.tall_mask.utils")
    base = torch.zeros_like(problem.vectors.base)  # so that no rounding of weights blurs it
    for threshold in (0.2, 0.6):
        found = peer.generate_task_masks(deltas, deltas, base, tall_mask_lambda=threshold)
        assert torch.equal(tall_masks(deltas, threshold), found)
    unified, masks, scales = fusion_bench("method.emr_merging.utils").emr_merge(parts_of(problem))
    found = emr(problem, norm="tensor")
    near((found.unified, found.scales), (layout.flatten(unified), scales))
    for task in range(3):
        parts = {name: mask[task].float() for name, mask in masks.items()}
        assert torch.equal(found.masks[task], layout.flatten(parts).bool())
    peer, generators = fusion_bench("method.dare.utils"), [torch.Generator() for _ in range(2)]
    drawn = partial(torch.rand, generator=generators[0])
    monkeypatch.setattr(torch, "rand_like", lambda row: drawn(len(row)))
    for row in deltas:
        theirs = row.clone()
        peer.param_random_drop_(theirs, 0.5, rescale=True)
        near(thinned(row, 0.5, "expected", layout, generators[1]), theirs)
    problem, made = pair(kind, 2)
    base, first, second = map(state_of, made)
    for t in (0.3, 0.5):
        found = fusion_bench("method.slerp.slerp").slerp_on_state_dicts(t, first, second)
        same(problem, slerp(problem, t=t), found)
    peer = fusion_bench("method.model_stock.model_stock")
    ratios = peer.compute_ratio(peer.compute_angle(first, second, base), k=2)
    same(problem, model_stock(problem), peer.merge_weights(first, second, base, ratios))


def test_fusion_bench_averages_angles_where_we_average_cosines():
    peer = fusion_bench("method.model_stock.model_stock")
    angles = torch.tensor([0.0, 90.0, 90.0])  # of three experts, two of them parallel
    ratio = peer.compute_ratio({"w": angles.mean().item()}, k=3)["w"]  # of 60 degrees
    near(ratio, 3 * 0.5 / (1 + 2 * 0.5))
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[:, None]
    near(stock_ratio(rows).item(), 3 / 3 / (1 + 2 / 3))  # of the cosine 1/3


def matrices(num_tasks: int) -> MergeProblem:
    """Matrices of three shapes and two vectors, in float64.

    Where tasks' directions are nearly dependent, polar factors amplify rounding, and in float32
    neither side has five digits.
    """
    shapes = {"high": (20, 12), "wide": (12, 20), "square": (15, 15), "bias": (7,), "gain": (3,)}

    def drawn(seed: int) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(seed)
        return {n: torch.randn(shape, generator=made).double() for n, shape in shapes.items()}

    base, experts = drawn(0), {name: drawn(n) for n, name in enumerate(TASKS[:num_tasks], 1)}
    experts = {task: {n: base[n] + t for n, t in state.items()} for task, state in experts.items()}
    vectors = TaskVectors.from_states(base, experts)
    return MergeProblem(vectors, [[] for _ in experts], lambda *_: [])


@numbers_of_tasks
def test_fusion_benchs_spectral_merges_are_ours(num_tasks):
    problem, iso = matrices(num_tasks), fusion_bench("method.isotropic_merging.iso_utils")
    peer = fusion_bench("method.task_singular_vector.utils").TSVM_utils
    theirs = [(iso_c, {}, iso.iso_c(parts_of(problem), accelerator="cpu"))]
    for common in (0.2, 0.8, 1.0):
        found = iso.iso_cts(parts_of(problem), common, accelerator="cpu")
        theirs.append((iso_cts, {"common": common}, found))
    found = peer.compute_and_sum_svd_mem_reduction(parts_of(problem), accelerator="cpu")
    theirs.append((tsv_m, {}, found))
    for method, options, found in theirs:
        same(problem, method(problem, scale=1.5, **options), added(problem, found, 1.5))


@every_kind
def test_fusion_benchs_isotropic_merges_are_ours_on_models(kind):
    problem, iso = pair(kind)[0], fusion_bench("method.isotropic_merging.iso_utils")
    found = iso.iso_c(parts_of(problem), accelerator="cpu")
    same(problem, iso_c(problem, scale=1.5), added(problem, found, 1.5))
    found = iso.iso_cts(parts_of(problem), 0.8, accelerator="cpu")
    same(problem, iso_cts(problem, scale=1.5), added(problem, found, 1.5))


@numbers_of_tasks
def test_knots_is_ties_of_the_peers_aligned_pieces(num_tasks):
    peer, parts = fusion_bench("method.knots.knots_utils"), by_task(matrices(num_tasks), "high")

    def problem_of(rows) -> MergeProblem:
        states = {task: {"weight": row} for task, row in zip(TASKS, rows, strict=False)}
        vectors = TaskVectors.from_states({"weight": 0 * rows[0]}, states)
        return MergeProblem(vectors, [[] for _ in states], lambda *_: [])

    basis, values, pieces = peer.subspace_alignment(list(parts))
    merged = ties(problem_of([values[:, None] * piece for piece in pieces]), keep=0.2, scale=0.6)
    near(knots(problem_of(parts)).view(20, 12), basis @ merged.view(-1, 12))


def of_peer(algorithm, made: list[nn.Module]) -> dict[str, torch.Tensor]:
    """What one of FusionBench's continual algorithms merges; it works on copies."""
    pool = SimpleNamespace(
        model_names=[str(number) for number in range(len(made) - 1)],
        load_pretrained_model=lambda: deepcopy(made[0]).requires_grad_(True),
        load_model=lambda name: deepcopy(made[1 + int(name)]).requires_grad_(True),
    )
    algorithm._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={}))
    return state_of(algorithm.run(pool))


ORDERED = {"shuffle_order": False, "save_on_every_step": False}


@every_kind
def test_opcm_and_its_baselines_are_fusion_benchs(kind):
    """Sequential TIES keeps one entry more."""
    problem, made = pair(kind)
    peer, size = fusion_bench("method.opcm"), problem.vectors.layout.size
    general = fusion_bench("method.opcm.opcm_general").OPCM
    for share in (0.0, 0.3, 0.5, 0.9) if kind == "linear" else (0.5,):
        for algorithm in (general, peer.OPCMForCLIP) if kind == "linear" else (general,):
            found = of_peer(algorithm(alpha=share, **ORDERED), made)
            same(problem, opcm(problem, share=share, **QUIET), found)
    found = of_peer(peer.ContinualWeightAverageForCLIP(**ORDERED), made)
    same(problem, running_average(problem), found)
    found = of_peer(peer.ContinualTaskArithmeticForCLIP(scaling_factor=0.3, **ORDERED), made)
    same(problem, METHODS["sequential_task_arithmetic"](problem, scale=0.3), found)
    if kind != "gpt2":  # of its second block's last matrix one entry differs
        theirs = peer.ContinualTiesMergingForCLIP(scaling_factor=0.5, threshold=20, **ORDERED)
        found = sequential_ties(problem, keep=(int(0.2 * size) + 1) / size, scale=0.5)
        same(problem, found, of_peer(theirs, made))


@pytest.mark.parametrize(("share", "rank"), [(1.0, None), (0.5, 1)])
def test_at_share_1_fusion_benchs_opcm_protects_less_and_at_low_rank_takes_out_more(share, rank):
    """No share exceeds 1 but by rounding, and of an index not found they make 0. Of a null space
    they remove a diagonal, in whatever basis the SVD returns."""
    problem, made = pair("linear", 2 if rank else 3, scale=0.3, rank=rank)
    peer = fusion_bench("method.opcm.opcm_general").OPCM(alpha=share, **ORDERED)
    theirs = problem.vectors.layout.flatten(of_peer(peer, made))
    assert (opcm(problem, share=share, **QUIET) - theirs).abs().max() > 1e-2


def test_a_parameter_that_lies_on_a_parent_module_keeps_fusion_benchs_first_experts_change():
    """Up to the common factors; ours takes every expert's."""
    problem, made = pair("token", scale=0.3)
    base, changes = state_of(made[0])["token"], by_task(problem, "token")
    peer = fusion_bench("method.opcm.opcm_general").OPCM(alpha=0.5, **ORDERED)
    theirs = of_peer(peer, made)["token"] - base
    ours = problem.vectors.layout.unflatten(opcm(problem, **QUIET))["token"] - base
    for found, expected in ((theirs, changes[0]), (ours, changes.sum(0))):
        near(torch.nn.functional.cosine_similarity(found, expected, dim=0), torch.ones(()))


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


@pytest.mark.parametrize(
    ("kind", "num_tasks"), [(kind, 3) for kind in KINDS] + [("linear", n) for n in (1, 2, 4)]
)
def test_fusion_benchs_doge_is_ours_where_as_many_entries_are_kept(kind, num_tasks, capsys):
    lightning = pytest.importorskip("lightning")
    peer = fusion_bench("method.doge_ta.doge_ta").DOGE_TA_Algorithm(subspace=6, K=30, lamda=0.07)
    problem, made = pair(kind, num_tasks)
    named = {n: Renamed(state_of(m)) for n, m in zip(("_pretrained_", *TASKS), made, strict=False)}
    peer.fabric = lightning.Fabric(accelerator="cpu", devices=1)
    found = peer.run(fusion_bench("modelpool").BaseModelPool(named)).state_dict()
    treated = sum(tensor.numel() for tensor in named["_pretrained_"].encoder.parameters())
    keep = (int(0.3 * treated) + 1) / treated
    merged = doge(problem, eta=0.07, lr=1e-4, units="absolute", keep=keep, **QUIET)
    expected = {
        name: found.get(f"encoder.{name.replace('.', '_')}.weight", tensor)
        for name, tensor in state_of(made[0]).items()
    }
    assert (merged - problem.vectors.base).abs().max() > 1e-3
    same(problem, merged, expected)


@numbers_of_tasks
@pytest.mark.parametrize("steps", [300, 400])
def test_wudi_is_fusion_benchs(num_tasks, steps, capsys):
    peer, (problem, _) = fusion_bench("method.wudi.wudi"), pair("linear", num_tasks, scale=0.002)
    found = peer.wudi_merging(list(map(dict, parts_of(problem))), accelerator="cpu", iter_num=steps)
    expected, summed = problem.vectors.layout.flatten(found), problem.vectors.deltas.sum(0)
    assert num_tasks == 1 or (expected - summed).abs().max() > 1e-3
    same(problem, wudi(problem, steps=steps, **QUIET), added(problem, found))


# --- FusionBench, from inputs
@every_kind
def test_fusion_benchs_regmean_is_ours_on_the_same_inputs(kind):
    """In float64, as we solve: their inverse of a Gram matrix has four digits in float32."""
    problem, grams = pair(kind)[0], []
    for number, task in enumerate(problem.vectors.tasks):
        seen = layer_inputs(problem, problem.vectors.expert(task), number)
        grams.append({n.removesuffix(".weight"): s.gram / s.count for n, s in seen.items()})
    experts = parts_of(problem, [problem.vectors.expert(t).double() for t in problem.vectors.tasks])
    values = {name: [expert[name] for expert in experts] for name in problem.vectors.layout.names}
    peer = fusion_bench("method.regmean.regmean")
    found = peer.merging_with_regmean_weights(values, grams, reduce_non_diagonal_ratio=0.95)
    same(problem, regmean(problem, **QUIET), found)


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
        self.embeddings, self.encoder = nn.Embedding(11, 6), nn.Module()
        self.encoder.layer = nn.ModuleList(Block() for _ in range(3))
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.double().requires_grad_(False).parameters():
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(x)
        for block in self.encoder.layer:
            x = block(x)
        return x.mean(dim=1)


def test_regmean_plus_plus_is_the_peers_on_the_same_inputs():
    algorithm = fusion_bench("method.regmean_plusplus.regmean_plusplus").RegMeanAlgorithmPlusPlus
    weight, batches = torch.full((4,), 1 / 4).double(), []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        ids = [torch.randint(11, (4, 7), generator=draw) for _ in range(5)]
        batches.append([Batch({"x": x}, weight) for x in ids])
    experts = {name: Tower(n) for n, name in enumerate(TASKS[:3], 1)}
    problem = module_problem(Tower(0), {n: state_of(m) for n, m in experts.items()}, batches)

    class Peer(algorithm):
        """The peer's algorithm, told where a tower's parts are."""

        def merge_embedding_layer(self, models_to_merge_dict):
            tables = [model.embeddings.weight for model in models_to_merge_dict.values()]
            return {"embeddings.weight": torch.stack(tables).mean(dim=0)}

        def get_input_for_first_layer(self, model, train_dataset):
            return [model.embeddings(batch.inputs["x"]) for batch in train_dataset]

        def get_layers(self, model):
            return model.encoder.layer

        def update_merged_params_dict(self, merged_params_dict, new_merged_params, layer_idx):
            named = {f"encoder.layer.{layer_idx}.{n}": t for n, t in new_merged_params.items()}
            return {**merged_params_dict, **named}

        def layer_batches_forward(self, layer, batches_input):
            return [layer(x) for x in batches_input]

        def get_regmean_weights(self, model_name, layer, batches_input, linear_modules_to_merge):
            x = torch.cat([x.flatten(0, 1) for x in batches_input])
            read = {"rise": x, "fall": torch.relu(layer.rise(x))}
            return {n: read[n].T @ read[n] / len(x) for n in linear_modules_to_merge}

    named = {"_pretrained_": Tower(0), **experts}
    sets = dict(zip(experts, problem.batches, strict=True))
    pool = fusion_bench("modelpool").BaseModelPool(named, train_datasets=sets)
    pool.load_train_dataset = lambda name: pool._train_datasets[name]
    options = {"num_regmean_examples": 20, "exclude_param_names_regex": []}
    options |= {"reduce_non_diagonal_ratio": 0.95, "weight_transpose": True}
    same(problem, regmean_plus_plus(problem, **QUIET), state_of(Peer(**options).run(pool)))


def peer_information(problem: MergeProblem, flat: torch.Tensor) -> list[torch.Tensor]:
    """The peer's formula, for every input by itself: (d sum_y sqrt(p) log p)^2, p held fixed."""
    leaf, found = flat.clone().requires_grad_(), []
    for batch in problem.batches[0]:
        log_p = problem.logits(leaf, 0, batch).log_softmax(-1)
        (grad,) = torch.autograd.grad((log_p.detach().exp().sqrt() * log_p).sum(), leaf)
        found.append(grad.square())
    return found


@pytest.mark.parametrize("classes", [2, 4])
def test_the_peers_information_is_another_at_two_answers_ours_times_the_gap_of_the_roots(classes):
    """(sqrt p - sqrt(1 - p))^2 for each input: nothing where the expert is undecided."""
    problem = linear_problem(num_tasks=1, classes=classes, rows=1, dtype=torch.float32)
    flat, ratios = problem.vectors.expert("task0"), []
    for peer, batch in zip(peer_information(problem, flat), problem.batches[0], strict=True):
        one = MergeProblem(problem.vectors, [[batch]], problem.forward)
        ours = fisher_diagonal(one, flat, 0)
        roots = problem.logits(flat, 0, batch).softmax(-1)[0].sqrt()
        ratios.append((peer / ours).median())
        if classes == 2:
            near(peer, ours * (roots[0] - roots[1]).square())
    assert classes == 2 or sum(ratios) / len(ratios) < 0.9


@every_kind
@pytest.mark.parametrize("normalise", [True, False])
def test_fusion_benchs_fisher_merge_is_ours_given_the_same_information(kind, normalise):
    """With the floor in it: the peer would add one, we raise what is lower."""
    peer, problem = fusion_bench("method.fisher_merging.fisher_merging"), pair(kind)[0]
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]
    found = [fisher_diagonal(problem, e, n).clamp(min=1e-9) for n, e in enumerate(experts)]
    parts = parts_of(problem, experts)
    values = {name: [part[name] for part in parts] for name in problem.vectors.layout.names}
    options = {"normalize_fisher_weight": normalise, "minimal_fisher_weight": 0.0}
    options["fisher_scaling_coefficients"] = torch.ones(3) / 3
    found = peer.merging_with_fisher_weights(values, parts_of(problem, found), **options)
    same(problem, fisher(problem, floor=1e-9, normalise=normalise, **QUIET), found)


def layer_wise(made: list[nn.Module]):
    """FusionBench's module with a coefficient per task and tensor, unclamped as in its configs."""
    peer = fusion_bench("models.wrappers.layer_wise_fusion")
    base, *experts = (model.requires_grad_(True) for model in made)
    weights = peer.get_layer_wise_weights(len(experts), len(state_of(base)), 0.3)
    options = {"clamp_weights": False, "tie_weights": True, "strict": False}
    return peer.LayerWiseMergedModel(weights, base, experts, **options)


@every_kind
def test_adamergings_steps_are_those_of_fusion_benchs_loop(kind):
    peer = fusion_bench("method.adamerging.layer_wise_adamerging").LayerWiseAdaMergingAlgorithm
    from omegaconf import DictConfig

    problem, made = pair(kind)
    tasks = list(problem.vectors.tasks)

    class Adaptation(peer):
        modelpool = SimpleNamespace(model_names=tasks)

        def get_shuffled_test_loader_iter(self, task):
            return iter([(given(problem.batches[tasks.index(task)][0]),)])

        def compute_logits(self, module, images, task):
            return answer_of(module(images))

    config = {"optimizer": "adam", "lr": 1e-2, "max_steps": 6, "fabric": None}
    module = Adaptation(DictConfig(config)).test_time_adaptation(layer_wise(made))
    merged = adamerging(problem, epochs=6, lr=1e-2, **QUIET)
    assert (merged - task_arithmetic(problem)).abs().max() > 1e-3
    same(problem, merged, state_of(module.merge_and_unload()))


@pytest.mark.parametrize("mean_logit", [False, True])
def test_one_steps_gradient_is_fusionbenchs_with_either_entropy(mean_logit):
    """Its GPT-2 and Flan-T5 loops average the batch's logits before the same entropy."""
    entropy_loss = fusion_bench("method.adamerging.entropy_loss").entropy_loss
    problem, made = pair("linear", scale=0.3)
    module, losses = layer_wise(made), []
    module.merge_weights()
    for batches in problem.batches:
        logits = module(given(batches[0]))
        losses.append(entropy_loss(logits.mean(0, keepdim=True) if mean_logit else logits))
    sum(losses).backward()
    of_rows = entropy_of_mean_logit if mean_logit else entropy
    flat = task_arithmetic(problem).requires_grad_()
    ours = sum(
        batches[0].weight @ of_rows(problem.logits(flat, task, batches[0]))
        for task, batches in enumerate(problem.batches)
    )
    ours.backward()
    (slope,) = parts_of(problem, [flat.grad])
    grads = [[(slope[name] * row[name]).sum() for name in row] for row in parts_of(problem)]
    near(ours.detach(), sum(losses).detach())
    near(torch.tensor(grads), module.merge_weight.grad)


def test_surgery_takes_the_steps_of_fusionbenchs_adapters():
    wrapper = fusion_bench("models.surgery.surgerymodelwrapper").SurgeryModelWrapper
    problem, made = pair("linear", scale=0.3)
    ours = surgery(problem, steps=6, batch_size=6, lr=1e-3, seed=3, **QUIET)
    made[0].load_state_dict(problem.vectors.layout.unflatten(task_arithmetic(problem)))
    adapters = wrapper(made[0], list(problem.vectors.tasks), projection_dim=10)
    drawn = torch.rand(16, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    names = [f"feature_mapping_to_head_down_proj_{task}" for task in problem.vectors.tasks]
    downs = [getattr(adapters, name) for name in names]
    assert 0.2 < downs[0].weight.abs().max() <= 10**-0.5  # it draws from the same range
    for down in downs:
        down.weight.data = ((2 * drawn - 1) / 10**0.5).float()
    adam = torch.optim.Adam(adapters.collect_trainable_params(), lr=1e-3)

    def features(number: int, task: str):
        x = given(problem.batches[number][0])
        return adapters.compute_surgery_features(lambda model: model(x), task)[:2]

    for step in range(7):
        for number, task in enumerate(problem.vectors.tasks):
            batch, (found, plain) = problem.batches[number][0], features(number, task)
            if step == 6:
                assert (found - plain).abs().max() > 1e-3
                near(ours.logits(number, batch), found.detach())
                continue
            adam.zero_grad()
            expert = problem.logits(problem.vectors.expert(task), number, batch)
            torch.nn.functional.l1_loss(found, expert).backward()
            adam.step()


class Mlp(nn.Module):
    """Two linear layers with a bend between them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, hidden):
        return self.fc2(nn.functional.gelu(self.fc1(hidden)))


class Routable(nn.Module):
    """One block on seven tokens, and the mean over them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Mlp()])

    def forward(self, x):
        return self.layer[0](x.view(-1, 7, 6)).mean(1)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("reduce", [False, True])
def test_a_routed_mlp_is_fusion_benchs(layers, reduce):
    peer = fusion_bench("models.we_moe").WeightEnsemblingMoE
    torch.manual_seed(0)
    made, x = [Routable() for _ in range(4)], torch.randn(5, 7, 6)
    blocks = [deepcopy(model.layer[0]) for model in made]  # the peer routes what could be trained
    experts = dict(zip(TASKS, map(state_of, made[1:]), strict=False))
    problem = module_problem(made[0], experts, [[batch_of(x.flatten(1))] for _ in experts])
    ours = wemoe(problem, router_layers=layers, steps=10, lr=0.1, **QUIET)
    options = {"hidden_size": 6, "base_model": blocks[0], "expert_models": blocks[1:]}
    options |= {"init_lambda": 0.3, "batch_first": True}
    theirs = peer(**options, router_hidden_layers=layers, batch_reduce=reduce)
    router = ours.routers["layer.0"]
    linears = [module for module in theirs.gate.modules() if isinstance(module, nn.Linear)]
    for linear, matrix, bias in zip(linears, router.matrices, router.biases, strict=False):
        linear.weight.data, linear.bias.data = matrix.data, bias.data
    if not layers:
        theirs.gate.weight.data = router.biases[0].data
    with torch.no_grad():
        near(ours.answers(0, problem.batches[0][0], reduce=reduce), theirs(x).mean(1))
