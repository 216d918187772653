"""Divergences: the contract every entry of DIVERGENCES keeps, and what each one promises alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from divmerge_core.divergences import (
    DIVERGENCES,
    chi_squared,
    cosine,
    entropy,
    facts_of,
    hellinger,
    js,
    kl,
    kl_family,
    logit_mse,
    objective,
    renyi,
    reverse_chi_squared,
    reverse_kl,
    skew_js,
    squared_l2,
    total_variation,
    triangular,
)
from divmerge_core.divergences import alpha as alpha_divergence
from divmerge_core.kernels.backend import triton

INF = float("inf")
NAMES = list(DIVERGENCES)
every_divergence = pytest.mark.parametrize("name", NAMES)
FUSED = [name for name in NAMES if "fused" in DIVERGENCES.facts[name]]
OTHER_VALUES = (
    *("skew_js:0.5", "skew_js:0.9", "alpha:-3", "alpha:-0.5", "alpha:0", "alpha:2", "alpha:1"),
    *("renyi:2", "renyi:1", "renyi:0.1"),
)
NEAR = {"rtol": 1e-4, "atol": 0}
SPECS = [*NAMES, *OTHER_VALUES]
every_spec = pytest.mark.parametrize("spec", SPECS)

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


def generated(f):
    """The definition of an f-divergence, sum_v q_v f(p_v / q_v): slow, in probabilities."""
    return lambda p, q: (q * f(p / q)).sum(-1)


def amari(alpha: float):
    return generated(lambda r: 4 / (1 - alpha**2) * (1 - r ** ((1 - alpha) / 2)))


def skewed(beta: float):
    """f of (1 - beta) KL(p || m) + beta KL(q || m), where m / q = (1 - beta) r + beta."""

    def f(r: Tensor) -> Tensor:
        m = (1 - beta) * r + beta
        return (1 - beta) * r * (r / m).log() - beta * m.log()

    return generated(f)


def renyi_of(order: float):
    return lambda p, q: (p**order * q ** (1 - order)).sum(-1).log() / (order - 1)


def centred_square(p: Tensor, q: Tensor) -> Tensor:
    a, b = p.log(), q.log()
    return ((a - a.mean(-1, keepdim=True)) - (b - b.mean(-1, keepdim=True))).square().mean(-1)


forward, backward = generated(lambda r: r * r.log()), generated(lambda r: -r.log())
REFERENCES = {
    "kl": forward,
    "reverse_kl": backward,
    "jeffreys": generated(lambda r: (r - 1) * r.log()),
    "js": skewed(0.5),
    "skew_js": skewed(0.1),
    "skew_js:0.5": skewed(0.5),
    "skew_js:0.9": skewed(0.9),
    "alpha": amari(0.5),
    "alpha:-3": amari(-3),
    "alpha:-0.5": amari(-0.5),
    "alpha:0": amari(0),
    "alpha:2": amari(2),
    "alpha:1": backward,
    "renyi": renyi_of(0.5),
    "renyi:2": renyi_of(2),
    "renyi:1": forward,
    "renyi:0.1": renyi_of(0.1),
    "hellinger": generated(lambda r: (r.sqrt() - 1) ** 2 / 2),
    "total_variation": generated(lambda r: (r - 1).abs() / 2),
    "chi_squared": generated(lambda r: (r - 1) ** 2),
    "reverse_chi_squared": generated(lambda r: (r - 1) ** 2 / r),
    "triangular": generated(lambda r: (r - 1) ** 2 / (r + 1)),
    "squared_l2": lambda p, q: (p - q).square().sum(-1),
    "logit_mse": centred_square,
}


def probability_js(p: Tensor, q: Tensor) -> Tensor:
    """The definition, with 0 log 0 = 0."""
    m = (p + q) / 2
    sides = [torch.where(side > 0, side * (side / m).log(), 0.0).sum(-1) for side in (p, q)]
    return sum(sides) / 2


def gradient(name: str, expert: Tensor, merged: Tensor) -> Tensor:
    """Gradient of the summed divergence in the merged model's logits."""
    merged = merged.clone().requires_grad_()
    objective(name)(expert, merged).sum().backward()
    return merged.grad


# The contract: every registered divergence keeps it, at other parameters too.


