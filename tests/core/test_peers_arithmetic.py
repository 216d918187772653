"""The same merges by mergekit, PEFT and FusionBench, and where theirs differ."""

import pytest
import torch
from helpers import linear_problem
from torch.testing import assert_close

from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.arithmetic import average, dare, task_arithmetic, thinned, ties
from divmerge_core.methods.masked import breadcrumbs, emr, tall_masks
from divmerge_core.methods.spherical import model_stock, multi_slerp, slerp, stock_ratio

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WEIGHTS = [1.0, 0.5, 2.0]


def toy(num_tasks: int = 3, **options) -> MergeProblem:
    """Five tensors in float32 whose sizes are multiples of ten: shares come out even."""
    return linear_problem(
        num_tasks=num_tasks, features=10, classes=10, dtype=torch.float32, **options
    )


def states(problem: MergeProblem) -> list[dict[str, torch.Tensor]]:
    """State dicts of the base and of every expert."""
    vectors = problem.vectors
    flats = [vectors.base, *map(vectors.expert, vectors.tasks)]
    return [vectors.layout.unflatten(flat) for flat in flats]


def changes(problem: MergeProblem) -> list[dict[str, torch.Tensor]]:
    """Every task vector as a state dict."""
    return [problem.vectors.layout.unflatten(row) for row in problem.vectors.deltas]


def draws(problem: MergeProblem, seed: int = 0) -> list[torch.Tensor]:
    """The uniform numbers that DARE compares with its rate: a vector per task."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(len(row), generator=generator) for row in problem.vectors.deltas]


# --- mergekit -------------------------------------------------------------------------------------


def by_mergekit(problem: MergeProblem, method: str, *, base: bool = True, **parameters):
    api = pytest.importorskip("mergekit.merge_methods.api")
    options = {"base": 0} if base else {}
    models = states(problem) if base else states(problem)[1:]
    merged = api.merge_state_dicts(models, method, parameters=parameters, **options)
    return problem.vectors.layout.flatten(merged)


def test_mergekits_linear_is_the_average():
    problem = toy()
    assert_close(by_mergekit(problem, "linear", base=False, weight=1.0), average(problem), **CLOSE)


def test_mergekits_task_arithmetic_is_ours():
    problem = toy()
    found = by_mergekit(problem, "task_arithmetic", weight=0.3)
    assert_close(found, task_arithmetic(problem), **CLOSE)


@pytest.mark.parametrize(("normalize", "combine"), [(True, "mean"), (False, "sum")])
def test_mergekits_ties_trims_tensors_and_weighs_before_the_election(normalize, combine):
    problem, scale = toy(), 0.7
    options = {"weight": WEIGHTS, "density": 0.3, "normalize": normalize, "lambda": scale}
    found = by_mergekit(problem, "ties", **options)
    ours = {"keep": 0.3, "scale": scale, "coeffs": WEIGHTS, "combine": combine}
    assert_close(ties(problem, trim="tensor", weights="before", **ours), found, **CLOSE)
    assert not torch.allclose(ties(problem, trim="global", weights="before", **ours), found)
    assert not torch.allclose(ties(problem, trim="tensor", weights="after", **ours), found)


def test_where_votes_cancel_mergekit_elects_plus_fusion_bench_the_majority_and_we_nothing():
    """Sums of 0, -2 and -2: mergekit takes the 1, FusionBench the -1 of the first entry."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    peer = pytest.importorskip("fusion_bench.method.ties_merging.ties_merging_utils")
    base, first, second = torch.zeros(3), torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, -1, -1])
    models, options = [{"w": base}, {"w": first}, {"w": second}], {"weight": 1.0, "density": 1.0}
    found = api.merge_state_dicts(models, "ties", parameters=options, base=0)["w"]
    assert found.tolist() == [1, -1, -1]
    theirs = peer.ties_merging(torch.stack([first, second]), reset_thresh=0.99, merge_func="mean")
    assert theirs.tolist() == [-1, -1, -1]
    vectors = TaskVectors.from_states(models[0], {"a": models[1], "b": models[2]})
    ours = ties(MergeProblem(vectors, [[], []], lambda parameters, pairs: []), keep=1.0)
    assert ours.tolist() == [0, -1, -1]


def give_mergekit_our_draws(problem: MergeProblem, drop: float, monkeypatch) -> None:
    """It asks for the entries that stay tensor by tensor, and within a tensor task by task."""
    stays = [row >= drop for row in draws(problem)]
    parts = [row[start:stop] for start, stop in problem.vectors.layout.bounds for row in stays]
    queue = iter(parts)
    monkeypatch.setattr(
        torch, "bernoulli", lambda chance: next(queue).view_as(chance).to(chance.dtype)
    )


