"""Methods in subspaces: identities, cases by hand, slow twins, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from comparisons import adam, by_task, changes, inputs_of
from helpers import QUIET, frozen, linear_problem, normal, problem_of, refuses
from torch.func import functional_call
from torch.testing import assert_close

from divmerge_core.merging.layer_inputs import layer_inputs
from divmerge_core.merging.problem import Diverged, MergeProblem
from divmerge_core.methods import essential as module
from divmerge_core.methods.arithmetic import task_arithmetic
from divmerge_core.methods.essential import essential, essential_factors, fused, levelled
from divmerge_core.methods.shifts import doge, doge_gradient, shared_basis, wudi, wudi_gradient
from divmerge_core.methods.spectral import orthogonalised
from divmerge_core.methods.subspace import esm, esm_pp


def of_matrices(deltas: torch.Tensor, **others: torch.Tensor) -> MergeProblem:
    """A problem of one matrix per task [T, M, K] and further tensors, around a base of ones."""
    tensors = {"weight": deltas, **others}
    shapes = {name: tuple(every.shape[1:]) for name, every in tensors.items()}
    rows = torch.cat([every.flatten(1) for every in tensors.values()], dim=1)
    return problem_of(*rows, base=1.0, **shapes)


# --- essential directions
def test_truncation_loses_the_energy_left_out_and_less_than_singular_vectors():
    """Directions that no input excites have no energy at all."""
    delta, x = normal(5, 7), normal(20, 7, seed=1) * torch.logspace(-1, 1, 7, dtype=torch.float64)
    basis, energy = essential(delta, x.T @ x)
    assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    for rank in range(6):  # at 5 nothing is lost
        kept = basis[:, :rank] @ basis[:, :rank].T @ delta
        cut = left[:, :rank] * values[:rank] @ right[:rank]
        lost, more = ((x @ (delta - near).T).square().sum() for near in (kept, cut))
        assert_close(lost, energy[rank:].sum())
        assert rank in (0, 5) or lost < more
    _, energy = essential(delta, x[:2].T @ x[:2])
    assert (energy[:2] > 0).all() and (energy[2:] == 0).all()


def test_inputs_of_equal_strength_make_them_the_left_singular_vectors():
    delta = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    basis, energy = essential(delta, torch.eye(3, dtype=torch.float64))
    assert_close(energy, torch.tensor([9.0, 4.0], dtype=torch.float64))
    assert_close(basis.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


def test_a_direction_that_is_excited_alone_is_weighed_by_one():
    """One token: of two directions one has energy, u along D x, and D's row along it is kept."""
    delta, x = normal(4, 5), normal(1, 5, seed=1)
    towards = (x @ delta.T / (x @ delta.T).norm()).T  # [M, 1]
    left, right = essential_factors(delta, x.T @ x, 2)
    assert_close(left @ right, towards @ towards.T @ delta)
    merged = fused([(left, right)], delta.norm()[None], power=0.0)
    assert_close(merged, towards @ towards.T @ delta)


