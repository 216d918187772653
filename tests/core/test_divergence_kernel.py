"""The fused divergence: its definition, its kernels against that in float64, and cached experts."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import compiled
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.kernels import divergence, divergence_triton
from divmerge_core.kernels.backend import triton
from divmerge_core.kernels.divergence import (
    KINDS,
    check,
    definition,
    divergence_and_gradient,
    fused_divergence,
)
from divmerge_core.kernels.expert_cache import TopKLogProbs, cache_expert, log_softmax

INF, NAN, LOG_2 = float("inf"), float("nan"), math.log(2)
GPU = torch.cuda.is_available()

needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=needs_triton)]
)
# Triton 3.9 announces a default of 3.10 whenever it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")

ROUNDING = 1e-6  # what float32 costs against float64 in a loss, and in a gradient near 0
# dtype; rtol of the gradient, rounded to that dtype: the interpreter truncates bfloat16
PRECISIONS = [
    (torch.float32, ROUNDING),
    (torch.bfloat16, 2**-8 if GPU else 2**-7),
    (torch.float16, 2**-11),
]
precisions = pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS)

# A and V: powers of two, their neighbours, one of either, none of A
SHAPES = [
    *((41, 1), (7, 2), (41, 3), (1, 5), (7, 31), (41, 32), (7, 33)),
    *((0, 5), (0, 1271), (3, 1000), (2, 1271)),
]
# precision and shape: every shape in float32, in half precision two of them
CASES = [(*PRECISIONS[0], shape) for shape in SHAPES]
CASES += [(*half, shape) for half in PRECISIONS[1:] for shape in [(41, 3), (2, 1271)]]
cases = pytest.mark.parametrize(("dtype", "rtol", "shape"), CASES, ids=str)


@pytest.fixture(autouse=True)
def poison():
    """What is allocated without being written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def narrow(monkeypatch):
    """Rows count as wide from 65 classes on, and are taken 128 at a time."""
    monkeypatch.setattr(divergence_triton, "WHOLE_ROW", 64)
    monkeypatch.setattr(divergence_triton, "STEP", 128)


def pair(*shape: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random logits in float64 of an expert and of a merged model not far from it."""
    generator = torch.Generator().manual_seed(seed)
    expert = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return expert, expert + torch.randn(*shape, dtype=torch.float64, generator=generator)


def run(
    backend: str, expert, merged: Tensor, incoming: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Loss, and gradient in `merged` for the incoming one (default: 1); Triton on a GPU if any."""
    device = "cuda" if GPU and backend == "triton" else "cpu"
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
    device = "cuda" if GPU and backend == "triton" else "cpu"
    weight = weight if weight is None else weight.to(device)
    sides = expert.to(device), merged.to(device)
    loss, gradient = divergence_and_gradient(*sides, backend=backend, weight=weight, **options)
    return loss.cpu(), gradient.cpu()


def exact(expert: Tensor, merged: Tensor, kind: str, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """The definition on the same numbers in float64."""
    return definition(expert.double(), merged.double(), kind, beta)


def one_hot(winner: int, *, classes: int = 3, gap: float = 1e4) -> Tensor:
    row = torch.full((1, classes), -gap)
    row[0, winner] = gap
    return row


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in DIVERGENCES])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_the_divergences_of_one_name(kind, masked):
    expert, merged = pair(5, 7)
    if masked:
        expert[1, :3] = merged[1, :3] = -INF
    merged.requires_grad_()
    slow = DIVERGENCES[kind](expert, merged)
    slow.sum().backward()
    loss, gradient = definition(expert, merged.detach(), kind)
    assert_close(loss, slow.detach())
    assert_close(gradient, merged.grad)


def test_every_kind_stands_in_for_a_registered_divergence():
    fused = {name: facts.get("fused") for name, facts in DIVERGENCES.facts.items()}
    assert {kind for kind in fused.values() if kind} == set(KINDS)
    assert all(fused[kind] == kind for kind in KINDS)


def test_jeffreys_is_the_sum_of_both_kl():
    both = [definition(*pair(5, 7), kind) for kind in ("kl", "reverse_kl")]
    loss, gradient = definition(*pair(5, 7), "jeffreys")
    assert_close(loss, both[0][0] + both[1][0])
    assert_close(gradient, both[0][1] + both[1][1])


