"""Every registered method has a page that says what it is; the pages build without a warning."""

import inspect
import re
import shutil

import nbformat
import pytest
import yaml
from divmerge_book.evaluation.benchmark import every_method as every_spec
from divmerge_book.figures import TITLES
from divmerge_book.runner import book, execute, method_pages
from helpers import ROOT
from test_structure import FETCHED

from divmerge_core.methods import METHODS, options_of

BOOK = ROOT / "book"
BIBLIOGRAPHY = (BOOK / "references.bib").read_text("utf-8")
REFERENCES = set(re.findall(r"^@\w+\{([^,\s]+),", BIBLIOGRAPHY, re.M))

every_method = pytest.mark.parametrize("name", METHODS)


# --- what every method says of itself -------------------------------------------------------------
@every_method
def test_the_docstring_has_its_parts(name):
    """One sentence; a formula that MathJax draws without another host; why, where not, and who."""
    text = inspect.getdoc(METHODS[name])
    lead, *parts = text.split("\n\n")
    ends = re.findall(r"(?<!\bEq)(?<!\bal)[.!?](?=\s|$)", lead)
    assert ends == ["."] and lead.endswith(".") and "\n" not in lead
    assert re.search(r"^\$\$\n[^$]+\n\$\$$", text, re.M)
    assert text.count("$$") % 2 == 0 and text.replace("$$", "").count("$") % 2 == 0
    assert [match[0] for match in FETCHED.finditer(text)] == []
    for label in ("Idea", "Pitfalls", "Source"):
        (found,) = [part for part in parts if part.startswith(f"{label}: ")]
        assert found.endswith("."), label


@every_method
def test_the_facts_are_true(name):
    """Citations are in the references, titles unique; a search has six distinct candidates."""
    keys = method_pages.sources(name)
    assert len(set(keys)) == len(keys) and set(keys) <= REFERENCES
    assert [other for other, title in TITLES.items() if title == TITLES[name]] == [name]
    search, parameters = METHODS.facts[name]["search"], inspect.signature(METHODS[name]).parameters
    assert len(search) in (0, 6)
    defaults = {option: parameters[option].default for option in options_of(name)}
    given = [{**defaults, **candidate} for candidate in search]
    assert [one for n, one in enumerate(given) if one in given[:n]] == []


@every_method
def test_the_call_and_the_options_on_the_page_are_the_methods(name):
    def bound(problem, **options):
        inspect.signature(METHODS[name]).bind(problem, **options)
        return options

    own = {"score": max, "large": "a problem"}
    options = eval(method_pages.call(name), {"METHODS": {name: bound}, "problem": None, **own})
    first = (*METHODS.facts[name]["search"], {})[0]
    assert options == {**first, **{key: own[key] for key in own if key in options_of(name)}}
    rows = method_pages.option_rows(name)
    assert [row[0] for row in rows] == [f"`{one}`" for one in options_of(name)]
    assert all(row[-1] for row in rows), "an option without a meaning"
    vague = [row for row in rows if re.match(r"in \(|applies|theirs|published", row[-1])]
    assert not vague, "a range or a published value is no meaning"
    if name == "emr":  # a semicolon does not end what is said of an option
        assert re.match("`total` takes .*; `tensor` sums .*\\.$", rows[0][-1])


# --- the pages ------------------------------------------------------------------------------------
def test_every_method_has_one_page_and_one_row(tmp_path):
    method_pages.write(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"index.md", *(f"{method_pages.slug(name)}.md" for name in METHODS)}
    assert len(written) == 1 + len(METHODS)
    assert all(re.fullmatch(r"\w+\.md", file) for file in written)
    index = (tmp_path / "index.md").read_text("utf-8")
    rows = re.findall(r"^\* - \[(.*)\]\(#method-(\w+)\)$", index, re.M)
    assert sorted(rows) == sorted((TITLES[name], method_pages.slug(name)) for name in METHODS)