@pytest.mark.parametrize(("rescale", "ours"), [(True, "l1"), (False, "none")])
def test_mergekits_dare_is_ours_on_the_same_draws(rescale, ours, monkeypatch):
    problem = toy()
    give_mergekit_our_draws(problem, 0.6, monkeypatch)
    found = by_mergekit(problem, "dare_linear", weight=0.3, density=0.4, rescale=rescale)
    assert_close(dare(problem, drop=0.6, rescale=ours), found, **CLOSE)


def test_mergekits_dare_ties_is_ours_without_a_second_trim(monkeypatch):
    problem = toy()
    give_mergekit_our_draws(problem, 0.6, monkeypatch)
    found = by_mergekit(
        problem, "dare_ties", weight=1.0, density=0.4, normalize=True, **{"lambda": 0.5}
    )
    options = {"then": "ties", "rescale": "l1", "scale": 0.5}
    assert_close(dare(problem, drop=0.6, keep=1.0, **options), found, **CLOSE)
    assert not torch.allclose(dare(problem, drop=0.6, keep=0.2, **options), found)


@pytest.mark.parametrize(("density", "gamma"), [(0.2, 0.1), (0.5, 0.3), (0.1, 0.0)])
def test_mergekits_breadcrumbs_are_ours(density, gamma):
    problem = toy()
    found = by_mergekit(problem, "breadcrumbs", weight=0.4, density=density, gamma=gamma)
    assert_close(breadcrumbs(problem, keep=density, remove=gamma, scale=0.4), found, **CLOSE)


def test_where_mergekits_breadcrumbs_lose_a_small_tensor_ours_keep_an_entry():
    problem = linear_problem(features=4, dtype=torch.float32)  # biases of four
    found = by_mergekit(problem, "breadcrumbs", weight=0.4, density=0.2, gamma=0.1)
    start, stop = problem.vectors.layout.bounds[2]
    assert torch.equal(found[start:stop], problem.vectors.base[start:stop])
    ours = breadcrumbs(problem, keep=0.2, remove=0.1, scale=0.4)
    assert not torch.equal(ours[start:stop], problem.vectors.base[start:stop])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.003, 0.3, 3.0])  # almost parallel to almost orthogonal
def test_mergekits_slerp_is_ours(t, scale):
    problem = toy(num_tasks=2, scale=scale)
    _, first, second = states(problem)
    api = pytest.importorskip("mergekit.merge_methods.api")
    found = api.merge_state_dicts([first, second], "slerp", parameters={"t": t}, base=0)
    assert_close(slerp(problem, t=t), problem.vectors.layout.flatten(found), **CLOSE)