def test_two_classes_by_hand():
    """p = (1/2, 1/2), q = (3/4, 1/4) and beta = 1/4: m = (9/16, 7/16)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    to_m = 0.5 * math.log(8 / 9) + 0.5 * math.log(8 / 7)
    from_q = 0.75 * math.log(4 / 3) + 0.25 * math.log(4 / 7)
    loss, gradient = definition(p, q, "js", 0.25)
    assert loss.item() == pytest.approx(0.75 * to_m + 0.25 * from_q, rel=1e-6)
    pull = 0.25 * 0.75 * (math.log(4 / 3) - from_q)
    assert gradient[0].tolist() == pytest.approx([pull, -pull], rel=1e-5)


@pytest.mark.parametrize("options", [{"kind": kind} for kind in KINDS] + [{"beta": 0.2}])
def test_gradients_agree_with_finite_differences_also_where_the_loss_is_used_twice(options):
    expert, merged = pair(3, 4)
    weight = torch.tensor([0.3, -2.0, 0.0], dtype=torch.float64)

    def twice(logits: Tensor) -> Tensor:
        loss = fused_divergence(expert, logits, **options)
        return (weight * loss + loss**2).sum() + 3 * fused_divergence(expert, 2 * logits, **options)

    assert torch.autograd.gradcheck(twice, merged.requires_grad_())


@every_backend
def test_the_graph_can_be_walked_twice(backend):
    device = "cuda" if GPU and backend == "triton" else "cpu"
    expert, merged = (logits.float().to(device) for logits in pair(3, 4))
    loss = fused_divergence(expert, merged.requires_grad_(), backend=backend)
    loss.sum().backward(retain_graph=True)
    once = merged.grad.clone()
    loss.sum().backward()
    slope = exact(expert, merged.detach(), "js")[1]
    assert_close(once.double(), slope, rtol=ROUNDING, atol=ROUNDING)
    assert_close(merged.grad, 2 * once)


def test_a_second_derivative_is_refused_rather_than_wrong():
    expert, merged = pair(3, 4)
    loss = fused_divergence(expert, merged.requires_grad_())
    with pytest.raises(RuntimeError, match="differentiable once; leave create_graph out"):
        torch.autograd.grad(loss.sum(), merged, create_graph=True)


# --- the kernels against the definition in float64 ------------------------------------------------


def assert_exact(found, expected, rtol: float = ROUNDING) -> None:
    """Loss and gradient are those in float64, up to what rounding may cost."""
    (loss, gradient), (exact_loss, exact_gradient) = found, expected
    assert_close(loss.double(), exact_loss, rtol=ROUNDING, atol=ROUNDING)
    assert_close(gradient.double(), exact_gradient, rtol=rtol, atol=ROUNDING)


@needs_triton
@every_kind
@cases
def test_the_kernels_are_the_definition(kind, shape, dtype, rtol):
    expert, merged = (logits.to(dtype) for logits in pair(*shape))
    incoming = torch.randn(shape[0], generator=torch.manual_seed(1))
    loss, gradient = run("triton", expert, merged, incoming, kind=kind)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    expected, slope = exact(expert, merged, kind)
    assert_exact((loss, gradient), (expected, incoming[:, None] * slope), rtol)


@needs_triton
@every_kind
@pytest.mark.parametrize("num_classes", [65, 128, 300])
def test_wide_rows_are_the_definition(narrow, monkeypatch, kind, num_classes):
    monkeypatch.setattr(divergence_triton, "whole_rows", None)
    expert, merged = (logits.float() for logits in pair(3, num_classes))
    assert_exact(run("triton", expert, merged, kind=kind), exact(expert, merged, kind))


@needs_triton
def test_a_row_wider_than_registers_hold_is_the_definition():
    expert, merged = (logits.float() for logits in pair(2, divergence_triton.WHOLE_ROW + 7))
    assert_exact(run("triton", expert, merged), exact(expert, merged, "js"))


@needs_triton
@pytest.mark.parametrize("beta", [1e-3, 0.2, 0.9])
@pytest.mark.parametrize("num_classes", [5, 300])
def test_the_kernels_take_the_skew(narrow, beta, num_classes):
    expert, merged = (logits.float() for logits in pair(3, num_classes))
    assert_exact(run("triton", expert, merged, beta=beta), exact(expert, merged, "js", beta))


def views(logits: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout."""
    if layout == "row stride":
        return torch.cat([logits, logits], dim=1)[:, : logits.shape[1]]
    if layout == "offset 1":
        return torch.cat([logits[:, :1], logits], dim=1)[:, 1:]
    if layout == "transposed":
        return logits.T.contiguous().T
    return logits


@every_backend
@pytest.mark.parametrize("layout", ["row stride", "offset 1", "transposed"])
@pytest.mark.parametrize("num_classes", [1, 3, 32, 300])
def test_strides_and_alignment_are_immaterial(narrow, backend, layout, num_classes):
    expert, merged = (logits.float() for logits in pair(5, num_classes))
    plain = run(backend, expert, merged)
    viewed = run(backend, views(expert, layout), views(merged, layout))
    assert_close(viewed, plain, rtol=0, atol=0)


@every_backend
def test_one_expert_row_serves_all_rows(backend):
    expert, merged = (logits.float() for logits in pair(5, 7))
    shared = expert[:1].expand(5, 7)
    assert_close(run(backend, shared, merged), run(backend, shared.contiguous(), merged))


@every_backend
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (2, 0, 7), (0, 7)], ids=str)
def test_one_number_per_position_whatever_the_leading_axes(backend, shape):
    expert, merged = (logits.float() for logits in pair(*shape))
    loss, gradient = run(backend, expert, merged)
    flat, flat_gradient = run(backend, expert.reshape(-1, 7), merged.reshape(-1, 7))
    assert loss.shape == shape[:-1] and gradient.shape == shape
    assert_close(loss.flatten(), flat)
    assert_close(gradient.reshape(-1, 7), flat_gradient)


