"""Task vectors in less memory: what int8 and half precision cost; low rank costs nothing."""

from itertools import pairwise

import pytest
import torch
from helpers import layout_of, linear_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from divmerge_core.divergences import js
from divmerge_core.kernels import merge
from divmerge_core.kernels.backend import triton
from divmerge_core.kernels.delta_storage import (
    SCALE_BLOCK,
    Factors,
    Int8Deltas,
    LowRankDeltas,
    dense,
    quantise,
)
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import fit_coefficients
from divmerge_core.merging.merged_model import GRADIENTS
from divmerge_core.merging.task_vectors import STORAGES, TaskVectors

in_threads = pytest.mark.usefixtures("threads")
BACKENDS = ["torch"] + (["triton"] if triton else [])


def base_and_adapters(num_tasks=3, ranks=(2, 1, 3)):
    """A base of two matrices and a vector, and LoRA factors; the second task adapts one only."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = {"first": normal(6, 5), "bias": normal(5), "second": normal(4, 7)}
    adapters = {
        f"task{n}": {
            name: (normal(base[name].shape[0], rank), normal(rank, base[name].shape[1]))
            for name in (("first",) if n == 1 else ("first", "second"))
        }
        for n, rank in zip(range(num_tasks), ranks, strict=True)
    }
    return base, adapters


def multiplied_out(base, adapters, scale=1.0):
    """The same experts as ordinary state dicts."""
    return {
        task: {
            name: tensor + scale * factors[name][0] @ factors[name][1]
            if name in factors
            else tensor
            for name, tensor in base.items()
        }
        for task, factors in adapters.items()
    }


# --- int8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 127, 128, 129, 400])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e3])
def test_int8_is_off_by_at_most_half_a_step_of_its_block(size, magnitude):
    row = magnitude * torch.randn(size, generator=torch.Generator().manual_seed(0))
    values, scales = quantise(row)
    assert len(scales) == -(-size // SCALE_BLOCK)
    steps = scales.repeat_interleave(SCALE_BLOCK)[:size]
    assert ((values * steps - row).abs() <= steps * 0.5001).all()
    for block, scale in zip(row.split(SCALE_BLOCK), scales, strict=True):
        assert_close(scale * 127, block.abs().max())
    values, scales = quantise(torch.zeros(size))
    assert not values.any() and not scales.any()


@in_threads
@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_task_vectors_merge_as_what_they_stand_for(backend, monkeypatch):
    monkeypatch.setattr(merge, "BLOCK", 2 * SCALE_BLOCK)
    generator = torch.Generator().manual_seed(1)
    base, rows = torch.randn(700, generator=generator), torch.randn(3, 700, generator=generator)
    segments = Segments.of([(0, 130), (130, 131), (131, 700)], [0, 1, 0])
    coeffs = torch.randn(3, 2, generator=generator)
    store = Int8Deltas.of(rows)
    expected = grouped_merge(base, store.dense(), coeffs, segments)
    assert_close(grouped_merge(base, store, coeffs, segments, backend=backend), expected)
    found = grouped_inner(base, store, segments, backend=backend)
    assert_close(found, grouped_inner(base, store.dense(), segments), rtol=1e-5, atol=1e-4)
    assert (store.dense() - rows).abs().max() < rows.abs().max() / 127 / 2 * 1.01


# --- storages of TaskVectors ----------------------------------------------------------------------

# what a stored task vector may be off by, relative to its largest number
ERRORS = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 254}
ERRORS |= {"streamed": 0, "streamed_bfloat16": 2**-8}


def states():
    generator = torch.Generator().manual_seed(2)
    shapes = {"weight": (40, 11), "bias": (11,)}
    make = [{k: torch.randn(v, generator=generator) for k, v in shapes.items()} for _ in range(3)]
    return make[0], {"one": make[1], "two": make[2]}


@pytest.mark.parametrize("storage", STORAGES)
def test_storages_keep_task_vectors_as_well_as_they_say(storage):
    plain, kept = TaskVectors.from_states(*states()), None
    for kept in (plain.stored_as(storage), TaskVectors.from_states(*states(), storage=storage)):
        off = (dense(kept.deltas) - plain.deltas).abs().max()
        assert off <= ERRORS[storage] * plain.deltas.abs().max() * 1.01
        expert = kept.expert("two")
        assert expert.dtype == torch.float32
        assert_close(expert, kept.base + dense(kept.deltas)[1])
        assert_close(kept.select(["two"]).norms(), kept.norms()[1:])


# --- low rank -------------------------------------------------------------------------------------


@in_threads
def test_adapters_merge_as_the_experts_that_they_stand_for():
    base, adapters = base_and_adapters()
    plain = TaskVectors.from_states(base, multiplied_out(base, adapters, 0.5))
    thin = TaskVectors.from_adapters(base, adapters, scale=0.5)
    segments = Segments.of(plain.layout.bounds, [0, 1, 2])
    coeffs = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_close(dense(thin.deltas), plain.deltas)
    held = sum(f.left.numel() + f.right.numel() for f in thin.deltas.factors.values())
    given = (factors for task in adapters.values() for pair in task.values() for factors in pair)
    assert held == sum(factor.numel() for factor in given)  # nothing is multiplied out
    expected = grouped_merge(plain.base, plain.deltas, coeffs, segments)
    assert_close(grouped_merge(thin.base, thin.deltas, coeffs, segments), expected)
    inner = grouped_inner(plain.base, plain.deltas, segments)
    assert_close(grouped_inner(thin.base, thin.deltas, segments), inner)
    for task in plain.tasks:
        assert_close(thin.expert(task), plain.expert(task))
    assert_close(thin.select(["task2", "task1"]).merge([2, 3]), plain.merge([0, 3, 2]))


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_segments_may_split_a_tensor_of_adapters_anywhere(data):
    """Against the task vectors multiplied out; a gradient of any stretch too."""
    base, adapters = base_and_adapters()
    thin = TaskVectors.from_adapters(base, adapters)
    size, matrix = thin.layout.size, dense(thin.deltas)
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=6)))
    bounds = list(pairwise([0, *cuts, size]))
    groups = [n % 3 for n in range(len(bounds))]
    segments = Segments.of(bounds, groups)
    generator = torch.Generator().manual_seed(3)
    shape = (3, segments.num_groups)
    coeffs = torch.randn(shape, generator=generator, dtype=torch.float64)
    merged = grouped_merge(thin.base, thin.deltas, coeffs, segments)
    assert_close(merged, grouped_merge(thin.base, matrix, coeffs, segments))
    found = grouped_inner(thin.base, thin.deltas, segments)
    assert_close(found, grouped_inner(thin.base, matrix, segments))
    for start, stop in bounds:
        part = thin.base[start:stop]
        found = merge.inner_range(part, thin.deltas, start, stop)
        assert_close(found, merge.inner_range(part, matrix, start, stop))


def test_a_tensor_of_adapters_split_by_hand():
    """A matrix of ones: its first row gets the first coefficient, its second row the other."""
    ones = {"w": (torch.ones(2, 1), torch.ones(1, 2))}
    thin = TaskVectors.from_adapters({"w": torch.zeros(2, 2)}, {"one": ones})
    segments = Segments(((0, 2, 0), (2, 4, 1)))
    coeffs = torch.tensor([[1.0, 5.0]])
    assert grouped_merge(thin.base, thin.deltas, coeffs, segments).tolist() == [1, 1, 5, 5]
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert grouped_inner(grad, thin.deltas, segments).tolist() == [[3, 7]]


def test_adapters_of_a_large_matrix_are_one_product_for_all_threads():
    """600 x 600 numbers are more than one thread would merge alone."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(600, 2, generator=generator), torch.randn(2, 600, generator=generator)
    thin = TaskVectors.from_adapters({"w": torch.zeros(600, 600)}, {"one": {"w": pair}})
    assert thin.layout.size >= 1 << 18
    segments = Segments(((0, 360_000, 0),))
    grad = torch.ones(360_000)
    expected = dense(thin.deltas).double().sum()
    assert_close(
        grouped_inner(grad, thin.deltas, segments).double()[0, 0], expected, rtol=1e-4, atol=1e-2
    )


