"""The DivMerge paper's claims, one by one, beside stored results: replicated or not."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from divmerge_book.evaluation.report import Report, caption
from divmerge_book.evaluation.statistics import Estimate, mean_interval, pearson
from divmerge_book.figures import largest, title
from divmerge_book.findings import SCORES, bullets, count, listed
from divmerge_book.findings.in_short import PLACES, Stored
from divmerge_book.published import paper
from divmerge_book.studies import choice, correlations
from divmerge_book.studies import scores as scoring
from divmerge_book.user_models import locate

VERDICTS = REPLICATED, OPPOSITE, OPEN = "replicated", "not replicated", "cannot be told"
REPORTS = ("bases/glue_minilm.json", "baselines/embedded_bert_tiny.json")  # the paper's tasks first
SUBSETS = "scaling/glue_encoder_minilm/sample.json"
ORDERS = (  # the paper's names: the first is above each of the others when all tasks are merged
    ("LL JS", ("Model averaging", "Multi-SLERP", "TIES", "TL AdaMerging", "LL AdaMerging")),
    ("TL JS", ("Model averaging", "Multi-SLERP", "TIES", "TL AdaMerging", "LL AdaMerging")),
    ("LL JS", ("TL JS",)),
    ("TL AdaMerging", ("LL AdaMerging",)),
)
BASELINES = ORDERS[0][1]


def verdict(low: float, high: float) -> str:
    """REPLICATED or OPPOSITE where an interval excludes 0, else OPEN."""
    return REPLICATED if low > 0 else OPPOSITE if high < 0 else OPEN


@dataclass(frozen=True)
class Check:
    """One claim against one stored result.

    paper: the paper's value; value, low, high: ours, with its 95 % interval. All are in points of
    ANP, or correlations. The paper says that the value is above 0. kept: the verdict on the kept
    margin, which the paper does not report; empty where it was not computed. weak: whether the
    method that should be lower has a lower ANP than the unmerged base. printed: whether the paper
    prints the value; else it is computed from its figures, and the check does not count.
    """

    claim: str
    setting: str
    paper: float
    value: float
    low: float
    high: float
    unit: str = "points"
    kept: str = ""
    weak: bool = False
    printed: bool = True

    @property
    def verdict(self) -> str:
        """That on the paper's own quantity."""
        return verdict(self.low, self.high)

    def words(self) -> tuple[str, str, str]:
        """The paper's value, ours, and its interval."""
        form = "{:.2f}" if self.unit == "correlation" else "{:+.1f}"
        paper, value, low, high = map(form.format, (self.paper, self.value, self.low, self.high))
        return paper, value, f"{low} to {high}"


def setting(report: Report, num_tasks: int) -> str:
    """What a Report measured: suite, encoder, number of tasks (and counted ones) and seeds."""
    facts, seeds = report.provenance, report.rows.seed.nunique()
    some = len(report.counted(report.rows.suite.iloc[0]))
    few = f" ({some} counted)" if some < num_tasks else ""
    return f"`{facts['suite']}`, `{facts['encoder']}`, T = {num_tasks}{few}, {count(seeds, 'seed')}"


def in_points(found: Estimate) -> list[float]:
    """An estimate and its interval in points."""
    return [100 * float(number) for number in (found.value, *found.interval())]


def pairs(
    methods: Iterable[str], printed: pd.Series
) -> Iterator[tuple[tuple[str, str], str, float]]:
    """Each of ORDERS between these methods: the two, the claim, and the paper's difference."""
    held = set(methods)
    for better, others in ORDERS:
        for other in others:
            pair = paper.METHODS_HERE[better], paper.METHODS_HERE[other]
            if held.issuperset(pair):
                yield pair, " is above ".join(map(title, pair)), printed[better] - printed[other]


def orders(report: Report) -> Iterator[Check]:
    """The paper's orderings of methods by ANP with all tasks merged."""
    suite, subset = largest(report.rows)[["suite", "subset"]].iloc[0]
    drawn, margins = (report.sampled(suite, subset, statistic=one) for one in SCORES)
    place = setting(report, subset.count("+") + 1)
    for pair, claim, theirs in pairs(drawn.methods, paper.table(6).iloc[-1]):
        found, kept = drawn.estimate(*pair), verdict(*margins.estimate(*pair).interval())
        weak = "base" in drawn.methods and drawn.estimate(pair[1], "base").value < 0
        yield Check(claim, place, theirs, *in_points(found), kept=kept, weak=weak)