@every_spec
def test_every_divergence_declares_its_facts(spec):
    declared = {"family", "formula", "slope", "symmetric", "bound", "metric", "curvature", "source"}
    assert declared <= set(facts_of(spec))
    assert facts_of(spec)["family"] in ("f", "other")


@every_spec
def test_equal_logits_have_divergence_zero(spec):
    logits = rows()
    assert_close(objective(spec)(logits, logits), torch.zeros(5, dtype=torch.float64))


@every_spec
def test_different_answers_have_positive_divergence(spec):
    assert (objective(spec)(rows(seed=0), rows(seed=1)) > 0).all()


@every_spec
def test_symmetric_divergences_and_only_they_are_symmetric(spec):
    a, b = rows(seed=0), rows(seed=1)
    there, back = objective(spec)(a, b), objective(spec)(b, a)
    assert torch.allclose(there, back) == facts_of(spec)["symmetric"]


@every_spec
def test_the_declared_bound_is_approached_and_none_means_unbounded(spec):
    far = objective(spec)(one_hot(winner=0, gap=1e4), one_hot(winner=1, gap=1e4)).item()
    bound = facts_of(spec)["bound"]
    if bound is None:
        assert far > 1e3
    else:
        assert far == pytest.approx(bound, rel=1e-6)


@every_spec
def test_one_number_per_position_whatever_the_leading_axes(spec):
    a, b = rows(shape=(2, 3, 7)), rows(seed=1, shape=(2, 3, 7))
    result = objective(spec)(a, b)
    assert result.shape == (2, 3)
    assert_close(result.flatten(), objective(spec)(a.flatten(0, 1), b.flatten(0, 1)))
    assert objective(spec)(a[0, 0], b[0, 0]).shape == ()


@every_spec
def test_adding_a_constant_to_a_row_changes_nothing(spec):
    a, b = rows(seed=0), rows(seed=1)
    shift = rows(seed=2, shape=(5, 1))
    assert_close(objective(spec)(a + shift, b - 2 * shift), objective(spec)(a, b))


@every_spec
@pytest.mark.parametrize("dtype, rtol, atol", PRECISIONS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 41), (1, 2)])
def test_log_space_agrees_with_the_definition_in_probabilities(spec, shape, dtype, rtol, atol):
    a, b = rows(seed=0, shape=shape), rows(seed=1, shape=shape)
    slow = REFERENCES[spec](a.softmax(-1), b.softmax(-1))
    fast = objective(spec)(a.to(dtype), b.to(dtype))
    assert fast.dtype == dtype
    assert_close(fast.double(), slow, rtol=rtol, atol=atol)


@every_spec
def test_gradients_agree_with_finite_differences(spec):
    a, b = rows(seed=0, shape=(3, 4)), rows(seed=1, shape=(3, 4))
    assert torch.autograd.gradcheck(objective(spec), (a.requires_grad_(), b.requires_grad_()))


@every_spec
def test_gradient_rows_sum_to_zero(spec):
    pull = gradient(spec, rows(seed=0), rows(seed=1))
    assert pull.abs().max() > 1e-3
    assert (pull.sum(-1).abs() <= 1e-14 * pull.abs().max().clamp(min=100)).all()


@every_spec
def test_equality_is_a_stationary_point(spec):
    logits = rows()
    assert_close(gradient(spec, logits, logits), torch.zeros_like(logits), rtol=0, atol=1e-12)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("winners", [(0, 0), (0, 1)], ids=["agree", "disagree"])
def test_extreme_logits_give_finite_value_and_gradient(spec, winners, dtype):
    a, b = (one_hot(winner=winner, gap=1e4).to(dtype) for winner in winners)
    assert torch.isfinite(objective(spec)(a, b)).all()
    assert torch.isfinite(gradient(spec, a, b)).all()


@every_spec
def test_a_class_masked_on_both_sides_does_not_count(spec):
    a, b = rows(seed=0), rows(seed=1)
    mask = torch.full((5, 2), -INF, dtype=torch.float64)
    masked_a, masked_b = torch.cat([a, mask], -1), torch.cat([b, mask], -1)
    assert_close(objective(spec)(masked_a, masked_b), objective(spec)(a, b))
    pull = gradient(spec, masked_a, masked_b)
    assert_close(pull[:, :-2], gradient(spec, a, b))
    assert (pull[:, -2:] == 0).all()


