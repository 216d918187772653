"""Task vectors that stay in the host's memory give what those on the device give, bit for bit."""

import pytest
import torch
from helpers import linear_problem

from divmerge_core.divergences import js
from divmerge_core.kernels import delta_storage
from divmerge_core.kernels.host_offload import StreamedDeltas
from divmerge_core.kernels.merge import grouped_inner, grouped_merge, inner_range
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import fit_coefficients
from divmerge_core.merging.merged_model import GRADIENTS
from divmerge_core.merging.task_vectors import TaskVectors

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def case(dtype=torch.float32, tasks=3, size=1000, seed=0):
    """Base, task vectors in memory, the same streamed, coefficients of two groups, segments."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, coeffs = (
        torch.randn(shape, generator=generator).to(wide) for shape in (size, (tasks, 2))
    )
    rows = torch.randn(tasks, size, generator=generator).to(dtype)
    cut = size // 3
    segments = Segments(((0, cut, 0), (cut, cut, 1), (cut, size, 1)))
    return base, rows, StreamedDeltas.of(iter(rows), tasks), coeffs, segments


@pytest.fixture
def small_chunks(monkeypatch):
    """Pieces of 128 columns, so that a small case has many of them."""
    monkeypatch.setattr(delta_storage, "CHUNK", 128)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_gradient_are_bitwise_those_of_the_matrix(dtype, small_chunks):
    base, rows, streamed, coeffs, segments = case(dtype)
    for one in (rows, streamed):
        delta_storage.check(base, one, segments, coeffs)
    merged = grouped_merge(base, streamed, coeffs, segments)
    assert torch.equal(merged, grouped_merge(base, rows, coeffs, segments))
    inner = grouped_inner(base, streamed, segments)
    assert torch.equal(inner, grouped_inner(base, rows, segments))
    some = inner_range(base[7:900], streamed, 7, 900)
    assert torch.equal(some, inner_range(base[7:900], rows, 7, 900))
    assert torch.equal(streamed.dense(), delta_storage.dense(rows))


@pytest.mark.parametrize(
    ("start", "stop", "chunk"), [(0, 0, 9), (7, 60, 99), (3, 290, 41), (0, 300, 100)]
)
def test_every_column_comes_once_in_order_through_two_buffers(start, stop, chunk):
    _, rows, streamed, *_ = case(size=300)
    pieces = [(low, min(low + chunk, stop)) for low in range(start, stop, chunk)]
    places = set()
    for piece, (low, high, part) in zip(pieces, streamed.stream(pieces, rows.dtype), strict=True):
        assert piece == (low, high) and torch.equal(part, rows[:, low:high])
        places.add(part.data_ptr())
    assert len(places) == min(2, len(pieces))


def test_some_rows_are_a_store_again():
    _, rows, streamed, *_ = case()
    assert torch.equal(streamed.rows([2, 0]).host, rows[[2, 0]])
    single = streamed.rows([1])
    assert torch.equal(single.host, rows[1:2])
    assert single.host.data_ptr() == streamed.host[1].data_ptr()  # a view


def states(problem):
    vectors = problem.vectors
    base = vectors.layout.unflatten(vectors.base.float())
    return base, {
        task: vectors.layout.unflatten(vectors.expert(task).float()) for task in vectors.tasks
    }


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize(
    ("streamed", "held"), [("streamed", "float32"), ("streamed_bfloat16", "bfloat16")]
)
def test_a_fit_is_bitwise_that_of_the_matrix(streamed, held, gradients, small_chunks):
    problem = linear_problem(dtype=torch.float32)
    found = []
    for storage in (streamed, held):
        vectors = TaskVectors.from_states(*states(problem), storage=storage)
        own = problem.__class__(vectors, problem.batches, problem.forward)
        coefficients = Coefficients(vectors.layout, 3, grouping="layer")
        merged = fit_coefficients(
            own, coefficients, js, epochs=1, gradients=gradients, progress=False
        )
        found.append((coefficients().detach(), merged))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_streamed_vectors_that_do_not_fit_are_refused():
    base, _, streamed, coeffs, segments = case()
    with pytest.raises(ValueError, match="make all of them from one layout"):
        grouped_merge(base[:-1], streamed, coeffs, segments)
    with pytest.raises(ValueError, match="cannot mix"):
        grouped_merge(base.double(), streamed, coeffs, segments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gets_the_same_from_pinned_memory(dtype, small_chunks):
    """Has not been run by us: no GPU was at hand."""
    base, rows, _, coeffs, segments = (
        part.cuda() if isinstance(part, torch.Tensor) else part for part in case(dtype)
    )
    streamed = StreamedDeltas.of(iter(rows), len(rows))
    assert streamed.host.is_pinned() and not streamed.host.is_cuda
    expected = grouped_merge(base, rows, coeffs, segments, backend="torch")
    torch.testing.assert_close(grouped_merge(base, streamed, coeffs, segments), expected)
    inner = grouped_inner(base, rows, segments, backend="torch")
    torch.testing.assert_close(grouped_inner(base, streamed, segments), inner)
    assert streamed.rows([2, 0]).host.is_pinned()