def test_peers_take_the_angle_to_a_zero_tensor_for_a_right_one():
    """Halfway from zero to (4, 8): we say (2, 4), they sin 45 degrees times (4, 8)."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    peer = pytest.importorskip("fusion_bench.method.slerp.slerp_utils")
    zero, moved = torch.zeros(2), torch.tensor([4.0, 8.0])
    found = api.merge_state_dicts(
        [{"w": zero}, {"w": moved}], "slerp", parameters={"t": 0.5}, base=0
    )
    assert_close(found["w"], moved * 0.5**0.5)
    assert_close(peer.slerp(0.5, zero, moved), moved * 0.5**0.5)
    vectors = TaskVectors.from_states({"w": zero}, {"a": {"w": zero}, "b": {"w": moved}})
    assert_close(slerp(MergeProblem(vectors, [[], []], lambda parameters, pairs: [])), moved / 2)


@pytest.mark.parametrize("base", [True, False])
def test_mergekits_multi_slerp_is_ours(base):
    problem = toy()
    found = by_mergekit(problem, "multislerp", base=base, weight=WEIGHTS)
    ours = multi_slerp(problem, weights=WEIGHTS, origin="base" if base else "zero")
    assert_close(ours, found, **CLOSE)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("num_tasks", [2, 3])
def test_mergekits_model_stock_is_ours(num_tasks, filter_wise):
    problem = toy(num_tasks)
    found = by_mergekit(problem, "model_stock", filter_wise=filter_wise)
    assert_close(model_stock(problem, filter_wise=filter_wise), found, **CLOSE)


def test_mergekit_takes_short_parallel_task_vectors_for_orthogonal_ones():
    """Task vectors 1e-5 long with a cosine of 1: we go all the way, mergekit next to nowhere."""
    api = pytest.importorskip("mergekit.merge_methods.api")
    base, moved = torch.zeros(4), torch.full((4,), 5e-6)
    models = [{"w": base}, {"w": moved}, {"w": moved.clone()}]
    found = api.merge_state_dicts(models, "model_stock", base=0)["w"]
    vectors = TaskVectors.from_states(models[0], {"a": models[1], "b": models[2]})
    ours = model_stock(MergeProblem(vectors, [[], []], lambda parameters, pairs: []))
    assert_close(ours, moved, rtol=1e-5, atol=0)
    assert (found < 1e-3 * moved).all()


# --- PEFT -----------------------------------------------------------------------------------------


def test_pefts_ties_trims_tensors_and_weighs_after_the_election():
    peft = pytest.importorskip("peft.utils.merge_utils")
    problem = toy()
    parts, start = changes(problem), states(problem)[0]
    found = {
        name: start[name] + peft.ties([part[name] for part in parts], torch.tensor(WEIGHTS), 0.3)
        for name in start
    }
    ours = ties(problem, keep=0.3, coeffs=WEIGHTS, trim="tensor", weights="after")
    assert_close(ours, problem.vectors.layout.flatten(found), **CLOSE)


# --- FusionBench ----------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_fusion_benchs_ties_trims_globally_and_keeps_one_entry_more(combine):
    peer = pytest.importorskip("fusion_bench.method.ties_merging.ties_merging_utils")
    problem = toy()
    size = problem.vectors.layout.size
    total = peer.ties_merging(problem.vectors.deltas, reset_thresh=0.2, merge_func=combine)
    found = problem.vectors.base + 0.3 * total
    one_more = (round(0.2 * size) + 1) / size
    assert_close(ties(problem, keep=one_more, scale=0.3, combine=combine), found, **CLOSE)
    assert not torch.allclose(ties(problem, keep=0.2, scale=0.3, combine=combine), found)


def test_fusion_benchs_dare_is_ours_on_the_same_draws(monkeypatch):
    peer = pytest.importorskip("fusion_bench.method.dare.utils")
    problem, drop = toy(), 0.5
    queue = iter(draws(problem))
    monkeypatch.setattr(torch, "rand_like", lambda row: next(queue))
    generator = torch.Generator().manual_seed(0)
    for row in problem.vectors.deltas:
        theirs = row.clone()
        peer.param_random_drop_(theirs, drop, rescale=True)
        ours = thinned(row, drop, "expected", problem.vectors.layout, generator)
        assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_fusion_benchs_slerp_is_ours(t):
    peer = pytest.importorskip("fusion_bench.method.slerp.slerp")
    problem = toy(num_tasks=2)
    _, first, second = states(problem)
    found = problem.vectors.layout.flatten(peer.slerp_on_state_dicts(t, first, second))
    assert_close(slerp(problem, t=t), found, **CLOSE)


def test_fusion_bench_averages_angles_where_we_average_cosines():
    peer = pytest.importorskip("fusion_bench.method.model_stock.model_stock")
    angles = torch.tensor([0.0, 90.0, 90.0])  # of three experts, two of them parallel
    ratio = peer.compute_ratio({"w": angles.mean().item()}, k=3)["w"]  # of 60 degrees
    assert_close(ratio, 3 * 0.5 / (1 + 2 * 0.5))
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[:, None]
    assert_close(stock_ratio(rows).item(), 3 / 3 / (1 + 2 / 3))  # of the cosine 1/3


def test_fusion_benchs_model_stock_is_ours_for_two_experts():
    peer = pytest.importorskip("fusion_bench.method.model_stock.model_stock")
    problem = toy(num_tasks=2)
    base, first, second = states(problem)
    ratios = peer.compute_ratio(peer.compute_angle(first, second, base), k=2)
    found = problem.vectors.layout.flatten(peer.merge_weights(first, second, base, ratios))
    assert_close(model_stock(problem), found, **CLOSE)


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_fusion_benchs_masks_are_ours(threshold):
    peer = pytest.importorskip("fusion_bench.method.tall_mask.utils")
    vectors = toy().vectors
    base = torch.zeros_like(vectors.base)  # so that no rounding of weights blurs the comparison
    found = peer.generate_task_masks(
        vectors.deltas, vectors.deltas, base, tall_mask_lambda=threshold
    )
    assert torch.equal(tall_masks(vectors.deltas, threshold), found)


def test_fusion_benchs_emr_is_ours_with_the_norm_per_tensor():
    peer = pytest.importorskip("fusion_bench.method.emr_merging.utils")
    problem = toy()
    unified, masks, scales = peer.emr_merge(changes(problem))
    found, layout = emr(problem, norm="tensor"), problem.vectors.layout
    assert_close(found.unified, layout.flatten(unified), **CLOSE)
    assert_close(found.scales, scales, **CLOSE)
    for task in range(3):
        parts = {name: mask[task].float() for name, mask in masks.items()}
        assert torch.equal(found.masks[task], layout.flatten(parts).bool())
