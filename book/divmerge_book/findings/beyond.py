"""Findings of the chapter on methods beyond one merged vector."""

import math
from collections.abc import Mapping

import pandas as pd

from divmerge_book.figures import title
from divmerge_book.figures.beyond import CLUSTERING_LABELS, ROUTING_LABELS, SELECTOR_LABELS
from divmerge_book.figures.styles import CONTINUAL
from divmerge_book.findings import bullets, each, listed, missing, scores, span, split
from divmerge_book.studies.continual_merging import BATCH, backward_transfer
from divmerge_book.studies.corrupted_experts import CORRUPTIONS
from divmerge_book.studies.inference_cost import gap_closed
from divmerge_book.studies.searches import SEARCHES

LEVEL = 0.05  # points nearer than this print alike
KINDS = {kind: CORRUPTIONS.facts[kind]["label"] for kind in CORRUPTIONS}


def arriving(found: pd.DataFrame, source: str) -> str:
    """Final accuracy and backward transfer of every rule, beside its method with all experts.

    found: of `continual_merging.backward_transfer`.
    """
    mean = 100 * found.groupby("method")[["ratio", "bwt"]].mean()
    own = mean.loc[[name for name in CONTINUAL if name in mean.index]]
    gap = own.ratio - [mean.ratio[BATCH[name]] for name in own.index]
    said = [f"{title(name)} ({round(value, 1) + 0.0:+.1f})" for name, value in gap.items()]
    behind, level = split(said, gap < -LEVEL)
    return (
        f"In {source} the best final accuracy of a continual rule is that of "
        f"{title(own.ratio.idxmax())}, {own.ratio.max():.1f} % of the experts'. Compared with "
        f"the method that merges all experts at once, these rules are worse (points): {behind}; "
        f"these are not: {level}. Backward transfer is {span(own.bwt, sign=True)} points, highest "
        f"for {title(own.bwt.idxmax())}.{margins(found)}"
    )


def margins(found: pd.DataFrame) -> str:
    """The best kept margin of a continual rule, and of the methods that see all experts at once."""
    if "kept_margin" not in found:
        return ""
    mean = found.groupby("method")[["kept_margin", "below"]].mean()
    one, whole = (
        mean[mean.index.isin(names)].nlargest(1, "kept_margin").iloc[0]
        for names in (list(CONTINUAL), list(BATCH.values()))
    )
    return (
        f" The highest kept margin of a continual rule is that of {title(one.name)}, "
        f"{100 * one.kept_margin:.1f} %, with {one.below:.1f} tasks below the majority class; of "
        f"the methods with all experts at once that of {title(whole.name)}, "
        f"{100 * whole.kept_margin:.1f} %, with {whole.below:.0f}."
    )


def ordered(found: pd.DataFrame, source: str) -> str:
    """Spread of every rule's final accuracy over orders. found: of `backward_transfer`."""
    spread = 100 * found[found.order >= 0].groupby("method").ratio.std()
    spread = spread[[name for name in CONTINUAL if name in spread.index]]
    return (
        f"Standard deviation of the final accuracy over orders in {source}, points: "
        f"{each(spread, end=', ')}."
    )


def mixture(table: pd.DataFrame, source: str) -> str:
    """The mixture against other groupings with as many models, between one model and T."""
    unique, said = table.drop_duplicates(["how", "groups"]), []
    for column, words in scores(table).items():
        mean = 100 * unique.pivot_table(column, "models", "how")
        both = mean.loc[2 : mean.index.max() - 1].dropna()
        if both.empty:
            return f"In {source} no number of models between one and T came up."
        others = [name for name in CLUSTERING_LABELS if name in both and name != "dp_mixture"]
        gaps = {CLUSTERING_LABELS[name]: both.dp_mixture - both[name] for name in others}
        lines = [
            f"above {name} for {(gap > 0).sum()} of {len(gap)} numbers of models "
            f"({span(gap, sign=True)} points)"
            for name, gap in gaps.items()
        ]
        said.append(f"the mixture's mean {words} is {listed(lines)}")
    counts = listed(map(str, both.index))
    return f"In {source}, with {counts} models, {'; '.join(said)}.{missing(table, source)}"


def detected(table: pd.DataFrame, source: str) -> str:
    """By kind of corruption: who ranks better than the control at every share, and what is merged.

    table: of `pools`. The control is the policy with shuffled rewards.
    """
    corrupt, lines = table[table.share > 0], []
    auc = corrupt.dropna(subset=["auc"]).pivot_table("auc", ["kind", "method"], "share")
    means = 100 * corrupt.groupby(["kind", "method"])[list(scores(table))].mean()
    for kind in (name for name in KINDS if name in set(corrupt.kind)):
        control, merged = auc.loc[kind].loc["shuffled"], means.loc[kind]
        rows = auc.loc[kind].reindex(SELECTOR_LABELS).drop("shuffled").dropna(how="all")
        said = [f"{SELECTOR_LABELS[name]} ({span(row, 2)})" for name, row in rows.iterrows()]
        high, low = split(said, (rows > control).all(axis=1))
        merges = "; ".join(
            f"mean {words} of merging all {merged[name]['all']:.1f} %, the policy's choice "
            f"{merged[name].policy:.1f} %, honest experts alone {merged[name].oracle:.1f} %"
            for name, words in scores(table).items()
        )
        lines.append(
            f"**{KINDS[kind]}**: mean AUC above the shuffled policy's ({span(control, 2)}) at "
            f"every share: {high}; not: {low}. Merges: {merges}"
        )
    return f"In {source}:\n\n{bullets(lines)}\n\n{missing(table, source)}"