def test_adding_up_factors_separately_is_another_model():
    """(B1 + B2)(A1 + A2) has cross terms B1 A2 + B2 A1 that no expert learned."""
    base, adapters = base_and_adapters(2, (2, 2))
    (b1, a1), (b2, a2) = (adapters[task]["first"] for task in ("task0", "task1"))
    thin = TaskVectors.from_adapters(base, adapters)
    merged = thin.layout.unflatten(thin.merge([1, 1]))["first"] - base["first"]
    separately = (b1 + b2) @ (a1 + a2)
    assert_close(merged, b1 @ a1 + b2 @ a2)
    assert_close(separately - merged, b1 @ a2 + b2 @ a1)
    assert (separately - merged).norm() > 0.5 * merged.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_half_precision_base_is_added_to_in_float32(dtype):
    base, adapters = base_and_adapters()
    thin = TaskVectors.from_adapters({k: v.float() for k, v in base.items()}, adapters)
    start = thin.base.to(dtype)
    coeffs = torch.full((3, 1), 0.3, dtype=torch.float32)
    segments = Segments(((0, thin.layout.size, 0),))
    factors = thin.deltas.factors.items()
    single = {n: Factors(f.left.float(), f.right.float(), f.ranks) for n, f in factors}
    store = LowRankDeltas(thin.deltas.shape, single)
    expected = start.double() + 0.3 * dense(thin.deltas).sum(0)
    merged = grouped_merge(start, store, coeffs, segments)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert_close(merged.double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "left", "right", "message"),
    [
        ("third", (6, 2), (2, 5), r"third of shape unknown cannot take factors \[6, 2\]"),
        ("first", (5, 2), (2, 6), r"first of shape \(6, 5\) cannot take factors \[5, 2\] and"),
        ("first", (6, 2), (3, 5), r"give B \[M, r\] and A \[r, K\] for a matrix"),
        ("bias", (5, 1), (1, 1), r"bias of shape \(5,\) cannot take factors"),
    ],
)
def test_factors_that_do_not_fit_are_refused(name, left, right, message):
    base, _ = base_and_adapters()
    with pytest.raises(ValueError, match=message):
        TaskVectors.from_adapters(base, {"x": {name: (torch.zeros(left), torch.zeros(right))}})


