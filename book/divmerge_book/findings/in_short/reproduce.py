"""In short: the chapters on better directions, the paper's setting and others' numbers."""

from divmerge_book.evaluation.sizes import LANGUAGE_SIZES
from divmerge_book.figures import largest, title
from divmerge_book.findings import count, each, listed, span
from divmerge_book.findings.contests import gaps, standing
from divmerge_book.findings.in_short import Stored
from divmerge_book.planning.language_plans import suite_forecast
from divmerge_book.published import leaderboard_summary as tables
from divmerge_book.published import paper

GLUE, EIGHT = "bases/glue_minilm.json", "bases/embedded_minilm.json"


def directions(stored: Stored) -> list[str]:
    """What DivMerge+ gains on eight tasks and on seven of GLUE, and over what it is made of."""
    said = [
        "DivMerge+ fits coefficients of orthogonalised singular directions (TSV-M's) with "
        "DivMerge's objective; it is this book's own method, not the paper's."
    ]
    for report in map(stored.report, (EIGHT, GLUE)):
        subset = largest(report.rows).subset.iloc[0]
        run = f"the stored run with {count(report.rows.seed.nunique(), 'seed')} of experts"
        both = gaps(report, subset, ["divmerge+"], ["divmerge/layer", "tsv_m"])
        said.append(f"{standing(report, run).partition('. ')[0]}.")
        said.append("There " + both.removeprefix("- ").replace(".\n- ", "; "))
    return said


def glue_on_a_gpu(stored: Stored) -> list[str]:
    """What the paper reports, and what a small encoder gives on its tasks."""
    report = stored.report(GLUE)
    first = standing(report, "the stored run").partition(". ")[0]
    stored.printed("paper")
    means = paper.averages(6).sort_values(ascending=False)
    shape = {"num_tasks": 7, "tokens": 64, "answers": 3, "rows": 6000}
    plan = suite_forecast(LANGUAGE_SIZES["glue/default"], **shape)
    return [
        "The paper's setting, Qwen2.5-0.5B on seven GLUE tasks, needs a GPU and was not run here.",
        f"Planned for size `default`, not measured: the fit holds {span(plan['fit, GB'])} GB, by "
        f"GPU, and there is room on {listed(plan.index[plan.fits.astype(bool)])}. Experts and "
        f"fit take at least {span(plan['experts and fit, s'] / 60)} minutes, by the data "
        "sheets' peak rates.",
        f"A small encoder ({report.provenance['encoder']}) stands in on the same tasks. {first}.",
        "The paper prints ANP averaged over numbers of tasks (LL: a coefficient per layer, TL: per "
        f"task): {each(means, '{:.1f} %', str, ', ')}.",
    ]


def published(stored: Stored) -> list[str]:
    """What a published table hides behind its means."""
    stored.printed("fusionbench")
    table, rows = tables.published(), tables.scored_rows()
    found, half = tables.summary(table), tables.margins(table, rows)
    first, second = order = found["mean"].nlargest(2).index
    ends = [f"{title(m)} ({100 * found.worst[m]:.0f} %, {found.worst_task[m]})" for m in order]
    below = [f"{title(m)} on {found.below_base[m]}" for m in found.index if found.below_base[m]]
    return [
        f"FusionBench prints {len(found)} merges of {table.shape[1]} GPT-2 experts; the highest "
        f"means are {100 * found['mean'][first]:.1f} % ({title(first)}) and "
        f"{100 * found['mean'][second]:.1f} % ({title(second)}).",
        f"By its test rows alone, such a mean has a 95 % interval of "
        f"±{100 * half['mean'][first]:.1f} points.",
        f"Their worst task, in % of its expert: {listed(ends)}.",
        f"Less accurate than the unmerged base: {listed(below)}.",
        "These are others' numbers; the experts themselves have not been merged for this page.",
    ]