def paid_off(table: pd.DataFrame, source: str) -> str:
    """For which kinds of corruption the policy's merge beats merging all, and honest experts alone.

    table: of `pools`.
    """
    corrupt, said = table[table.share > 0], []
    for column, words in scores(table).items():
        mean = corrupt.pivot_table(column, "kind", "method").rename(index=KINDS)
        over, honest = (
            split(mean.index, mean.policy > mean[name], none)[0]
            for name, none in (("all", "no kind of corruption"), ("oracle", "no kind"))
        )
        said.append(
            f"a higher mean {words} than merging all for {over}, and than honest experts alone for "
            f"{honest}"
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
    last, counts = table.dropna(subset=["test"]), list(dict.fromkeys(table["rows"]))
    mean = 100 * last[last["rows"] == counts[0]].groupby("search")[["gap", "test"]].mean()
    expert, found = mean.loc["expert"], mean.drop("expert")
    label = {name: SEARCHES.facts[name]["label"] for name in SEARCHES}
    text = (
        f"In {source}, on {counts[0]} validation rows a task, validation accuracy exceeds test "
        f"accuracy by {span(found.gap, sign=True)} points (most: {label[found.gap.idxmax()]}); "
        f"the experts' own gap is {expert.gap:+.1f}. The best test accuracy of a search is "
        f"{found.test.max():.1f} % ({label[found.test.idxmax()]}), that of the experts "
        f"{expert.test:.1f} %: {(found.test > expert.test).sum()} of {len(found)} searches beat "
        "the experts."
    )
    if len(counts) == 1:
        return text
    seeds = last[last["rows"] == counts[1]].seed
    both = last[last.seed.isin(seeds) & (last.search != "expert")]
    gap = 100 * both.pivot_table("gap", "search", "rows")
    few, more = gap[counts[0]], gap[counts[1]]
    return (
        f"{text} With {counts[1]} rows, at the same seeds, the gap is smaller for "
        f"{(more < few).sum()} of {len(found)} searches ({span(few, sign=True)} becomes "
        f"{span(more, sign=True)} points)."
    )


def luck(table: pd.DataFrame) -> str:
    """Standard error of a validation score, and the best of equals above it; table: `searches`."""
    rows = table["rows"].iloc[0]
    few = table[table["rows"] == rows]
    start, calls = few[few.search == "expert"].validation.mean(), int(few.call.max())
    error = 100 * math.sqrt(start * (1 - start) / rows)
    return (
        f"The standard error of one model's accuracy on {rows} rows is {error:.1f} points. The "
        f"best of {calls} independent and equally good candidates is expected up to "
        f"{error * math.sqrt(2 * math.log(calls)):.1f} points above its true accuracy."
    )


def steered(table: pd.DataFrame, source: str) -> str:
    """The best fusion: gain on the small experts, gap closed, and time. table: of `fusion`."""
    closed = gap_closed(table)
    fused = closed.drop(index=["large base", "small expert", "large expert"])
    best, gain = fused.accuracy.idxmax(), 100 * (fused.accuracy - closed.accuracy["small expert"])
    return (
        f"In {source} the best fusion is *{best}*, {100 * fused.accuracy[best]:.1f} %: "
        f"{gain[best]:+.1f} points from the small experts alone, and "
        f"{100 * fused.closed[best]:.0f} % of the gap between the large base and the large "
        f"experts, at {fused.milliseconds[best] / closed.milliseconds['large base']:.1f} times the "
        f"large base's time. More accurate than the small experts: "
        f"{listed(f'*{name}*' for name in gain.index[gain > 0])}."
    )


def slowest(table: pd.DataFrame, source: str) -> str:
    """Which ways to find weights cost the most time. table: of `storage`."""
    said = [
        f"{title(row.method)} {row.slower:.1f} ({ROUTING_LABELS[row.finds]})"
        for row in table.nlargest(3, "slower").itertuples()
    ]
    return f"The slowest in {source}, in times of a plain model: {'; '.join(said)}."


def stored_well(table: pd.DataFrame, source: str) -> str:
    """Who keeps most below 1.5 models, and without the task's number. table: of `storage`."""
    said = []
    for column, words in scores(table).items():
        small = table.loc[table[column][table.models < 1.5].idxmax()]
        blind = table.loc[table[column][table.finds != "task"].idxmax()]
        said.append(
            f"Of the methods that store less than 1.5 models, {title(small.method)} has the "
            f"highest {words} in {source}: {100 * small[column]:.1f} %. Of all that do not need "
            f"the task's number, {title(blind.method)} has the highest: {100 * blind[column]:.1f} "
            f"%, with {blind.models:.2f} models stored and {blind.slower:.1f} times a model's time."
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
