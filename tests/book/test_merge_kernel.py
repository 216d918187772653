"""The merge kernel and its gradient, on every backend, against sums over single numbers.

Without a GPU, Triton's kernels run in its interpreter.
"""

import os
import subprocess
import sys
from functools import partial
from itertools import combinations, product

import compiled
import pytest
import torch
from divmerge_book.kernel_benchmarks.merge_bandwidth import bytes_moved
from helpers import layout_of, shared_by
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from divmerge_core.kernels import delta_storage, merge
from divmerge_core.kernels.backend import triton
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
skips = {
    "torch": (),
    "triton": pytest.mark.skipif(triton is None, reason="Triton is not installed"),
}
BACKENDS = [pytest.param(name, marks=skip, id=name) for name, skip in skips.items()]
BACKENDS += ["torch on 2 threads"]
CASES = [
    pytest.param(
        name, *row, marks=skips[name], id=f"{name}-{row[0]}-{row[1]}".replace("torch.", "")
    )
    for name, row in product(skips, PRECISIONS)
    if (name, row[0]) != ("triton", double)
]
CASES += [("torch on 2 threads", *row) for row in PRECISIONS[:4:3]]

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
    "awkward": ([(129, 7), (1,), (1271,), (1,), (3, 3, 3)], [0, 1, 1, 0, 2]),
}
tables = pytest.mark.parametrize("table", TABLES)
models = pytest.mark.parametrize(
    ("table", "num_tasks"),
    [*((table, 2) for table in TABLES), ("one number", 1), ("awkward", 1), ("awkward", 20)],
)
backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
precisions = pytest.mark.parametrize(
    ("backend", "kind", "stored", "rtol", "atol"), CASES, indirect=["backend"]
)


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

    def normal(dtype, *shape: int):
        return torch.randn(*shape, generator=generator, dtype=double).to(DEVICE, dtype)

    widths = [stop - start for start, stop in layout.bounds]
    owner = torch.tensor(groups).repeat_interleave(torch.tensor(widths)).to(DEVICE)
    segments = Segments.of(layout.bounds, groups)
    coeffs = normal(torch.promote_types(kind, single), num_tasks, 1 + max(groups))
    deltas = normal(stored or kind, num_tasks, layout.size)
    return normal(kind, layout.size), deltas, coeffs, owner, segments


def slow_merge(base, deltas, coeffs, owner):
    """theta_i = base_i + sum_t Lambda[t, group of i] tau_{t,i}, in float64."""
    return base.double() + (coeffs.double()[:, owner] * deltas.double()).sum(0)


def slow_inner(grad, deltas, num_groups, owner):
    """dL/dLambda[t, g] = sum over the i of group g of grad_i tau_{t,i}, in float64."""
    products = grad.double() * deltas.double()
    columns = [(products * (owner == group)).sum(1) for group in range(num_groups)]
    return torch.stack(columns, dim=1)


