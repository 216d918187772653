"""Divergences: the contract of every entry of DIVERGENCES, and what each one satisfies besides."""

import math

import pytest
import torch
from helpers import INF, NAN, logit_pairs, one_hot, refuses
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from divmerge_core.divergences import DIVERGENCES, cosine, facts_of, kl_family, objective
from divmerge_core.divergences.distances import logit_mse, squared_l2
from divmerge_core.divergences.kl_family import entropy, js, kl, reverse_kl, skew_js
from divmerge_core.divergences.power_family import alpha as alpha_divergence
from divmerge_core.divergences.power_family import chi_squared, hellinger, renyi
from divmerge_core.kernels.backend import triton

NAMES = list(DIVERGENCES)
FUSED = [name for name in NAMES if "fused" in DIVERGENCES.facts[name]]
OTHER_VALUES = (
    *("skew_js:0.5", "skew_js:0.9", "alpha:-3", "alpha:-0.5", "alpha:0", "alpha:2", "alpha:1"),
    *("renyi:2", "renyi:1", "renyi:0.1"),
)
SPECS = [*NAMES, *OTHER_VALUES]
every_spec = pytest.mark.parametrize("spec", SPECS)


def rows(*, seed: int = 0, shape: tuple[int, ...] = (5, 7), scale: float = 3.0) -> Tensor:
    """Random logits in float64."""
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def gradient(spec: str, expert: Tensor, merged: Tensor) -> Tensor:
    """Gradient of the summed divergence in the merged model's logits."""
    merged = merged.clone().requires_grad_()
    objective(spec)(expert, merged).sum().backward()
    return merged.grad


def f_divergence(f):
    """The definition, sum_v q_v f(p_v / q_v)."""
    return lambda p, q: (q * f(p / q)).sum(-1)


def amari(alpha: float):
    return f_divergence(lambda r: 4 / (1 - alpha**2) * (1 - r ** ((1 - alpha) / 2)))


def skewed(beta: float):
    """f of (1 - beta) KL(p || m) + beta KL(q || m), where m / q = (1 - beta) r + beta."""

    def f(r: Tensor) -> Tensor:
        m = (1 - beta) * r + beta
        return (1 - beta) * r * (r / m).log() - beta * m.log()

    return f_divergence(f)


def renyi_of(order: float):
    return lambda p, q: (p**order * q ** (1 - order)).sum(-1).log() / (order - 1)


forward, backward = f_divergence(lambda r: r * r.log()), f_divergence(lambda r: -r.log())
REFERENCES = {
    "kl": forward,
    "reverse_kl": backward,
    "jeffreys": f_divergence(lambda r: (r - 1) * r.log()),
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
    "hellinger": f_divergence(lambda r: (r.sqrt() - 1) ** 2 / 2),
    "total_variation": f_divergence(lambda r: (r - 1).abs() / 2),
    "chi_squared": f_divergence(lambda r: (r - 1) ** 2),
    "reverse_chi_squared": f_divergence(lambda r: (r - 1) ** 2 / r),
    "triangular": f_divergence(lambda r: (r - 1) ** 2 / (r + 1)),
    "squared_l2": lambda p, q: (p - q).square().sum(-1),
    "logit_mse": lambda p, q: (p / q).log().var(-1, correction=0),
}


@every_spec
def test_the_declared_facts_hold_and_log_space_agrees_with_probabilities(spec):
    facts, divergence = facts_of(spec), objective(spec)
    declared = {"family", "formula", "slope", "symmetric", "bound", "metric", "curvature", "source"}
    assert declared <= set(facts) and facts["family"] in ("f", "other")
    a, b = rows(seed=0), rows(seed=1)
    assert_close(divergence(a, a), torch.zeros(5, dtype=torch.float64))
    assert (divergence(a, b) > 0).all()
    assert torch.allclose(divergence(a, b), divergence(b, a)) == facts["symmetric"]
    far, bound = divergence(one_hot(0), one_hot(1)).item(), facts["bound"]
    assert far > 1e3 if bound is None else far == pytest.approx(bound, rel=1e-6)
    for shape in [(5, 7), (2, 3, 41), (1, 2), (4,)]:
        a, b = rows(seed=0, shape=shape), rows(seed=1, shape=shape)
        slow = REFERENCES[spec](a.softmax(-1), b.softmax(-1))
        for dtype, rtol, atol in ((torch.float64, 1e-10, 1e-12), (torch.float32, 1e-4, 2e-6)):
            fast = divergence(a.to(dtype), b.to(dtype))
            assert fast.dtype == dtype and fast.shape == shape[:-1]
            assert_close(fast.double(), slow, rtol=rtol, atol=atol)


