"""What the tables of the chapter beyond one vector say, in sentences."""

import math
from collections.abc import Mapping

import pandas as pd

from divmerge_book.figures import title
from divmerge_book.figures.beyond import CLUSTERING_LABELS as NAMES
from divmerge_book.figures.beyond import CONTINUAL as ARRIVING
from divmerge_book.figures.beyond import ROUTING_LABELS as WHERE
from divmerge_book.figures.beyond import SELECTOR_LABELS as SAID
from divmerge_book.findings import bullets, listed, missing, scores, span
from divmerge_book.studies.continual_merging import BATCH, backward_transfer
from divmerge_book.studies.corrupted_experts import CORRUPTIONS
from divmerge_book.studies.inference_cost import gap_closed
from divmerge_book.studies.searches import SEARCHES

BATCH_OF = tuple(BATCH.values())
LEVEL = 0.0005  # ratios nearer than this print alike


def arriving(found: pd.DataFrame, source: str) -> str:
    """Final accuracy and backward transfer of every rule, beside its method with all experts.

    found: of `continual_merging.backward_transfer`.
    """
    mean = found.groupby("method", sort=False)[["ratio", "bwt"]].mean()
    own = mean.loc[[name for name in ARRIVING if name in mean.index]]
    gaps = {name: own.ratio[name] - mean.ratio[BATCH[name]] for name in own.index}
    said = {n: f"{title(n)} ({round(100 * gap, 1) + 0.0:+.1f})" for n, gap in gaps.items()}
    behind = [said[name] for name, gap in gaps.items() if gap < -LEVEL]
    level = [said[name] for name, gap in gaps.items() if gap >= -LEVEL]
    best, kept = own.ratio.idxmax(), own.bwt.idxmax()
    return (
        f"In {source} the best final accuracy of a continual rule is that of {title(best)}, "
        f"{100 * own.ratio[best]:.1f} % of the experts'. Against the method that sees all experts "
        f"at once, in points, these rules are behind: {listed(behind)}; these are not: "
        f"{listed(level)}. Backward transfer is {span(100 * own.bwt, sign=True)} points, highest "
        f"for {title(kept)}.{margins(found)}"
    )


def margins(found: pd.DataFrame) -> str:
    """The best kept margin of a continual rule, and of the methods that see all experts at once."""
    if "kept_margin" not in found:
        return ""
    mean = found.groupby("method", sort=False)[["kept_margin", "below"]].mean()
    own, whole = (mean.loc[[n for n in names if n in mean.index]] for names in (ARRIVING, BATCH_OF))
    one, all_ = own.kept_margin.idxmax(), whole.kept_margin.idxmax()
    return (
        f" The highest kept margin of a continual rule is that of {title(one)}, "
        f"{100 * own.kept_margin[one]:.1f} %, with {own.below[one]:.1f} tasks below the majority "
        f"class; of the methods with all experts at once that of {title(all_)}, "
        f"{100 * whole.kept_margin[all_]:.1f} %, with {whole.below[all_]:.0f}."
    )


def ordered(found: pd.DataFrame, source: str) -> str:
    """Spread of every rule's final accuracy over orders. found: of `backward_transfer`."""
    spread = 100 * found[found.order >= 0].groupby("method", sort=False).ratio.std()
    said = [f"{title(name)} {spread[name]:.1f}" for name in ARRIVING if name in spread.index]
    return f"Standard deviation of the final accuracy over orders in {source}, points: " + (
        f"{', '.join(said)}."
    )


def mixture(table: pd.DataFrame, source: str) -> str:
    """The mixture against other groupings with as many models, between one model and T."""
    unique, said = table.drop_duplicates(["how", "groups"]), []
    for column, words in scores(table).items():
        mean = 100 * unique.groupby(["models", "how"])[column].mean().unstack("how")
        both, lines = mean.loc[2 : mean.index.max() - 1].dropna(), []
        if both.empty:
            return f"In {source} no number of models between one and T came up."
        for other in (name for name in NAMES if name in both and name != "dp_mixture"):
            gap = both.dp_mixture - both[other]
            lines.append(
                f"above {NAMES[other]} for {(gap > 0).sum()} of {len(gap)} numbers of models "
                f"({span(gap, sign=True)} points)"
            )
        said.append(f"the mixture's mean {words} is {listed(lines)}")
    counts = listed([f"{count}" for count in both.index])
    return f"In {source}, with {counts} models, {'; '.join(said)}.{missing(table, source)}"