@every_backend
def test_sides_may_differ_in_precision(backend):
    expert, merged = pair(5, 7)
    expert, merged = expert.bfloat16(), merged.float()
    found = run(backend, expert, merged)
    assert found[1].dtype == torch.float32
    assert_exact(found, exact(expert, merged, "js"))


def test_float64_stays_float64():
    loss, gradient = run("auto", *pair(5, 7))
    assert loss.dtype == gradient.dtype == torch.float64


# --- loss and gradient at once --------------------------------------------------------------------


@needs_triton
@every_kind
@cases
def test_one_call_is_the_definition(kind, dtype, rtol, shape):
    expert, merged = (logits.to(dtype) for logits in pair(*shape))
    weight = torch.randn(shape[0], generator=torch.manual_seed(1))
    loss, gradient = run_at_once("triton", expert, merged, weight, kind=kind)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    expected, slope = exact(expert, merged, kind)
    assert_exact((loss, gradient), (expected, weight[:, None] * slope), rtol)


@every_backend
@every_kind
@pytest.mark.parametrize("num_classes", [7, 64, 300])
def test_one_call_agrees_with_autograd_on_every_awkward_row(narrow, backend, kind, num_classes):
    expert, merged = (logits.float() for logits in pair(8, num_classes))
    expert[0, 0] = merged[1, 0] = -INF  # infinite losses, a gradient of NaN
    expert[2, :5] = merged[2, :5] = -INF
    expert[3], merged[3] = (one_hot(side, classes=num_classes)[0] for side in (0, 1))
    merged[4] = expert[4]
    weight = torch.linspace(-1, 1, 8)
    autograd = run(backend, expert, merged, weight, kind=kind)
    at_once = run_at_once(backend, expert, merged, weight, kind=kind)
    assert_close(at_once, autograd, rtol=1e-6, atol=1e-7, equal_nan=True)


@every_backend
@pytest.mark.parametrize("num_classes", [7, 300])
def test_rows_weigh_the_same_without_weights(narrow, backend, num_classes):
    sides = [logits.float() for logits in pair(5, num_classes)]
    loss, gradient = run_at_once(backend, *sides, beta=0.2)
    assert_exact((loss, gradient), exact(*sides, "js", 0.2))
    weighted = run_at_once(backend, *sides, torch.ones(5), beta=0.2)
    assert_close(weighted, (loss, gradient), rtol=0, atol=0)
    doubled = run_at_once(backend, *sides, torch.full((5,), 2.0), beta=0.2)
    assert_close(doubled, (loss, 2 * gradient), rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("num_classes", [32, 300])
def test_one_call_takes_any_strides_axes_and_precisions(narrow, backend, num_classes):
    expert, merged = pair(2, 3, num_classes)
    expert, merged, weight = expert.bfloat16(), merged.float(), torch.tensor([[1.0, 2, 3]])
    strange = expert.mT.contiguous().mT, views(merged.flatten(0, 1), "offset 1").view_as(merged)
    loss, gradient = run_at_once(backend, *strange, weight.double().expand(2, 3))
    assert loss.shape == (2, 3) and gradient.shape == merged.shape
    expected, slope = exact(expert.flatten(0, 1), merged.flatten(0, 1), "js")
    expected, slope = expected.view(2, 3), slope.view_as(merged)
    assert_exact((loss, gradient), (expected, weight[..., None] * slope))


@needs_triton
def test_one_call_on_a_row_wider_than_registers_hold_is_the_definition():
    expert, merged = (logits.float() for logits in pair(2, divergence_triton.WHOLE_ROW + 7))
    assert_exact(run_at_once("triton", expert, merged), exact(expert, merged, "js"))


@needs_triton
@pytest.mark.parametrize(("num_classes", "launches"), [(64, 1), (65, 2)])
def test_one_call_takes_one_launch_where_a_row_fits(narrow, monkeypatch, num_classes, launches):
    made, launch = [], divergence_triton.launch
    monkeypatch.setattr(
        divergence_triton,
        "launch",
        lambda kernel, *rest: (made.append(kernel), launch(kernel, *rest)),
    )
    run_at_once("triton", *(logits.float() for logits in pair(2, num_classes)))
    assert len(made) == launches


@every_backend
def test_what_one_call_gives_has_no_graph(backend):
    device = "cuda" if GPU and backend == "triton" else "cpu"
    sides = [logits.float().to(device).requires_grad_() for logits in pair(5, 7)]
    before = [logits.detach().clone() for logits in sides]
    loss, gradient = divergence_and_gradient(*sides, backend=backend)
    assert not loss.requires_grad and not gradient.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(sides, before, strict=True))