@every_spec
def test_half_precision_is_widened_and_gradients_agree_with_finite_differences(spec):
    for dtype in (torch.bfloat16, torch.float16):
        a, b = rows(seed=0).to(dtype), rows(seed=1).to(dtype)
        result = objective(spec)(a, b)
        assert result.dtype == torch.float32
        assert torch.equal(result, objective(spec)(a.float(), b.float()))
    a, b = (rows(seed=seed, shape=(2, 4)).requires_grad_() for seed in range(2))
    assert torch.autograd.gradcheck(objective(spec), (a, b))


@every_spec
def test_shifts_and_classes_masked_on_both_sides_change_nothing(spec):
    """So gradient rows sum to zero; at equality the gradient is zero."""
    a, b, shift = rows(seed=0), rows(seed=1), rows(seed=2, shape=(5, 1))
    plain, slope = objective(spec)(a, b), gradient(spec, a, b)
    assert slope.abs().max() > 1e-3
    assert (slope.sum(-1).abs() <= 1e-14 * slope.abs().max().clamp(min=100)).all()
    assert_close(objective(spec)(a + shift, b - 2 * shift), plain)
    mask = torch.full((5, 2), -INF, dtype=torch.float64)
    wider = torch.cat([a, mask], -1), torch.cat([b, mask], -1)
    assert_close(objective(spec)(*wider), plain)
    assert_close(gradient(spec, *wider), torch.cat([slope, torch.zeros_like(mask)], -1))
    assert_close(gradient(spec, a, a), torch.zeros_like(a), rtol=0, atol=1e-12)
    single = torch.tensor([[0.0, -INF, -INF]])
    assert objective(spec)(single, single + 3).item() == pytest.approx(0, abs=1e-7)
    assert_close(gradient(spec, single, single + 3), torch.zeros(1, 3), rtol=0, atol=1e-7)


@every_spec
def test_extreme_logits_are_finite_bounds_hold_under_masks_and_bad_rows_are_refused(spec):
    def finite(*sides) -> bool:
        both = torch.cat([objective(spec)(*sides)[:, None], gradient(spec, *sides)], -1)
        return bool(torch.isfinite(both).all())

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for winner in (0, 1):
            assert finite(one_hot(0).to(dtype), one_hot(winner).to(dtype))
    bound = facts_of(spec)["bound"]
    full, some, other = torch.tensor([[[0.0, 0.0]], [[0.0, -INF]], [[-INF, 0.0]]])
    for sides in ((full, some), (some, full), (some, other)):
        if bound is not None:
            assert finite(*sides)
            assert 0 < objective(spec)(*sides).item() <= bound * (1 + 1e-6)
    for side in (0, 1):
        for bad in ([NAN, 0.0], [INF, 0.0], [-INF, -INF]):
            pair = [torch.zeros(2, 2), torch.zeros(2, 2)]
            pair[side][1] = torch.tensor(bad)
            with refuses("-inf only, so they define no distribution; check"):
                objective(spec)(*pair)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if facts_of(spec)["curvature"]])
def test_close_to_equality_it_is_the_fisher_metric_times_the_declared_curvature(spec):
    """By central differences of the value, along random directions."""
    row, step = rows(shape=(6, 5)), 1e-3 * rows(seed=1, shape=(6, 5), scale=1.0)
    p = row.softmax(-1)
    fisher = (p * step**2).sum(-1) - (p * step).sum(-1) ** 2
    value = (objective(spec)(row, row + step) + objective(spec)(row, row - step)) / 2
    expected = torch.full_like(fisher, facts_of(spec)["curvature"])
    assert_close(value / (fisher / 2), expected, rtol=1e-4, atol=0)