def run(script: str) -> str:
    """What a script prints in a fresh process."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the formulas ---------------------------------------------------------------------------------


@models
@precisions
def test_the_merge_is_the_sum(table, num_tasks, backend, kind, stored, rtol, atol):
    base, deltas, coeffs, owner, segments = case(table, num_tasks, kind, stored)
    merged = grouped_merge(base, deltas, coeffs, segments, backend=backend)
    expected = slow_merge(base, deltas, coeffs, owner)
    assert merged.dtype == kind
    if (backend, kind, DEVICE) == ("triton", brain, "cpu"):
        rtol *= 2  # the interpreter cuts bfloat16 off where the hardware rounds
    assert_close(merged.double(), expected, rtol=rtol, atol=atol * num_tasks)


@models
@precisions
def test_the_gradient_is_the_sum(table, num_tasks, backend, kind, stored, rtol, atol):
    grad, deltas, coeffs, owner, segments = case(table, num_tasks, kind, stored)
    found = grouped_inner(grad, deltas, segments, backend=backend)
    expected = slow_inner(grad, deltas, coeffs.shape[1], owner)
    assert found.dtype == torch.promote_types(kind, single)  # summed wide, whatever came in
    exact = 1e-12 if kind == double else 2e-6
    assert_close(found.double(), expected, rtol=exact, atol=exact * max(1, len(grad)) ** 0.5)


def test_the_sum_by_hand():
    segments = Segments(((0, 2, 0), (2, 3, 1)))
    base, deltas = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    coeffs = torch.tensor([[2.0, 10.0], [3.0, 100.0]])
    merged = grouped_merge(base, deltas, coeffs, segments)
    assert merged.tolist() == [1 + 2, 2 + 3, 3 + 20 + 100]
    assert grouped_inner(base, deltas, segments).tolist() == [[1, 6], [2, 3]]


@backends
def test_sums_in_half_precision_would_be_far_off(backend):
    """Ten thousand products of ones: bfloat16 cannot count beyond 256."""
    ones, segments = torch.ones(10_000, dtype=brain, device=DEVICE), Segments(((0, 10_000, 0),))
    assert grouped_inner(ones, ones[None], segments, backend=backend).item() == 10_000


@tables
@backends
def test_what_stood_in_the_output_is_immaterial(table, backend):
    base, deltas, coeffs, _, segments = case(table, 2)
    out = torch.full_like(base, float("nan"))
    given = grouped_merge(base, deltas, coeffs, segments, out=out, backend=backend)
    assert given is out
    again = grouped_merge(base, deltas, coeffs, segments, backend=backend)
    assert_close(out, again, rtol=0, atol=0)


@tables
@backends
def test_inputs_are_left_alone(table, backend):
    given = case(table, 2)
    base, deltas, coeffs, _, segments = given
    before = [tensor.clone() for tensor in given[:3]]
    grouped_merge(base, deltas, coeffs, segments, backend=backend)
    grouped_inner(base, deltas, segments, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, given[:3], strict=True))


@backends
def test_a_store_that_is_misaligned_or_has_longer_rows_gives_the_same(backend):
    base, deltas, coeffs, _, segments = case("awkward", 3)
    roomy = torch.full((3, deltas.shape[1] + 6), float("nan"), device=DEVICE)
    shifted = torch.full((len(base) + 1,), float("nan"), device=DEVICE)
    roomy[:, 5:-1], shifted[1:] = deltas, base
    out = torch.empty_like(shifted)[1:]
    grouped_merge(shifted[1:], roomy[:, 5:-1], coeffs, segments, out=out, backend=backend)
    assert_close(out, grouped_merge(base, deltas, coeffs, segments, backend=backend))
    found = grouped_inner(shifted[1:], roomy[:, 5:-1], segments, backend=backend)
    assert_close(found, grouped_inner(base, deltas, segments, backend=backend))


@backends
def test_the_gradient_is_bitwise_the_same_on_every_run(backend):
    grad, deltas, _, _, segments = case("awkward", 5)
    first = grouped_inner(grad, deltas, segments, backend=backend)
    again = [grouped_inner(grad, deltas, segments, backend=backend) for _ in range(5)]
    assert all(torch.equal(first, other) for other in again)


def test_coefficients_of_another_precision_are_converted():
    base, deltas, coeffs, owner, segments = case("a group each", 2, double)
    merged = grouped_merge(base, deltas, coeffs.float(), segments)
    assert merged.dtype == double
    assert_close(merged, slow_merge(base, deltas, coeffs.float(), owner))


def test_threads_share_the_work_and_change_nothing():
    bounds = [(0, 200_001), (200_001, 200_002), (200_002, 400_000)]
    segments, generator = Segments.of(bounds, [0, 1, 0]), torch.Generator().manual_seed(0)
    base, deltas = torch.randn(400_000, generator=generator), torch.randn(3, 400_000)
    coeffs = torch.randn(3, 2, generator=generator)
    alone = grouped_merge(base, deltas, coeffs, segments), grouped_inner(base, deltas, segments)
    with shared_by(3):
        together = grouped_merge(base, deltas, coeffs, segments)
        inner = [grouped_inner(base, deltas, segments) for _ in range(5)]
    assert_close(together, alone[0])
    assert_close(inner[0], alone[1], rtol=1e-4, atol=1e-2)
    assert all(torch.equal(inner[0], other) for other in inner)


FORKED = """
import os, signal, torch
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.threads import SHARED
from divmerge_core.kernels.segments import Segments
torch.set_num_threads(2)
base, deltas, segments = torch.ones(SHARED), torch.ones(2, SHARED), Segments(((0, SHARED, 0),))