def over_subsets(stored: Stored) -> Iterator[Check]:
    """The paper's orderings on subsets of GLUE's tasks: means over sizes of means over subsets.

    Subsets of the first seed, of every size but the largest, of which there is one. The interval is
    over subsets of each size.
    """
    found = stored.tables(SUBSETS)
    rows, printed = found["answers"], paper.table(6).iloc[:-1].mean()
    own = scoring.first_seed(scoring.by_subset(scoring.ratios(rows, rows)))
    some = own[own["T"] < own["T"].max()]
    wide = some.pivot(index=["T", "subset"], columns="method", values=[*SCORES])
    sizes = f"T = {some['T'].min()} to {some['T'].max()}"
    few = f"{len(scoring.floor(rows))} tasks counted"
    place = f"`{found.facts['suite']}`, `{found.facts['encoder']}`, {sizes}, {len(wide)} subsets"
    place = f"{place} ({few})"

    def gap(score: str, better: str, other: str) -> Estimate:
        of = (wide[score, better] - wide[score, other]).groupby("T")
        error, freedom = (of.sem() ** 2).sum() / len(of) ** 2, len(wide) - len(of)
        return Estimate(of.mean().mean(), np.float64(0), error, 1, freedom)

    for pair, claim, theirs in pairs(wide["anp"], printed):
        ours, kept = (gap(score, *pair) for score in SCORES)
        yield Check(claim, place, theirs, *in_points(ours), kept=verdict(*kept.interval()))


def lead(report: Report) -> Iterator[Check]:
    """DivMerge per layer less the best of the paper's baselines, for most tasks less for fewest.

    The interval is over seeds alone.
    """
    printed = paper.table(6)
    theirs = printed["LL JS"] - printed[list(BASELINES)].max(axis=1)
    subsets = sorted(report.rows.subset.unique(), key=lambda name: name.count("+"))
    ahead = []
    for subset in (subsets[0], subsets[-1]):
        drawn = report.sampled(report.rows.suite.iloc[0], subset)
        by_seed = pd.DataFrame(100 * drawn.exact, columns=drawn.methods)
        best = by_seed[[paper.METHODS_HERE[name] for name in BASELINES]].mean().idxmax()
        ahead.append((by_seed["divmerge/layer"] - by_seed[best]).to_numpy())
    grown = ahead[1] - ahead[0]
    few, many = (subset.count("+") + 1 for subset in (subsets[0], subsets[-1]))
    yield Check(
        f"DivMerge's lead over the best baseline grows from T = {few} to T = {many}",
        setting(report, many),
        theirs.iloc[-1] - theirs.iloc[0],
        grown.mean(),
        *mean_interval(grown),
    )


def objectives(stored: Stored) -> Iterator[Check]:
    """JS is above KL, with all tasks merged."""
    found = stored.tables("choice/ablation.json")
    scores = found.tables["scores"].query("search == 'searched' and count == count.max()")
    few = scores.method.str.match("expert|js/|kl/")
    table = choice.summary(scores[few]).set_index(["objective", "grouping"])
    seeds, printed = found.tables["scores"].seed.nunique(), paper.table(6).iloc[-1]
    for level, grouping in (("TL", "task"), ("LL", "layer")):
        row = table.loc[("kl", grouping)]
        place = f"`{found.facts['suite']}`, `{found.facts['encoder']}`, T = {row['count']}, "
        yield Check(
            f"JS is above KL, coefficients per {grouping}",
            place + count(seeds, "seed"),
            printed[f"{level} JS"] - printed[f"{level} KL"],
            *(-100 * row[name] for name in ("difference", "from_high", "from_low")),
        )


