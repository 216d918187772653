"""In short: the chapters on one's own models, a language model and the kernel."""

from divmerge_book.figures import baselines as draw
from divmerge_book.figures import largest, title
from divmerge_book.findings import count, listed
from divmerge_book.findings.contests import standing
from divmerge_book.findings.in_short import Stored
from divmerge_book.kernel_benchmarks import merge_bandwidth


def own_models(stored: Stored) -> list[str]:
    """What to expect of the best single model by the data at hand."""
    report = stored.report("baselines/embedded_bert_tiny.json")
    subset = largest(report.rows).subset.iloc[0]
    found, published = (
        draw.single_models(table[table.block != draw.REFERENCE])
        for table in (draw.summary(report, subset, published=own) for own in (False, True))
    )
    choices = {
        "without labels": published[published.block != draw.LABELS],
        "with validation labels, which choose options": found,
    }
    best = {data: rows.loc[rows.value.idxmax()] for data, rows in choices.items()}
    said = [
        f"{data}: {title(row.name)}, {100 * row.value:.1f} % ANP and {100 * row.kept:.1f} % kept "
        f"margin in {row.seconds:.1f} s"
        for data, row in best.items()
    ]
    return [
        "One file describes base, experts and rows; one command checks it, merges, scores and "
        "writes a folder that transformers loads.",
        f"What to expect of one model on the {subset.count('+') + 1} tasks of the stored "
        f"table: {'; '.join(said)}.",
        "The page *Which method should I use* has more choices; your own test rows decide.",
    ]


def language_model(stored: Stored) -> list[str]:
    """Where DivMerge stands on a small language model."""
    report = stored.report("language/embedded_lm.json")
    first, _, rest = standing(report, "the stored run").partition(". ")
    tasks = [f"`{task}`" for task in largest(report.rows).task.unique()]
    return [
        f"A language model ({report.provenance['encoder']}) is merged on {listed(tasks)}; the "
        "divergence is taken over its whole vocabulary, at the tokens of the experts' own answers.",
        f"{first}.",
        rest,
        f"This is {report.rows.seed.nunique()} seed of experts, so intervals are over test rows; "
        f"of each method {count(report.provenance['budget'], 'set')} of options was tried.",
    ]


def kernel(stored: Stored) -> list[str]:
    """How near the merge is to the copy bandwidth, and how far its peers are."""
    run = stored.tables("kernel/cpu.json")
    size = run["steps"].parameters.iloc[0]
    table = merge_bandwidth.summary(run["rows"]).query("parameters == @size")
    table = table[table.tasks == table.tasks.max()].set_index(["contestant", "part"]).sort_index()
    ours, theirs = table.loc["ours"], table.drop(index=["ours", "copy"])
    peak = run["steps"].groupby("contestant")[["peak", "seconds"]].median()

    def took(name: str) -> str:
        return f"{peak.seconds[name]:.2f} s and {peak.peak[name] / 1e6:.0f} MB"

    far, count = theirs.ratio.idxmax(), int(table.tasks.iloc[0])
    return [
        f"A merge of T = {count} task vectors of {size / 1e6:.0f} million parameters reaches "
        f"{100 * ours.floor['forward']:.0f} % of the speed that the machine's copy bandwidth "
        f"allows, and its gradient {100 * ours.floor['backward']:.0f} %.",
        f"The other implementations take {theirs.ratio.min():.1f} to {theirs.ratio.max():.0f} "
        f"times as long; the longest is the {far[1]} pass of `{far[0]}`, which moves "
        f"{theirs.moved[far] / ours.moved[far[1]]:.0f} times the bytes.",
        f"A whole step of a fit takes {took('ours')} here, {took('dictionary')} where tensors are "
        "merged one by one.",
        f"All of it was measured on a CPU ({run.facts['threads']} threads); on a GPU nothing was.",
    ]