def test_every_smooth_f_divergence_declares_a_curvature():
    """Total variation has a kink; a divergence of another family need not be a Fisher metric."""
    smooth = {name for name in NAMES if facts_of(name)["curvature"]}
    assert smooth - {"renyi"} == {
        name for name in NAMES if facts_of(name)["family"] == "f" and name != "total_variation"
    }
    row = rows(shape=(4,), scale=1.0)
    p = row.softmax(-1)
    fisher = p.diag() - p.outer(p)
    for name in ("squared_l2", "logit_mse"):
        divergence = objective(name)
        hessian = torch.autograd.functional.hessian(lambda z, d=divergence: d(row, z), row.clone())
        share = (hessian * fisher).sum() / fisher.square().sum()
        assert (hessian - share * fisher).norm() > 0.1 * hessian.norm()


def test_declared_metrics_obey_the_triangle_inequality():
    metrics = {name: facts_of(name)["metric"] for name in NAMES if facts_of(name)["metric"]}
    roots = ("js", "hellinger", "triangular", "squared_l2", "logit_mse")
    assert metrics == {**dict.fromkeys(roots, "square root"), "total_variation": "itself"}
    a, b, c = (rows(seed=seed, shape=(500, 4)) for seed in range(3))
    for name, kind in metrics.items():
        power = 0.5 if kind == "square root" else 1.0
        ac, ab, bc = (DIVERGENCES[name](*two) ** power for two in ((a, c), (a, b), (b, c)))
        assert (ac <= ab + bc + 1e-12).all()


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_kernel_gives_the_same_where_it_is_used(name, monkeypatch):
    a, b = rows(), rows(seed=1)
    assert not kl_family.fusible(a.float(), b.float())  # on a CPU
    slow = DIVERGENCES[name](a, b), gradient(name, a, b)
    kinds, fused = [], kl_family.fused_divergence

    def noted(*given, **options):
        kinds.append(given[2])
        return fused(*given, **options)

    monkeypatch.setattr(kl_family, "resolve_backend", lambda backend, *sides: "triton")
    monkeypatch.setattr(kl_family, "fused_divergence", noted)
    assert_close((DIVERGENCES[name](a, b), gradient(name, a, b)), slow)
    assert kinds == [DIVERGENCES.facts[name]["fused"]] * 2
    DIVERGENCES[name](a.requires_grad_(), b)  # the kernel gives the expert no gradient
    assert len(kinds) == 2
    with torch.no_grad():
        DIVERGENCES[name](a, b)
    assert len(kinds) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or triton is None, reason="needs Triton on a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_the_kernel_is_used_where_it_can_be(name):
    a, b = rows().cuda(), rows(seed=1).cuda()
    assert_close(DIVERGENCES[name](a.float(), b.float()).double(), DIVERGENCES[name](a, b))
    assert kl_family.fusible(a.float(), b.float()) and not kl_family.fusible(a, b)
    assert kl_family.fusible(a.float(), b.float().requires_grad_())
    assert not kl_family.fusible(a.float().requires_grad_(), b.float())
    assert torch.autograd.gradcheck(DIVERGENCES[name], (a.requires_grad_(), b.requires_grad_()))


def test_the_families_meet_where_they_should():
    a, b = rows(seed=0), rows(seed=1)
    mixture = ((a.softmax(-1) + b.softmax(-1)) / 2).log()
    same = [
        ("alpha:-1", kl(a, b)),
        ("alpha:1", reverse_kl(a, b)),
        ("alpha:0", 4 * hellinger(a, b)),
        ("alpha:-3", chi_squared(a, b) / 2),
        ("alpha:3", chi_squared(b, a) / 2),
        ("reverse_chi_squared", chi_squared(b, a)),
        ("renyi:1", kl(a, b)),
        ("renyi:2", torch.log1p(chi_squared(a, b))),
        ("renyi:0.5", -2 * torch.log1p(-hellinger(a, b))),
        ("skew_js:0.5", js(a, b)),
        ("jeffreys", kl(a, b) + reverse_kl(a, b)),
        ("reverse_kl", kl(b, a)),
        ("js", entropy(mixture) - (entropy(a) + entropy(b)) / 2),
        ("alpha:0.3", objective("alpha:-0.3")(b, a)),
        ("skew_js:0.2", objective("skew_js:0.8")(b, a)),
    ]
    for spec, value in same:
        assert_close(objective(spec)(a, b), value, msg=lambda text, spec=spec: f"{spec}: {text}")
    uniform = torch.zeros_like(a)
    assert_close(kl(a, uniform), math.log(7) - entropy(a))
    for beta, limit in ((1e-3, reverse_kl(a / 3, b / 3)), (1 - 1e-3, kl(a / 3, b / 3))):
        scaled = skew_js(a / 3, b / 3, beta=beta) / 1e-3
        assert_close(scaled, limit, rtol=1e-2, atol=0)