def predicts(stored: Stored) -> Iterator[Check]:
    """Correlations over experts of accuracy with a small divergence, their mean over tasks.

    Intervals are over seeds alone.
    """
    found = stored.tables("evidence/embedded_bert_tiny.json")
    wide = found.tables["cross"].pivot(index=["seed", "task"], columns="model")
    tasks, pairs = list(wide["js"].columns), []
    for seed, own in wide.groupby("seed"):
        own = own.loc[seed].loc[tasks]
        pairs.append((-own["js"][tasks].to_numpy(), own["accuracy"][tasks].to_numpy()))
    theirs = -paper.figure(5, "js").to_numpy(), paper.table(5).to_numpy().T
    place = f"`embedded`, `{found.facts['encoder']}`, {count(len(tasks), 'task')}, "
    for words, kept in (("with", lambda x: x), ("without", correlations.others)):
        values = np.array([pearson(*map(kept, pair)).mean() for pair in pairs])
        yield Check(
            f"Accuracy goes with a small divergence, over experts {words} the task's own",
            place + count(len(pairs), "seed"),
            float(pearson(*map(kept, theirs)).mean()),
            values.mean(),
            *mean_interval(values),
            unit="correlation",
            printed=words == "with",
        )


@cache
def checks(folder: Path) -> tuple[list[Check], Stored]:
    """Every claim that a result stored in a folder bears on, and what was read for it."""
    stored = Stored(folder)
    reports = [stored.report(name) for name in REPORTS]
    found = [one for report in reports for one in orders(report)]
    found += [*over_subsets(stored), *lead(reports[1]), *objectives(stored), *predicts(stored)]
    return found, stored


def drawn(report: str = "") -> tuple[list[Check], str]:
    """The checks of the Report in a file, or those of the stored results, and where they are from.

    There are none where no results are stored, as on Colab.
    """
    if report:
        own = Report.load(locate(report))
        found = list(orders(own))
        none = "" if found else " It has no two methods that the paper puts in order."
        return found, f"Drawn from `{report}`: {caption(own)}.{none}"
    folder = next(filter(Path.is_dir, PLACES), None)
    if folder is None:
        return [], "Results are not stored here; give `report` a file."
    found, stored = checks(folder)
    return found, stored.origin()


def counts(found: Sequence[Check]) -> str:
    """How many checks of what the paper prints have which verdict."""
    found = [one for one in found if one.printed]
    of = Counter(one.verdict for one in found)
    said = listed([f"{of[word]} {word}" for word in VERDICTS])
    weak = [one for one in found if one.weak and one.verdict == REPLICATED]
    poor = " Of the replicated, {} against a method that is below the unmerged base."
    few = poor.format(f"{len(weak)} {'is' if len(weak) == 1 else 'are'}") if weak else ""
    return f"Of {len(found)} checks of the paper's claims: {said}.{few}"


def of_verdict(found: Iterable[Check], word: str) -> str:
    """The claims with a verdict, by setting."""
    claims = defaultdict(list)
    for one in found:
        if one.verdict == word:
            claims[one.setting].append(one.claim)
    said = [f"{'; '.join(own)} ({place})" for place, own in claims.items()]
    return f"{word.capitalize()}: {'; '.join(said) or 'none'}."


def summary(found: Sequence[Check]) -> str:
    """How many checks have which verdict, and the claims that are not replicated, by setting."""
    return bullets([counts(found), *(of_verdict(found, word) for word in (OPPOSITE, OPEN))])


def table(found: Iterable[Check]) -> pd.DataFrame:
    """A row per check: Claim, Setting, Paper, Here, 95 % interval, Verdict, By kept margin."""
    columns = "Claim", "Setting", "Paper", "Here", "95 % interval", "Verdict", "By kept margin"
    rows = [
        (one.claim, one.setting.replace("`", ""), *one.words(), one.verdict, one.kept)
        for one in found
    ]
    return pd.DataFrame(rows, columns=columns)


def in_short(stored: Stored) -> list[str]:
    """How many checks have which verdict, and which are not replicated."""
    every, read = checks(stored.folder)
    stored.dates.update(read.dates)
    glue = [one for one in every if "glue" in one.setting]
    held = sum(one.verdict == REPLICATED for one in glue)
    kept = sum(one.kept == REPLICATED for one in glue)
    held = (
        f"On GLUE's tasks, {held} of {len(glue)} orderings of methods are replicated, and {kept} "
        "by kept margin."
    )
    return [counts(every), held, *(of_verdict(every, word) for word in (OPPOSITE, OPEN))]
