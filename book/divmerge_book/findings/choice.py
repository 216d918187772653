"""Findings on divergences: their shapes, and what a choice among them changes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from divmerge_book.evaluation.statistics import format_correlation
from divmerge_book.findings import bullets, count, listed, span, table_of
from divmerge_book.studies.objective_fits import named
from divmerge_book.studies.predictions import WORDS, of_score
from divmerge_book.studies.robustness import CORRUPTIONS
from divmerge_core.divergences import DIVERGENCES, facts_of

LEVEL = 0.05  # of corrected p-values


def label_of(kind: str) -> str:
    return CORRUPTIONS.facts[kind]["label"]


def divergence_table() -> str:
    """Every registered divergence with its formula, bound, symmetry, metric and curvature."""
    lines = ["| name | $D(p, q)$ | bound | symmetric | a metric is | $c$ |", "|---" * 6 + "|"]
    for name in DIVERGENCES:
        fact, own = facts_of(name), facts_of(name)["parameter"]
        bound = "none" if fact["bound"] is None else f"{fact['bound']:.3g}"
        formula = fact["formula"].replace(", m", "$, $m")  # may break there
        cells = [f"`{name}:{own.default:g}`" if own else f"`{name}`", f"${formula}$", bound]
        cells += ["yes" if fact["symmetric"] else "no", fact["metric"] or "no"]
        cells.append(f"{fact['curvature']:g}" if fact["curvature"] else "none")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slope_table() -> str:
    """The derivative of every divergence that declares one."""
    slopes = {name: facts_of(name)["slope"] for name in DIVERGENCES}
    lines = [f"| `{name}` | ${slope}$ |" for name, slope in slopes.items() if slope]
    return "\n".join(["| name | $\\varphi_v$, up to a constant |", "|---|---|", *lines])


def letting_go(strength: pd.DataFrame) -> str:
    """Whose gradient fades where the merge is right against its expert. strength: `gradients`."""
    ratio = strength.iloc[:, 1] / strength.iloc[:, 0]
    fading, growing = (map(named, ratio.index[side]) for side in (ratio < 0.5, ratio > 1.2))
    return (
        "When the merged model, right against its expert, becomes twice as confident, the gradient "
        f"of {listed(fading)} falls to less than half. That of {listed(growing)} grows by a fifth "
        f"or more. KL keeps {ratio['kl']:.2f} times its gradient."
    )


def near_fisher(close: pd.DataFrame) -> str:
    """How far ratios to the Fisher metric scatter. close: of `fisher_ratios`."""
    spread = close.groupby("objective").ratio.agg(lambda x: x.max() / x.min() - 1)
    declared = pd.Series({name: facts_of(name)["curvature"] for name in DIVERGENCES})
    metric, other = declared.dropna().index, declared.index[declared.isna()]
    assert spread[metric].max() < 0.05 < spread[other].min()
    return (
        f"The {len(metric)} divergences that declare a factor have it within "
        f"{100 * spread[metric].max():.1f} % in every direction. For the other {len(other)} the "
        f"largest ratio is at least {1 + spread[other].min():.0f} times the smallest."
    )


def score_table(found: pd.DataFrame, kinds: Sequence[str], order: Sequence[str]) -> pd.DataFrame:
    """Scores in % of the start, JS and the others, by grouping and T. found: of `choice.summary`.

    With predictions also on how many tasks a merge is below the majority class.
    """
    more, fitted = [*kinds, *(["below"] if "below" in found else [])], found.objective != "start"
    begin = found[~fitted].set_index("count")[more]
    wide = found[fitted].pivot(index="objective", columns=["grouping", "count"], values=more)
    wide.loc["start, 1/T"] = [begin[score][count] for score, _, count in wide.columns]
    wide *= [100 if score in kinds else 1 for score, *_ in wide.columns]
    named_too = {**WORDS, "below": "tasks below majority"}
    wide.columns.names = ["%", "per", "T"]
    return wide.loc[["start, 1/T", "js", *order]].rename(columns=named_too, level=0)


def search_gain(
    scores: pd.DataFrame, fits: pd.DataFrame, kinds: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores in % with a searched and with the same step size; chosen step sizes by grouping.

    scores: of `choice.summary`; fits: of `choice.ablation`.
    """
    key, alike = ["objective", "grouping"], scores[scores.search == "same"]
    middle = scores[scores["count"] == alike["count"].iloc[0]]
    both = 100 * middle.pivot_table(index=key, columns="search", values=kinds)
    rates = fits[fits.search == "searched"].groupby(key).rate.first().unstack("grouping")
    return both.drop(index="start"), rates