def test_one_call_in_float64_stays_float64():
    expert, merged = pair(5, 7)
    loss, gradient = divergence_and_gradient(expert, merged, weight=torch.ones(5))
    assert loss.dtype == gradient.dtype == torch.float64
    assert_close((loss, gradient), exact(expert, merged, "js"))


@pytest.mark.parametrize("weight", [torch.ones(()), torch.ones(4), torch.ones(5, 1)], ids=str)
def test_weights_are_one_per_position(weight):
    with pytest.raises(ValueError, match=r"one number per position, \[5\], got .*; expand it"):
        divergence_and_gradient.__wrapped__(*pair(5, 7), weight=weight)


# --- precision ------------------------------------------------------------------------------------


def rounded_first(expert: Tensor, merged: Tensor) -> Tensor:
    """The gradient of js by one who rounds log-probabilities before widening them."""
    log_p, log_q = (logits.log_softmax(-1).bfloat16().double() for logits in (expert, merged))
    slope = log_q.exp() * (log_q - torch.logaddexp(log_p, log_q) + LOG_2) / 2
    return slope - log_q.exp() * slope.sum(-1, keepdim=True)


@every_backend
def test_half_precision_is_widened_before_any_arithmetic(backend):
    """Rounding log-probabilities before widening them costs percents of the gradient."""
    expert, noise = pair(4, 1000, scale=1.0)[0], pair(4, 1000, scale=0.1, seed=1)[0]
    expert, merged = expert.bfloat16(), (expert + noise).bfloat16()
    _, slope = exact(expert, merged, "js")
    _, gradient = run(backend, expert, merged)
    error = (gradient.double() - slope).norm() / slope.norm()
    careless = (rounded_first(expert, merged) - slope).norm() / slope.norm()
    assert error < 0.005  # the last digit of the gradient itself
    assert careless > 0.1


@every_backend
@pytest.mark.parametrize("run", [run, run_at_once])
def test_a_large_incoming_gradient_is_multiplied_in_before_rounding(backend, run):
    """Loss scaling rescues float16 gradients below 6e-8 only if nothing was rounded before."""
    expert, merged = (logits.half() for logits in pair(2, 1000, scale=5.0))
    _, slope = exact(expert, merged, "js")
    _, gradient = run(backend, expert, merged, torch.full((2,), 2.0**16))
    small = slope.abs() < 6e-8
    assert small.sum() > 100
    found = gradient.double()[small] / 2**16
    assert_close(found, slope[small], rtol=1e-3, atol=1e-11)


# --- robustness -----------------------------------------------------------------------------------