def test_large_ratios_continue_as_a_tangent_and_small_ones_are_exact():
    gaps = torch.tensor([29.0, 31.0, 40.0], dtype=torch.float64)
    sure = torch.stack([torch.zeros(3), torch.full((3,), -100.0)], -1).double()  # p = (1, 0)
    doubt = torch.stack([-gaps, torch.log1p(-(-gaps).exp())], -1)  # q = (e^-gap, 1 - e^-gap)
    top = math.exp(30)
    expected = torch.tensor([math.expm1(29), 2 * top - 1, 11 * top - 1]).double()
    assert_close(chi_squared(sure, doubt), expected)  # 1 / q - 1 = e^gap - 1
    slope = gradient("chi_squared", sure, doubt)[:, 0]
    assert_close(slope[1:], torch.full((2,), -top, dtype=torch.float64))


def test_unbounded_ones_are_infinite_only_under_the_mask_that_makes_them_so():
    full, some = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -INF]])
    for spec in ("kl", "jeffreys", "chi_squared", "logit_mse"):  # where the merged model masks
        assert objective(spec)(full, some).item() == INF
    for spec in ("reverse_kl", "jeffreys", "alpha:2", "logit_mse"):  # where the expert masks
        assert objective(spec)(some, full).item() == INF
    assert reverse_kl(full, some).item() == pytest.approx(math.log(3 / 2), rel=1e-6)
    assert kl(some, full).item() == pytest.approx(math.log(3 / 2), rel=1e-6)
    both = torch.cat([some, full]), torch.cat([full, full])
    assert reverse_kl(*both).tolist() == [INF, 0.0]


def test_the_gradient_vanishes_for_bounded_ones_on_a_confidently_wrong_expert():
    """The merged model is certain of another class: KL's gradient stays 1, chi-squared's grows."""
    wrong, right = one_hot(0, gap=15.0, classes=2), one_hot(1, gap=15.0, classes=2)
    steep = {name: gradient(name, wrong, right).abs().max().item() for name in NAMES}
    assert steep["kl"] == pytest.approx(1, rel=1e-6) and steep["chi_squared"] > 1e12
    assert max(steep[n] for n in ("js", "hellinger", "triangular", "total_variation")) < 1e-6


