"""Task vectors in less memory or in the host's: what each storage costs, mostly nothing."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import layout_of, linear_problem, normal, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from divmerge_core.divergences import js
from divmerge_core.kernels import delta_storage, merge
from divmerge_core.kernels.backend import triton
from divmerge_core.kernels.delta_storage import (
    SCALE_BLOCK,
    Factors,
    Int8Deltas,
    LowRankDeltas,
    quantise,
)
from divmerge_core.kernels.host_offload import StreamedDeltas
from divmerge_core.kernels.merge import grouped_inner, grouped_merge, inner_range
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import fit_coefficients
from divmerge_core.merging.merged_model import GRADIENTS
from divmerge_core.merging.task_vectors import STORAGES, TaskVectors, dense

in_threads = pytest.mark.usefixtures("threads")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# what a stored task vector may be off by, relative to its largest number
ERRORS = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 254}
ERRORS |= {"streamed": 0, "streamed_bfloat16": 2**-8}


@pytest.fixture
def small_chunks(monkeypatch):
    """Pieces of 128 columns, so that a small case has many of them."""
    monkeypatch.setattr(delta_storage, "CHUNK", 128)


def base_and_adapters(num_tasks=3, ranks=(2, 1, 3)):
    """A base of two matrices and a vector, and LoRA factors; the second task adapts one only."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = {"first": drawn(6, 5), "bias": drawn(5), "second": drawn(4, 7)}
    adapters = {
        f"task{n}": {
            name: (drawn(base[name].shape[0], rank), drawn(rank, base[name].shape[1]))
            for name in (("first",) if n == 1 else ("first", "second"))
        }
        for n, rank in zip(range(num_tasks), ranks, strict=True)
    }
    return base, adapters


def states():
    make = [
        {"weight": normal(40, 11, seed=n).float(), "bias": normal(11, seed=n + 9).float()}
        for n in range(3)
    ]
    return make[0], {"one": make[1], "two": make[2]}


def test_int8_is_the_same_in_pieces_as_whole():
    row = normal((SCALE_BLOCK << 11) + 77)
    for found, wanted in zip(vars(Int8Deltas.of([row])).values(), quantise(row), strict=True):
        assert torch.equal(found[0], wanted)


@pytest.mark.parametrize("storage", STORAGES)
def test_storages_keep_task_vectors_as_well_as_they_say(storage):
    plain = TaskVectors.from_states(*states())
    for kept in (plain.stored_as(storage), TaskVectors.from_states(*states(), storage=storage)):
        off = (dense(kept.deltas) - plain.deltas).abs().max()
        assert off <= ERRORS[storage] * plain.deltas.abs().max() * 1.01
        expert = kept.expert("two")
        assert expert.dtype == torch.float32
        assert_close(expert, kept.base + dense(kept.deltas)[1])
        assert_close(kept.select(["two"]).norms(), kept.norms()[1:])


# --- int8
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
@pytest.mark.parametrize("backend", ["torch"] + (["triton"] if triton else []))
def test_int8_task_vectors_merge_as_what_they_stand_for(backend, monkeypatch):
    monkeypatch.setattr(merge, "BLOCK", 2 * SCALE_BLOCK)
    base, *rows = normal(4, 700, seed=1).float()
    segments = Segments.of([(0, 130), (130, 131), (131, 700)], [0, 1, 0])
    coeffs, store = normal(3, 2).float(), Int8Deltas.of(rows)
    expected = grouped_merge(base, dense(store), coeffs, segments)
    assert_close(grouped_merge(base, store, coeffs, segments, backend=backend), expected)
    found = grouped_inner(base, store, segments, backend=backend)
    assert_close(found, grouped_inner(base, dense(store), segments), rtol=1e-5, atol=1e-4)