@every_backend
@every_kind
@pytest.mark.parametrize("winners", [(0, 0), (0, 1)], ids=["agree", "disagree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_value_and_gradient(narrow, backend, kind, winners, dtype):
    for classes in (3, 200):
        sides = [one_hot(winner, classes=classes).to(dtype) for winner in winners]
        loss, gradient = run(backend, *sides, kind=kind)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
        assert_exact((loss, gradient), exact(*sides, kind), rtol=2**-7)


@every_backend
@every_kind
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_identical_rows_have_loss_and_gradient_zero(backend, kind, shift):
    logits = pair(5, 33)[0].float()
    loss, gradient = run(backend, logits, logits + shift, kind=kind)
    atol = 2e-7 if shift == 0 else 2e-3  # a float32 near 1e4 has steps of 1e-3
    assert_close(loss, torch.zeros(5), rtol=0, atol=atol)
    assert_close(gradient, torch.zeros(5, 33), rtol=0, atol=atol)


@every_backend
@every_kind
def test_a_single_class_leaves_nothing_to_differ(backend, kind):
    loss, gradient = run(backend, torch.tensor([[5.0], [-1e4]]), torch.zeros(2, 1), kind=kind)
    assert loss.tolist() == [0, 0] and gradient.tolist() == [[0], [0]]


@every_backend
@every_kind
@pytest.mark.parametrize("num_classes", [7, 300])
def test_a_class_masked_on_both_sides_does_not_count(narrow, backend, kind, num_classes):
    expert, merged = (logits.float() for logits in pair(5, num_classes))
    mask = torch.full((5, 129), -INF)  # also as a whole first step of a wide row
    masked = [torch.cat([mask, logits], -1) for logits in (expert, merged)]
    loss, gradient = run(backend, *masked, kind=kind)
    assert_exact((loss, gradient[:, 129:]), exact(expert, merged, kind))
    assert (gradient[:, :129] == 0).all()


@every_backend
@every_kind
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
def test_the_lowest_float_masks_as_minus_infinity_does(backend, kind):
    """Of a row, that is; in a row of nothing else all classes are alike."""
    expert, merged = (logits.float() for logits in pair(5, 7))
    mask = torch.full((5, 2), torch.finfo(torch.float32).min)
    masked = [torch.cat([mask, logits], -1) for logits in (expert, merged)]
    loss, gradient = run(backend, *masked, kind=kind)
    assert_exact((loss, gradient[:, 2:]), exact(expert, merged, kind))
    assert (gradient[:, :2] == 0).all()
    nothing_else = run(backend, mask, mask, kind=kind)
    assert_close(nothing_else, (torch.zeros(5), torch.zeros(5, 2)), rtol=0, atol=1e-7)


def ruled_out(side: str) -> tuple[Tensor, Tensor]:
    """Two rows over three classes; in the first, one side rules out the first class."""
    sides = {"expert": torch.zeros(2, 3), "merged": torch.zeros(2, 3)}
    sides[side][0, 0] = -INF
    return sides["expert"], sides["merged"]


@every_backend
@pytest.mark.parametrize("side", ["expert", "merged"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_a_mask_on_one_side_leaves_js_finite(backend, side, beta):
    sides = ruled_out(side)
    p, q = (logits.softmax(-1) for logits in sides)
    m = (1 - beta) * p + beta * q
    loss, gradient = run(backend, *sides, beta=beta)
    by_hand = (1 - beta) * torch.xlogy(p, p / m).sum(-1) + beta * torch.xlogy(q, q / m).sum(-1)
    assert_close(loss, by_hand, rtol=1e-6, atol=1e-7)
    pull = beta * torch.xlogy(q, q / m)
    assert_close(gradient, pull - q * pull.sum(-1, keepdim=True), rtol=1e-6, atol=1e-7)


@every_backend
@pytest.mark.parametrize("kind", ["kl", "jeffreys"])
def test_kl_is_infinite_where_the_merged_model_rules_out_an_answer(backend, kind):
    loss, gradient = run(backend, *ruled_out("merged"), kind=kind)
    assert loss.tolist() == [INF, 0]
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0] == pytest.approx(-1 / 3)  # the answer is missed
    assert gradient[1].tolist() == pytest.approx([0, 0, 0], abs=1e-7)


@every_backend
@pytest.mark.parametrize("kind", ["reverse_kl", "jeffreys"])
def test_reverse_kl_is_infinite_where_the_expert_rules_out_an_answer(backend, kind):
    loss, gradient = run(backend, *ruled_out("expert"), kind=kind)
    assert loss.tolist() == [INF, 0]
    assert torch.isnan(gradient[0]).all()
    assert gradient[1].tolist() == pytest.approx([0, 0, 0], abs=1e-7)


@every_backend
@pytest.mark.parametrize(("kind", "side"), [("kl", "expert"), ("reverse_kl", "merged")])
def test_the_other_kl_is_finite(backend, kind, side):
    loss, gradient = run(backend, *ruled_out(side), kind=kind)
    assert loss.tolist() == pytest.approx([math.log(3 / 2), 0])
    assert torch.isfinite(gradient).all()


BAD_ROWS = {"nan": [NAN, 0.0, 1.0], "inf": [INF, 0.0, 1.0], "masked": [-INF, -INF, -INF]}
bad_rows = pytest.mark.parametrize("bad", BAD_ROWS)
each_side = pytest.mark.parametrize("side", [0, 1], ids=["expert", "merged"])


@bad_rows
@each_side
@every_kind
def test_torch_refuses_a_row_without_a_distribution(bad, side, kind):
    sides = [logits.float() for logits in pair(4, 3)]
    sides[side][2] = torch.tensor(BAD_ROWS[bad])
    with pytest.raises(ValueError, match="define no distribution; check the model's weights"):
        fused_divergence(*sides, kind)


@needs_triton
@each_side
@pytest.mark.parametrize("kind", ["js", "kl"])
@pytest.mark.parametrize("width", [3, 300])
@pytest.mark.parametrize("run", [run, run_at_once])
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
def test_triton_gives_nan_for_a_row_without_a_distribution_alone(narrow, side, kind, width, run):
    sides = [logits.float() for logits in pair(7, width)]
    sound = run("triton", *sides, kind=kind)
    for row, bad in zip((1, 3, 5), BAD_ROWS.values(), strict=True):
        sides[side][row] = bad[-1]
        sides[side][row, :3] = torch.tensor(bad)
    for found, expected in zip(run("triton", *sides, kind=kind), sound, strict=True):
        assert torch.isnan(found[1::2]).all()
        assert torch.equal(found[::2], expected[::2])


# --- properties -----------------------------------------------------------------------------------

number = st.floats(-1e4, 1e4, width=32)


@st.composite
def pairs(draw) -> tuple[Tensor, Tensor]:
    """Two rows of float32 logits over the same 1 to 6 classes, some masked on either side."""
    classes = draw(st.integers(1, 6))
    sides = []
    for _ in range(2):
        entry = st.one_of(number, st.just(-INF))
        row = draw(st.lists(entry, min_size=classes, max_size=classes))
        row[draw(st.integers(0, classes - 1))] = draw(number)  # at least one class is allowed
        sides.append(torch.tensor([row], dtype=torch.float32))
    return sides[0], sides[1]


any_two = given(pairs(), st.floats(0.05, 0.95))
torch_examples = settings(deadline=None, max_examples=150, derandomize=True)
triton_examples = settings(deadline=None, max_examples=10, derandomize=True)  # milliseconds each


def js_keeps_its_promises(backend: str, sides: tuple[Tensor, Tensor], beta: float) -> None:
    expert, merged = sides
    loss, gradient = run(backend, expert, merged, beta=beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)  # of the side
    assert -ROUNDING <= loss.item() <= entropy + ROUNDING
    assert torch.isfinite(gradient).all()
    assert gradient.sum().item() == pytest.approx(0, abs=ROUNDING)
    swapped, _ = run(backend, merged, expert, beta=1 - beta)
    assert swapped.item() == pytest.approx(loss.item(), abs=ROUNDING)


@torch_examples
@any_two
def test_skewed_js_is_at_most_the_entropy_of_the_skew_and_turns_with_its_sides(sides, beta):
    js_keeps_its_promises("torch", sides, beta)


@needs_triton
@triton_examples
@any_two
def test_the_kernels_keep_the_promises_of_js(sides, beta):
    js_keeps_its_promises("triton", sides, beta)


@needs_triton
@triton_examples
@any_two
def test_the_kernels_agree_with_float64_on_any_pair(sides, beta):
    assert_exact(run("triton", *sides, beta=beta), exact(*sides, "js", beta))


@every_backend
def test_js_is_symmetric_and_reaches_log_2_where_answers_are_disjoint(backend):
    expert, merged = (logits.float() for logits in pair(5, 33))
    there, back = run(backend, expert, merged)[0], run(backend, merged, expert)[0]
    assert_close(there, back, rtol=1e-6, atol=1e-7)
    assert run(backend, one_hot(0), one_hot(1))[0].item() == pytest.approx(LOG_2, rel=1e-6)


@every_backend
@every_kind
def test_adding_a_constant_to_a_row_changes_nothing(backend, kind):
    expert, merged = ((64 * logits).round().float() / 64 for logits in pair(5, 33))
    plain = run(backend, expert, merged, kind=kind)
    moved = run(backend, expert + 4096, merged - 4096, kind=kind)  # exact in float32
    assert_close(moved, plain, rtol=1e-6, atol=1e-6)


def test_the_limits_of_skewed_js_are_the_two_kl():
    """js / beta tends to KL(q || p) for beta to 0, js / (1 - beta) to KL(p || q) for beta to 1."""
    expert, merged = pair(5, 7, scale=1.0)
    low, high = definition(expert, merged, "js", 1e-6), definition(expert, merged, "js", 1 - 1e-6)
    for found, kind in ((low, "reverse_kl"), (high, "kl")):
        for number, limit in zip(found, definition(expert, merged, kind), strict=True):
            assert_close(number / 1e-6, limit, rtol=1e-3, atol=1e-4)


# --- cached experts -------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_js_with_a_bfloat16_expert_is_off_by_no_more_than_stated(backend, beta):
    for scale in (0.1, 1.0, 5.0, 20.0):
        expert, merged = (logits.float() for logits in pair(20, 60, scale=scale))
        cached = cache_expert(expert)
        log_p = log_softmax(expert)
        assert cached.dtype == torch.bfloat16
        assert ((cached.float() - log_p).abs() <= log_p.abs() / 256).all()
        largest = log_p.abs().amax(-1)
        bound = 2 * (1 - beta) * (1 / math.e - math.log(1 - beta)) * largest / 256
        loss, _ = run(backend, cached, merged, beta=beta)
        error = (loss - exact(expert, merged, "js", beta)[0]).abs()
        assert (error <= bound).all()
        assert error.max() < 2e-3  # measured; the bound is for the worst of rows


def test_a_bfloat16_expert_keeps_its_masks():
    expert, merged = pair(5, 7)
    expert[:, :2] = merged[:, :2] = -INF
    assert torch.isneginf(cache_expert(expert)[:, :2]).all()
    assert torch.isfinite(fused_divergence(cache_expert(expert), merged)).all()


def lost_at_most(cached: TopKLogProbs, merged: Tensor, beta: float) -> Tensor:
    """M h(beta Q / M): the entropy of the side, given that the class is one of the others."""
    outside_p, outside_q = cached.log_probs[:, -1].exp(), cached.coarsen(merged).softmax(-1)[:, -1]
    parts = torch.stack([(1 - beta) * outside_p, beta * outside_q])
    return -torch.xlogy(parts, parts / parts.sum(0)).sum(0)


@pytest.mark.parametrize("top", [None, 2])
def test_cached_answers_need_no_gradient(top):
    """An expert under training would else be kept alive by what was cached of it."""
    expert = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cached = cache_expert(expert, top=top)
    for part in [cached] if top is None else [cached.log_probs, cached.classes]:
        assert not part.requires_grad and part.grad_fn is None


@pytest.mark.parametrize("top", [1, 3, 16])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_js_on_top_answers_is_low_by_no_more_than_stated(top, beta, scale):
    for seed in range(10):
        expert, merged = pair(50, 17, scale=scale, seed=seed)
        cached = cache_expert(expert, top=top)
        lost = fused_divergence(expert, merged, beta=beta)
        lost = lost - fused_divergence(cached, merged, beta=beta)
        bound = lost_at_most(cached, merged, beta)
        assert (lost > -1e-12).all() and (lost <= bound + 1e-12).all()
        outside = (1 - beta) * cached.log_probs[:, -1].exp()
        outside = outside + beta * cached.coarsen(merged).softmax(-1)[:, -1]
        assert (bound <= LOG_2 * outside + 1e-12).all()


def test_the_bound_for_top_answers_is_reached_where_the_others_are_disjoint():
    """Both sides put half on the first class, the rest on different others."""
    expert = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    merged = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    cached = cache_expert(expert + torch.tensor([1e-9, 0.0, 0.0]), top=1)
    assert cached.classes.item() == 0
    lost = fused_divergence(expert, merged) - fused_divergence(cached, merged)
    assert_close(lost, lost_at_most(cached, merged, 0.5))
    assert lost.item() == pytest.approx(LOG_2 / 2)


@every_kind
@pytest.mark.parametrize("top", [1, 4])
def test_no_divergence_grows_when_classes_are_joined(kind, top):
    expert, merged = pair(50, 17)
    cached = cache_expert(expert, top=top)
    whole, joined = (fused_divergence(side, merged, kind) for side in (expert, cached))
    assert (joined <= whole + 1e-12).all() and (joined > 0).all()


def test_kl_on_top_answers_may_miss_everything():
    expert, merged = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, -INF]])
    assert fused_divergence(expert, merged, "kl").item() == INF
    assert fused_divergence(cache_expert(expert, top=1), merged, "kl").item() < 0.1