def test_entropy_and_cosine_are_no_divergences():
    """Entropy lies between 0 and log V; a cosine depends on the direction only."""
    a, right = rows(shape=(5, 7)), torch.tensor([[1.0, 1.0]])
    assert entropy(torch.zeros(1, 4)).item() == pytest.approx(math.log(4), rel=1e-6)
    assert entropy(torch.tensor([[0.0, -INF, -INF]])).item() == 0
    assert (entropy(a) > 0).all() and (entropy(a) < math.log(7)).all()
    assert_close(cosine(a, 3 * a), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(cosine(a, -a), torch.full((5,), 2.0, dtype=torch.float64))
    assert cosine(torch.tensor([[1.0, 0.0]]), right).item() == pytest.approx(1 - math.sqrt(0.5))
    assert cosine(torch.zeros(1, 2), right).item() == 1
    assert cosine(a.half(), a.half()).dtype == torch.float32
    assert cosine(a.float(), a).dtype == torch.float64
    assert "cosine" not in DIVERGENCES and "entropy" not in DIVERGENCES


# --- from a spec to an objective
def test_a_spec_names_a_function_with_a_parameter_after_a_colon():
    a, b = rows(seed=0), rows(seed=1)
    assert all(objective(name) is DIVERGENCES[name] for name in NAMES)
    assert torch.equal(objective("skew_js:0.3")(a, b), skew_js(a, b, beta=0.3))
    assert torch.equal(objective("renyi:2")(a, b), renyi(a, b, order=2.0))
    assert torch.equal(objective("alpha:-2")(a, b), alpha_divergence(a, b, alpha=-2.0))
    assert facts_of("skew_js:0.5")["bound"] == pytest.approx(math.log(2))
    assert facts_of("alpha:0")["bound"] == 4 and facts_of("alpha:2")["bound"] is None
    assert facts_of("renyi:2")["curvature"] == 2


def test_a_temperature_divides_both_sides_logits():
    """A high one leaves c/2 times the Fisher metric, near the variance of the logits' gap."""
    a, b = rows(seed=0), rows(seed=1)
    for name in ("js", "kl", "skew_js:0.3"):
        assert_close(objective(name, 2.0)(a, b), objective(name)(a / 2, b / 2))
    half = a.half(), b.half()
    assert_close(objective("js", 3.0)(*half), js(half[0].float() / 3, half[1].float() / 3))
    for name in ("kl", "js", "hellinger", "chi_squared"):
        limit = facts_of(name)["curvature"] / 2 * logit_mse(a, b)
        assert_close(1e6 * objective(name, 1e3)(a, b), limit, rtol=0.05, atol=0)


REFUSED = {  # a spec, and what both its readers say
    "js:0.5": "'js' has no parameter, got 'js:0.5'; say 'js'",
    "jss": f"choose one of: {', '.join(NAMES)}.*did you mean 'js'",
    "skew_js:half": "must be a number, got 'half'; say 'skew_js:0.1'",
    "skew_js:": "must be a number, got ''",
    "skew_js:0": r"beta must be in \[0.001, 0.999\], got 0; the default is 0.1",
    "skew_js:nan": "beta must be in",
    "alpha:4": r"alpha must be in \[-3, 3\]",
    "alpha:0.999": "too near 1 for float32; give 1 itself, where it is reverse_kl",
    "alpha:-0.999": "too near -1 for float32; give -1 itself, where it is kl",
    "alpha:1.001": "too near 1 for float32; give 1 itself",
    "renyi:0": r"order must be in \[0.01, 10\]",
    "renyi:1.005": "give 1 itself, where it is kl",
}


@pytest.mark.parametrize(("spec", "message"), REFUSED.items(), ids=REFUSED)
def test_invalid_specs_are_refused(spec, message):
    for reader in (objective, facts_of):
        with refuses(message):
            reader(spec)


def test_parameters_and_temperatures_out_of_range_are_refused():
    calls = (skew_js, {"beta": 2.0}), (renyi, {"order": -1.0}), (alpha_divergence, {"alpha": 4.0})
    for call, options in calls:
        with refuses(f"{next(iter(options))} must be in"):
            call(rows(), rows(), **options)
    for temperature in (0.0, -1.0, INF, NAN):
        with refuses("temperature must be above 0 and finite"):
            objective("js", temperature)


ROUNDING = 1e-6  # nats, in float32


@settings(deadline=None, max_examples=80, derandomize=True)
@given(logit_pairs())
def test_any_pair_keeps_bounds_finite_gradients_and_the_order_of_js_and_kl(pair):
    """JS <= (log 2 / 2) KL: class by class their ratio is largest, log(2) / 2, where p = 0."""
    for spec in ("js", "skew_js", "alpha", "hellinger", "total_variation", "triangular"):
        value, bound = objective(spec)(*pair).item(), facts_of(spec)["bound"]
        assert -ROUNDING <= value <= bound * (1 + ROUNDING)
        slope = gradient(spec, *pair)
        assert torch.isfinite(slope).all()
    assert 0 <= squared_l2(*pair).item() <= 2 * (1 + ROUNDING)
    assert gradient("js", *pair).sum().item() == pytest.approx(0, abs=ROUNDING)
    there, forward = js(*pair).item(), kl(*pair).item()
    assert there == pytest.approx(js(*pair[::-1]).item(), abs=ROUNDING)
    assert forward >= -ROUNDING and there <= math.log(2) / 2 * forward + ROUNDING
