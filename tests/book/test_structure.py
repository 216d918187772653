"""What the repository says about itself is true, and its parts agree."""

import ast
import hashlib
import importlib.metadata
import re
import sys
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from divmerge_book.runner import execute
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
SLUG = REPOSITORY.removeprefix("https://github.com/")
CONFIG = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())

# Rooms, from the ground up: a room imports only what stands before it.
ROOMS = (
    *(f"divmerge_core.{room}" for room in ("registry", "storage", "kernels", "divergences")),
    *(f"divmerge_core.{room}" for room in ("merging", "methods", "checkpoints")),
    *(f"divmerge_book.{room}" for room in ("data", "models", "evaluation", "interference")),
    *(f"divmerge_book.{room}" for room in ("studies", "planning", "kernel_benchmarks")),
    *(f"divmerge_book.{room}" for room in ("user_models", "published", "figures", "findings")),
    *("divmerge_book.runner", "divmerge_book.__main__"),
)
PACKAGES = (ROOT / "divmerge_core", ROOT / "book" / "divmerge_book")
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
SHOWING = re.compile(r"\b(?:Markdown|display|box)\(")  # a cell that shows text or a table
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem != "solutions"]

SETUP = f"""\
# On Colab this installs the package; elsewhere nothing happens.
import importlib.util

if importlib.util.find_spec("divmerge_core") is None:
    %pip install -q git+{REPOSITORY}"""
CHECK = """\
from divmerge_book.runner.parameters import check_parameters

given = check_parameters(globals())  # names of those that are set"""

MATHJAX = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
# Macros that MathJax would fetch from elsewhere when a formula uses them.
FETCHED = re.compile(
    r"\\(boldsymbol|color|textcolor|colorbox|definecolor|cancel|bcancel|xcancel|cancelto|bbox|enclose"
    r"|bra|ket|braket|set|Bra|Ket|Set|href|class|style|cssId|ce|pu|unicode|verb|require|toggle"
    r"|mathtip|texttip|xmapsto|xlongequal|begin\{(CD|prooftree)\})(?![A-Za-z])"
)