@every_backend
@every_kind
def test_all_classes_as_top_answers_lose_nothing(backend, kind):
    expert, merged = (logits.float() for logits in pair(5, 9))
    whole = run(backend, expert, merged, kind=kind)
    kept = run(backend, cache_expert(expert, top=9), merged, kind=kind)
    assert_close(kept, whole, rtol=1e-6, atol=1e-6)


@every_backend
def test_masked_others_have_no_gradient(backend):
    expert, merged = torch.tensor([[2.0, 1, 0, 0]]), torch.tensor([[0.0, 1.0, -INF, -INF]])
    loss, gradient = run(backend, cache_expert(expert, top=2), merged)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert (gradient[:, 2:] == 0).all()


def test_gradients_through_top_answers_agree_with_finite_differences():
    expert, merged = pair(3, 6)
    loss = partial(fused_divergence, cache_expert(expert, top=2), beta=0.3)
    assert torch.autograd.gradcheck(loss, merged.requires_grad_())


@pytest.mark.parametrize("top", [0, -1, 8])
def test_a_number_of_top_answers_out_of_range_is_refused(top):
    with pytest.raises(ValueError, match=rf"top must be in 1..7, .*, got {top}; leave it out"):
        cache_expert(pair(5, 7)[0], top=top)


def test_cached_answers_of_other_positions_are_refused():
    expert, merged = pair(5, 7)
    with pytest.raises(ValueError, match=r"positions \[5\] do not fit logits \[4, 7\]; index both"):
        fused_divergence(cache_expert(expert, top=2), merged[:4])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": torch.zeros(5, 6)}, r"one shape \[\*A, V\] .*, got \[5, 6\] and \[5, 7\]"),
        ({"expert": torch.zeros(7)}, r"one shape .*, got \[7\] and \[5, 7\]"),
        ({"expert": torch.zeros(5, 0), "merged": torch.zeros(5, 0)}, "with one class or more"),
        ({"expert": torch.zeros(()), "merged": torch.zeros(())}, "with one class or more"),
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
    check(**good)
    with pytest.raises(ValueError, match=message):
        check(**good | change)


