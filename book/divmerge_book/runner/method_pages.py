"""The book's pages on merging methods, written from what METHODS says of each and its docstring."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from divmerge_book.figures import title
from divmerge_core.methods import METHODS, options_of

NOTEBOOK = "notebooks/06_baselines.ipynb"  # the chapter that takes any method by name
BLOCKS = {  # how the fact `needs` begins -> the heading of the methods that need it
    "nothing": "No data",
    "validation labels": "No data, and validation labels for one number",
    "unlabelled inputs": "Unlabelled inputs",
    "a validation score": "A validation score",
}
COMMON = {  # options that mean the same in every method
    "seed": "Of everything that is drawn.",
    "progress": "Show a progress bar.",
    "inputs": "Unlabelled inputs per task; None for the method's own number.",
    "epochs": "Passes over the inputs.",
    "lr": "Step size.",
    "steps": "Number of steps.",
    "batch_size": "Inputs per step.",
    "callback": "Called with every step.",
    "checkpoint": "A file from which an interrupted fit resumes.",
    "grouping": "Which tensors share a coefficient.",
    "optimizer": "Which optimizer fits the coefficients.",
    "init": "The first coefficients; None for the method's own.",
    "scale": "The factor of the merged task vector.",
    "divergence": "A name in DIVERGENCES.",
    "temperature": "What both sides' logits are divided by.",
    "basis": "What the coefficients scale, a name in BASES.",
    "link": "How coefficients are bounded; None for not at all.",
}
INTRO = """\
(methods)=
# Methods

Every merging method of the package, with a page for each: what it computes and why, where it goes
wrong, where public tools differ from its paper, and what it can be given. Where validation labels
are needed for one number, such as a scale, the merge itself looks at no data; a validation score is
asked for again and again. A method's cost grows with the *weights* (one pass over them), with
*inputs* (forward passes), with *gradients*, or with *training*. Most methods return one vector of
parameters; a *predictor* answers without one, and its answer may depend on the task or on the
input. The last two columns say whether the tasks may come in any order, and how many experts a
method takes.
"""


def slug(name: str) -> str:
    """A method's name as part of an address: `adamerging++` -> `adamerging_plus_plus`."""
    return name.replace("+", "_plus")


def sources(name: str) -> list[str]:
    """Keys of what a method cites, its own paper first."""
    return [key.strip() for key in METHODS.facts[name]["cite"].split(",")]


def credit(name: str) -> str:
    """What a method is due to: its own paper, or this book after the papers that it cites."""
    papers = [f"{{cite:t}}`{key}`" for key in sources(name)]
    own = METHODS.facts[name]["source"] == "this book"
    return f"this book, after {' and '.join(papers)}" if own else papers[0]


def block(name: str) -> str:
    """The heading that a method stands under; raises ValueError for a need that has none."""
    needs = METHODS.facts[name]["needs"]
    for start, heading in BLOCKS.items():
        if needs.startswith(start):
            return heading
    raise ValueError(f"{name}: needs must begin with {', '.join(BLOCKS)}; got {needs!r}")


def table(rows: Iterable[Sequence[str]], *, heads: str, widths: str) -> str:
    """A MyST table; heads: `header-rows` or `stub-columns`; widths: of the columns, in percent."""
    lines = ["```{list-table}", f":{heads}: 1", f":widths: {widths}", ""]
    for row in rows:
        lines += [f"{'  -' if n else '* -'} {cell}" for n, cell in enumerate(row)]
    return "\n".join([*lines, "```"])


def assigned(options: dict[str, object]) -> str:
    """`{"keep": 0.2, "trim": "global"}` as it stands in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def call(name: str) -> str:
    """How a method is called in Python, with the first options that a search would try."""
    given = assigned((*METHODS.facts[name]["search"], {})[0])
    own = [f"{option}={option}" for option in ("score", "large") if option in options_of(name)]
    return f'METHODS["{name}"]({", ".join(filter(None, ("problem", given, *own)))})'


def command(name: str) -> str:
    """How a method is run on the suites; one for a second, larger base has none to run on."""
    if METHODS.facts[name].get("optional") == "large":
        return "It is made for a second, larger base, which the suites of this book do not have.\n"
    line = f".venv/bin/python -m divmerge_book run \\\n  {NOTEBOOK} out.ipynb"
    suites = f"On the suites of this book:\n\n```bash\n{line} -p methods {name}\n```\n"
    if METHODS.facts[name].get("returns") == "predictor":
        return suites
    own = f".venv/bin/divmerge merge my_models.yaml merged/ --method {name}"
    return f"On your own models:\n\n```bash\n{own}\n```\n\n{suites}"


def meaning(name: str, option: str) -> str:
    """What is said of an option by its method, else by the one it extends, else everywhere.

    Else the first sentence of the method's docstring that has it.
    """
    extended = re.sub(r"(\++|_pp|_plus_plus)$", "", name)
    found = said(name, option) or said(extended, option) or COMMON.get(option)
    if found and found.startswith("published"):
        found = f"{COMMON[option].partition(';')[0].rstrip('.')}, {found}"
    named = (one for own in (name, extended) for one in body(own) if f"`{option}`" in one)
    return found or next(named, "").rstrip(";")


def body(name: str) -> list[str]:
    """Sentences of a method's docstring before its pitfalls, without formulas."""
    text, *_ = inspect.getdoc(METHODS[name]).partition("\n\nPitfalls: ")
    parts = [" ".join(part.split()) for part in text.split("\n\n") if not part.startswith("$$")]
    return [one for part in parts for one in re.split(r"(?<=[.;]) (?=[`A-Za-z$])", part)]