def differences(per: pd.DataFrame, kinds: Sequence[str], source: str) -> str:
    """Which objectives differ significantly from JS. per: of `choice.summary`; kinds: scores."""
    tests, parts = per[per.objective != "js"], []
    for score in kinds:
        own = of_score(tests, score)
        sure, lines = own[own.holm < LEVEL], []
        for (spec, up), some in sure.groupby(["objective", sure.difference > 0]):
            where = listed(f"per {r.grouping}, T = {r.count}" for r in some.itertuples())
            gap = f"{span(100 * some.difference, sign=True)} points"
            lines.append(f"{'above' if up else 'below'}: {named(spec)}, {gap} ({where})")
        first = (
            f"Of {len(tests)} differences from JS in {WORDS[score]}, in {source}, {len(sure)} "
            f"{'is' if len(sure) == 1 else 'are'} significant after correction."
        )
        parts.append(f"{first}\n\n{bullets(lines)}".strip())
    return "\n\n".join(parts)


def searched(both: pd.DataFrame, kinds: Sequence[str], lost: int) -> str:
    """What choosing a step size per objective changes. both: score by search; lost: diverged."""
    lines = []
    for score in kinds:
        gain = both[score].searched - both[score].same
        own = ", ".join(f"{up} {gap:+.1f}" for up, gap in gain["js"].items())
        lines.append(
            f"A step size chosen for each objective, in place of one for all, changes the test "
            f"{WORDS[score]} by {gain.mean():+.2f} points on average, from {gain.min():+.1f} "
            f"({named(gain.idxmin()[0])}) to {gain.max():+.1f} ({named(gain.idxmax()[0])}); "
            f"JS's per {own}."
        )
    return f"{' '.join(lines)} Fits that diverged: {lost}."


def tempered(hot: pd.DataFrame, kinds: Sequence[str], source: str) -> str:
    """How far the temperature changes every objective's scores, beside their intervals."""
    lines = []
    for score in kinds:
        own = of_score(hot, score).groupby("objective")
        far = [f"{named(n)} {v:.1f}" for n, v in (100 * own.score.agg(np.ptp)).items()]
        half = 50 * (own.high.mean() - own.low.mean()).mean()
        lines.append(f"{WORDS[score]}: {listed(far)} (half of a 95 % interval: {half:.1f})")
    return f"From the best to the worst temperature, in points, in {source}. {'; '.join(lines)}."


def corrupted(harm: pd.DataFrame, source: str) -> str:
    """What every kind of expert costs the other tasks. harm: of `corruption_costs`."""
    lines, objectives = [], sorted(harm.objective.unique(), key=named)
    for score, column in (("anp", "cost"), ("kept_margin", "kept_cost")):
        if column in harm:
            each = 100 * harm.groupby(["kind", "objective", "seed"])[column].mean()
            for kind in (kind for kind in CORRUPTIONS if kind in each.index):
                cells = [
                    "no other task counts"
                    if (own := each[kind, spec]).isna().any()
                    else f"{own.mean():+.1f} ({span(own, sign=True)})"
                    for spec in objectives
                ]
                lines.append([WORDS[score], label_of(kind), *cells])
    return (
        f"What one expert costs the other tasks in {source}, against a merge without it, in points "
        "(in brackets the lowest to the highest seed, each with another expert changed):\n\n"
        + table_of(["score", "expert", *map(named, objectives)], lines)
    )


def balanced(even: pd.DataFrame, source: str) -> str:
    """How evenly tasks share the gradient, and what corruption adds. even: of `choice.balance`."""
    of = even[even.kind == "none"].groupby("objective").effective_tasks.mean()
    share = even.pivot_table(index=["objective", "seed"], columns="kind", values="strained")
    gain = 100 * share.sub(share["none"], axis=0).drop(columns="none").dropna()
    lines = [
        f"{named(spec)}: "
        + ", ".join(f"{label_of(kind)} {value:+.0f} points" for kind, value in row.items())
        for spec, row in gain.groupby("objective").mean().iterrows()
    ]
    return (
        f"Of {int(even.tasks.iloc[0])} tasks, in {source}, the effective number is {of['js']:.2f} "
        f"under JS and {of['kl']:.2f} under KL; it is highest under {named(of.idxmax())} "
        f"({of.max():.2f}) and lowest under {named(of.idxmin())} ({of.min():.2f}). What "
        f"corruption adds to an expert's share of the gradient, seed by seed:\n\n{bullets(lines)}"
    )


def followed(gap: pd.DataFrame, source: str) -> str:
    """Whether the ANP follows the loss. gap: of `choice.disagreement`."""
    mean = gap.groupby("objective").mean(numeric_only=True)
    text, fights = mean.correlation.map(format_correlation), 100 * mean.against
    high, low = mean.correlation.idxmax(), mean.correlation.idxmin()
    lost = ""
    if "kept_lost" in mean:
        worst = 100 * mean.kept_lost
        lost = (
            f" By kept margin the last step is {worst['js']:.1f} points below the best step under "
            f"JS, and at most {worst.max():.1f} ({named(worst.idxmax())})."
        )
    return (
        f"In {source} loss and ANP agree most under {named(high)} ({text[high]}) and least under "
        f"{named(low)} ({text[low]}); for JS it is {text['js']} ({gap.records.max()} records of a "
        f"fit, {count(gap.seed.nunique(), 'seed')}). Loss and ANP fall together on "
        f"{fights['js']:.0f} % of the stretches between records under JS, and on at most "
        f"{fights.max():.0f} % ({named(fights.idxmax())}).{lost}"
    )