def test_levelling_takes_the_mean_of_the_singular_values_that_are_not_zero():
    given = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    assert_close(levelled(given), torch.diag(torch.tensor([2.0, 2.0, 0.0])))
    assert_close(levelled(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_layers_are_polarised_against_the_mean_of_their_kind():
    """Norms 1 and 3 have the mean 2: squared shares 1/4 and 9/4. The head is alone of its kind."""
    layers = {"block.0.up": 1.0, "block.1.up": 3.0, "head": 7.0}
    given = {name: torch.full((1, 1), size) for name, size in layers.items()}
    found = module.polarised_layers(given, 2.0)
    assert [m.item() for m in found.values()] == pytest.approx([0.25, 6.75, 7.0])
    assert [m.item() for m in module.polarised_layers(given, 0.0).values()] == [1.0, 3.0, 7.0]


# --- esm
def slow_layer(deltas, inputs, power: float) -> np.ndarray:
    """ESM of one layer, from singular vectors of the outputs themselves."""
    lefts, rights, norms = [], [], [np.linalg.norm(delta) for delta in deltas]
    for delta, x in zip(deltas, inputs, strict=True):
        _, sizes, rows = np.linalg.svd(x @ delta.T, full_matrices=False)
        rank = max(1, len(delta) // len(deltas))
        directions, energy = rows[:rank].T, sizes[:rank] ** 2 / (len(x) - 1)
        weight = (energy / energy.mean()) ** 0.15
        weight /= weight.mean()
        lefts.append(directions @ np.diag(weight))
        strength = (np.linalg.norm(delta) / np.mean(norms)) ** power
        rights.append(strength * np.diag(weight) @ directions.T @ delta)
    left, right = np.hstack(lefts), np.vstack(rights)
    columns = np.sqrt((right**2).sum(axis=0))
    right = right @ np.diag((columns / columns.mean()) ** power)
    return slow_level(left) @ slow_level(right)


def slow_level(matrix: np.ndarray) -> np.ndarray:
    """mean(s) M (M^T M)^(-1/2), or its transposed form where M is wide: no singular vectors."""
    if matrix.shape[0] < matrix.shape[1]:
        return slow_level(matrix.T).T
    squares, axes = np.linalg.eigh(matrix.T @ matrix)
    return np.sqrt(squares).mean() * matrix @ axes @ np.diag(squares**-0.5) @ axes.T


@pytest.mark.parametrize(
    ("num_tasks", "power", "scaling"),
    [(1, 0.0, "layer"), (1, 1.0, "all"), (2, 2.0, "layer"), (3, 2.0, "all")],
)
def test_esm_is_the_slow_one(num_tasks, power, scaling):
    problem = linear_problem(num_tasks=num_tasks)
    found = changes(problem, esm(problem, scale=1.5, power=power, scaling=scaling, **QUIET))
    names = [name for name in found if name.endswith("weight")]
    x = {task: [inputs_of(problem, task)] for task in range(num_tasks)}
    for task, streams in x.items():
        expert = problem.vectors.layout.unflatten(problem.vectors.expert(f"task{task}"))
        first, second, shift, *_ = expert.values()
        streams.append(streams[0] @ first.T)
        streams.append(streams[1] @ second.T + shift)
    expected = {}
    for number, name in enumerate(names):
        deltas = list(by_task(problem, name).numpy())
        inputs = [x[task][number].numpy() for task in range(num_tasks)]
        expected[name] = slow_layer(deltas, inputs, power if scaling == "all" else 0.0)
    kind = [np.linalg.norm(expected[name]) for name in names[1:]]
    for name, norm in zip(names[1:], kind, strict=True):
        expected[name] = expected[name] * (norm / np.mean(kind)) ** power
    for name in names:
        assert_close(found[name], 1.5 * torch.from_numpy(expected[name]), rtol=1e-7, atol=1e-9)
    for name in set(found) - set(names):
        assert_close(found[name], by_task(problem, name).mean(0))


def test_seeds_change_the_draw_of_inputs_alone():
    problem = linear_problem(num_tasks=2, batches=8, rows=5)
    every = [esm(problem, inputs=40, seed=seed, **QUIET) for seed in (0, 1)]
    assert_close(*every)
    assert not torch.allclose(*(esm(problem, inputs=10, seed=s, **QUIET) for s in (0, 1)))


@pytest.mark.parametrize(("inputs", "batches"), [(1, 1), (5, 1), (6, 2), (40, 8), (1000, 8)])
def test_whole_batches_are_drawn_until_they_hold_enough_inputs(inputs, batches):
    problem = linear_problem(num_tasks=2, batches=8, rows=5)
    few = module.subsampled(problem, inputs, seed=3)
    assert [len(every) for every in few.batches] == [batches] * 2
    for every, source in zip(few.batches, problem.batches, strict=True):
        assert len({id(b) for b in every} & {id(b) for b in source}) == batches


def test_few_tokens_idle_experts_and_inputs_that_do_not_reach_a_layer_leave_finite_merges():
    problem, name = linear_problem(num_tasks=2, batches=1, rows=1), "encoder.layer.0.dense.weight"
    merged = esm(problem, **QUIET)
    assert torch.isfinite(merged).all()
    assert_close(esm(problem.select(["task1", "task0"]), **QUIET), merged)
    assert torch.linalg.matrix_rank(changes(problem, merged)[name]) == 2  # a direction a task
    problem = linear_problem(num_tasks=2)
    idle = frozen(problem, slice(1, 2), slice(1, None))
    found = changes(idle, esm(idle, power=0.0, **QUIET))[name]
    assert torch.isfinite(found).all()
    assert torch.linalg.matrix_rank(found) == 3  # of 6: its half of T = 2
    still = [[replace(b, inputs={"x": 0 * b.inputs["x"]}) for b in bs] for bs in problem.batches]
    found = changes(problem, esm(replace(problem, batches=still), **QUIET))
    assert not found["embeddings.weight"].any() and found["encoder.layer.1.dense.weight"].any()


def test_matrices_that_are_no_linear_layers_are_merged_as_by_tsv_m(toy_problem):
    found = changes(toy_problem, esm(toy_problem, **QUIET))
    for name, delta in found.items():
        every = by_task(toy_problem, name)
        if "embeddings" in name and delta.ndim == 2:
            assert_close(delta, orthogonalised(every), rtol=1e-4, atol=1e-5)
        elif delta.ndim == 1:
            assert_close(delta, every.mean(0), rtol=1e-4, atol=1e-5)
        else:
            assert delta.any()


# --- esm_pp
@pytest.mark.parametrize(("rank", "num_tasks"), [(1, 2), (2, 3), (32, 3)])
def test_routing_is_input_by_input_and_layer_by_layer(rank, num_tasks):
    """Against a loop over inputs through the three maps of the linear model."""
    problem = linear_problem(num_tasks=num_tasks)
    routed = esm_pp(problem, rank=rank, **QUIET)
    merged = list(problem.vectors.layout.unflatten(routed.flat).values())
    steps = [(merged[0], None), (merged[1], merged[2]), (merged[3], merged[4])]
    names = [name for name in problem.vectors.layout.names if name.endswith("weight")]
    experts = [problem.vectors.expert(task) for task in problem.vectors.tasks]
    seen = [layer_inputs(problem, expert, task) for task, expert in enumerate(experts)]
    taken = set()
    for task, batches in enumerate(problem.batches):
        for row, found in zip(batches[0].inputs["x"], routed.logits(task, batches[0]), strict=True):
            for name, (weight, bias) in zip(names, steps, strict=True):
                cosines = [row @ s[name].total / s[name].total.norm() for s in seen]
                nearest = int(np.argmax(cosines))
                gap = by_task(problem, name)[nearest] - changes(problem, routed.flat)[name]
                directions = essential(gap, seen[nearest][name].gram)[0][:, :rank]
                row = (weight + directions @ directions.T @ gap) @ row
                row = row if bias is None else row + bias
                taken.add(nearest)
            assert_close(found, row)
    assert len(taken) > 1


def test_a_detour_goes_by_the_mean_over_tokens_without_padding():
    """The second token points elsewhere and is padding in the second input alone."""
    eye = torch.eye(2)
    detour = module.Detour(eye, torch.ones(2, 1, 1), torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]]))
    x = torch.tensor([[[1.0, 1.0], [0.0, 5.0]], [[3.0, 1.0], [0.0, 5.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert detour(x, mask).flatten().tolist() == [10.0, 50.0, 3.0, 0.0]
    assert detour(x, None).flatten().tolist() == [10.0, 50.0, 10.0, 50.0]


def test_padding_changes_no_answer(toy_problem):
    routed, batch = esm_pp(toy_problem, **QUIET), toy_problem.batches[0][0]
    wider = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in batch.inputs.items()}
    found = routed.logits(0, replace(batch, inputs=wider))
    assert_close(found, routed.logits(0, batch), rtol=1e-4, atol=1e-5)


def test_detours_have_no_idle_direction_and_belong_to_the_layers_asked_for(problem):
    routed = esm_pp(linear_problem(num_tasks=2, batches=1, rows=1), **QUIET)
    for detour in routed.detours.values():
        assert torch.linalg.matrix_rank(detour.left).tolist() == [1, 1]
    weights = [name for name in problem.vectors.layout.names if name.endswith("weight")]
    assert list(esm_pp(problem, **QUIET).detours) == weights
    assert list(esm_pp(problem, layers=r"layer\.1", **QUIET).detours) == weights[2:]


def test_the_routed_model_stores_one_model_and_each_layers_factors_and_prototypes():
    """float64: N = 36 + 42 + 28 parameters; two tasks, ways of rank 2, six features everywhere."""
    problem = linear_problem(num_tasks=2)
    ways = [2 * (6 + 2 * (width + 6)) for width in (6, 6, 4)]
    assert esm_pp(problem, rank=2, **QUIET).nbytes == 8 * (36 + 42 + 28 + sum(ways))
    one = esm_pp(problem, rank=2, layers=r"layer\.1", **QUIET)
    assert one.nbytes == 8 * (36 + 42 + 28 + ways[-1])


def test_a_layer_that_no_input_passes_has_no_detour_and_is_merged_as_by_tsv_m():
    problem = linear_problem(num_tasks=2)
    names = [name for name in problem.vectors.layout.names if "layer.1" in name]
    model = problem.module
    both = torch.nn.Sequential(model.embeddings, model.encoder.layer[0]["dense"])

    def forward(parameters, pairs):
        """Without the last layer."""
        first, second, shift, *_ = parameters.values()
        own = {"0.weight": first, "1.weight": second, "1.bias": shift}
        return [functional_call(both, own, batch.inputs["x"]) for _, batch in pairs]

    idle = replace(problem, forward=forward)
    routed = esm_pp(idle, **QUIET)
    assert names[0] not in routed.detours and len(routed.detours) == 2
    expected = orthogonalised(by_task(problem, names[0]))
    assert_close(changes(problem, routed.flat)[names[0]], expected)
    assert torch.isfinite(routed.logits(0, idle.batches[0][0])).all()


def test_no_hook_stays_behind_where_the_model_fails(problem):
    routed = esm_pp(problem, **QUIET)
    with pytest.raises(RuntimeError):
        routed.logits(0, replace(problem.batches[0][0], inputs={"x": torch.ones(2, 3)}))
    assert not any(layer._forward_hooks for layer in problem.module.modules())


# --- doge
def doge_loss(deltas, coeffs, shift) -> torch.Tensor:
    """Written out: a loop over experts and rows."""
    merged = sum(c * (delta + shift) for c, delta in zip(coeffs, deltas, strict=True))
    pairs = (pair for delta in deltas for pair in zip(delta, merged, strict=True))
    return sum((row @ (row - near)) ** 2 for row, near in pairs)


def autograd_of(loss):
    return lambda at: torch.autograd.grad(loss(at.requires_grad_()), at)[0]


def test_doges_gradient_is_autograds_and_has_no_part_in_the_shared_directions():
    deltas, shift, coeffs = normal(3, 4, 5), normal(4, 5, seed=1), normal(3, seed=2).abs()
    found = doge_gradient(deltas, coeffs, deltas.new_zeros(4, 0))(shift)
    assert_close(found, autograd_of(lambda at: doge_loss(deltas, coeffs, at))(shift.clone()))
    deltas = normal(3, 12, 18)
    shared = shared_basis(deltas, 6)
    assert shared.shape == (12, 2)
    assert_close(shared.T @ shared, torch.eye(2, dtype=torch.float64))
    found = doge_gradient(deltas, torch.ones(3, dtype=torch.float64), shared)(normal(12, 18))
    assert found.norm() > 1 and (shared.T @ found).abs().max() < 1e-12 * found.norm()


def test_shared_directions_are_those_that_two_experts_have_in_common():
    """Both change outputs 0, each one more of its own: with two singular vectors each, 0 leads."""
    deltas = torch.zeros(2, 4, 4, dtype=torch.float64)
    deltas[0, 0, 0], deltas[0, 1, 1], deltas[1, 0, 2], deltas[1, 2, 3] = 3, 2, 2, 3
    found = shared_basis(deltas, 4)
    assert_close(found.abs(), torch.eye(4, dtype=torch.float64)[:, :1])


@pytest.mark.parametrize("num_tasks", [7, 9])
def test_where_experts_outnumber_directions_none_is_shared(num_tasks):
    assert shared_basis(normal(num_tasks, 6, 8), 6).shape == (6, 0)
    merged = doge(of_matrices(normal(num_tasks, 6, 8)), steps=3, **QUIET)
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("units", ["relative", "absolute"])
def test_doge_is_the_slow_one(units):
    deltas = 0.1 * normal(2, 12, 13)
    problem = of_matrices(deltas)
    merged = changes(problem, doge(problem, eta=0.5, lr=0.02, units=units, steps=20, **QUIET))
    unit = deltas.square().mean().sqrt() if units == "relative" else torch.tensor(1.0)
    norms = torch.stack([delta.norm() for delta in deltas])
    coeffs = 0.5 * (norms.mean() if units == "relative" else 1.0) / norms
    left = torch.cat([torch.linalg.svd(delta)[0][:, :6] for delta in deltas], dim=1)
    shared = torch.linalg.svd(left)[0][:, :2]
    off = torch.eye(12, dtype=torch.float64) - shared @ shared.T
    slope = autograd_of(lambda at: doge_loss(deltas / unit, coeffs, at))
    shift = unit * adam(torch.zeros(12, 13).double(), lambda at: off @ slope(at), 20, 0.02)
    cuts = [delta.abs().flatten().sort(descending=True).values[46] for delta in deltas]
    expected = sum(
        c * (d + shift.detach()) * (d.abs() >= cut)
        for c, d, cut in zip(coeffs, deltas, cuts, strict=True)
    )
    assert_close(merged["weight"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [doge, lambda p, **o: wudi(p, lr=0.03, units="relative", **o)])
def test_in_relative_units_the_merge_grows_with_the_experts(method):
    deltas = normal(3, 6, 7)
    once, tiny = (method(of_matrices(d), steps=20, **QUIET) - 1 for d in (deltas, 1e-4 * deltas))
    assert_close(tiny, 1e-4 * once, rtol=1e-5, atol=1e-9)


def test_doge_leaves_embeddings_and_biases_and_counts_entries_over_all_matrices():
    """One matrix may hold all of the largest half, so that the other stays."""
    extra = {"token_embeddings": normal(2, 4, 3), "wte.weight": normal(2, 4, 3)}
    problem = of_matrices(normal(2, 4, 5), **extra, bias=normal(2, 6, seed=1))
    found = changes(problem, doge(problem, steps=2, **QUIET))
    assert found.pop("weight").any()
    assert not any(tensor.any() for tensor in found.values())
    problem = of_matrices(100 * normal(2, 4, 5), other=normal(2, 4, 5))
    found = changes(problem, doge(problem, keep=0.2, steps=2, **QUIET))
    assert found["weight"].any() and not found["other"].any()
    with refuses("doge merges matrices that are no embeddings; .* none"):
        doge(of_matrices(normal(2, 3)), **QUIET)


def test_an_expert_without_a_delta_adds_nothing():
    deltas = normal(2, 6, 7)
    deltas[1] = 0
    found = doge(of_matrices(deltas), steps=0, **QUIET) - 1
    shared = doge(of_matrices(deltas[:1]), eta=0.15, steps=0, **QUIET) - 1  # half the mean norm
    assert_close(found, shared)
    assert torch.isfinite(doge(of_matrices(deltas), steps=5, **QUIET)).all()
    deltas = normal(3, 4, 5)
    deltas[1] = 0
    found = wudi(of_matrices(deltas), steps=20, **QUIET)
    assert_close(found, wudi(of_matrices(deltas[[0, 2]]), steps=20, **QUIET))


# --- wudi
def wudi_loss(deltas, merged) -> torch.Tensor:
    return sum(((merged - d) @ d.T).square().sum() / d.square().sum() for d in deltas)


def test_wudis_gradient_is_autograds_and_vanishes_at_the_least_squares_solution():
    """sum_t D_t G_t times the inverse of sum_t G_t, with G_t = D_t^T D_t / |D_t|^2."""
    deltas, shift = normal(3, 4, 5), normal(4, 5, seed=1)
    expected = autograd_of(lambda at: wudi_loss(deltas, deltas.sum(0) + at))(shift.clone())
    assert_close(wudi_gradient(deltas)(shift), expected)
    grams = [d.T @ d / d.square().sum() for d in deltas]
    best = sum(d @ g for d, g in zip(deltas, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    assert wudi_gradient(deltas)(best - deltas.sum(0)).abs().max() < 1e-10


def test_wudi_of_experts_that_read_different_inputs_is_their_sum():
    """One expert alone among them: the fit starts where its gradient is zero."""
    deltas = torch.zeros(2, 3, 8, dtype=torch.float64)
    deltas[0, :, :4], deltas[1, :, 4:] = normal(3, 4), normal(3, 4, seed=1)
    problem, alone = of_matrices(deltas), linear_problem(num_tasks=1, dtype=torch.float32)
    merged = wudi(problem, lr=0.1, units="relative", steps=20, **QUIET)
    assert_close(merged, task_arithmetic(problem, scale=1.0))
    for units in ("relative", "absolute"):
        merged = wudi(alone, lr=0.1, units=units, steps=20, **QUIET)
        assert_close(merged, alone.vectors.expert("task0"))


@pytest.mark.parametrize("units", ["relative", "absolute"])
def test_wudi_is_the_slow_one(units):
    deltas = 0.1 * normal(3, 4, 5)
    problem = of_matrices(deltas)
    merged = changes(problem, wudi(problem, lr=0.02, units=units, steps=20, **QUIET))["weight"]
    unit = deltas.square().mean().sqrt() if units == "relative" else torch.tensor(1.0)
    slope = autograd_of(lambda at: wudi_loss(deltas / unit, at))
    expected = unit * adam(deltas.sum(0) / unit, slope, 20, 0.02).detach()
    assert_close(merged, expected, rtol=1e-6, atol=1e-9)
    assert wudi_loss(deltas, merged) < wudi_loss(deltas, deltas.sum(0))


def test_wudi_starts_at_the_sum_of_matrices_and_takes_the_mean_of_the_rest():
    extra = {"embeddings": normal(2, 4, 3), "bias": normal(2, 6), "kernel": normal(2, 2, 2, 2)}
    problem = of_matrices(normal(2, 4, 5), **extra)
    found = changes(problem, wudi(problem, steps=0, **QUIET))
    for name, delta in found.items():
        every = by_task(problem, name)
        assert_close(delta, every.sum(0) if delta.ndim == 2 else every.mean(0))


def test_wudi_of_linear_layers_leaves_all_else_at_the_base(toy_problem):
    options = {"units": "relative", "lr": 0.02, "steps": 5, **QUIET}
    found = changes(toy_problem, wudi(toy_problem, scope="linear", **options))
    everything = changes(toy_problem, wudi(toy_problem, **options))
    linear = [n for n, d in found.items() if d.ndim == 2 and "embeddings" not in n]
    assert 0 < len(linear) < sum(delta.ndim == 2 for delta in found.values())
    for name, delta in found.items():
        expected = everything[name] if name in linear else torch.zeros_like(delta)
        assert_close(delta, expected, rtol=0, atol=0)
        assert everything[name].any()


def test_wudi_of_linear_layers_needs_a_module_that_has_some(problem):
    for network, message in (
        (None, "wudi looks inside the model: give MergeProblem its"),
        (torch.nn.ReLU(), "wudi with scope='linear' .*take scope='matrices'"),
    ):
        with refuses(message):
            wudi(replace(problem, module=network), scope="linear", **QUIET)


# --- fits
@pytest.mark.parametrize(("method", "units"), [(doge, "relative"), (wudi, "absolute")])
def test_a_fit_that_runs_away_or_stops_being_finite_says_where(method, units):
    """Adam's first step moves every entry by lr, here a thousand times a task vector's length."""
    deltas, options = normal(2, 4, 5), {"units": units, "steps": 20, **QUIET}
    lr = 1000 * deltas.flatten(1).norm(dim=1).max().item()
    expected = f"{method.__name__}: after step 0 in weight the parameters are .* over 100 times"
    with pytest.raises(Diverged, match=rf"{expected} .*; lower lr \(now {lr}\)"):
        method(of_matrices(deltas), lr=lr, **options)
    with pytest.raises(Diverged, match=expected):
        method(of_matrices(deltas), lr=1e300, **options)


@pytest.mark.parametrize("method", [doge, wudi])
def test_a_fit_may_change_a_matrix_more_than_any_expert_did(method):
    """Bounds are those of the whole model: a matrix that experts hardly touched may move.

    Alone in its model the same matrix may not: there a hundred of its lengths are the bound.
    """
    small = 1e-3 * normal(2, 4, 5, seed=1)
    problem = of_matrices(normal(2, 4, 5), other=small)
    options = {"lr": 1.0, "units": "absolute", "steps": 20, **QUIET}
    options |= {"eta": 3e-3, "keep": 1.0} if method is doge else {}  # eta: what an expert adds
    found = changes(problem, method(problem, **options))["other"]
    assert found.norm() > 100 * small.flatten(1).norm(dim=1).max()
    with pytest.raises(Diverged, match=f"{method.__name__}: after step .* over 100 times"):
        method(of_matrices(small), **options)


@pytest.mark.parametrize("method", [doge, wudi])
def test_experts_of_low_rank_are_merged_without_their_null_directions(method):
    low = normal(2, 12, 1) @ normal(2, 1, 13, seed=1)
    assert shared_basis(low, 3).shape == (12, 2)
    assert torch.isfinite(method(of_matrices(low), steps=5, **QUIET)).all()