def said(name: str, option: str) -> str:
    """The sentences of a method's docstring from the one that begins with an option's name on."""
    sentences, options = body(name), options_of(name)
    begins = [re.match(r"`(\w+)`|(\w+)(?=:)", one) for one in sentences]
    names = [(one[1] or one[2]) if one else "" for one in begins]
    names = [one if one in options else "" for one in names]
    if option not in names:
        return ""
    first = names.index(option)
    ended = next(n for n in range(first, len(names)) if sentences[n].endswith(".")) + 1
    until = next((n for n in range(first + 1, len(names)) if names[n]), ended)
    opened = re.sub(r"^`?\w+`?(?: and `\w+`)?(:| is| are)? ", "", sentences[first])
    return " ".join([opened, *sentences[first + 1 : until]]).rstrip(";")


def option_rows(name: str) -> list[tuple[str, str, str, str]]:
    """Name, default, type and meaning of every option; the first two as in the signature."""
    rows = []
    for option in list(inspect.signature(METHODS[name]).parameters.values())[1:]:
        default = option.default
        default = float(f"{default:.4g}") if isinstance(default, float) else default  # 1/6 in print
        kind = re.sub(r"\b(?:[A-Za-z_]\w*\.)+", "", inspect.formatannotation(option.annotation))
        said = meaning(name, option.name)
        rows.append((f"`{option.name}`", f"`{default!r}`", f"`{kind}`", said))
    return rows


def prose(name: str, text: str) -> str:
    """What follows a docstring's first line, as a page sets it."""
    # Equations that stand side by side get a line each, else they are wider than a page.
    rows = r"$$\n\\begin{gathered}\n\1\n\\end{gathered}\n$$"
    text = re.sub(r"(?s)\$\$\n([^$]*?\\qquad[^$]*?)\n\$\$", rows, text)
    text = re.sub(r"\s*\\qquad\s+", r" \\\\[1ex]\n", text)
    # An option that a sentence starts with is set as code.
    names = "|".join(options_of(name)) or "(?!)"
    text = re.sub(rf"(^|[.;]\s)({names}): ", r"\1`\2`: ", text, flags=re.M)
    others = "|".join(map(re.escape, METHODS.keys() - {name, *options_of(name)}))
    text = re.sub(f"`({others})`", lambda m: f"[{m[0]}](#method-{slug(m[1])})", text)
    cited = rf"\1 {{cite:p}}`{','.join(sources(name))}`"
    text = re.sub(r"(?ms)^(Source: .*?)(?=\n\n|\Z)", cited, text)
    return re.sub(r"^(Idea|Pitfalls|Peers|Source): ", r"**\1.** ", text, flags=re.M)


def page(name: str, measured: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """One method's page; measured: of `which_method.standings`."""
    facts, method = METHODS.facts[name], METHODS[name]
    lead, _, body = inspect.getdoc(method).partition("\n\n")
    note = "".join(facts["source"].partition(",")[1:])
    returns = {"vector": "one vector of parameters", "predictor": "a predictor"}
    tried = "; ".join(f"`{assigned(one)}`" if one else "its defaults" for one in facts["search"])
    rows = [
        ("source", f"{credit(name)}{note}"),
        ("needs", facts["needs"]),
        ("cost grows with", facts["cost"]),
        ("returns", returns[facts.get("returns", "vector")]),
        ("order of tasks", "immaterial" if facts["symmetric"] else "matters"),
        ("experts", f"exactly {facts['exactly']}" if "exactly" in facts else "any number"),
        ("a search tries", tried or "its defaults alone"),
        ("code", f"`{method.__module__.replace('.', '/')}.py`"),
    ]
    rows += [("measured", line) for line in measured.get(name, ())]
    options, head = option_rows(name), ("option", "default", "type", "meaning")
    return "\n".join(
        [
            f"(method-{slug(name)})=\n# {title(name)}\n\n{lead}\n",
            table(rows, heads="stub-columns", widths="22 78"),
            f"\n{prose(name, body)}\n\n## Options\n",
            table([head, *options], heads="header-rows", widths="14 14 20 52")
            if options
            else "None.",
            "\n## How to call it\n",
            f"```python\nfrom divmerge_core import METHODS\n\nmerged = {call(name)}\n```\n",
            "`problem` is a `MergeProblem`; the chapter *The objective* makes one by hand.\n",
            command(name),
        ]
    )


def index() -> str:
    """The page that lists all methods, in blocks by the data they need."""
    head = ("method", "source", "needs", "cost", "returns", "any order", "experts")
    parts = [INTRO]
    for heading in BLOCKS.values():
        rows = [
            (
                f"[{title(name)}](#method-{slug(name)})",
                credit(name),
                *(facts["needs"], facts["cost"], facts.get("returns", "vector")),
                *("yes" if facts["symmetric"] else "no", str(facts.get("exactly", "any"))),
            )
            for name, facts in METHODS.facts.items()
            if block(name) == heading
        ]
        widths = "17 22 22 11 11 8 9"
        parts += [f"## {heading}\n", table([head, *rows], heads="header-rows", widths=widths), ""]
    return "\n".join(parts)


def write(folder: Path, measured: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
    """Write `index.md` and one page per method into a folder of the book's source."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text(index(), "utf-8")
    for name in METHODS:
        (folder / f"{slug(name)}.md").write_text(page(name, measured), "utf-8")