def merged():
    return grouped_merge(base, deltas, torch.ones(2, 1), segments)[-1].item()

assert merged() == 3  # the parent's threads have run
if (child := os.fork()) == 0:
    signal.alarm(30)  # ends a child that waits for ever
    try:
        os._exit(int(merged()))
    finally:
        os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_has_threads_of_its_own():
    """Those of its parent are not in it, and work left to them would never be done."""
    assert run(FORKED) == "3\n"


# --- properties -----------------------------------------------------------------------------------

numbers = st.floats(-10, 10, allow_nan=False, width=32)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_the_merge_is_linear_in_the_coefficients_and_the_gradient_its_transpose(data):
    widths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    groups = [min(n, data.draw(st.integers(0, 2))) for n in range(len(widths))]
    groups = [sorted(set(groups)).index(group) for group in groups]
    layout = layout_of(**{f"tensor{n}": (width,) for n, width in enumerate(widths)})
    segments, num_tasks = Segments.of(layout.bounds, groups), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=double)

    base, deltas, grad = normal(layout.size), normal(num_tasks, layout.size), normal(layout.size)
    a, b = normal(2, num_tasks, segments.num_groups)
    x, y = data.draw(numbers), data.draw(numbers)

    def moved(coeffs):
        return grouped_merge(base, deltas, coeffs, segments) - base

    assert_close(moved(x * a + y * b), x * moved(a) + y * moved(b), rtol=1e-9, atol=1e-9)
    inner = grouped_inner(grad, deltas, segments)
    assert_close(grad @ moved(a), (inner * a).sum(), rtol=1e-9, atol=1e-9)
    assert torch.equal(moved(torch.zeros_like(a)), torch.zeros_like(base))


# --- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["a group that comes back", "an empty tensor", "one number"])
def test_autograd_agrees_with_finite_differences(table):
    base, deltas, coeffs, _, segments = (
        x.cpu() if isinstance(x, torch.Tensor) else x for x in case(table, 3, double)
    )
    base.requires_grad_()
    coeffs.requires_grad_()
    torch.autograd.gradcheck(lambda b, c: grouped_merge(b, deltas, c, segments), (base, coeffs))


@backends
def test_autograd_gives_the_gradient_on_every_backend(backend):
    base, deltas, coeffs, _, segments = case("awkward", 3)
    coeffs.requires_grad_()
    slope = torch.linspace(-1, 1, len(base), device=DEVICE)
    (grouped_merge(base, deltas, coeffs, segments, backend=backend) * slope).sum().backward()
    assert_close(coeffs.grad, grouped_inner(slope, deltas, segments, backend=backend))


def test_a_merge_into_a_buffer_is_outside_the_graph_and_says_so():
    base, deltas, coeffs, _, segments = case("a group each", 2)
    out = torch.empty_like(base)
    with pytest.raises(ValueError, match="`out` records no gradient; detach, or give no out"):
        grouped_merge(base, deltas, coeffs.requires_grad_(), segments, out=out)
    with torch.no_grad():
        assert not grouped_merge(base, deltas, coeffs, segments, out=out).requires_grad