# --- low rank
@in_threads
def test_adapters_merge_as_the_experts_that_they_stand_for():
    base, adapters = base_and_adapters()
    experts = {
        task: {
            name: tensor + 0.5 * factors[name][0] @ factors[name][1] if name in factors else tensor
            for name, tensor in base.items()
        }
        for task, factors in adapters.items()
    }
    plain = TaskVectors.from_states(base, experts)
    thin = TaskVectors.from_adapters(base, adapters, scale=0.5)
    assert_close(dense(thin.deltas), plain.deltas)
    held = sum(f.left.numel() + f.right.numel() for f in thin.deltas.factors.values())
    pairs = (factors for task in adapters.values() for pair in task.values() for factors in pair)
    assert held == sum(factor.numel() for factor in pairs)  # nothing is multiplied out
    for task in plain.tasks:
        assert_close(thin.expert(task), plain.expert(task))
    assert_close(thin.select(["task2", "task1"]).merge([2, 3]), plain.merge([0, 3, 2]))


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_segments_may_split_a_tensor_of_adapters_anywhere(data):
    """Against the task vectors multiplied out; a gradient of any stretch too."""
    thin = TaskVectors.from_adapters(*base_and_adapters())
    size, matrix = thin.layout.size, dense(thin.deltas)
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=6)))
    bounds = list(pairwise([0, *cuts, size]))
    segments = Segments.of(bounds, [n % 3 for n in range(len(bounds))])
    coeffs = normal(3, segments.num_groups, seed=3)
    merged = grouped_merge(thin.base, thin.deltas, coeffs, segments)
    assert_close(merged, grouped_merge(thin.base, matrix, coeffs, segments))
    found = grouped_inner(thin.base, thin.deltas, segments)
    assert_close(found, grouped_inner(thin.base, matrix, segments))
    for start, stop in bounds:
        part = thin.base[start:stop]
        found = inner_range(part, thin.deltas, start, stop)
        assert_close(found, inner_range(part, matrix, start, stop))


