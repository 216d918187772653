"""The merge kernel and its gradient, on every backend, against sums over single numbers.

Without a GPU, Triton's kernels run in its interpreter.
"""

import inspect
import subprocess
import sys
from itertools import combinations

import compiled
import pytest
import torch
from helpers import INF, NAN, layout_of, normal, refuses, shared_by
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from divmerge_core.kernels import backend as backend_module
from divmerge_core.kernels import delta_storage, merge
from divmerge_core.kernels.backend import triton
from divmerge_core.kernels.delta_storage import SCALE_BLOCK
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.segments import Segments, block_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
double, single, brain, half = torch.float64, torch.float32, torch.bfloat16, torch.float16

# vector, deltas, rtol, atol: what rounding alone may cost against float64. Sums are taken in
# float32, so a result in half precision is off by its own rounding and nothing else.
PRECISIONS = [
    (double, double, 1e-12, 1e-12),
    (single, single, 1e-5, 2e-6),
    (single, brain, 1e-5, 2e-6),
    (single, half, 1e-5, 2e-6),
    (brain, brain, 2**-8, 1e-5),
    (brain, single, 2**-8, 1e-5),
    (half, half, 2**-11, 1e-5),
]
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
BACKENDS = ["torch", "torch on 2 threads", pytest.param("triton", marks=needs_triton)]
backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
precisions = pytest.mark.parametrize(("kind", "stored", "rtol", "atol"), PRECISIONS, ids=str)