def detected(table: pd.DataFrame, source: str) -> str:
    """By kind of corruption: who ranks better than the control at every share, and what is merged.

    table: of `pools`. The control is the policy with shuffled rewards.
    """
    corrupt, lines = table[table.share > 0], []
    auc = corrupt.dropna(subset=["auc"]).groupby(["kind", "method", "share"]).auc.mean()
    means = 100 * corrupt.groupby(["kind", "method"])[list(scores(table))].mean()
    for kind in (name for name in CORRUPTIONS if name in set(corrupt.kind)):
        rows, merged = auc[kind].unstack("share"), means.loc[kind]
        better = {n: (rows.loc[n] > rows.loc["shuffled"]).all() for n in rows.index}
        order = [name for name in SAID if name in rows.index and name != "shuffled"]
        high = [f"{SAID[n]} ({span(rows.loc[n], 2)})" for n in order if better[n]]
        low = [f"{SAID[n]} ({span(rows.loc[n], 2)})" for n in order if not better[n]]
        lines.append(
            f"**{CORRUPTIONS.facts[kind]['label']}**: mean AUC above the shuffled policy's "
            f"({span(rows.loc['shuffled'], 2)}) at every share: {listed(high)}; not: "
            f"{listed(low)}. Merges: "
            + "; ".join(
                f"mean {words} of merging all {merged[name]['all']:.1f} %, the policy's choice "
                f"{merged[name].policy:.1f} %, honest experts alone {merged[name].oracle:.1f} %"
                for name, words in scores(table).items()
            )
        )
    return f"In {source}:\n\n{bullets(lines)}\n\n{missing(table, source)}"


def paid_off(table: pd.DataFrame, source: str) -> str:
    """For which kinds of corruption the policy's merge beats merging all, and honest experts alone.

    table: of `pools`.
    """
    corrupt, said = table[table.share > 0], []
    for column, words in scores(table).items():
        mean = 100 * corrupt.groupby(["kind", "method"])[column].mean().unstack("method")
        label = {kind: CORRUPTIONS.facts[kind]["label"] for kind in mean.index}
        over = {name: mean.policy - mean[name] for name in ("all", "oracle")}
        won = {name: [label[k] for k in gap.index if gap[k] > 0] for name, gap in over.items()}
        said.append(
            f"a higher mean {words} than merging all for "
            f"{listed(won['all'], 'no kind of corruption')}, and than honest experts alone for "
            f"{listed(won['oracle'], 'no kind')}"
        )
    return (
        f"In {source} the learned policy's merge has {'; '.join(said)}. It asks for "
        f"{corrupt.calls.max():.0f} scores, which also choose among honest experts."
        f"{missing(table, source)}"
    )


