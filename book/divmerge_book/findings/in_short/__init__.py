"""The box "In short" of a chapter: three to five sentences made of stored results.

Every chapter has a function from `Stored` to sentences in one of these modules; `box` shows them,
with the files that they were made of.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from IPython.display import Markdown

from divmerge_book.evaluation import stored_tables
from divmerge_book.evaluation.report import Report
from divmerge_book.findings import bullets, count, listed

PLACES = (Path("../book/results"), Path("book/results"))  # from a chapter's folder, or from above


@dataclass(frozen=True)
class Stored:
    """The folder of stored results; `dates` has what every file that was read says of itself."""

    folder: Path
    dates: dict[str, str] = field(default_factory=dict)

    def report(self, name: str) -> Report:
        """The Report in `name`, such as `baselines/embedded_bert_tiny.json`."""
        report = Report.load(self.folder / name)
        self.note(name, report.provenance)
        return report

    def tables(self, name: str) -> stored_tables.ResultTable:
        """The tables in `name`, such as `protocol/inputs.json`, with their facts."""
        found = stored_tables.ResultTable(*stored_tables.load(self.folder / name), "the stored run")
        self.note(name, found.facts)
        return found

    def note(self, name: str, facts: Mapping) -> None:
        """Keep a file's encoder, number of seeds and date, as far as it has them."""
        known = facts.get("encoder"), "seeds" in facts and count(len(facts["seeds"]), "seed")
        self.dates[f"book/results/{name}"] = ", ".join(filter(None, [*known, facts["date"]]))

    def printed(self, work: str) -> None:
        """Name the file of numbers that others print; work: of `published.paper`."""
        self.dates[f"book/divmerge_book/published/{work}.json"] = "as printed"

    def origin(self) -> str:
        """A line that names the files that were read."""
        files = listed([f"`{name}` ({date})" for name, date in self.dates.items()])
        return f"Made of stored results: {files}."


def box(sentences: Callable[[Stored], Iterable[str]]) -> Markdown:
    """A chapter's sentences in a box, with the files that they were made of.

    It speaks of the results as they are stored when the cell runs, whatever a reader's parameters
    are. Where no results are stored, as on Colab, it says so.
    """
    stored = Stored(next(filter(Path.is_dir, PLACES), PLACES[0]))
    try:
        text = bullets(sentences(stored))
        text += f"\n\n*{stored.origin()}*"
    except FileNotFoundError as error:
        text = f"`{Path(error.filename).name}` is not stored here; this run's results are below."
    return Markdown(f":::{{admonition}} In short\n:class: tip\n\n{text}\n:::")