# shapes of the tensors, and the group of each
TABLES = {
    "one tensor": ([(7,)], [0]),
    "one number": ([(1,)], [0]),
    "scalars": ([(), (), ()], [0, 1, 0]),
    "one group": ([(3, 2), (5,), (1,)], [0, 0, 0]),
    "a group each": ([(3, 2), (5,), (1,)], [0, 1, 2]),
    "a group that comes back": ([(41,), (1,), (13, 3), (2,)], [0, 1, 0, 2]),
    "an empty tensor": ([(3,), (0, 4), (2,)], [0, 1, 2]),
    "no numbers at all": ([(0,)], [0]),
    "a block and one": ([(257,), (256,), (255,)], [0, 1, 0]),
    "awkward": ([(129, 3), (1,), (571,), (1,), (3, 3, 3)], [0, 1, 1, 0, 2]),
}
FEW = [("scalars", 1), ("no numbers at all", 2), ("a block and one", 2), ("awkward", 3)]
MODELS = [*((table, 2) for table in TABLES), ("one number", 1), ("awkward", 20)]
tables = pytest.mark.parametrize("table", TABLES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks and chunks of a few hundred parameters, so that small cases have edges and middles."""
    monkeypatch.setattr(merge, "BLOCK", 256)
    monkeypatch.setattr(delta_storage, "CHUNK", 100)


@pytest.fixture
def backend(request):
    """A backend by name, which two threads share where it says so."""
    name, _, threads = request.param.partition(" on ")
    with shared_by(2 if threads else 1):
        yield name


def case(table, num_tasks, kind=single, stored=None):
    """base [N], deltas [T, N], coefficients [T, G], the group of every number, and the segments."""
    sizes, groups = TABLES[table]
    layout = layout_of(**{f"tensor{n}": size for n, size in enumerate(sizes)})
    generator = torch.Generator().manual_seed(num_tasks)

    def drawn(dtype, *shape: int):
        return torch.randn(*shape, generator=generator, dtype=double).to(DEVICE, dtype)

    widths = [stop - start for start, stop in layout.bounds]
    owner = torch.tensor(groups).repeat_interleave(torch.tensor(widths)).to(DEVICE)
    segments = Segments.of(layout.bounds, groups)
    coeffs = drawn(torch.promote_types(kind, single), num_tasks, 1 + max(groups))
    deltas = drawn(stored or kind, num_tasks, layout.size)
    return drawn(kind, layout.size), deltas, coeffs, owner, segments


def slow_merge(base, deltas, coeffs, owner):
    """theta_i = base_i + sum_t Lambda[t, group of i] tau_{t,i}, in float64."""
    return base.double() + (coeffs.double()[:, owner] * deltas.double()).sum(0)


def slow_inner(grad, deltas, num_groups, owner):
    """dL/dLambda[t, g] = sum over the i of group g of grad_i tau_{t,i}, in float64."""
    products = grad.double() * deltas.double()
    columns = [(products * (owner == group)).sum(1) for group in range(num_groups)]
    return torch.stack(columns, dim=1)


# --- the formulas
@backends
@precisions
def test_merge_and_gradient_are_the_sums(backend, kind, stored, rtol, atol):
    """A merge, its gradient by itself and through autograd; inputs stay, old output goes."""
    if (backend, kind) == ("triton", double):
        pytest.skip("Triton computes in float32")
    if (backend, kind, DEVICE) == ("triton", brain, "cpu"):
        rtol *= 2  # the interpreter cuts bfloat16 off where the hardware rounds
    exact = 1e-12 if kind == double else 2e-6
    every = (kind, stored) in ((double, double), (single, single)) and backend == "torch"
    for table, num_tasks in MODELS if every else FEW:
        base, deltas, coeffs, owner, segments = case(table, num_tasks, kind, stored)
        before = [tensor.clone() for tensor in (base, deltas, coeffs)]
        out = torch.full_like(base, NAN)
        given = grouped_merge(base, deltas, coeffs, segments, out=out, backend=backend)
        assert given is out and out.dtype == kind
        expected = slow_merge(base, deltas, coeffs, owner)
        assert_close(out.double(), expected, rtol=rtol, atol=atol * num_tasks)
        found = grouped_inner(base, deltas, segments, backend=backend)
        assert found.dtype == torch.promote_types(kind, single)  # summed wide, whatever came in
        expected = slow_inner(base, deltas, coeffs.shape[1], owner)
        bound = {"rtol": exact, "atol": exact * max(1, len(base)) ** 0.5}
        assert_close(found.double(), expected, **bound)
        merged = grouped_merge(base, deltas, coeffs.requires_grad_(), segments, backend=backend)
        assert torch.equal(merged, out)
        merged.backward(base)
        assert_close(coeffs.grad, found.to(coeffs.dtype), rtol=0, atol=0)
        after = (base, deltas, coeffs.detach())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@backends
def test_the_sum_by_hand_in_float32_and_bitwise_the_same_on_every_run(backend):
    """Ten thousand products of ones: bfloat16 cannot count beyond 256."""
    segments = Segments(((0, 2, 0), (2, 3, 1)))
    base, deltas = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    coeffs = torch.tensor([[2.0, 10.0], [3.0, 100.0]])
    base, deltas, coeffs = (x.to(DEVICE) for x in (base, deltas, coeffs))
    merged = grouped_merge(base, deltas, coeffs, segments, backend=backend)
    assert merged.tolist() == [1 + 2, 2 + 3, 3 + 20 + 100]
    found = grouped_inner(base, deltas, segments, backend=backend)
    assert found.tolist() == [[1, 6], [2, 3]]
    ones, segments = torch.ones(10_000, dtype=brain, device=DEVICE), Segments(((0, 10_000, 0),))
    assert grouped_inner(ones, ones[None], segments, backend=backend).item() == 10_000
    grad, deltas, _, _, segments = case("awkward", 5)
    runs = [grouped_inner(grad, deltas, segments, backend=backend) for _ in range(4)]
    assert all(torch.equal(runs[0], other) for other in runs)


@backends
def test_a_store_that_is_misaligned_or_has_longer_rows_gives_the_same(backend):
    base, deltas, coeffs, _, segments = case("awkward", 3)
    roomy = torch.full((3, deltas.shape[1] + 6), NAN, device=DEVICE)
    shifted = torch.full((len(base) + 1,), NAN, device=DEVICE)
    roomy[:, 5:-1], shifted[1:] = deltas, base
    out = torch.empty_like(shifted)[1:]
    grouped_merge(shifted[1:], roomy[:, 5:-1], coeffs, segments, out=out, backend=backend)
    assert_close(out, grouped_merge(base, deltas, coeffs, segments, backend=backend))
    found = grouped_inner(shifted[1:], roomy[:, 5:-1], segments, backend=backend)
    assert_close(found, grouped_inner(base, deltas, segments, backend=backend))


def test_coefficients_of_another_precision_are_converted():
    base, deltas, coeffs, owner, segments = case("a group each", 2, double)
    merged = grouped_merge(base, deltas, coeffs.float(), segments)
    assert merged.dtype == double
    assert_close(merged, slow_merge(base, deltas, coeffs.float(), owner))


# --- properties
numbers = st.floats(-10, 10, allow_nan=False, width=32)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_the_merge_is_linear_in_the_coefficients_and_the_gradient_its_transpose(data):
    widths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    groups = [min(n, data.draw(st.integers(0, 2))) for n in range(len(widths))]
    groups = [sorted(set(groups)).index(group) for group in groups]
    layout = layout_of(**{f"tensor{n}": (width,) for n, width in enumerate(widths)})
    segments, num_tasks = Segments.of(layout.bounds, groups), data.draw(st.integers(1, 4))
    seed, size = data.draw(st.integers(0, 99)), layout.size
    base, grad, *deltas = normal(2 + num_tasks, size, seed=seed)
    deltas = torch.stack(deltas)
    a, b = normal(2, num_tasks, segments.num_groups, seed=seed + 1)
    x, y = data.draw(numbers), data.draw(numbers)

    def moved(coeffs):
        return grouped_merge(base, deltas, coeffs, segments) - base

    assert_close(moved(x * a + y * b), x * moved(a) + y * moved(b), rtol=1e-9, atol=1e-9)
    inner = grouped_inner(grad, deltas, segments)
    assert_close(grad @ moved(a), (inner * a).sum(), rtol=1e-9, atol=1e-9)
    assert torch.equal(moved(torch.zeros_like(a)), torch.zeros_like(base))


# --- autograd
@pytest.mark.parametrize("table", ["a group that comes back", "an empty tensor", "one number"])
def test_autograd_agrees_with_finite_differences(table):
    base, deltas, coeffs, _, segments = (
        x.cpu() if isinstance(x, torch.Tensor) else x for x in case(table, 3, double)
    )
    base.requires_grad_()
    coeffs.requires_grad_()
    torch.autograd.gradcheck(lambda b, c: grouped_merge(b, deltas, c, segments), (base, coeffs))


def test_a_merge_into_a_buffer_is_outside_the_graph_and_says_so():
    base, deltas, coeffs, _, segments = case("a group each", 2)
    out = torch.empty_like(base)
    with refuses("`out` records no gradient; detach, or give no out"):
        grouped_merge(base, deltas, coeffs.requires_grad_(), segments, out=out)
    with torch.no_grad():
        assert not grouped_merge(base, deltas, coeffs, segments, out=out).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_merge_and_its_gradient_stand_in_a_cuda_graph():
    base, deltas, coeffs, owner, segments = case("awkward", 3)
    out, graph = torch.empty_like(base), torch.cuda.CUDAGraph()

    def step():
        grouped_merge(base, deltas, coeffs, segments, out=out, validate=False)
        return grouped_inner(out, deltas, segments)

    step()  # compiles, and uploads the table of blocks
    with torch.cuda.graph(graph):
        inner = step()
    coeffs *= 2
    graph.replay()
    assert_close(out, slow_merge(base, deltas, coeffs, owner).float())
    assert_close(inner, slow_inner(out, deltas, coeffs.shape[1], owner).float())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_models_of_more_than_two_to_the_31_numbers(monkeypatch):
    monkeypatch.setattr(merge, "BLOCK", 4096)
    size = 1 << 29
    deltas = torch.zeros(5, size, dtype=brain, device=DEVICE)
    deltas[:, -1] = torch.arange(1, 6)
    base, segments = torch.zeros(size, device=DEVICE), Segments(((0, size, 0),))
    merged = grouped_merge(base, deltas, torch.ones(5, 1, device=DEVICE), segments)
    assert merged[-1].item() == 15 and merged[:-1].abs().max() == 0
    assert grouped_inner(merged, deltas, segments)[:, 0].tolist() == [15, 30, 45, 60, 75]


# --- segments and blocks
@tables
def test_the_rows_between_two_places_hold_every_number_there_once(table):
    *_, owner, segments = case(table, 1)
    edges = [0, 1, 2, 3, 41, segments.size // 2, segments.size - 1, segments.size]
    for low, high in combinations([edge for edge in edges if 0 <= edge <= segments.size], 2):
        rows = segments.within(low, high)
        places = [place for start, stop, _ in rows for place in range(start, stop)]
        assert places == list(range(low, high))
        assert all(set(owner[start:stop].tolist()) == {group} for start, stop, group in rows)
        assert all(start < stop for start, stop, _ in rows)


@tables
def test_blocks_hold_every_parameter_once_and_only_one_group(table):
    *_, owner, segments = case(table, 1)
    rows, starts = block_table(segments, 256, torch.device("cpu"))
    places = [place for low, high, _ in rows.tolist() for place in range(low, high)]
    assert sorted(places) == list(range(segments.size))
    for low, high, group in rows.tolist():
        assert set(owner[low:high].tolist()) == {group}
        assert low // 256 == (high - 1) // 256  # inside one aligned stretch of 256
    for group, (first, last) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        assert set(rows[first:last, 2].tolist()) <= {group}


def test_neighbours_of_one_group_are_one_stretch_and_no_partition_is_refused():
    segments = Segments.of([(0, 2), (2, 5), (5, 6), (6, 9)], [0, 0, 1, 0])
    assert segments.rows == ((0, 5, 0), (5, 6, 1), (6, 9, 0))
    assert (segments.num_groups, segments.size) == (2, 9)
    for bounds in ([(0, 2), (3, 5)], [(0, 2), (1, 5)], [(1, 2), (2, 5)]):
        with refuses("tensors must lie end to end from 0, got one at"):
            Segments.of(bounds, [0, 1])
    for groups in ([0, 2], [1, 1], [-1, 0]):
        with refuses(r"numbered 0..G-1 without a gap; got \[-?\d"):
            Segments.of([(0, 2), (2, 5)], groups)
    with refuses("2 tensors but 1 groups; give one per tensor"):
        Segments.of([(0, 2), (2, 5)], [0])


# --- bad input
GAPS = "must be neighbours in memory; call .contiguous"
REFUSED = {  # what is given instead, and the message
    "coefficients [T, G] transposed": (
        {"coeffs": torch.zeros(3, 2)},
        r"\[T, G\] = \[2, 3\], .*, got \[3, 2",
    ),
    "coefficients for fewer groups": ({"coeffs": torch.zeros(2, 1)}, r"got \[2, 1\]"),
    "another layout": (
        {"segments": Segments.of([(0, 4), (4, 5), (5, 6)], [0, 1, 2])},
        "segments end at 6, deltas have 12 columns, the vector has shape",
    ),
    "no tasks": ({"deltas": torch.zeros(0, 12), "coeffs": torch.zeros(0, 3)}, "hold no task"),
    "mixed float64": (
        {"deltas": torch.zeros(2, 12, dtype=double)},
        r"cannot mix \['torch.float32', 'torch.float64'\]: vector and deltas may be",
    ),
    "NaN": ({"coeffs": torch.full((2, 3), NAN)}, "NaN or inf; a fit .* a smaller lr"),
    "inf": ({"coeffs": torch.full((2, 3), INF)}, "NaN or inf"),
    "gaps in the base": ({"base": torch.zeros(12, 2)[:, 0]}, GAPS),
    "gaps in the deltas": ({"deltas": torch.zeros(12, 2).T}, GAPS),
    "another output": (
        {"out": torch.zeros(12, dtype=double)},
        r"out must be like base, \[12\] of torch.float32 on .*, got \[12\] of",
    ),
    "a strided output": ({"out": torch.zeros(12, 2)[:, 0]}, GAPS),
    "two devices": ({"coeffs": torch.zeros(2, 3).to("meta")}, "lie on .*meta.*; move them to one"),
    "a backend": ({"backend": "cuda"}, "must be one of auto, torch, triton, got 'cuda'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_the_cure(change, message):
    base, deltas, coeffs, _, segments = case("a group each", 2)
    given = {"base": base, "deltas": deltas, "coeffs": coeffs, "segments": segments}
    moved = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in change.items()
    }
    with refuses(message):
        inspect.unwrap(grouped_merge)(**given | moved)


def test_coefficients_that_are_not_finite_may_pass_unchecked():
    base, deltas, coeffs, _, segments = case("a group each", 2)
    coeffs[1, 2] = NAN
    merged = grouped_merge(base, deltas, coeffs, segments, validate=False)
    assert not merged[segments.rows[2][0] :].isfinite().any()


def test_triton_is_refused_for_float64_and_without_a_gpu(monkeypatch):
    base, deltas, coeffs, _, segments = case("one tensor", 1, double)
    with refuses("computes in float32; say backend='torch'|not installed"):
        grouped_merge(base, deltas, coeffs, segments, backend="triton")
    monkeypatch.setattr(backend_module, "INTERPRETED", False)
    if DEVICE == "cpu" and triton:
        with refuses("needs tensors on a GPU, got cpu.*TRITON_INTERPRET=1"):
            grouped_merge(base.float(), deltas.float(), coeffs, segments, backend="triton")


FRESH = """
import os, signal, sys
sys.modules["triton"] = None  # importing it now fails, as where it is not installed
import torch
from divmerge_core.kernels.divergence import fused_divergence
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.kernels.threads import SHARED

given = torch.ones(3), torch.ones(2, 3), torch.ones(2, 1), Segments(((0, 3, 0),))
assert grouped_merge(*given).tolist() == [3, 3, 3]
assert grouped_inner(given[0], given[1], given[3]).tolist() == [[3], [3]]
logits = torch.zeros(2, 3, requires_grad=True)
fused_divergence(torch.eye(2, 3), logits).sum().backward()
assert logits.grad.abs().sum() > 0
for call in (grouped_merge, lambda *_, **how: fused_divergence(torch.eye(2, 3), logits, **how)):
    try:
        call(*given, backend="triton")
    except ValueError as error:
        print(error)

base, deltas, segments = torch.ones(5), torch.ones(2, 5), Segments(((0, 3, 0), (3, 5, 1)))

@torch.compile(backend="eager", fullgraph=True)
def step(coeffs):
    out = torch.empty_like(base)
    grouped_merge(base, deltas, coeffs.detach() / 2, segments, out=out, backend="torch",
                  validate=False)
    return out * 2

assert step(torch.tensor([[2.0, 4.0], [2.0, 4.0]])).tolist() == [6, 6, 6, 10, 10]
print("one graph")

torch.set_num_threads(2)
base, deltas, segments = torch.ones(SHARED), torch.ones(2, SHARED), Segments(((0, SHARED, 0),))

def merged():
    return grouped_merge(base, deltas, torch.ones(2, 1), segments)[-1].item()

assert merged() == 3  # the parent's threads have run
if hasattr(os, "fork"):
    if (child := os.fork()) == 0:
        signal.alarm(30)  # ends a child that waits for ever
        try:
            os._exit(int(merged()))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
print("forked")
"""


def test_a_fresh_process_without_triton_compiles_a_step_and_may_fork():
    """In its own process: here shape checks wrap every function. A child has its own threads."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("package triton, which is not installed; pip install triton") == 2
    assert done.stdout.endswith("one graph\nforked\n")


# --- compiled code
STORED = {"*fp32": 4, "*bf16": 2, "*i8": 1}  # deltas, and bytes of each
POINTERS = ("base", "grad", "scales", "coeffs", "partial", "out")
INTEGERS = ("stride", "num_scales", "num_groups", "num_blocks", "T")
COMPILED = {
    (name, target, stored): compiled.Case(
        f"divmerge_core.kernels.merge:{name}_kernel",
        {"table": "*i64", "deltas": stored, **dict.fromkeys(POINTERS, "*fp32")}
        | dict.fromkeys(INTEGERS, "i32"),
        {"INT8": stored == "*i8", "ROWS": 4096 // SCALE_BLOCK, "ROW": SCALE_BLOCK},
        num_warps=8,
        target=target,
    )
    for name in ("merge", "inner")
    for target in compiled.TARGETS
    for stored in STORED
}


@pytest.fixture(scope="module")
def code():
    """What the compilers made of every case, all of them compiled at once."""
    return compiled.reports_or_skip(COMPILED)


@pytest.mark.parametrize("key", COMPILED, ids=lambda key: "-".join(key))
def test_compiled_code_keeps_its_registers_and_moves_128_bits_at_a_time(key, code):
    """4096 numbers a program, of which every thread reads neighbours: 16, or 8 on AMD."""
    (name, target, stored), report = key, code[key]
    assert report.spills == 0 and report.registers <= 96
    each = 8 if target == "gfx942" else 16
    assert report.loads[128] >= each * 4 // 16 + each * STORED[stored] // 16
    assert report.stores.get(128, 0) == (each * 4 // 16 if name == "merge" else 0)
