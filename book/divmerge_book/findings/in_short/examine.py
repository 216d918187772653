"""In short: the chapters that examine methods, divergences and interference."""

from divmerge_book.figures import baselines as draw
from divmerge_book.figures import largest, title
from divmerge_book.findings import beyond as find
from divmerge_book.findings import listed
from divmerge_book.findings.contests import COLUMN_OF, gap, sampled
from divmerge_book.findings.in_short import Stored
from divmerge_book.studies.plans import used, with_margins


def baselines(stored: Stored) -> list[str]:
    """Which method is best under an equal search, where DivMerge stands, and what it costs."""
    report = stored.report("baselines/embedded_bert_tiny.json")
    subset = largest(report.rows).subset.iloc[0]
    every = draw.summary(report, subset).query("block != 'reference'")
    table, pairs = draw.single_models(every), draw.SCORES.items()
    best = [f"{title(table[c].idxmax())} by {w} ({100 * table[c].max():.1f} %)" for c, w in pairs]
    first = table.value[table.index.str.startswith("divmerge")].idxmax()
    ranks = [f"{int(table[c].rank(ascending=False)[first])} by {w}" for c, w in pairs]
    ahead = {name: (table[c].idxmax(), first) for name, c in COLUMN_OF.items()}
    said = [f"{title(p[0])} {gap(sampled(report, subset), {n: p})}" for n, p in ahead.items()]
    cheap = table[table.value >= table.value[first]].seconds
    more = every.drop(table.index)
    few = more[more.stored < 1.5].value
    return [
        f"With the same experts and the same search for every method, T = {subset.count('+') + 1}, "
        f"the best of {len(table)} methods that return one model are {listed(best)}.",
        f"The best DivMerge by ANP, {title(first)} ({100 * table.value[first]:.1f} %), is number "
        f"{listed(ranks)}.",
        f"Minus {title(first)}, with 95 % intervals: {listed(said)}.",
        f"{title(first)} takes {table.seconds[first]:.1f} s; the fastest method with at least its "
        f"ANP, {title(cheap.idxmin())}, takes {cheap.min():.1f} s.",
        f"{len(more)} more methods answer with more than one model. Of those that store less than "
        f"1.5 models, {title(few.idxmax())} has the highest ANP ({100 * few.max():.1f} %).",
    ]


def beyond(stored: Stored) -> list[str]:
    """What more models, more storage, or answers of small experts buy: each finding's beginning."""
    drawn = {}
    for name in ("storage", "arrivals", "mixture", "evolution", "fusion"):
        found = stored.tables(file := f"beyond/{name}.json")
        stored.note(file, {**found.facts, **used(found.facts)})
        facts = {**found.facts, "source": found.source}
        drawn[name] = with_margins(name, found["rows"], facts), facts
    lines = find.summary(drawn).removeprefix("- ").split("\n- ")
    return [f"{line.partition('. ')[0].removesuffix('.')}." for line in lines]