def test_unknown_storages_and_nothing_to_merge_are_refused():
    with pytest.raises(KeyError, match="float32, bfloat16, float16, int8"):
        TaskVectors.from_states(*states(), storage="int4")
    with pytest.raises(ValueError, match="no experts given"):
        TaskVectors.from_states(states()[0], {})
    with pytest.raises(ValueError, match="the adapters hold no factors"):
        TaskVectors.from_adapters(base_and_adapters()[0], {"x": {}})


# --- in a fit -------------------------------------------------------------------------------------


def fitted(problem, vectors, gradients, grouping="layer"):
    problem = problem.__class__(vectors, problem.batches, problem.forward)
    coefficients = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping)
    merged = fit_coefficients(
        problem, coefficients, js, epochs=1, gradients=gradients, progress=False
    )
    return coefficients().detach(), merged


@in_threads
@pytest.mark.parametrize("grouping", ["task", "layer"])
def test_gradients_gathered_either_way_give_the_same_fit(grouping):
    problem = linear_problem()
    fits = [fitted(problem, problem.vectors, way, grouping) for way in GRADIENTS]
    for one, other in zip(*fits, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_low_rank_experts_are_fitted_as_dense_ones(gradients):
    problem = linear_problem()
    layout, rows = problem.vectors.layout, problem.vectors.deltas
    base = layout.unflatten(problem.vectors.base)
    adapters = {}
    for task, row in zip(problem.vectors.tasks, rows, strict=True):
        factors = {}
        for name, tensor in layout.unflatten(row).items():
            if tensor.ndim == 2:
                u, s, v = torch.linalg.svd(tensor, full_matrices=False)
                factors[name] = (u * s, v)
        adapters[task] = factors
    thin = TaskVectors.from_adapters(base, adapters)
    plain = TaskVectors(layout, thin.tasks, thin.base, dense(thin.deltas))
    for one, other in zip(
        fitted(problem, thin, gradients), fitted(problem, plain, gradients), strict=True
    ):
        assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_an_unknown_way_to_gather_gradients_is_refused():
    with pytest.raises(ValueError, match="gradients must be one of stream, buffer, got 'hook'"):
        fitted(linear_problem(), linear_problem().vectors, "hook")


def test_a_tensor_that_the_model_does_not_read_has_gradient_zero():
    layout = layout_of(used=(2,), unused=(3,))
    vectors = TaskVectors(layout, ("a",), torch.zeros(5), torch.ones(1, 5))
    segments = Segments.of(layout.bounds, [0, 1])
    for gather in GRADIENTS.values():
        live = torch.zeros(5)
        leaves = layout.unflatten(live)
        for leaf in leaves.values():
            leaf.requires_grad_()
        collect = gather(leaves, vectors, segments)
        for _ in range(2):  # what one step gathered is gone in the next
            (leaves["used"] * torch.tensor([1.0, 2.0])).sum().backward()
            assert collect().tolist() == [[3, 0]]
