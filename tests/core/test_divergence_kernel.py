"""The fused divergence: its definition, its kernels against that in float64, and cached experts."""

import inspect
import math
from dataclasses import replace
from functools import partial

import compiled
import pytest
import torch
from helpers import INF, NAN, logit_pairs, one_hot, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels import divergence, divergence_triton
from divmerge_core.kernels.backend import triton
from divmerge_core.kernels.divergence import definition, divergence_and_gradient, fused_divergence
from divmerge_core.kernels.expert_cache import TopKLogProbs, cache_expert, log_softmax

LOG_2, GPU = math.log(2), torch.cuda.is_available()

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
every_kind = pytest.mark.parametrize("kind", divergence.KINDS)
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

ROUNDING = 1e-6  # what float32 costs against float64 in a loss, and in a gradient near 0
# dtype; rtol of the gradient, rounded to that dtype: the interpreter truncates bfloat16
BRAIN = (torch.bfloat16, 2**-8 if GPU else 2**-7)
PRECISIONS = [(torch.float32, ROUNDING), BRAIN, (torch.float16, 2**-11)]
precisions = pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS, ids=str)

# A and V: one of either, none of A; several blocks of rows; two blocks of the gradient's columns
SHAPES = {torch.float32: [(1, 1), (7, 2), (0, 5), (70, 33), (2, 2500)]}
HALF_SHAPES = [(7, 3), (2, 300)]


@pytest.fixture(autouse=True)
def poison():
    """Memory that is allocated without being written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def narrow(monkeypatch):
    """Rows count as wide from 65 classes on, and are taken 128 at a time."""
    monkeypatch.setattr(divergence_triton, "WHOLE_ROW", 64)
    monkeypatch.setattr(divergence_triton, "STEP", 128)


def pair(*shape: int, scale: float = 3.0, seed: int = 0, dtype=torch.float32) -> list[Tensor]:
    """Random logits of an expert and of a merged model not far from it."""
    generator = torch.Generator().manual_seed(seed)
    expert = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
    merged = expert + torch.randn(*shape, dtype=torch.float64, generator=generator)
    return [expert.to(dtype), merged.to(dtype)]


pair64 = partial(pair, dtype=torch.float64)


def device_for(backend: str) -> str:
    return "cuda" if GPU and backend == "triton" else "cpu"


def run(
    backend: str, expert, merged: Tensor, incoming: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Loss, and gradient in `merged` for the incoming one (default: 1); Triton on a GPU if any."""
    device = device_for(backend)
    if isinstance(expert, TopKLogProbs):
        expert = replace(expert, **{k: v.to(device) for k, v in vars(expert).items()})
    else:
        expert = expert.to(device)
    merged = merged.to(device).detach().requires_grad_()
    loss = fused_divergence(expert, merged, backend=backend, **options)
    loss.backward(torch.ones_like(loss) if incoming is None else incoming.to(loss))
    return loss.detach().cpu(), merged.grad.cpu()


