"""Findings on the paper's printed numbers; tables of `published.paper_reanalysis`."""

import pandas as pd

from divmerge_book.findings import listed
from divmerge_book.published import paper, paper_reanalysis


def which_correlation(both: pd.DataFrame) -> str:
    """Which correlation Table 2 prints. both: of `which_correlation`."""
    mean, columns = both.groupby("divergence")[["printed", "spearman"]].mean(), both
    pearson, rank = ((columns.printed - columns[n]).abs().max() for n in ("pearson", "spearman"))
    return (
        f"All {len(both)} cells of the paper's Table 2 are Pearson's correlations: the largest "
        f"difference is {pearson:.4f}, which is rounding. Spearman's differ from the printed ones "
        f"by up to {rank:.2f}; their means are {mean.spearman.KL:.3f} for KL and "
        f"{mean.spearman.JS:.3f} for JS, where {mean.printed.KL:.3f} and {mean.printed.JS:.3f} are "
        "printed."
    )


def inside(table: pd.DataFrame) -> str:
    """How many printed numbers the own expert alone explains. table: of `without_the_point`."""
    rows = table[table.how == "pearson"]
    within = rows.kept.between(rows.alone_low, rows.alone_high)
    return (
        f"{within.sum()} of the {len(rows)} printed numbers lie within the range that the own "
        "expert alone gives."
    )


def pooled(means: pd.DataFrame) -> str:
    """The mean correlation with and without the own expert. means: of `without_the_point`."""
    pick = means.set_index(["divergence", "how"])
    js, kl = pick.loc[("JS", "pearson")], pick.loc[("KL", "pearson")]
    rank, other = pick.loc[("JS", "spearman")], pick.loc[("KL", "spearman")]
    return (
        f"With the own expert, the mean of Pearson's correlations is {js.kept:.2f} for JS and "
        f"{kl.kept:.2f} for KL; the own expert alone, with the others permuted, gives "
        f"{js.alone:.2f} and {kl.alone:.2f}. Without it, {js.value:.2f} [{js.low:.2f}, "
        f"{js.high:.2f}] and {kl.value:.2f} [{kl.low:.2f}, {kl.high:.2f}] remain (tasks "
        f"resampled). Spearman's for JS is {rank.value:.2f}, p = {rank.within:.3f} within tasks "
        f"and {rank.relabelled:.3f} relabelled; for KL p = {other.relabelled:.2f} relabelled."
    )


def noisy(spread: pd.DataFrame) -> str:
    """On which tasks experts differ by chance alone. spread: of `spread`."""
    share = (100 * spread.noise).sort_values(ascending=False)
    first, second = share.index[:2]
    return (
        f"On {first}, chance explains {share[first]:.0f} % of the variance of the six other "
        f"experts' accuracies, and on {second} {share[second]:.0f} %. No measure could order "
        "experts that differ by chance."
    )


def disagreeing(pairs: pd.DataFrame) -> str:
    """In which cells two tables of one experiment disagree. pairs: of `two_tables`."""
    far = pairs[pairs.margins.abs() > 1]
    line = "; ".join(
        f"{row.method}, {row.tasks}: {row.pairs:.2f} and {row.row:.2f}" for row in far.itertuples()
    )
    gaps = pairs[pairs.method.str.contains("JS|KL")].groupby("tasks").gap
    own = gaps.agg(lambda gap: gap.abs().max()).classification
    return (
        f"Of {len(pairs)} cells that Table 3 and Table 6 or 7 print for T = 2, "
        f"{(pairs.gap.abs() < 0.005).sum()} agree and {len(far)} differ by more than the margin: "
        f"{line}. KL and JS differ by at most {own:.2f} points on classification."
    )


def on_a_grid(grid: pd.DataFrame) -> str:
    """The printed row that moves in steps. grid: rows of `on_a_grid`."""
    best = grid.loc[grid.chance.idxmin()]
    return (
        f"All {best['values']:.0f} different values of the row T = {best['T']:.0f} of Table "
        f"{best.table:.0f} are within {best.gap:.3f} points of 100 minus a multiple of "
        f"{best.step:.3f}, which is one answer where the expert has about {50 / best.step:.0f} "
        f"right. Among random rows, a share of at most {best.chance:.3f} fits as well; {len(grid)} "
        "printed rows were tried."
    )


def jumps() -> str:
    """How Table 6 changes from one number of models to the next."""
    change, six = paper_reanalysis.steps(6), paper.table(6)
    rises = [name for name in six if (change[name] > 0).any()]
    jump = -change.loc["3 to 4"]
    layer = jump[["LL KL", "LL JS"]]
    return (
        f"From T = 3 to 4 KL and JS per layer fall by at most {layer.max():.1f} points, all other "
        f"columns by {jump.drop(layer.index).min():.1f} or more. From 2 to 3 none falls by more "
        f"than {-change.loc['2 to 3'].min():.1f}. {len(rises)} of {len(six.columns)} columns rise "
        "somewhere with more models."
    )


def averages() -> str:
    """How far printed averages are from those of their columns."""
    check = paper_reanalysis.printed_averages()
    gap = check.printed - check.found
    worst = check.loc[gap.abs().idxmax()]
    return (
        f"Of {len(check)} printed averages, the largest difference from the column's own is "
        f"{gap[gap.abs().idxmax()]:+.4f} ({worst.column}, Table {worst.table})."
    )


def js_and_kl(versus: pd.DataFrame) -> str:
    """In how many cells JS is ahead of KL. versus: of `js_and_kl`."""
    groups = versus.groupby(["tasks", "level"]).gain
    wins = [
        f"in {(some > 0).sum()} of {len(some)} cells on {tasks} per {level} "
        f"({some[versus.table != 3].mean():+.2f} points)"
        for (tasks, level), some in groups
    ]
    lost = "; ".join(
        f"Table {row.table}, per {row.level}, T = {row.T}: {row.gain:+.2f}"
        for row in versus[versus.gain <= 0].itertuples()
    )
    printed = paper.table(2)
    behind = listed(printed.index[printed.JS < printed.KL])
    return (
        f"In the paper's tables (in brackets the mean gain in Tables 6 and 7) JS is ahead of KL "
        f"{listed(wins)}. Not ahead: {lost}. In Table 2 KL has the higher correlation on {behind}."
    )


def js_and_others(rivals: pd.DataFrame) -> str:
    """Where a method without experts' answers is ahead of JS. rivals: of `js_and_others`."""
    line = "; ".join(
        f"{row.tasks}, T = {row.T}, per {row.level}: {row.js:.2f} against {row.best:.2f} of "
        f"{row.other}"
        for row in rivals[rivals.gain < 0].itertuples()
    )
    layers = rivals[(rivals.level == "layer") & (rivals["T"] > 2)].gain
    return (
        f"JS is ahead of the best other method in {(rivals.gain > 0).sum()} of {len(rivals)} "
        f"cells. Not: {line}. Per layer and with more than two models it leads by "
        f"{layers.min():.1f} to {layers.max():.1f} points."
    )