GRAPH = """
import torch
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.kernels.segments import Segments
base, deltas, segments = torch.ones(5), torch.ones(2, 5), Segments(((0, 3, 0), (3, 5, 1)))

@torch.compile(backend="eager", fullgraph=True)
def step(coeffs):
    out = torch.empty_like(base)
    grouped_merge(base, deltas, coeffs.detach() / 2, segments, out=out, backend="torch",
                  validate=False)
    return out * 2

assert step(torch.tensor([[2.0, 4.0], [2.0, 4.0]])).tolist() == [6, 6, 6, 10, 10]
"""


def test_a_compiled_step_holds_the_merge_in_one_graph():
    run(GRAPH)  # in a process of its own: here, shape checks wrap every function


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


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_a_step_moves_each_number_once(num_tasks):
    """(T + 2) N forward and (T + 1) N backward, where the usual merge moves 5 T N and 4 T^2 N."""
    bounds = [(n * 10_000, (n + 1) * 10_000) for n in range(20)]
    segments, size = Segments.of(bounds, range(20)), 200_000
    base, deltas, coeffs = torch.ones(size), torch.ones(num_tasks, size), torch.ones(num_tasks, 20)
    out = torch.empty_like(base)
    merge_ = partial(grouped_merge, base, deltas, coeffs, segments, out=out, backend="torch")
    inner_ = partial(grouped_inner, base, deltas, segments, backend="torch")
    for call, floor in ((merge_, num_tasks + 2), (inner_, num_tasks + 1)):
        assert floor * size <= bytes_moved(call) / 4 <= 1.1 * floor * size


# --- segments and blocks --------------------------------------------------------------------------


def test_neighbours_of_one_group_are_one_stretch():
    segments = Segments.of([(0, 2), (2, 5), (5, 6), (6, 9)], [0, 0, 1, 0])
    assert segments.rows == ((0, 5, 0), (5, 6, 1), (6, 9, 0))
    assert (segments.num_groups, segments.size) == (2, 9)


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


@pytest.mark.parametrize("bounds", [[(0, 2), (3, 5)], [(0, 2), (1, 5)], [(1, 2), (2, 5)]])
def test_gaps_and_overlaps_are_refused(bounds):
    with pytest.raises(ValueError, match="tensors must lie end to end from 0, got one at"):
        Segments.of(bounds, [0, 1])


@pytest.mark.parametrize("groups", [[0, 2], [1, 1], [-1, 0]])
def test_groups_with_gaps_are_refused(groups):
    with pytest.raises(ValueError, match=r"a group, numbered 0..G-1 without a gap; got \[-?\d"):
        Segments.of([(0, 2), (2, 5)], groups)


def test_a_map_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 tensors but 1 groups; give one per tensor"):
        Segments.of([(0, 2), (2, 5)], [0])


# --- bad input ------------------------------------------------------------------------------------


def refused(message, *, base=None, deltas=None, coeffs=None, segments=None, **options):
    """A merge with one thing wrong is refused with this message."""
    case_base, case_deltas, case_coeffs, _, case_segments = case("a group each", 2)
    with pytest.raises(ValueError, match=message):
        grouped_merge(
            case_base if base is None else base,
            case_deltas if deltas is None else deltas,
            case_coeffs if coeffs is None else coeffs,
            segments or case_segments,
            **options,
        )


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3, 1), (1, 3)])
def test_coefficients_of_the_wrong_shape_are_refused_with_the_right_one(shape):
    base, deltas, _, _, segments = case("a group each", 2)
    with pytest.raises(ValueError, match=r"must be \[T, G\] = \[2, 3\], .*, got \[\d, \d\]"):
        delta_storage.check(base, deltas, segments, torch.zeros(shape))


def test_segments_of_another_layout_are_refused():
    short = Segments.of([(0, 4), (4, 5), (5, 6)], [0, 1, 2])
    refused("segments end at 6, deltas have 12 columns, the vector has shape", segments=short)


def test_no_tasks_are_refused():
    refused("hold no task", deltas=torch.zeros(0, 12), coeffs=torch.zeros(0, 3))