def searched(table: pd.DataFrame, source: str) -> str:
    """Gap and test accuracy of every search at the fewest rows, and the gap with more rows.

    table: of `searches`. Numbers of rows are compared at the seeds that have both.
    """
    last, label = table.dropna(subset=["test"]), {n: SEARCHES.facts[n]["label"] for n in SEARCHES}
    counts = list(dict.fromkeys(table["rows"]))
    few = last[last["rows"] == counts[0]]
    mean = 100 * few.groupby("search")[["gap", "test"]].mean()
    rivals = mean.loc[[name for name in SEARCHES if name in mean.index]]
    best, own = rivals.test.idxmax(), mean.test["expert"]
    text = (
        f"In {source}, on {counts[0]} validation rows a task, validation accuracy exceeds test "
        f"accuracy by {span(rivals.gap, sign=True)} points (most: {label[rivals.gap.idxmax()]}); "
        f"the experts' own gap is {mean.gap['expert']:+.1f}. The best test accuracy of a search is "
        f"{rivals.test.max():.1f} % ({label[best]}), that of the experts {own:.1f} %: "
        f"{(rivals.test > own).sum()} of {len(rivals)} searches beat the experts."
    )
    if len(counts) == 1:
        return text
    seeds = set(last[last["rows"] == counts[1]].seed)
    both = last[last.seed.isin(seeds) & last.search.isin(SEARCHES)]
    gap = 100 * both.groupby(["rows", "search"]).gap.mean()
    less = (gap[counts[1]] < gap[counts[0]]).sum()
    return (
        f"{text} With {counts[1]} rows, at the same seeds, the gap is smaller for {less} of "
        f"{len(rivals)} searches ({span(gap[counts[0]], sign=True)} becomes "
        f"{span(gap[counts[1]], sign=True)} points)."
    )


def luck(table: pd.DataFrame) -> str:
    """The standard error of one validation score, and how far the best of equals lies above.

    table: of `searches`.
    """
    rows = table["rows"].iloc[0]
    few = table[table["rows"] == rows]
    start, calls = few[few.search == "expert"].validation.mean(), int(few.call.max())
    error = 100 * math.sqrt(start * (1 - start) / rows)
    return (
        f"standard error on {rows} rows: {error:.1f} points\n"
        f"best of {calls} equally good candidates: +{error * math.sqrt(2 * math.log(calls)):.1f} "
        "points"
    )


def steered(table: pd.DataFrame, source: str) -> str:
    """The best fusion: gain on the small experts, gap closed, and time. table: of `fusion`."""
    closed = gap_closed(table)
    fused = closed.drop(index=["large base", "small expert", "large expert"])
    best, small = fused.accuracy.idxmax(), closed.accuracy["small expert"]
    above = [f"*{name}*" for name in fused.index if fused.accuracy[name] > small]
    return (
        f"In {source} the best fusion is *{best}*, {100 * fused.accuracy[best]:.1f} %: "
        f"{100 * (fused.accuracy[best] - small):+.1f} points from the small experts alone, and "
        f"{100 * fused.closed[best]:.0f} % of the gap between the large base and the large "
        f"experts, at {fused.milliseconds[best] / closed.milliseconds['large base']:.1f} times the "
        f"large base's time. More accurate than the small experts: {listed(above)}."
    )


def slowest(table: pd.DataFrame, source: str) -> str:
    """Which ways to find weights cost the most time. table: of `storage`."""
    ranked = table.sort_values("slower", ascending=False).head(3)
    said = [f"{title(r.method)} {r.slower:.1f} ({WHERE[r.finds]})" for r in ranked.itertuples()]
    return f"The slowest in {source}, in times of a plain model: {'; '.join(said)}."


def stored_well(table: pd.DataFrame, source: str) -> str:
    """Who keeps most below 1.5 models, and without the task's number. table: of `storage`."""
    said = []
    for column, words in scores(table).items():
        small = table[table.models < 1.5].sort_values(column).iloc[-1]
        blind = table[table.finds != "task"].sort_values(column).iloc[-1]
        said.append(
            f"Below one and a half models, {title(small.method)} has the highest {words} in "
            f"{source}: {100 * small[column]:.1f} %. Without the task's number, "
            f"{title(blind.method)} has: {100 * blind[column]:.1f} %, with {blind.models:.2f} "
            f"models stored and {blind.slower:.1f} times a model's time."
        )
    return " ".join(said) + missing(table, source)


def summary(drawn: Mapping[str, tuple[pd.DataFrame, Mapping]]) -> str:
    """The chapter's findings, a bullet per study that was drawn: name -> table and its facts."""
    say = {
        "arrivals": lambda table, source: arriving(backward_transfer(table), source),
        **{"mixture": mixture, "pools": paid_off, "evolution": searched, "fusion": steered},
        "storage": stored_well,
    }
    return bullets(say[name](table, facts["source"]) for name, (table, facts) in drawn.items())