def test_a_new_method_appears_by_itself(tmp_path, monkeypatch):
    def halfway(problem, *, share: float = 1 / 3, far: list[int] | None = None):
        """Stop on the way.

        $$
        \\theta = \\tau, \\qquad
        [\\tau] = 1
        $$

        Idea: less is more than `halfway+` or `adamerging++`.

        share: of the way. far: tasks.

        Source: in a book,
        but where?
        """

    facts = {"source": "Nobody 2000, in a dream", "cite": "nobody2000, else2001"}
    facts |= {"needs": "nothing", "cost": "weights", "symmetric": False, "exactly": 3}
    facts["search"] = ({"share": 0.5},)
    monkeypatch.setitem(METHODS, "halfway+", halfway)
    monkeypatch.setitem(METHODS.facts, "halfway+", facts)
    method_pages.write(tmp_path)
    index = (tmp_path / "index.md").read_text("utf-8")
    row = "* - [halfway+](#method-halfway_plus)\n  - {cite:t}`nobody2000`\n  - nothing\n"
    assert "\n  - this book, after {cite:t}`touayouch2026` and {cite:t}`gargiulo2025`\n" in index
    assert row + "  - weights\n  - vector\n  - no\n  - 3\n" in index
    assert index.index("## No data\n") < index.index(row) < index.index("## Unlabelled inputs")
    page = (tmp_path / "halfway_plus.md").read_text("utf-8")
    assert page.startswith("(method-halfway_plus)=\n# halfway+\n\nStop on the way.\n")
    rows = r"\theta = \tau, \\[1ex]" + "\n" + r"[\tau] = 1"
    assert f"$$\n\\begin{{gathered}}\n{rows}\n\\end{{gathered}}\n$$\n" in page
    link = "[`adamerging++`](#method-adamerging_plus_plus)"
    assert f"**Idea.** less is more than `halfway+` or {link}.\n\n" in page
    assert "\n\n`share`: of the way. `far`: tasks.\n\n" in page
    assert "**Source.** in a book,\nbut where? {cite:p}`nobody2000,else2001`\n\n## Options" in page
    assert "- {cite:t}`nobody2000`, in a dream\n" in page
    assert "- exactly 3\n" in page and "- matters\n" in page and "- `share=0.5`\n" in page
    assert "* - `share`\n  - `0.3333`\n  - `float`\n  - of the way.\n* - `far`\n" in page
    assert 'METHODS["halfway+"](problem, share=0.5)' in page
    assert "-p methods halfway+\n" in page


def test_a_need_that_no_block_holds_is_refused(monkeypatch):
    facts = {**METHODS.facts["ties"], "needs": "luck"}
    monkeypatch.setitem(METHODS.facts, "ties", facts)
    with pytest.raises(ValueError, match="ties: needs must begin with nothing, .*got 'luck'"):
        method_pages.index()


def test_the_command_on_the_page_names_a_notebook_that_takes_methods():
    assert execute.parameters(ROOT / method_pages.NOTEBOOK)["methods"].kind == "list[str]"
    runnable = {spec.partition("/")[0] for spec in every_spec()}
    for name in METHODS:
        assert (f"-p methods {name}\n" in method_pages.page(name)) == (name in runnable), name


def test_the_table_of_contents_takes_every_page_in():
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text("utf-8"))
    (entry,) = [one for one in toc["parts"][-1]["chapters"] if one["file"] == "methods/index"]
    assert entry["sections"] == [{"glob": "methods/*"}]


def printing(text: str) -> nbformat.NotebookNode:
    """A notebook with a cell that has printed Markdown."""
    shown = nbformat.v4.new_output("display_data", {"text/markdown": text})
    code = nbformat.v4.new_code_cell("show()", outputs=[shown])
    cells = [nbformat.v4.new_markdown_cell("# Page"), code]
    return nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


@pytest.mark.slow
def test_the_pages_build_without_a_warning_in_the_books_own_settings(tmp_path):
    source = tmp_path / "src"
    shutil.copytree(BOOK, source)
    method_pages.write(source / "methods")
    (source / "index.md").write_text("# Home\n\n[Methods](methods/index.md)\n")
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text("utf-8"))
    last = toc["parts"][-1]
    kept = [one for one in last["chapters"] if one["file"] in ("methods/index", "references")]
    kept.append({"file": "printed"})
    nbformat.write(printing("| a | $b$ |\n|---|---|\n| `c` | $d$ |"), source / "printed.ipynb")
    (source / "_toc.yml").write_text(yaml.safe_dump({**toc, "parts": [{**last, "chapters": kept}]}))
    built = book.write_pages(tmp_path, source).parent  # warnings are errors

    def article(page: str) -> str:
        found = re.search("<article.*</article>", (built / f"{page}.html").read_text(), re.S)
        return re.sub("<[^>]*>", "", found[0])

    scripts = {page: (built / f"{page}.html").read_text() for page in ("index", "printed")}
    assert [text.count("mathjax/tex-svg.js") for text in scripts.values()] == [0, 1]
    assert (built / "mathjax" / "tex-svg.js").is_file() and "THEBE" not in scripts["printed"]
    assert "show()" in article("printed") and not re.search(r"[|$]", article("printed"))
    for name in METHODS:
        text = article(f"methods/{method_pages.slug(name)}")
        assert TITLES[name] in text and "Options" in text
        assert re.findall(r"\$\$|\*\*|\{cite|\(method-|^```", text, re.M) == []