def test_precisions_that_cannot_mix_are_refused():
    refused(
        r"cannot mix \['torch.float32', 'torch.float64'\]: vector and deltas may be",
        deltas=torch.zeros(2, 12, dtype=double, device=DEVICE),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_coefficients_that_are_not_finite_are_refused_unless_told_otherwise(value):
    base, deltas, coeffs, _, segments = case("a group each", 2)
    coeffs[1, 2] = value
    refused("hold NaN or inf; a fit that got there needs a smaller lr", coeffs=coeffs)
    merged = grouped_merge(base, deltas, coeffs, segments, validate=False)
    assert not merged[segments.rows[2][0] :].isfinite().any()


def test_gaps_between_numbers_are_refused():
    gaps = "must be neighbours in memory; call .contiguous"
    refused(gaps, base=torch.zeros(12, 2, device=DEVICE)[:, 0])
    refused(gaps, deltas=torch.zeros(12, 2, device=DEVICE).T)


def test_an_output_unlike_the_base_is_refused():
    out = torch.zeros(12, dtype=double, device=DEVICE)
    refused(r"out must be like base, \[12\] of torch.float32 on .*, got \[12\] of", out=out)


def test_tensors_on_two_devices_are_refused():
    refused("tensors lie on .*meta.*; move them to one device", coeffs=torch.zeros(2, 3).to("meta"))


def test_an_unknown_backend_is_refused_with_the_known_ones():
    refused("backend must be one of auto, torch, triton, got 'cuda'", backend="cuda")


def test_float64_is_not_for_triton():
    base, deltas, coeffs, _, segments = case("one tensor", 1, double)
    with pytest.raises(ValueError, match="computes in float32; say backend='torch'|not installed"):
        grouped_merge(base, deltas, coeffs, segments, backend="triton")


BARE = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
{before}
import torch
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.segments import Segments
given = torch.ones(3), torch.ones(2, 3), torch.ones(2, 1), Segments(((0, 3, 0),))
assert grouped_merge(*given).tolist() == [3, 3, 3]
assert grouped_inner(given[0], given[1], given[3]).tolist() == [[3], [3]]
try:
    grouped_merge(*given, backend="triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("sys.modules['triton'] = None", "needs the package triton, which is not installed"),
        pytest.param("", "needs tensors on a GPU, got cpu", marks=skips["triton"]),
    ],
)
def test_without_triton_or_a_gpu_everything_works_and_triton_is_refused(before, message):
    assert message in run(BARE.format(before=before))


# --- compiled code --------------------------------------------------------------------------------

STORED = {"*fp32": 4, "*bf16": 2, "*i8": 1}  # deltas, and bytes of each
POINTERS = ("base", "grad", "scales", "coeffs", "partial", "out")
INTEGERS = ("stride", "num_scales", "num_groups", "num_blocks", "T")
COMPILED = {
    (name, target, stored): compiled.Case(
        f"divmerge_core.kernels.merge:{name}_kernel",
        {"table": "*i64", "deltas": stored, **dict.fromkeys(POINTERS, "*fp32")}
        | dict.fromkeys(INTEGERS, "i32"),
        {
            "INT8": stored == "*i8",
            "ROWS": 4096 // delta_storage.SCALE_BLOCK,
            "ROW": delta_storage.SCALE_BLOCK,
        },
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
    try:
        return dict(zip(COMPILED, compiled.reports([*COMPILED.values()]), strict=True))
    except compiled.Unavailable as reason:
        pytest.skip(f"the merge kernels' machine code is not checked: {reason}")


@pytest.mark.parametrize("key", COMPILED, ids=lambda key: "-".join(key))
def test_compiled_code_keeps_its_registers_and_moves_128_bits_at_a_time(key, code):
    """4096 numbers a program, of which every thread reads neighbours: 16, or 8 on AMD."""
    (name, target, stored), report = key, code[key]
    assert report.spills == 0 and report.registers <= 96
    each = 8 if target == "gfx942" else 16
    assert report.loads[128] >= each * 4 // 16 + each * STORED[stored] // 16
    assert report.stores.get(128, 0) == (each * 4 // 16 if name == "merge" else 0)