@every_spec
def test_a_single_allowed_class_on_both_sides_leaves_nothing_to_differ(spec):
    row = torch.tensor([[0.0, -INF, -INF]])
    assert objective(spec)(row, row + 3).item() == pytest.approx(0, abs=1e-7)
    assert_close(gradient(spec, row, row + 3), torch.zeros(1, 3), rtol=0, atol=1e-7)


@every_spec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_any_arithmetic(spec, dtype):
    a, b = rows(seed=0).to(dtype), rows(seed=1).to(dtype)
    result = objective(spec)(a, b)
    assert result.dtype == torch.float32
    assert torch.equal(result, objective(spec)(a.float(), b.float()))


@every_spec
@pytest.mark.parametrize("bad", [float("nan"), INF], ids=["nan", "inf"])
@pytest.mark.parametrize("side", [0, 1], ids=["expert", "merged"])
def test_logits_without_a_distribution_are_refused(spec, bad, side):
    pair = [rows(), rows(seed=1)]
    pair[side][2, 3] = bad
    with pytest.raises(ValueError, match="define no distribution; check the model's weights"):
        objective(spec)(*pair)


@every_spec
def test_a_row_with_every_class_masked_is_refused(spec):
    masked = rows()
    masked[1] = -INF
    with pytest.raises(ValueError, match="-inf only"):
        objective(spec)(masked, rows())


@pytest.mark.parametrize("name", FUSED)
def test_where_the_fused_kernel_stands_in_it_gives_the_same(name, monkeypatch):
    a, b = rows(), rows(seed=1)
    slow = DIVERGENCES[name](a, b), gradient(name, a, b)
    kinds, fused = [], kl_family.fused_divergence

    def noted(*given, **options):
        kinds.append(given[2])
        return fused(*given, **options)

    monkeypatch.setattr(kl_family, "fusible", lambda *sides: True)
    monkeypatch.setattr(kl_family, "fused_divergence", noted)
    assert_close((DIVERGENCES[name](a, b), gradient(name, a, b)), slow)
    assert kinds == [DIVERGENCES.facts[name]["fused"]] * 2


def test_nothing_is_fused_on_a_cpu():
    assert not kl_family.fusible(rows().float(), rows().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or triton is None, reason="needs Triton on a GPU")
@every_divergence
def test_on_a_gpu_the_kernel_stands_in_where_it_can(name):
    a, b = rows().cuda(), rows(seed=1).cuda()
    assert_close(DIVERGENCES[name](a.float(), b.float()).double(), DIVERGENCES[name](a, b))
    assert kl_family.fusible(a.float(), b.float()) and not kl_family.fusible(a, b)
    assert kl_family.fusible(a.float(), b.float().requires_grad_())
    assert not kl_family.fusible(a.float().requires_grad_(), b.float())
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