def test_bad_input_is_refused_before_any_launch(monkeypatch):
    monkeypatch.setattr(divergence_triton, "loss_and_state", None)
    sides = [logits.float() for logits in pair(5, 7)]
    with pytest.raises(ValueError, match="kind must be one of"):
        fused_divergence(*sides, "jss", backend="triton")
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"):
        fused_divergence(*sides, backend="cuda")


@needs_triton
def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="float64"):
        run("triton", *pair(5, 7))


def test_an_expert_that_requires_a_gradient_is_fine_where_none_is_recorded():
    expert, merged = pair(5, 7)
    with torch.no_grad():
        loss = fused_divergence(expert.requires_grad_(), merged)
    assert_close(loss, exact(expert.detach(), merged, "js")[0])


@pytest.mark.parametrize("recording", [True, False])
def test_no_gradient_is_computed_that_nobody_asked_for(recording, monkeypatch):
    asked = []
    plain = definition

    def spy(*args, differentiate):
        asked.append(differentiate)
        return plain(*args, differentiate=differentiate)

    monkeypatch.setattr(divergence, "definition", spy)
    expert, merged = pair(5, 7)
    with torch.set_grad_enabled(recording):
        loss = fused_divergence(expert, merged if recording else merged.requires_grad_())
    assert asked == [False] and not loss.requires_grad