def run_at_once(
    backend: str, expert, merged: Tensor, weight: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """The same by `divergence_and_gradient`."""
    device = device_for(backend)
    weight = weight if weight is None else weight.to(device)
    sides = expert.to(device), merged.to(device)
    loss, gradient = divergence_and_gradient(*sides, backend=backend, weight=weight, **options)
    return loss.cpu(), gradient.cpu()


both_calls = pytest.mark.parametrize("call", [run, run_at_once])


def exact(expert: Tensor, merged: Tensor, kind: str = "js", beta: float = 0.5, weight=None):
    """The definition on the same numbers in float64."""
    loss, gradient = definition(expert.double(), merged.double(), kind, beta)
    return loss, gradient if weight is None else weight[:, None] * gradient


def assert_exact(found, expected, rtol: float = ROUNDING) -> None:
    """Loss and gradient are those in float64, up to what rounding may cost."""
    (loss, gradient), (exact_loss, exact_gradient) = found, expected
    assert_close(loss.double(), exact_loss, rtol=ROUNDING, atol=ROUNDING)
    assert_close(gradient.double(), exact_gradient, rtol=rtol, atol=ROUNDING)


# --- the definition
@every_kind
def test_the_closed_gradient_is_that_of_autograd(kind):
    expert, merged = pair64(5, 7)
    expert[1, :3] = merged[1, :3] = -INF
    merged.requires_grad_()
    loss = DIVERGENCES[kind](expert, merged)
    loss.sum().backward()
    assert_close(definition(expert, merged.detach(), kind), (loss.detach(), merged.grad))
    assert DIVERGENCES.facts[kind]["fused"] == kind


def test_two_classes_by_hand_and_the_limits_of_skewed_js():
    """p = (1/2, 1/2), q = (3/4, 1/4) and beta = 1/4: m = (9/16, 7/16). The limits are both KL."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    to_m = 0.5 * math.log(8 / 9) + 0.5 * math.log(8 / 7)
    from_q = 0.75 * math.log(4 / 3) + 0.25 * math.log(4 / 7)
    loss, gradient = definition(p, q, "js", 0.25)
    assert loss.item() == pytest.approx(0.75 * to_m + 0.25 * from_q, rel=1e-6)
    slope = 0.25 * 0.75 * (math.log(4 / 3) - from_q)
    assert gradient[0].tolist() == pytest.approx([slope, -slope], rel=1e-5)
    sides = pair64(5, 7, scale=1.0)
    for beta, kind in ((1e-6, "reverse_kl"), (1 - 1e-6, "kl")):
        found = [number / 1e-6 for number in definition(*sides, "js", beta)]
        assert_close(found, list(definition(*sides, kind)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [*({"kind": k} for k in divergence.KINDS), {"beta": 0.2}])
def test_gradients_agree_with_finite_differences_also_where_the_loss_is_used_twice(options):
    expert, merged = pair64(3, 4)
    weight = torch.tensor([0.3, -2.0, 0.0], dtype=torch.float64)

    def twice(logits: Tensor) -> Tensor:
        loss = fused_divergence(expert, logits, **options)
        return (weight * loss + loss**2).sum() + 3 * fused_divergence(expert, 2 * logits, **options)

    assert torch.autograd.gradcheck(twice, merged.requires_grad_())


@every_backend
def test_a_graph_serves_two_backward_passes_and_no_second_derivative(backend):
    expert, merged = (logits.to(device_for(backend)) for logits in pair(3, 4))
    loss = fused_divergence(expert, merged.requires_grad_(), backend=backend)
    loss.sum().backward(retain_graph=True)
    once = merged.grad.clone()
    loss.sum().backward(retain_graph=True)
    assert_close(once.double(), exact(expert, merged.detach())[1], rtol=ROUNDING, atol=ROUNDING)
    assert_close(merged.grad, 2 * once)
    with pytest.raises(RuntimeError, match="differentiable once; leave create_graph out"):
        torch.autograd.grad(loss.sum(), merged, create_graph=True)


# --- the kernels against the definition in float64
@needs_triton
@every_kind
@precisions
@both_calls
def test_the_kernels_are_the_definition(call, kind, dtype, rtol):
    for shape in SHAPES.get(dtype, HALF_SHAPES):
        sides = pair(*shape, dtype=dtype)
        weight = torch.randn(shape[0], generator=torch.manual_seed(1))
        loss, gradient = call("triton", *sides, weight, kind=kind)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        assert_exact((loss, gradient), exact(*sides, kind, weight=weight), rtol)


@needs_triton
@every_kind
@both_calls
def test_wide_rows_are_the_definition(narrow, monkeypatch, call, kind):
    monkeypatch.setattr(divergence_triton, "whole_rows", None)
    for num_classes in (65, 128, 300):
        sides, weight = pair(17, num_classes), torch.linspace(-1, 1, 17)
        assert_exact(call("triton", *sides, weight, kind=kind), exact(*sides, kind, weight=weight))


@every_backend
@both_calls
def test_both_backends_take_the_skew_and_rows_wider_than_registers_hold(backend, call):
    for beta in (1e-3, 0.2, 0.9):
        sides = pair(3, 5)
        assert_exact(call(backend, *sides, beta=beta), exact(*sides, "js", beta))
    sides = pair(2, divergence_triton.WHOLE_ROW + 7)
    assert_exact(call(backend, *sides, beta=0.2), exact(*sides, "js", 0.2))


def views(logits: Tensor) -> list[Tensor]:
    """The same matrix with a larger row stride, an offset of one number, and transposed."""
    width = logits.shape[1]
    return [
        torch.cat([logits, logits], dim=1)[:, :width],
        torch.cat([logits[:, :1], logits], dim=1)[:, 1:],
        logits.T.contiguous().T,
        logits[:1].expand(len(logits), width),
    ]


@every_backend
@both_calls
def test_strides_and_alignment_do_not_matter(narrow, backend, call):
    for num_classes in (1, 32, 300):
        expert, merged = pair(5, num_classes)
        for left, right in zip(views(expert), views(merged), strict=True):
            plain = call(backend, left.contiguous(), right.contiguous())
            assert_close(call(backend, left, right), plain, rtol=0, atol=0)


@every_backend
@both_calls
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 0, 7)], ids=str)
def test_one_number_per_position_whatever_the_leading_axes(backend, call, shape):
    expert, merged = pair(*shape)
    weight = torch.arange(1.0, 1 + merged[..., 0].numel()).view(shape[:-1])
    loss, gradient = call(backend, expert.bfloat16(), merged, weight)  # precisions may differ
    assert loss.shape == shape[:-1] and gradient.shape == shape and gradient.dtype == torch.float32
    flat = expert.bfloat16().reshape(-1, 7), merged.reshape(-1, 7)
    expected = exact(*flat, weight=weight.flatten())
    assert_exact((loss.flatten(), gradient.reshape(-1, 7)), expected)
    double = call("auto", expert.double(), merged.double())  # float64 stays float64
    assert double[0].dtype == double[1].dtype == torch.float64


# --- loss and gradient at once
@every_backend
@every_kind
def test_one_call_agrees_with_autograd_on_every_special_row(narrow, backend, kind):
    for num_classes in (7, 64, 300):
        expert, merged = pair(8, num_classes)
        expert[0, 0] = merged[1, 0] = -INF  # infinite losses, a gradient of NaN
        expert[2, :5] = merged[2, :5] = -INF
        expert[3], merged[3] = (one_hot(side, classes=num_classes)[0] for side in (0, 1))
        merged[4] = expert[4]
        weight = torch.linspace(-1, 1, 8)
        autograd = run(backend, expert, merged, weight, kind=kind)
        at_once = run_at_once(backend, expert, merged, weight, kind=kind)
        assert_close(at_once, autograd, rtol=1e-6, atol=1e-7, equal_nan=True)


@needs_triton
def test_one_call_takes_one_launch_where_a_row_fits(narrow, monkeypatch):
    made, launch = [], divergence_triton.launch
    monkeypatch.setattr(divergence_triton, "launch", lambda *a: (made.append(a[0]), launch(*a)))
    for num_classes, launches in ((64, 1), (65, 2)):
        made.clear()
        run_at_once("triton", *pair(2, num_classes))
        assert len(made) == launches


@every_backend
def test_no_graph_is_made_and_inputs_are_left_alone(backend):
    sides = [logits.to(device_for(backend)).requires_grad_() for logits in pair(5, 7)]
    before = [logits.detach().clone() for logits in sides]
    loss, gradient = divergence_and_gradient(*sides, backend=backend)
    assert not loss.requires_grad and not gradient.requires_grad
    run(backend, *(logits.detach() for logits in sides))
    assert all(map(torch.equal, sides, before))


@pytest.mark.parametrize("recording", [True, False])
def test_a_gradient_that_is_not_wanted_is_not_computed(recording, monkeypatch):
    asked, plain = [], definition

    def noted(*args, differentiate):
        asked.append(differentiate)
        return plain(*args, differentiate=differentiate)

    monkeypatch.setattr(divergence, "definition", noted)
    expert, merged = pair64(5, 7)
    with torch.set_grad_enabled(recording):  # an expert under no_grad may require a gradient
        sides = (expert, merged) if recording else (expert.requires_grad_(), merged)
        loss = fused_divergence(sides[0], merged if recording else merged.requires_grad_())
    assert asked == [False] and not loss.requires_grad
    assert_close(loss, exact(expert.detach(), merged.detach())[0])


# --- precision
@every_backend
def test_half_precision_is_widened_before_any_arithmetic(backend):
    """Rounding log-probabilities before widening them costs percents of the gradient."""
    expert, noise = pair64(4, 1000, scale=1.0)[0], pair64(4, 1000, scale=0.1, seed=1)[0]
    expert, merged = expert.bfloat16(), (expert + noise).bfloat16()
    _, slope = exact(expert, merged)
    _, gradient = run(backend, expert, merged)
    log_p, log_q = (logits.log_softmax(-1).bfloat16().double() for logits in (expert, merged))
    early = log_q.exp() * (log_q - torch.logaddexp(log_p, log_q) + LOG_2) / 2
    early = early - log_q.exp() * early.sum(-1, keepdim=True)
    assert (gradient.double() - slope).norm() / slope.norm() < 0.005  # its own last digit
    assert (early - slope).norm() / slope.norm() > 0.1


@every_backend
@both_calls
def test_a_large_incoming_gradient_is_multiplied_in_before_rounding(backend, call):
    """Loss scaling rescues float16 gradients below 6e-8 only if nothing was rounded before."""
    sides = pair(2, 1000, scale=5.0, dtype=torch.float16)
    _, slope = exact(*sides)
    _, gradient = call(backend, *sides, torch.full((2,), 2.0**16))
    small = slope.abs() < 6e-8
    assert small.sum() > 100
    assert_close(gradient.double()[small] / 2**16, slope[small], rtol=1e-3, atol=1e-11)


# --- robustness
@every_backend
@every_kind
def test_extreme_logits_give_finite_value_and_gradient(narrow, backend, kind):
    for dtype in (torch.float32, torch.bfloat16):
        for winner, classes in ((0, 3), (1, 3), (1, 200)):
            sides = [one_hot(side, classes=classes).to(dtype) for side in (0, winner)]
            loss, gradient = run(backend, *sides, kind=kind)
            assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
            assert_exact((loss, gradient), exact(*sides, kind), rtol=2**-7)


@every_backend
@every_kind
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
def test_shifts_masks_and_equal_rows(narrow, backend, kind):
    expert, merged = ((64 * logits).round() / 64 for logits in pair(5, 33))
    plain = run(backend, expert, merged, kind=kind)
    moved = run(backend, expert + 4096, merged - 4096, kind=kind)  # exact in float32
    assert_close(moved, plain, rtol=1e-6, atol=1e-6)
    for shift, atol in ((0.0, 5e-7), (1e4, 2e-3), (-1e4, 2e-3)):  # float32 near 1e4: steps of 1e-3
        equal = run(backend, expert, expert + shift, kind=kind)
        assert_close(equal, (torch.zeros(5), torch.zeros(5, 33)), rtol=0, atol=atol)
    lowest = torch.finfo(torch.float32).min  # it masks as -inf does, and a whole row is uniform
    for value, width in ((-INF, 2), (-INF, 129), (lowest, 2)):  # 129: a whole step of a wide row
        mask = torch.full((5, width), value)
        masked = [torch.cat([mask, logits], -1) for logits in (expert, merged)]
        loss, gradient = run(backend, *masked, kind=kind)
        assert_exact((loss, gradient[:, width:]), exact(expert, merged, kind))
        assert (gradient[:, :width] == 0).all()
    uniform = run(backend, mask, mask, kind=kind)
    assert_close(uniform, (torch.zeros(5), torch.zeros(5, 2)), rtol=0, atol=1e-7)
    loss, gradient = run(backend, torch.tensor([[5.0], [-1e4]]), torch.zeros(2, 1), kind=kind)
    assert loss.tolist() == [0, 0] and gradient.tolist() == [[0], [0]]


@every_backend
@every_kind
@pytest.mark.parametrize("side", [0, 1], ids=["expert", "merged"])
def test_a_mask_on_one_side_leaves_js_finite_and_the_kl_of_the_other_infinite(backend, kind, side):
    """Two rows over three classes; in the first, one side masks the first class."""
    sides = torch.zeros(2, 3), torch.zeros(2, 3)
    sides[side][0, 0] = -INF
    p, q = (logits.softmax(-1) for logits in sides)
    for beta in (0.1, 0.5) if kind == "js" else ():
        m = (1 - beta) * p + beta * q
        slope = beta * torch.xlogy(q, q / m)
        by_hand = ((1 - beta) * torch.xlogy(p, p / m) + slope).sum(-1)
        expected = by_hand, slope - q * slope.sum(-1, keepdim=True)
        assert_close(run(backend, *sides, beta=beta), expected, rtol=1e-6, atol=1e-7)
    if kind == "js":
        return
    loss, gradient = run(backend, *sides, kind=kind)
    infinite = kind == "jeffreys" or (kind == "kl") == (side == 1)
    assert loss.tolist() == pytest.approx([INF if infinite else math.log(3 / 2), 0])
    assert gradient[1].tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    if infinite and side == 0:
        assert torch.isnan(gradient[0]).all()
    else:
        assert torch.isfinite(gradient[0]).all()
    assert not (infinite and side == 1) or gradient[0, 0] == pytest.approx(-1 / 3)


BAD_ROWS = {"nan": [NAN, 0.0, 1.0], "inf": [INF, 0.0, 1.0], "masked": [-INF, -INF, -INF]}


@every_kind
def test_torch_refuses_a_row_without_a_distribution(kind):
    for side in (0, 1):
        for bad in BAD_ROWS.values():
            sides = pair(4, 3)
            sides[side][2] = torch.tensor(bad)
            with refuses("define no distribution; check the model's weigh"):
                fused_divergence(*sides, kind)


@needs_triton
@pytest.mark.parametrize("side", [0, 1], ids=["expert", "merged"])
@pytest.mark.parametrize("kind", ["js", "kl"])
@both_calls
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
def test_triton_gives_nan_for_a_row_without_a_distribution_alone(narrow, side, kind, call):
    for width in (3, 300):
        sides = pair(7, width)
        sound = call("triton", *sides, kind=kind)
        for row, bad in zip((1, 3, 5), BAD_ROWS.values(), strict=True):
            sides[side][row] = bad[-1]
            sides[side][row, :3] = torch.tensor(bad)
        for found, expected in zip(call("triton", *sides, kind=kind), sound, strict=True):
            assert torch.isnan(found[1::2]).all()
            assert torch.equal(found[::2], expected[::2])


# --- properties
@every_backend
def test_skewed_js_is_exact_bounded_and_changes_sides_with_its_skew(backend):
    """At most the entropy of the skew, log 2 for 1/2, reached where the answers are disjoint."""

    @settings(deadline=None, max_examples=8 if backend == "triton" else 60, derandomize=True)
    @given(logit_pairs(), st.floats(0.05, 0.95))
    def holds(sides, beta):
        loss, gradient = run(backend, *sides, beta=beta)
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert -ROUNDING <= loss.item() <= entropy + ROUNDING
        assert torch.isfinite(gradient).all()
        assert gradient.sum().item() == pytest.approx(0, abs=ROUNDING)
        swapped, _ = run(backend, *sides[::-1], beta=1 - beta)
        assert swapped.item() == pytest.approx(loss.item(), abs=ROUNDING)
        assert_exact((loss, gradient), exact(*sides, "js", beta))

    holds()
    assert run(backend, one_hot(0), one_hot(1))[0].item() == pytest.approx(LOG_2, rel=1e-6)


# --- cached experts
@every_backend
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_js_with_a_bfloat16_expert_is_off_by_no_more_than_stated(backend, beta):
    for scale in (0.1, 5.0, 20.0):
        expert, merged = pair(20, 60, scale=scale)
        cached, log_p = cache_expert(expert), log_softmax(expert)
        assert cached.dtype == torch.bfloat16
        assert ((cached.float() - log_p).abs() <= log_p.abs() / 256).all()
        largest = log_p.abs().amax(-1)
        bound = 2 * (1 - beta) * (1 / math.e - math.log(1 - beta)) * largest / 256
        loss, _ = run(backend, cached, merged, beta=beta)
        error = (loss - exact(expert, merged, "js", beta)[0]).abs()
        assert (error <= bound).all()
        assert error.max() < 2e-3  # measured; the bound is for the worst of rows


@pytest.mark.parametrize("top", [None, 2])
def test_a_cached_expert_keeps_masks_and_holds_no_graph(top):
    """It would keep an expert under training alive."""
    expert, merged = pair64(5, 7)
    expert[:, :2] = merged[:, :2] = -INF
    cached = cache_expert(expert.requires_grad_(), top=top)
    for part in [cached] if top is None else [cached.log_probs, cached.classes]:
        assert not part.requires_grad and part.grad_fn is None
    assert top or torch.isneginf(cached[:, :2]).all()
    assert torch.isfinite(fused_divergence(cached, merged)).all()


def largest_loss(cached: TopKLogProbs, merged: Tensor, beta: float) -> Tensor:
    """M h(beta Q / M): the entropy of the side, given that the class is one of the others."""
    outside_p, outside_q = cached.log_probs[:, -1].exp(), cached.coarsen(merged).softmax(-1)[:, -1]
    parts = torch.stack([(1 - beta) * outside_p, beta * outside_q])
    return -torch.xlogy(parts, parts / parts.sum(0)).sum(0)


@pytest.mark.parametrize("top", [1, 3, 16])
def test_js_on_top_classes_is_low_by_no_more_than_stated(top):
    for beta in (0.1, 0.5, 0.9):
        for scale in (0.1, 3.0):
            expert, merged = pair64(200, 17, scale=scale)
            cached = cache_expert(expert, top=top)
            lost = fused_divergence(expert, merged, beta=beta)
            lost = lost - fused_divergence(cached, merged, beta=beta)
            bound = largest_loss(cached, merged, beta)
            assert (lost > -1e-12).all() and (lost <= bound + 1e-12).all()
            outside = (1 - beta) * cached.log_probs[:, -1].exp()
            outside = outside + beta * cached.coarsen(merged).softmax(-1)[:, -1]
            assert (bound <= LOG_2 * outside + 1e-12).all()


def test_the_bound_for_top_classes_is_reached_where_the_others_are_disjoint():
    """Both sides put half on the first class, the rest on different others."""
    expert = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    merged = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    cached = cache_expert(expert + torch.tensor([1e-9, 0.0, 0.0]), top=1)
    assert cached.classes.item() == 0
    lost = fused_divergence(expert, merged) - fused_divergence(cached, merged)
    assert_close(lost, largest_loss(cached, merged, 0.5))
    assert lost.item() == pytest.approx(LOG_2 / 2)


@every_kind
def test_joining_classes_never_adds_and_all_classes_lose_nothing(kind):
    expert, merged = pair64(50, 17)
    whole = fused_divergence(expert, merged, kind)
    for top in (1, 4):
        joined = fused_divergence(cache_expert(expert, top=top), merged, kind)
        assert (joined <= whole + 1e-12).all() and (joined > 0).all()
    full, masked = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, -INF]])
    if kind == "kl":  # it may miss everything
        assert fused_divergence(full, masked, kind).item() == INF
        assert fused_divergence(cache_expert(full, top=1), masked, kind).item() < 0.1
    for backend in ["torch"] + (["triton"] if triton else []):
        expert, merged = pair(5, 9)
        found = run(backend, cache_expert(expert, top=9), merged, kind=kind)
        assert_close(found, run(backend, expert, merged, kind=kind), rtol=1e-6, atol=1e-6)


def test_gradients_through_top_classes():
    expert, merged = torch.tensor([[2.0, 1, 0, 0]]), torch.tensor([[0.0, 1.0, -INF, -INF]])
    loss, gradient = run("torch", cache_expert(expert, top=2), merged)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert (gradient[:, 2:] == 0).all()  # of masked others
    expert, merged = pair64(3, 6)
    loss = partial(fused_divergence, cache_expert(expert, top=2), beta=0.3)
    assert torch.autograd.gradcheck(loss, merged.requires_grad_())


# --- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": torch.zeros(5, 6)}, r"one shape \[\*A, V\] .*, got \[5, 6\] and \[5, 7\]"),
        ({"expert": torch.zeros(7)}, r"one shape .*, got \[7\] and \[5, 7\]"),
        (dict.fromkeys(("expert", "merged"), torch.zeros(5, 0)), "with one class or more"),
        (dict.fromkeys(("expert", "merged"), torch.zeros(())), "with one class or more"),
        ({"merged": torch.zeros(5, 7).int()}, r"merged must be logits in .*int32; say .float\(\)"),
        ({"expert": torch.zeros(5, 7, requires_grad=True)}, r"gets no gradient.*expert.detach\(\)"),
        ({"kind": "jss"}, "kind must be one of js, kl, reverse_kl, jeffreys, got 'jss'"),
        ({"beta": 0.0}, r"beta must be in \[0.001, 0.999\], got 0.0; near 0 .*: take these"),
        ({"beta": 1.0}, r"beta must be in \[0.001, 0.999\], got 1.0"),
        ({"beta": NAN}, r"beta must be in \[0.001, 0.999\], got nan"),
        ({"kind": "kl", "beta": 0.2}, "beta=0.2 is a skew of js, and kl has none; leave beta out"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(change, message):
    good = {"expert": torch.zeros(5, 7), "merged": torch.zeros(5, 7), "kind": "js", "beta": 0.5}
    divergence.validate(**good)
    with refuses(message):
        divergence.validate(**good | change)


def test_bad_input_is_refused_before_any_launch(monkeypatch):
    monkeypatch.setattr(divergence_triton, "launch", None)
    sides, (expert, merged) = pair(5, 7), pair64(5, 7)
    for call in (fused_divergence, divergence_and_gradient):
        for options, message in (
            ({"kind": "jss"}, "kind must be one of"),
            ({"backend": "cuda"}, "backend must be one of auto, torch, triton, got 'cu"),
        ):
            with refuses(message):
                call(*sides, **options)
        with refuses("float64|not installed"):
            call(expert, merged, backend="triton")
    for weight in (torch.ones(()), torch.ones(4), torch.ones(5, 1)):
        with refuses(r"one number per position, \[5\], got .*; expand it"):
            inspect.unwrap(divergence_and_gradient)(*sides, weight=weight)
    for top in (0, -1, 8):
        with refuses(rf"top must be in 1..7, .*, got {top}; leave it out"):
            cache_expert(expert, top=top)
    with refuses(r"positions \[5\] do not fit logits \[4, 7\]; index both"):
        fused_divergence(cache_expert(expert, top=2), merged[:4])


# --- compiled code
WHOLE = divergence_triton.WHOLE_ROW
KERNELS = {  # and how many classes a row has, of which a program takes at most so many
    "narrow rows": ("whole_rows", 2, WHOLE),
    "whole rows": ("whole_rows", WHOLE, WHOLE),
    "wide rows": ("wide_rows", 151936, divergence_triton.STEP),
    "gradient": ("gradients", 151936, divergence_triton.TILE),
    "short rows at once": ("whole_rows", 48, WHOLE),
    "whole rows at once": ("whole_rows", WHOLE, WHOLE),
}
FULL = "whole rows at once"  # needs most registers, js most of all kinds
COMPILED = [
    (name, kind, dtype, target)
    for name in KERNELS
    for kind in (divergence.KINDS if name == FULL else ["js"])
    for dtype in ["bf16", "fp32"]
    for target in compiled.TARGETS
    if (name, kind) == (FULL, "js")
    or (target, dtype) == ("sm_90", "bf16")
    or (kind == "js" and (target, dtype) in (("sm_90", "fp32"), ("gfx942", "bf16")))
]


def case(name: str, kind: str, dtype: str, target: str) -> compiled.Case:
    kernel, num_classes, limit = KERNELS[name]
    tile = divergence_triton.tiling(num_classes, limit)
    threads = 32 * tile.pop("num_warps")
    types = {"expert": f"*{dtype}", "merged": f"*{dtype}", "beta": "fp32", "state": "*fp32"}
    types |= dict.fromkeys(("stride_p", "stride_q", "num_rows", "num_classes"), "i32")
    outer = {"incoming": "*fp32", "gradient": f"*{dtype}"}
    constants = {"KIND": kind, **tile}
    if name == "gradient":
        types |= outer
    elif name.endswith("at once"):
        types |= outer | {"loss": "*fp32"}
        constants["state"] = types.pop("state") and None
    else:
        types |= {"loss": "*fp32"}
        constants |= dict.fromkeys(outer) if kernel == "whole_rows" else {}
    module = f"divmerge_core.kernels.divergence_triton:{kernel}"
    return compiled.Case(module, types, constants, threads // compiled.TARGETS[target][2], target)


@pytest.fixture(scope="module")
def reports():
    """What the compilers report, for every entry of COMPILED."""
    return compiled.reports_or_skip({key: case(*key) for key in COMPILED})


@pytest.mark.parametrize("key", COMPILED, ids=" ".join)
def test_no_register_spills_and_every_logit_moves_once_sixteen_bytes_at_a_time(reports, key):
    name, _, dtype, _ = key
    assert reports[key].spills == 0
    if name.startswith("narrow"):
        return
    loads, stores = dict(reports[key].loads), dict(reports[key].stores)
    wide_loads = loads.pop(128)
    assert wide_loads >= 2 and set(loads) <= {32}  # what the gradient reads of its row
    if name != "gradient" and not name.endswith("at once"):
        return
    wide_stores = stores.pop(128)
    assert set(stores) <= {32}  # the loss
    if name.endswith("at once"):  # no loop: every access in the code happens once a thread
        _, num_classes, limit = KERNELS[name]
        tile = divergence_triton.tiling(num_classes, limit)
        bytes_a_side = tile["ROWS"] * tile["BLOCK"] * {"bf16": 2, "fp32": 4}[dtype]
        sixteen = 16 * 32 * tile["num_warps"]  # bytes, by one instruction in all threads
        assert wide_loads * sixteen == 2 * bytes_a_side
        assert wide_stores * sixteen == bytes_a_side


# --- on a GPU
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@every_kind
@precisions
@pytest.mark.parametrize("shape", [(64, 151936), (513, 16384), (70000, 2)], ids=str)
def test_large_shapes_on_a_gpu(kind, shape, dtype, rtol):
    expert, merged = (logits.cuda() for logits in pair(*shape, dtype=dtype))
    incoming = torch.randn(shape[0], device="cuda")
    merged.requires_grad_()
    loss = fused_divergence(expert, merged, kind)
    loss.backward(incoming)
    expected = exact(expert, merged.detach(), kind, weight=incoming)
    assert_exact((loss.detach(), merged.grad), expected, 4 * rtol)
    at_once = divergence_and_gradient(expert, merged, kind, weight=incoming)
    assert_exact(at_once, expected, 4 * rtol)


@pytest.mark.gpu
@on_gpu
def test_matrices_of_more_than_two_to_the_31_numbers():
    expert = torch.randn(1, 151936, device="cuda", dtype=torch.bfloat16).expand(15000, -1)
    merged = torch.zeros(15000, 151936, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    loss = fused_divergence(expert, merged)
    loss.sum().backward()
    assert (loss == loss[0]).all()
    assert torch.equal(merged.grad[-1], merged.grad[0])
