"""Divergences: the contract every entry of DIVERGENCES keeps, and what each one promises alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from divmerge_core import divergences
from divmerge_core.divergences import DIVERGENCES, entropy, js, kl, reverse_kl
from divmerge_core.kernels.backend import triton

INF = float("inf")
NAMES = list(DIVERGENCES)
every_divergence = pytest.mark.parametrize("name", NAMES)

# dtype, rtol, atol: what rounding alone may cost against the float64 reference
PRECISIONS = [(torch.float64, 1e-10, 1e-12), (torch.float32, 1e-4, 2e-6)]


def rows(*, seed: int = 0, shape: tuple[int, ...] = (5, 7), scale: float = 3.0) -> Tensor:
    """Random logits in float64."""
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def one_hot(*, winner: int, gap: float, classes: int = 3) -> Tensor:
    """A row of logits at -gap with the winner at +gap."""
    row = torch.full((1, classes), -gap)
    row[0, winner] = gap
    return row


def probability_kl(p: Tensor, q: Tensor) -> Tensor:
    """The definition, with 0 log 0 = 0: slow, and only for probabilities that do not underflow."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def probability_js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (probability_kl(p, m) + probability_kl(q, m)) / 2


REFERENCES = {
    "kl": probability_kl,
    "reverse_kl": lambda p, q: probability_kl(q, p),
    "js": probability_js,
}


def gradient(name: str, expert: Tensor, merged: Tensor) -> Tensor:
    """Gradient of the summed divergence in the merged model's logits."""
    merged = merged.clone().requires_grad_()
    DIVERGENCES[name](expert, merged).sum().backward()
    return merged.grad


# The contract: every registered divergence keeps it.


@every_divergence
def test_every_divergence_declares_its_facts(name):
    assert {"symmetric", "bound", "source"} <= set(DIVERGENCES.facts[name])


@every_divergence
def test_equal_logits_have_divergence_zero(name):
    logits = rows()
    assert_close(DIVERGENCES[name](logits, logits), torch.zeros(5, dtype=torch.float64))


@every_divergence
def test_different_answers_have_positive_divergence(name):
    assert (DIVERGENCES[name](rows(seed=0), rows(seed=1)) > 0).all()


@every_divergence
def test_symmetric_divergences_and_only_they_are_symmetric(name):
    a, b = rows(seed=0), rows(seed=1)
    there, back = DIVERGENCES[name](a, b), DIVERGENCES[name](b, a)
    assert torch.allclose(there, back) == DIVERGENCES.facts[name]["symmetric"]


@every_divergence
def test_the_declared_bound_is_approached_and_none_means_unbounded(name):
    far = DIVERGENCES[name](one_hot(winner=0, gap=1e4), one_hot(winner=1, gap=1e4)).item()
    bound = DIVERGENCES.facts[name]["bound"]
    if bound is None:
        assert far > 1e4
    else:
        assert far == pytest.approx(bound, rel=1e-6)


@every_divergence
def test_one_number_per_position_whatever_the_leading_axes(name):
    a, b = rows(shape=(2, 3, 7)), rows(seed=1, shape=(2, 3, 7))
    result = DIVERGENCES[name](a, b)
    assert result.shape == (2, 3)
    assert_close(result.flatten(), DIVERGENCES[name](a.flatten(0, 1), b.flatten(0, 1)))
    assert DIVERGENCES[name](a[0, 0], b[0, 0]).shape == ()


@every_divergence
def test_adding_a_constant_to_a_row_changes_nothing(name):
    a, b = rows(seed=0), rows(seed=1)
    shift = rows(seed=2, shape=(5, 1))
    assert_close(DIVERGENCES[name](a + shift, b - 2 * shift), DIVERGENCES[name](a, b))


@every_divergence
@pytest.mark.parametrize("dtype, rtol, atol", PRECISIONS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 41), (1, 2)])
def test_log_space_agrees_with_the_definition_in_probabilities(name, shape, dtype, rtol, atol):
    if name not in REFERENCES:
        pytest.skip(f"no slow reference for {name}; add one to REFERENCES")
    a, b = rows(seed=0, shape=shape), rows(seed=1, shape=shape)
    slow = REFERENCES[name](a.softmax(-1), b.softmax(-1))
    fast = DIVERGENCES[name](a.to(dtype), b.to(dtype))
    assert fast.dtype == dtype
    assert_close(fast.double(), slow, rtol=rtol, atol=atol)


@every_divergence
def test_gradients_agree_with_finite_differences(name):
    a, b = rows(seed=0, shape=(3, 4)), rows(seed=1, shape=(3, 4))
    assert torch.autograd.gradcheck(DIVERGENCES[name], (a.requires_grad_(), b.requires_grad_()))