@every_backend
def test_inputs_are_left_alone(backend):
    sides = [logits.float() for logits in pair(5, 7)]
    before = [logits.clone() for logits in sides]
    run(backend, *sides)
    assert all(torch.equal(a, b) for a, b in zip(sides, before, strict=True))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now fails, as where it is not installed
import torch
from divmerge_core.kernels.divergence import fused_divergence
logits = torch.zeros(2, 3, requires_grad=True)
fused_divergence(torch.eye(2, 3), logits).sum().backward()
assert logits.grad.abs().sum() > 0
try:
    fused_divergence(torch.eye(2, 3), logits, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton_torch_serves_and_triton_is_refused_with_the_cure():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True
    )
    assert "needs the package triton, which is not installed; pip install triton" in done.stdout


# --- what the compilers make of the kernels -------------------------------------------------------

WHOLE = divergence_triton.WHOLE_ROW
KERNELS = {  # and how many classes a row has, of which a program takes at most so many
    "narrow rows": ("whole_rows", 2, WHOLE),
    "whole rows": ("whole_rows", WHOLE, WHOLE),
    "wide rows": ("wide_rows", 151936, divergence_triton.STEP),
    "gradient": ("gradients", 151936, divergence_triton.TILE),
    "narrow rows at once": ("whole_rows", 2, WHOLE),
    "short rows at once": ("whole_rows", 48, WHOLE),
    "whole rows at once": ("whole_rows", WHOLE, WHOLE),
}
COMPILED = [
    (name, kind, dtype, target)
    for name in KERNELS
    for kind in (KINDS if name.startswith("whole") else ["js"])  # js needs most
    for dtype in ["bf16", "fp32"]
    for target in compiled.TARGETS
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
    return compiled.Case(
        f"divmerge_core.kernels.divergence_triton:{kernel}",
        types,
        constants,
        threads // compiled.TARGETS[target][2],
        target,
    )


@pytest.fixture(scope="module")
def reports():
    """What the compilers say, for every entry of COMPILED."""
    try:
        made = compiled.reports([case(*key) for key in COMPILED])
    except compiled.Unavailable as reason:
        pytest.skip(str(reason))
    return dict(zip(COMPILED, made, strict=True))


@pytest.mark.parametrize("key", COMPILED, ids=" ".join)
def test_no_kernel_spills_registers(reports, key):
    assert reports[key].spills == 0


unless_narrow = [key for key in COMPILED if not key[0].startswith("narrow")]


@pytest.mark.parametrize("key", unless_narrow, ids=" ".join)
def test_logits_move_sixteen_bytes_at_a_time(reports, key):
    loads, stores = dict(reports[key].loads), dict(reports[key].stores)
    assert loads.pop(128) >= 2
    assert set(loads) <= {32}  # what the gradient reads of its row
    if key[0] == "gradient" or key[0].endswith("at once"):
        stores.pop(128)
        assert set(stores) <= {32}  # the loss


at_once = [key for key in unless_narrow if key[0].endswith("at once")]


@pytest.mark.parametrize("key", at_once, ids=" ".join)
def test_one_launch_loads_both_sides_once_and_stores_the_gradient_once(reports, key):
    """No loop runs in this kernel, so that every access in its code happens once a thread."""
    _, num_classes, limit = KERNELS[key[0]]
    tile = divergence_triton.tiling(num_classes, limit)
    bytes_a_side = tile["ROWS"] * tile["BLOCK"] * {"bf16": 2, "fp32": 4}[key[2]]
    sixteen = 16 * 32 * tile["num_warps"]  # bytes, by one instruction in all threads
    assert reports[key].loads[128] * sixteen == 2 * bytes_a_side
    assert reports[key].stores[128] * sixteen == bytes_a_side


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@every_kind
@precisions
@pytest.mark.parametrize("shape", [(64, 151936), (513, 16384), (70000, 2)], ids=str)
def test_large_shapes_on_a_gpu(kind, shape, dtype, rtol):
    expert, merged = (logits.to(dtype).cuda() for logits in pair(*shape))
    incoming = torch.randn(shape[0], device="cuda")
    merged.requires_grad_()
    loss = fused_divergence(expert, merged, kind)
    loss.backward(incoming)
    expected, slope = exact(expert, merged.detach(), kind)
    expected = expected, incoming[:, None] * slope
    assert_exact((loss.detach(), merged.grad), expected, 4 * rtol)
    at_once = divergence_and_gradient(expert, merged, kind, weight=incoming)
    assert_exact(at_once, expected, 4 * rtol)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_matrices_of_more_than_two_to_the_31_numbers():
    expert = torch.randn(1, 151936, device="cuda", dtype=torch.bfloat16).expand(15000, -1)
    merged = torch.zeros(15000, 151936, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    loss = fused_divergence(expert, merged)
    loss.sum().backward()
    assert (loss == loss[0]).all()
    assert torch.equal(merged.grad[-1], merged.grad[0])