def test_the_others_by_hand():
    """p = (1/2, 1/2), q = (4/5, 1/5): sums of two terms each, and Neyman's divides by p."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    overlap = math.sqrt(0.5 * 0.8) + math.sqrt(0.5 * 0.2)
    by_hand = {
        "jeffreys": 0.3 * math.log(8 / 5) + 0.3 * math.log(5 / 2),
        "alpha:0": 4 * (1 - overlap),
        "renyi": -2 * math.log(overlap),
        "renyi:2": math.log(0.25 / 0.8 + 0.25 / 0.2),
        "hellinger": 1 - overlap,
        "total_variation": 0.3,
        "chi_squared": 0.09 / 0.8 + 0.09 / 0.2,
        "reverse_chi_squared": 0.09 / 0.5 + 0.09 / 0.5,
        "triangular": 0.09 / 1.3 + 0.09 / 0.7,
        "squared_l2": 0.18,
        "logit_mse": (math.log(4) / 2) ** 2,  # centred logits are 0, 0 and +-log(4) / 2
    }
    for spec, value in by_hand.items():
        assert objective(spec)(p, q).item() == pytest.approx(value, rel=1e-5), spec


def test_the_families_meet_where_they_should():
    a, b = rows(seed=0), rows(seed=1)
    same = [
        ("alpha:-1", kl(a, b)),
        ("alpha:1", reverse_kl(a, b)),
        ("alpha:0", 4 * hellinger(a, b)),
        ("alpha:-3", chi_squared(a, b) / 2),
        ("alpha:3", reverse_chi_squared(a, b) / 2),
        ("renyi:1", kl(a, b)),
        ("renyi:2", torch.log1p(chi_squared(a, b))),
        ("renyi:0.5", -2 * torch.log1p(-hellinger(a, b))),
        ("skew_js:0.5", js(a, b)),
        ("jeffreys", kl(a, b) + reverse_kl(a, b)),
    ]
    for spec, value in same:
        assert_close(objective(spec)(a, b), value, msg=lambda text, spec=spec: f"{spec}: {text}")


def test_swapping_the_sides_mirrors_the_parameter():
    a, b = rows(seed=0), rows(seed=1)
    for spec, mirrored in (("alpha:0.5", "alpha:-0.5"), ("skew_js:0.2", "skew_js:0.8")):
        assert_close(objective(spec)(a, b), objective(mirrored)(b, a))


def test_skew_js_tends_to_a_kl_at_either_end_of_beta():
    a, b = rows(seed=0, scale=1.0), rows(seed=1, scale=1.0)
    assert_close(skew_js(a, b, beta=1e-3) / 1e-3, reverse_kl(a, b), rtol=1e-2, atol=0)
    assert_close(skew_js(a, b, beta=1 - 1e-3) / 1e-3, kl(a, b), rtol=1e-2, atol=0)


def test_pinsker_and_the_order_of_the_bounded_ones():
    a, b = rows(seed=0, shape=(500, 4)), rows(seed=1, shape=(500, 4))
    distance, squared = total_variation(a, b), hellinger(a, b)
    assert (2 * distance**2 <= kl(a, b)).all()
    assert (squared <= distance).all() and (distance <= (2 * squared).sqrt()).all()
    assert (triangular(a, b) / 4 <= js(a, b)).all()  # Topsoe 2000
    assert (js(a, b) <= math.log(2) * triangular(a, b) / 2).all()


@pytest.mark.parametrize(
    "distance",
    [lambda a, b: js(a, b).sqrt(), lambda a, b: hellinger(a, b).sqrt()]
    + [lambda a, b: triangular(a, b).sqrt(), total_variation]
    + [lambda a, b: squared_l2(a, b).sqrt(), lambda a, b: logit_mse(a, b).sqrt()],
    ids=["js", "hellinger", "triangular", "total_variation", "squared_l2", "logit_mse"],
)
def test_declared_metrics_obey_the_triangle_inequality(distance):
    a, b, c = (rows(seed=seed, shape=(500, 4)) for seed in range(3))
    assert (distance(a, c) <= distance(a, b) + distance(b, c) + 1e-12).all()


def test_exactly_those_divergences_are_called_metrics():
    roots = {name for name in NAMES if facts_of(name)["metric"] == "square root"}
    assert roots == {"js", "hellinger", "triangular", "squared_l2", "logit_mse"}
    assert {name for name in NAMES if facts_of(name)["metric"] == "itself"} == {"total_variation"}


@pytest.mark.parametrize("spec", [spec for spec in SPECS if facts_of(spec)["curvature"]])
def test_close_to_equality_it_is_the_fisher_metric_times_the_declared_curvature(spec):
    """By central differences of the value, along random directions."""
    row, step = rows(shape=(6, 5)), 1e-3 * rows(seed=1, shape=(6, 5), scale=1.0)
    p = row.softmax(-1)
    fisher = (p * step**2).sum(-1) - (p * step).sum(-1) ** 2
    value = (objective(spec)(row, row + step) + objective(spec)(row, row - step)) / 2
    assert_close(value / (fisher / 2), torch.full_like(fisher, facts_of(spec)["curvature"]), **NEAR)


def test_every_smooth_f_divergence_declares_a_curvature():
    """Total variation alone has a kink; what is no f-divergence need not be a Fisher metric."""
    smooth = {name for name in NAMES if facts_of(name)["curvature"]}
    assert smooth - {"renyi"} == {
        name for name in NAMES if facts_of(name)["family"] == "f" and name != "total_variation"
    }


def test_curvatures_that_are_none_are_not_the_fisher_metric():
    row = rows(shape=(4,), scale=1.0)
    p = row.softmax(-1)
    fisher = p.diag() - p.outer(p)
    for name in ("squared_l2", "logit_mse"):
        divergence = objective(name)
        hessian = torch.autograd.functional.hessian(lambda z, d=divergence: d(row, z), row.clone())
        share = (hessian * fisher).sum() / fisher.square().sum()
        assert (hessian - share * fisher).norm() > 0.1 * hessian.norm()


def test_large_ratios_go_on_as_a_tangent_and_small_ones_are_exact():
    gaps = torch.tensor([29.0, 31.0, 40.0], dtype=torch.float64)
    sure = torch.stack([torch.zeros(3), torch.full((3,), -100.0)], -1).double()  # p = (1, 0)
    doubt = torch.stack([-gaps, torch.log1p(-(-gaps).exp())], -1)  # q = (e^-gap, 1 - e^-gap)
    found = chi_squared(sure, doubt)  # 1 / q - 1 = e^gap - 1
    top = math.exp(30)
    assert_close(found, torch.tensor([math.expm1(29), 2 * top - 1, 11 * top - 1]).double())
    pull = gradient("chi_squared", sure, doubt)[:, 0]
    assert_close(pull[1:], torch.full((2,), -top, dtype=torch.float64))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if facts_of(spec)["bound"] is not None])
@pytest.mark.parametrize("masked", [0, 1], ids=["expert", "merged"])
def test_bounded_ones_are_finite_under_a_mask_on_one_side(spec, masked):
    pair = [torch.zeros(1, 3), torch.zeros(1, 3)]
    pair[masked][0, 0] = -INF
    disjoint = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    for sides in (pair, disjoint):
        assert 0 < objective(spec)(*sides).item() <= facts_of(spec)["bound"] * (1 + 1e-6)
        assert torch.isfinite(gradient(spec, *sides)).all()


@pytest.mark.parametrize("spec", ["jeffreys", "alpha:2", "chi_squared", "logit_mse"])
def test_unbounded_ones_are_infinite_where_the_expert_alone_gives_an_answer(spec):
    expert, merged = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -INF]])
    sides = (merged, expert) if spec == "alpha:2" else (expert, merged)
    assert objective(spec)(*sides).item() == INF


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


SLOPES = {  # dD/dq_v up to a constant, with r = p_v / q_v
    "kl": lambda r: -r,
    "reverse_kl": lambda r: -r.log(),
    "jeffreys": lambda r: -r - r.log(),
    "js": lambda r: -((1 + r) / 2).log() / 2,
    "skew_js": lambda r: -0.1 * (0.9 * r + 0.1).log(),
    "alpha": lambda r: -4 * r**0.25,
    "hellinger": lambda r: -r.sqrt() / 2,
    "total_variation": lambda r: -(r - 1).sign() / 2,
    "chi_squared": lambda r: -(r**2),
    "reverse_chi_squared": lambda r: 2 / r,
    "triangular": lambda r: -4 * r**2 / (1 + r) ** 2,
}


@pytest.mark.parametrize("name", [name for name in NAMES if facts_of(name)["family"] == "f"])
def test_gradients_have_their_closed_forms(name):
    a, b = rows(seed=0), rows(seed=1)
    q = b.softmax(-1)
    slope = SLOPES[name](a.softmax(-1) / q)
    by_hand = q * (slope - (q * slope).sum(-1, keepdim=True))
    assert_close(gradient(name, a, b), by_hand)


def test_the_gradient_of_logit_mse_is_the_centred_difference():
    a, b = rows(seed=0), rows(seed=1)
    gap = (b - a) - (b - a).mean(-1, keepdim=True)
    assert_close(gradient("logit_mse", a, b), 2 * gap / 7)


def test_where_the_merged_model_is_surely_right_and_the_expert_surely_wrong_js_lets_go():
    """KL still pulls with the full weight of the row, chi-squared with its ratio."""
    wrong, right = one_hot(winner=0, gap=15.0, classes=2), one_hot(winner=1, gap=15.0, classes=2)
    pulls = {name: gradient(name, wrong, right).abs().max().item() for name in NAMES}
    assert pulls["kl"] == pytest.approx(1, rel=1e-6)
    assert max(pulls[n] for n in ("js", "hellinger", "triangular", "total_variation")) < 1e-6
    assert pulls["chi_squared"] > 1e12


def test_entropy_lies_between_zero_for_one_answer_and_log_v_for_none():
    assert entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4), rel=1e-6)
    assert entropy(torch.tensor([[0.0, -INF, -INF]])).item() == 0
    assert (entropy(rows()) > 0).all() and (entropy(rows()) < math.log(7)).all()


# From a spec to an objective.


def test_a_spec_without_a_parameter_is_the_function_itself():
    for name in NAMES:
        assert objective(name) is DIVERGENCES[name]


def test_a_parameter_follows_a_colon():
    a, b = rows(seed=0), rows(seed=1)
    assert torch.equal(objective("skew_js:0.3")(a, b), skew_js(a, b, beta=0.3))
    assert torch.equal(objective("renyi:2")(a, b), renyi(a, b, order=2.0))
    assert torch.equal(objective("alpha:-2")(a, b), alpha_divergence(a, b, alpha=-2.0))


def test_a_temperature_divides_both_sides_logits():
    a, b = rows(seed=0), rows(seed=1)
    for name in ("js", "kl", "skew_js:0.3"):
        assert_close(objective(name, 2.0)(a, b), objective(name)(a / 2, b / 2))
    half = a.half(), b.half()
    assert_close(objective("js", 3.0)(*half), js(half[0].float() / 3, half[1].float() / 3))


def test_at_a_high_temperature_all_that_is_left_is_the_variance_of_the_logits():
    """D is near c/2 times the Fisher metric, and that near the variance of the logits' gap."""
    a, b = rows(seed=0), rows(seed=1)
    gap = logit_mse(a, b)
    for name in ("kl", "js", "hellinger", "chi_squared"):
        limit = facts_of(name)["curvature"] / 2 * gap
        assert_close(1e6 * objective(name, 1e3)(a, b), limit, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("js:0.5", "'js' has no parameter, got 'js:0.5'; say 'js'"),
        ("jss", "did you mean 'js'"),
        ("skew_js:half", "must be a number, got 'half'; say 'skew_js:0.1'"),
        ("skew_js:", "must be a number, got ''"),
        ("skew_js:0", r"beta must be in \[0.001, 0.999\], got 0; the default is 0.1"),
        ("skew_js:nan", "beta must be in"),
        ("alpha:4", r"alpha must be in \[-3, 3\]"),
        (
            "alpha:0.999",
            "alpha=0.999 is too near 1 for float32; give 1 itself, where it is reverse",
        ),
        ("renyi:0", r"order must be in \[0.01, 10\]"),
        ("renyi:1.005", "give 1 itself, where it is kl"),
    ],
)
def test_specs_that_mean_nothing_are_refused(spec, said):
    with pytest.raises(ValueError, match=said):
        objective(spec)
    with pytest.raises(ValueError, match=said):
        facts_of(spec)


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, float("nan")])
def test_temperatures_out_of_range_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0 and finite"):
        objective("js", temperature)