@every_divergence
def test_gradient_rows_sum_to_zero(name):
    pull = gradient(name, rows(seed=0), rows(seed=1))
    assert pull.abs().max() > 1e-3
    assert_close(pull.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


@every_divergence
def test_equality_is_a_stationary_point(name):
    logits = rows()
    assert_close(gradient(name, logits, logits), torch.zeros_like(logits), rtol=0, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("winners", [(0, 0), (0, 1)], ids=["agree", "disagree"])
def test_extreme_logits_give_finite_value_and_gradient(name, winners, dtype):
    a, b = (one_hot(winner=winner, gap=1e4).to(dtype) for winner in winners)
    assert torch.isfinite(DIVERGENCES[name](a, b)).all()
    assert torch.isfinite(gradient(name, a, b)).all()


@every_divergence
def test_a_class_masked_on_both_sides_does_not_count(name):
    a, b = rows(seed=0), rows(seed=1)
    mask = torch.full((5, 2), -INF, dtype=torch.float64)
    masked_a, masked_b = torch.cat([a, mask], -1), torch.cat([b, mask], -1)
    assert_close(DIVERGENCES[name](masked_a, masked_b), DIVERGENCES[name](a, b))
    pull = gradient(name, masked_a, masked_b)
    assert_close(pull[:, :-2], gradient(name, a, b))
    assert (pull[:, -2:] == 0).all()


@every_divergence
def test_a_single_allowed_class_on_both_sides_leaves_nothing_to_differ(name):
    row = torch.tensor([[0.0, -INF, -INF]])
    assert DIVERGENCES[name](row, row + 3).item() == 0
    assert (gradient(name, row, row + 3) == 0).all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_any_arithmetic(name, dtype):
    a, b = rows(seed=0).to(dtype), rows(seed=1).to(dtype)
    result = DIVERGENCES[name](a, b)
    assert result.dtype == torch.float32
    assert torch.equal(result, DIVERGENCES[name](a.float(), b.float()))


@every_divergence
@pytest.mark.parametrize("bad", [float("nan"), INF], ids=["nan", "inf"])
@pytest.mark.parametrize("side", [0, 1], ids=["expert", "merged"])
def test_logits_without_a_distribution_are_refused(name, bad, side):
    pair = [rows(), rows(seed=1)]
    pair[side][2, 3] = bad
    with pytest.raises(ValueError, match="define no distribution; check the model's weights"):
        DIVERGENCES[name](*pair)


@every_divergence
def test_a_row_with_every_class_masked_is_refused(name):
    masked = rows()
    masked[1] = -INF
    with pytest.raises(ValueError, match="-inf only"):
        DIVERGENCES[name](masked, rows())


@every_divergence
def test_where_the_fused_kernel_stands_in_it_gives_the_same(name, monkeypatch):
    a, b = rows(), rows(seed=1)
    slow = DIVERGENCES[name](a, b), gradient(name, a, b)
    kinds, fused = [], divergences.fused_divergence
    monkeypatch.setattr(divergences, "fusible", lambda *sides: True)
    monkeypatch.setattr(
        divergences, "fused_divergence", lambda *given: kinds.append(given[2]) or fused(*given)
    )
    assert_close((DIVERGENCES[name](a, b), gradient(name, a, b)), slow)
    assert kinds == [name, name]


def test_nothing_is_fused_on_a_cpu():
    assert not divergences.fusible(rows().float(), rows().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or triton is None, reason="needs Triton on a GPU")
@every_divergence
def test_on_a_gpu_the_kernel_stands_in_where_it_can(name):
    a, b = rows().cuda(), rows(seed=1).cuda()
    assert_close(DIVERGENCES[name](a.float(), b.float()).double(), DIVERGENCES[name](a, b))
    assert divergences.fusible(a.float(), b.float()) and not divergences.fusible(a, b)
    assert divergences.fusible(a.float(), b.float().requires_grad_())
    assert not divergences.fusible(a.float().requires_grad_(), b.float())
    assert torch.autograd.gradcheck(DIVERGENCES[name], (a.requires_grad_(), b.requires_grad_()))


def test_an_unknown_divergence_is_answered_with_the_choices():
    with pytest.raises(KeyError) as error:
        DIVERGENCES["jss"]
    assert f"choose one of: {', '.join(NAMES)}" in str(error.value)
    assert "did you mean 'js'?" in str(error.value)


# What each divergence promises alone.


def test_two_classes_by_hand():
    """p = (1/2, 1/2), q = (3/4, 1/4), m = (5/8, 3/8)."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    forward = 0.5 * math.log(4 / 3)
    backward = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    halves = 0.5 * math.log(16 / 15), 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    assert kl(p, q).item() == pytest.approx(forward, rel=1e-5)
    assert reverse_kl(p, q).item() == pytest.approx(backward, rel=1e-5)
    assert js(p, q).item() == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_kl_to_the_uniform_distribution_is_log_v_minus_entropy():
    logits = rows()
    missing = math.log(7) - entropy(logits)
    assert_close(kl(logits, torch.zeros_like(logits)), missing)


def test_kl_is_infinite_where_the_merged_model_rules_out_an_answer():
    expert, merged = torch.zeros(2, 3), torch.zeros(2, 3)
    merged[0, 1] = -INF  # the expert gives this answer with probability 1/3
    forward, mixed = kl(expert, merged), js(expert, merged)
    assert forward.tolist() == [INF, 0.0]
    assert reverse_kl(expert, merged)[0].item() == pytest.approx(math.log(3 / 2), rel=1e-6)
    assert 0 < mixed[0] < math.log(2)


def test_reverse_kl_is_infinite_where_the_expert_rules_out_an_answer():
    expert = torch.tensor([[0.0, 0.0, -INF]])
    merged = torch.zeros(1, 3)
    assert reverse_kl(expert, merged).item() == INF
    assert kl(expert, merged).item() == pytest.approx(math.log(3 / 2), rel=1e-6)


def test_reverse_kl_is_kl_with_the_sides_swapped():
    a, b = rows(seed=0), rows(seed=1)
    assert torch.equal(reverse_kl(a, b), kl(b, a))


@pytest.mark.parametrize("masked", ["expert", "merged"])
def test_a_mask_on_one_side_leaves_js_and_its_gradient_finite(masked):
    pair = {"expert": torch.zeros(1, 3), "merged": torch.zeros(1, 3)}
    pair[masked][0, 0] = -INF
    p, q = (pair[side].softmax(-1) for side in ("expert", "merged"))
    assert_close(js(**pair), probability_js(p, q))
    assert torch.isfinite(gradient("js", **pair)).all()


def test_disjoint_answers_reach_the_bound_of_js():
    left, right = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    assert js(left, right).item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.isfinite(gradient("js", left, right)).all()


def test_js_is_the_entropy_of_the_mixture_minus_the_mean_entropy():
    a, b = rows(seed=0), rows(seed=1)
    mixture = ((a.softmax(-1) + b.softmax(-1)) / 2).log()
    assert_close(js(a, b), entropy(mixture) - (entropy(a) + entropy(b)) / 2)


def test_the_square_root_of_js_obeys_the_triangle_inequality():
    a, b, c = (rows(seed=seed, shape=(500, 4)) for seed in range(3))
    assert (js(a, c).sqrt() <= js(a, b).sqrt() + js(b, c).sqrt()).all()


def test_gradients_have_their_closed_forms():
    a, b = rows(seed=0), rows(seed=1)
    p, q = a.softmax(-1), b.softmax(-1)
    m = (p + q) / 2
    slopes = {"kl": -p / q, "reverse_kl": (q / p).log(), "js": (q / m).log() / 2}
    for name, slope in slopes.items():
        by_hand = q * (slope - (q * slope).sum(-1, keepdim=True))
        assert_close(gradient(name, a, b), by_hand, msg=lambda text, name=name: f"{name}: {text}")


def test_curvature_at_equality_is_the_fisher_metric_and_a_quarter_of_it_for_js():
    row = rows(shape=(4,))
    p = row.softmax(-1)
    fisher = p.diag() - p.outer(p)
    for name, share in {"kl": 1.0, "reverse_kl": 1.0, "js": 0.25}.items():
        hessian = torch.autograd.functional.hessian(
            lambda z, name=name: DIVERGENCES[name](row, z), row.clone()
        )
        assert_close(hessian, share * fisher, msg=lambda text, name=name: f"{name}: {text}")


def test_entropy_lies_between_zero_for_one_answer_and_log_v_for_none():
    assert entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4), rel=1e-6)
    assert entropy(torch.tensor([[0.0, -INF, -INF]])).item() == 0
    assert (entropy(rows()) > 0).all() and (entropy(rows()) < math.log(7)).all()


# Properties over any pair of logit rows.

number = st.floats(-1e4, 1e4, width=32)


@st.composite
def pairs(draw) -> tuple[Tensor, Tensor]:
    """Two rows of float32 logits over the same 2 to 6 classes, some masked on either side."""
    classes = draw(st.integers(2, 6))
    entry = st.one_of(number, st.just(-INF))
    sides = []
    for _ in range(2):
        row = draw(st.lists(entry, min_size=classes, max_size=classes))
        row[draw(st.integers(0, classes - 1))] = draw(number)  # at least one class is allowed
        sides.append(torch.tensor([row], dtype=torch.float32))
    return sides[0], sides[1]


ROUNDING = 1e-6  # nats, in float32


@settings(deadline=None, max_examples=300, derandomize=True)
@given(pairs())
def test_js_lies_between_zero_and_log_2_and_is_symmetric(pair):
    a, b = pair
    there, back = js(a, b).item(), js(b, a).item()
    assert -ROUNDING <= there <= math.log(2) + ROUNDING
    assert there == pytest.approx(back, abs=ROUNDING)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(pairs())
def test_js_has_a_finite_gradient_whose_rows_sum_to_zero(pair):
    pull = gradient("js", *pair)
    assert torch.isfinite(pull).all()
    assert pull.sum().item() == pytest.approx(0, abs=ROUNDING)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(pairs())
def test_kl_is_never_negative_and_small_kl_means_small_js(pair):
    """JS <= (log 2 / 2) KL: class by class, their ratio is largest, and log(2) / 2, where p = 0."""
    a, b = pair
    forward = kl(a, b).item()
    assert forward >= -ROUNDING
    assert js(a, b).item() <= math.log(2) / 2 * forward + ROUNDING
