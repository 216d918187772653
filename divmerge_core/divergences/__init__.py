"""How far the merged model's answer is from the expert's: one number per position.

Every divergence takes logits, expert first, and returns `[*A]`, unreduced. All work in log space.
Bounded ones are finite for all logits, others for logits of +-1e4, and for classes masked with
-inf on both sides. In float32, values below about 1e-7 are rounding, and may be negative.

p is the expert's answer, q the merged model's. Divergences of family `f` are
D(p, q) = sum_v q_v f(p_v / q_v) for a convex f with f(1) = 0 (Csiszar 1967, Ali and Silvey 1966).

Facts beside each: `family`, f or other; `formula` and `slope`, LaTeX with r = p_v / q_v, where
slope is dD/dq_v up to a constant; `symmetric`; `bound`, the least upper one, None for none;
`metric`, what of it obeys the triangle inequality; `curvature`, c in D = c/2 times the Fisher
metric near equality, None where there is no such c; `parameter`; `at`, its value's facts;
`fused`, the kernel that stands in on a GPU; `source`.
"""

from divmerge_core.registry import Registry

ABSENT = {"slope": None, "symmetric": False, "bound": None, "metric": None, "curvature": None}
DIVERGENCES = Registry("divergence", family="f", **ABSENT)

from divmerge_core.divergences.distances import (
    cosine,
    logit_mse,
    squared_l2,
    total_variation,
    triangular,
)
from divmerge_core.divergences.kl_family import entropy, jeffreys, js, kl, reverse_kl, skew_js
from divmerge_core.divergences.parse import facts_of, objective  # noqa: E402, F401
from divmerge_core.divergences.power_family import (
    alpha,
    chi_squared,
    hellinger,
    renyi,
    reverse_chi_squared,
)