def test_adapters_of_a_large_matrix_are_one_product_for_all_threads():
    """600 x 600 numbers are more than one thread would merge alone."""
    pair = normal(600, 2).float(), normal(2, 600, seed=1).float()
    thin = TaskVectors.from_adapters({"w": torch.zeros(600, 600)}, {"one": {"w": pair}})
    assert thin.layout.size >= 1 << 18
    found = grouped_inner(torch.ones(360_000), thin.deltas, Segments(((0, 360_000, 0),)))
    expected = dense(thin.deltas).double().sum()
    assert_close(found.double()[0, 0], expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_half_precision_base_is_added_to_in_float32(dtype):
    base, adapters = base_and_adapters()
    thin = TaskVectors.from_adapters({k: v.float() for k, v in base.items()}, adapters)
    factors = thin.deltas.factors.items()
    single = {n: Factors(f.left.float(), f.right.float(), f.ranks) for n, f in factors}
    store, start = LowRankDeltas(thin.deltas.shape, single), thin.base.to(dtype)
    segments = Segments(((0, thin.layout.size, 0),))
    merged = grouped_merge(start, store, torch.full((3, 1), 0.3), segments)
    expected = start.double() + 0.3 * dense(thin.deltas).sum(0)
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
    with refuses(message):
        TaskVectors.from_adapters(base, {"x": {name: (torch.zeros(left), torch.zeros(right))}})
    with refuses("the adapters hold no factors"):
        TaskVectors.from_adapters(base, {"x": {}})
    with refuses("float32, bfloat16, float16, int8"):
        TaskVectors.from_states(*states(), storage="int4")


# --- in the host's memory
def streamed_case(dtype=torch.float32, tasks=3, size=1000):
    """Base, task vectors in memory, the same streamed, coefficients of two groups, segments."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, coeffs = normal(size).to(wide), normal(tasks, 2, seed=1).to(wide)
    rows, cut = normal(tasks, size, seed=2).to(dtype), size // 3
    segments = Segments(((0, cut, 0), (cut, cut, 1), (cut, size, 1)))
    return base, rows, StreamedDeltas.of(iter(rows), tasks), coeffs, segments


@in_threads
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_gradient_of_streamed_vectors_are_bitwise_those_of_a_matrix(dtype, small_chunks):
    base, rows, streamed, coeffs, segments = streamed_case(dtype)
    results = [
        (
            grouped_merge(base, store, coeffs, segments),
            grouped_inner(base, store, segments),
            inner_range(base[7:900], store, 7, 900),
            dense(store),
        )
        for store in (rows, streamed)
    ]
    assert all(map(torch.equal, *results))
    for numbers in ([2, 0], [1]):
        assert torch.equal(streamed.rows(numbers).host, rows[numbers])
    assert streamed.rows([1]).host.data_ptr() == streamed.host[1].data_ptr()  # a view


@pytest.mark.parametrize(
    ("start", "stop", "chunk"), [(0, 0, 9), (7, 60, 99), (3, 290, 41), (0, 300, 100)]
)
def test_every_column_comes_once_in_order_through_two_buffers(start, stop, chunk):
    _, rows, streamed, *_ = streamed_case(size=300)
    pieces = [(low, min(low + chunk, stop)) for low in range(start, stop, chunk)]
    places = set()
    for piece, (low, high, part) in zip(pieces, streamed.stream(pieces, rows.dtype), strict=True):
        assert piece == (low, high) and torch.equal(part, rows[:, low:high])
        places.add(part.data_ptr())
    assert len(places) == min(2, len(pieces))


def test_streamed_vectors_that_do_not_fit_are_refused():
    base, _, streamed, coeffs, segments = streamed_case()
    with refuses("make all of them from one layout"):
        grouped_merge(base[:-1], streamed, coeffs, segments)
    with refuses("cannot mix"):
        grouped_merge(base.double(), streamed, coeffs, segments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gets_the_same_from_pinned_memory(dtype, small_chunks):
    """Has not been run by us: no GPU was at hand."""
    base, rows, _, coeffs, segments = (
        part.cuda() if isinstance(part, torch.Tensor) else part for part in streamed_case(dtype)
    )
    streamed = StreamedDeltas.of(iter(rows), len(rows))
    assert streamed.host.is_pinned() and not streamed.host.is_cuda
    expected = grouped_merge(base, rows, coeffs, segments, backend="torch")
    assert_close(grouped_merge(base, streamed, coeffs, segments), expected)
    inner = grouped_inner(base, rows, segments, backend="torch")
    assert_close(grouped_inner(base, streamed, segments), inner)
    assert streamed.rows([2, 0]).host.is_pinned()


# --- in a fit
def fitted(problem, vectors, gradients, grouping="layer"):
    problem = replace(problem, vectors=vectors)
    coefficients = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping)
    options = {"epochs": 1, "gradients": gradients, "progress": False}
    merged = fit_coefficients(problem, coefficients, js, **options)
    return coefficients().detach(), merged


@in_threads
@pytest.mark.parametrize("grouping", ["task", "layer"])
def test_gradients_gathered_either_way_give_the_same_fit(problem, grouping):
    one, other = (fitted(problem, problem.vectors, way, grouping) for way in GRADIENTS)
    assert_close(one, other, rtol=1e-9, atol=1e-9)
    with refuses("gradients must be one of stream, buffer, got 'hook'"):
        fitted(problem, problem.vectors, "hook")


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_fits_of_low_rank_or_streamed_experts_are_those_of_the_matrix(gradients, small_chunks):
    """Streamed ones bit for bit."""
    problem = linear_problem(dtype=torch.float32)
    for streamed, held in (("streamed", "float32"), ("streamed_bfloat16", "bfloat16")):
        both = (problem.vectors.stored_as(storage) for storage in (streamed, held))
        fits = (fitted(problem, vectors, gradients) for vectors in both)
        assert all(map(torch.equal, *fits))
    problem = linear_problem()
    layout, adapters = problem.vectors.layout, {}
    for task, row in zip(problem.vectors.tasks, problem.vectors.deltas, strict=True):
        tensors = layout.unflatten(row).items()
        parts = {n: torch.linalg.svd(t, False) for n, t in tensors if t.ndim == 2}
        adapters[task] = {name: (u * s, v) for name, (u, s, v) in parts.items()}
    thin = TaskVectors.from_adapters(layout.unflatten(problem.vectors.base), adapters)
    plain = replace(thin, deltas=dense(thin.deltas))
    one, other = (fitted(problem, vectors, gradients) for vectors in (thin, plain))
    assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_a_tensor_that_the_model_does_not_read_has_gradient_zero():
    layout = layout_of(used=(2,), unused=(3,))
    vectors = TaskVectors(layout, ("a",), torch.zeros(5), torch.ones(1, 5))
    for gather in GRADIENTS.values():
        leaves = layout.unflatten(torch.zeros(5))
        for leaf in leaves.values():
            leaf.requires_grad_()
        collect = gather(leaves, vectors, Segments.of(layout.bounds, [0, 1]))
        for _ in range(2):  # what one step gathered is gone in the next
            (leaves["used"] * torch.tensor([1.0, 2.0])).sum().backward()
            assert collect().tolist() == [[3, 0]]