def test_parameters_are_checked_in_direct_calls_too():
    with pytest.raises(ValueError, match="beta must be in"):
        skew_js(rows(), rows(), beta=2.0)
    with pytest.raises(ValueError, match="order must be in"):
        renyi(rows(), rows(), order=-1.0)


def test_facts_follow_the_parameter():
    assert facts_of("skew_js:0.5")["bound"] == pytest.approx(math.log(2))
    assert facts_of("alpha:0")["bound"] == 4 and facts_of("alpha:2")["bound"] is None
    assert facts_of("renyi:2")["curvature"] == 2


# Beside the registry.


def test_cosine_sees_direction_only():
    a = rows(shape=(5, 7))
    assert_close(cosine(a, 3 * a), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(cosine(a, -a), torch.full((5,), 2.0, dtype=torch.float64))
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert cosine(left, right).item() == pytest.approx(1 - math.sqrt(0.5))
    assert cosine(torch.zeros(1, 2), right).item() == 1
    assert "cosine" not in DIVERGENCES and "entropy" not in DIVERGENCES


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


@settings(deadline=None, max_examples=100, derandomize=True)
@given(pairs())
def test_bounded_ones_stay_in_their_bounds_with_finite_gradients(pair):
    for spec in ("skew_js", "alpha", "hellinger", "total_variation", "triangular", "squared_l2"):
        value, bound = objective(spec)(*pair).item(), facts_of(spec)["bound"]
        assert -ROUNDING <= value <= bound * (1 + ROUNDING)
        assert torch.isfinite(gradient(spec, *pair)).all()


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