def documents() -> list[Path]:
    """Every text file that belongs to the repository."""
    noise = {".venv", ".git", "_build", "build", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    noise |= {"__pycache__", ".ipynb_checkpoints"}
    folders = [ROOT / name for name in (".ci", "divmerge_core", "notebooks", "book", "tests")]
    files = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    kept = (path for path in sorted(files) if path.is_file() and path.suffix != ".png")
    return [path for path in kept if not noise & set(path.relative_to(ROOT).parts)]


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- the address ---------------------------------------------------------------------------------
def test_every_mention_of_the_address_is_the_same():
    assert CONFIG["repository"]["url"] == REPOSITORY
    assert CONFIG["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
    for path in documents():
        text = path.read_text()
        installs = re.findall(r"git\+(https://[\w./-]+)", text)
        assert set(installs) <= {REPOSITORY}, path
        slugs = re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", text)
        if path.parent == ROOT and path.suffix == ".md":  # these pages link to no other repository
            slugs += re.findall(r"github\.com/([\w.-]+/[\w.-]+)", text)
        assert {slug.removesuffix(".git") for slug in slugs} <= {SLUG}, path


def test_the_files_that_commands_and_pages_name_exist():
    """Tests and packages by path, in the Makefile and in the pages about the repository."""
    named = re.compile(r"(?<![\w/.])((?:tests|divmerge_core|book/divmerge_book|\.ci)/[\w./*-]*\w)")
    for path in (ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "book").glob("*.md")):
        if path.name != "CHANGELOG.md":
            for name in named.findall(path.read_text()):
                assert list(ROOT.glob(name)), f"{path.name} names {name}, which does not exist"


def test_the_citation_and_the_workflow_speak_of_this_repository():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["repository-code"] == REPOSITORY and cited["license"] == PROJECT["license"]
    assert str(cited["version"]) == PROJECT["version"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())["jobs"]
    lines = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    targets = re.findall(r"\bmake ([a-z ]+)", "\n".join(lines))
    known = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert {one for line in targets for one in line.split()} <= {*known, "lint"}
    uploads = [step for step in jobs["build"]["steps"] if "upload" in step.get("uses", "")]
    assert [step["with"]["path"] for step in uploads] == ["_build/html"]
    assert jobs["publish"]["needs"] == "build"


# --- the environment -----------------------------------------------------------------------------
def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def declared() -> list[Requirement]:
    """What the lock pins: not Triton, which PyTorch's CUDA builds bring, and not the peers."""
    extras = [PROJECT["optional-dependencies"][name] for name in ("torch", "book", "test")]
    return [Requirement(line) for group in (PROJECT["dependencies"], *extras) for line in group]


def test_the_lock_satisfies_the_declared_ranges():
    pins = locked()
    for requirement in declared():
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert [pin for pin in pins.values() if "+" in pin] == [], "public versions"


def test_the_ranges_admit_colab():
    lines = (ROOT / "tests" / "colab.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    colab = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    for requirement in declared():
        version = colab.get(canonicalize_name(requirement.name))
        assert version is None or version in requirement.specifier, requirement
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    missing = {"cma", "gguf", "jaxtyping", "papermill", "pydantic", "rouge-score"}
    assert core - set(colab) == missing, "what the set-up cell adds"
    assert not core & {"torch", "transformers"}  # Colab keeps its own CUDA builds


def test_conda_users_get_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = environment["dependencies"]
    assert packages == ["python=3.11", "pip"]
    extras = ",".join(e for e in PROJECT["optional-dependencies"] if e not in ("peers", "cluster"))
    assert pip == {"pip": ["-r requirements.lock", f"-e .[{extras}]"]}


@pytest.mark.skipif(
    not Path(sys.prefix, ".complete").is_file(), reason="not in the environment that make built"
)
def test_what_runs_is_what_is_locked_and_the_lock_is_complete():
    pins = locked()
    for name, version in pins.items():
        assert importlib.metadata.version(name).split("+")[0] == version, name
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in pins, f"{name} needs {needed}"


def test_make_knows_the_sizes_and_ci_runs_the_commands():
    from divmerge_book.evaluation import stored_tables
    from divmerge_book.evaluation.experiment import SIZES

    assert list(stored_tables.SIZES) == list(SIZES)
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^SIZES := (.*)$", makefile, re.M)[1].split() == list(SIZES)
    assert re.search(r"^export OMP_WAIT_POLICY = PASSIVE$", makefile, re.M)
    steps = (ROOT / ".ci" / "run").read_text()
    assert steps.index("make test") < steps.index("make book")


# --- the package ---------------------------------------------------------------------------------
def room_of(module: str) -> str:
    """The room that a module of full name `divmerge_core.kernels.merge` lies in."""
    return ".".join(module.split(".")[:2])


def imported(path: Path) -> set[str]:
    """The rooms that a module imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            whole = "." not in node.module
            found |= {f"{node.module}.{a.name}" for a in node.names} if whole else {node.module}
    return {room_of(name) for name in found if name.startswith("divmerge_") and "." in name}


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_a_room_imports_what_stands_before_it(path):
    package = next(folder for folder in PACKAGES if path.is_relative_to(folder))
    module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
    if module.endswith("__init__") and module.count(".") == 1:
        return
    room = room_of(module)
    assert room in ROOMS, f"{room} has no place in the list"
    allowed = ROOMS[: ROOMS.index(room) + 1]
    assert imported(path) <= set(allowed), f"only {', '.join(allowed)} may be imported here"


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_modules_are_short_and_annotated_for_the_shape_checks(path):
    text = path.read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 250
    assert "from __future__ import annotations" not in text
    assert ast.get_docstring(ast.parse(text)), "a module opens with what it holds"


# --- the notebooks -------------------------------------------------------------------------------

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=names)


def code(path: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def tree(source: str) -> ast.Module:
    """A cell's syntax tree; magics count as `pass`."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))


def test_the_table_of_contents_lists_every_notebook_and_page_once():
    listed = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]
    chapters = [name for name in listed if name.startswith("notebooks/")]
    assert sorted(chapters) == [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    assert len(set(listed)) == len(listed)
    others = {path.stem for path in (ROOT / "book").glob("*.md")} - {"index"}
    others |= {"methods/index", "interactive/methods", "interactive/plane"}
    assert set(listed) - set(chapters) == others


def test_texts_name_chapters_by_title():
    """A chapter's number on its page is its place in the book, not its file's number."""
    for path in (*NOTEBOOKS, *(ROOT / "book").glob("*.md"), *MODULES):
        assert not re.search(r"[Cc]hapters? \d\d", path.read_text()), path


@each_notebook
def test_notebooks_are_valid_and_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    ids = [cell.get("id") for cell in notebook.cells]
    assert None not in ids and len(set(ids)) == len(ids)
    for cell in code(path):
        assert cell.outputs == [] and cell.execution_count is None
        assert not {"papermill", "execution"} & set(cell.metadata)


@each_notebook
def test_notebooks_open_with_a_title_parameters_and_the_setup(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"(\([\w-]+\)=\n)?# ", first.source), "a label may stand before the title"
    parameters, setup, check, *others = code(path)
    assert "parameters" in parameters.metadata.get("tags", [])
    assert setup.source == SETUP and check.source == CHECK
    for cell in others:  # the check takes the last cell of such lines for the parameters
        assert not any(isinstance(line, ast.AnnAssign) for line in tree(cell.source).body)
    declared = execute.parameters(path)
    assert [name for name, one in declared.items() if not one.help] == []
    lines = [line for line in parameters.source.splitlines() if not line.startswith("#")]
    assert set(papermill.inspect_notebook(path)) == set(declared), "papermill reads them too"
    assert len(lines) == len(declared), "papermill reads one parameter a line"


@each_notebook
def test_what_is_stored_is_drawn_by_one_rule(path):
    """Four chapters show stored Reports beside their own, each under a caption of its own."""
    sources = "\n".join(cell.source for cell in code(path))
    read = re.findall(r"\b(?:Report|tables)\.load\(|(?<![.\w])load\(folder", sources)
    assert not read or path.stem[:2] in ("04", "14", "17", "19")
    if calls := re.findall(r"\bstored_or_\w+\(", sources):
        assert sources.count("given") > 1, f"{len(calls)} calls know nothing of what was asked for"
        for name, one in execute.parameters(path).items():
            empty = not one.default and one.kind != "bool"
            assert not empty or re.search(r"(empty|0): ", one.help), f"what does no {name} mean?"


@each_notebook
def test_what_can_use_a_gpu_asks_colab_for_one_and_says_what_it_runs_on(path):
    metadata = nbformat.read(path, as_version=4).metadata
    device = execute.parameters(path).get("device")
    wanted = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}
    asked = {key: metadata[key] for key in wanted if key in metadata}
    assert asked == (wanted if device else {})
    if device and device.default == "auto":
        assert any("device_line(" in cell.source for cell in code(path))


@each_notebook
def test_cells_fit_a_page_and_nothing_asks_for_a_token(path):
    asking = re.compile(r"getpass|\blogin\(|userdata|HF_TOKEN|\binput\(")
    for cell in code(path):
        lines = cell.source.splitlines()
        assert len(lines) <= 15 and max(map(len, lines), default=0) <= 80, cell.source
        assert not asking.search(cell.source), cell.source


def test_every_label_stands_once():
    """Else a reference would lead to another chapter, and the pages would not build."""
    labels = []
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            marks = r"^(?:\(([\w-]+)\)=|:(?:label|name): ([\w-]+))$"
            labels += ["".join(found) for found in re.findall(marks, cell.source, re.M)]
            labels.append(cell.metadata.get("mystnb", {}).get("figure", {}).get("name"))
    counts = Counter(filter(None, labels))
    assert {label for label, count in counts.items() if count > 1} == set()


@each_notebook
def test_a_chapter_is_short_its_plumbing_is_folded_and_its_figures_are_told_in_words(path):
    """At most 30 code cells, at most a third of them plumbing: folded cells that show nothing."""
    cells = code(path)
    assert len(cells) <= 30
    folded = [cell for cell in cells if "hide-input" in cell.metadata.get("tags", [])]
    figures = [cell for cell in cells if "figure" in cell.metadata.get("mystnb", {})]
    silent = [c for c in folded if c not in figures and not SHOWING.search(c.source)]
    assert len(silent) <= len(cells) / 3
    assert all(cell in folded for cell in [*cells[:4], *figures])
    prose = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    for cell in figures:
        name = cell.metadata["mystnb"]["figure"]["name"]
        assert f"{{numref}}`{name}`" in "".join(prose), f"no text refers to {name}"
        assert len(cell.metadata["mystnb"]["image"]["alt"]) > 20, f"{name} is not told in words"


@each_notebook
def test_definitions_are_derivations_and_are_compared_with_the_package(path):
    for cell, following in pairwise([*code(path), nbformat.v4.new_code_cell("")]):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if any(isinstance(node, kinds) for node in ast.walk(tree(cell.source))):
            assert "derivation" in cell.metadata.get("tags", []), cell.source
        if "derivation" in cell.metadata.get("tags", []):
            assert "assert" in following.source, f"compare this with the package:\n{cell.source}"


# --- the pages -----------------------------------------------------------------------------------
def test_mathjax_is_the_vendored_one_and_licences_are_the_declared_ones():
    static = ROOT / "book" / "_extra" / "mathjax"
    assert CONFIG["sphinx"]["config"]["mathjax_path"] == "../mathjax/tex-svg.js"
    assert hashlib.sha256((static / "tex-svg.js").read_bytes()).hexdigest() == MATHJAX
    assert "Apache License" in (static / "tex-svg.LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("path", [*sorted((ROOT / "book").glob("*.md")), *NOTEBOOKS], ids=names)
def test_formulas_need_nothing_from_elsewhere(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert [match[0] for match in FETCHED.finditer(text)] == []


def test_the_readmes_tree_is_short_and_shows_rooms_that_exist():
    text = (ROOT / "README.md").read_text()
    (drawn,) = re.findall(r"^## The tree\n+```\n(.*?)^```", text, re.M | re.S)
    assert len(drawn.splitlines()) <= 40
    rooms = {path.parent.name for path in MODULES if path.name == "__init__.py"}
    shown = set(re.findall(r"(\w+)/", drawn))
    assert rooms - {"language"} <= shown
    known = {path.name for path in ROOT.rglob("*") if path.is_dir()}
    assert shown <= known


# --- the data page -------------------------------------------------------------------------------
def test_the_data_page_lists_every_asset_and_every_task():
    from divmerge_book.data.downloads import ASSETS
    from divmerge_book.data.tasks import TASKS

    page = " ".join((ROOT / "book" / "data.md").read_text(encoding="utf-8").split())
    for asset in ASSETS.values():
        assert f"`{asset.package}` {asset.version}" in page
        assert asset.licence in page and asset.sha256[:16] in page
    for name, task in TASKS.items():
        assert f"`{name}`" in page and task.kind in page and ", ".join(task.answers) in page
