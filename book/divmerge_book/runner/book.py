"""The book: its notebooks, executed side by side where something changed, and its HTML pages."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml
from tqdm import tqdm

from divmerge_book.data.code_digest import ROOT
from divmerge_book.runner.execute import parameters
from divmerge_book.runner.executors import RunFailed, processes, run_page
from divmerge_core.storage import sha256, write_json

MEMORY = 8 * 2**30  # bytes that a notebook beside others may need


def digest(files: Iterable[Path], *facts: object) -> str:
    contents = [(file.name, sha256(file)) for file in sorted(files)]
    return hashlib.sha256(json.dumps([facts, contents]).encode()).hexdigest()


@dataclass(frozen=True)
class Chapter:
    """One notebook of the book at one size."""

    root: Path
    name: str
    size: str

    @property
    def notebook(self) -> Path:
        return self.root / f"{self.name}.ipynb"

    @property
    def output(self) -> Path:
        """The executed copy; a JSON file of the same name holds its `key`."""
        return self.root / "_build" / "executed" / self.size / f"{self.name}.ipynb"

    def values(self) -> dict[str, object]:
        """The book's parameters that the notebook has."""
        offered = {"size": self.size, "publish": self.size == "full"}
        return {name: offered[name] for name in offered if name in parameters(self.notebook)}

    def key(self) -> dict[str, str]:
        """Everything that determines the executed copy."""
        versions = sorted(f"{d.name}=={d.version}" for d in metadata.distributions())
        package = (path for folder in ROOT for path in folder.rglob("*"))
        sources = [self.notebook, *(p for p in package if p.is_file() and p.suffix != ".pyc")]
        results = (self.root / "book" / "results").rglob("*.json")
        run = digest(sources, self.values(), versions, sys.version)
        return {"run": run, "results": digest(results)}

    def up_to_date(self) -> bool:
        sidecar = self.output.with_suffix(".json")
        kept = sidecar.is_file() and self.output.is_file()
        return kept and json.loads(sidecar.read_text()) == self.key()


def run_chapter(chapter: Chapter) -> float:
    """Execute a chapter; returns seconds. Raises RunFailed with the cell that failed."""
    start, before = time.monotonic(), chapter.key()
    sidecar = chapter.output.with_suffix(".json")
    sidecar.unlink(missing_ok=True)
    page, folder = chapter.notebook.read_text("utf-8"), chapter.notebook.parent
    run_page(page, chapter.output, chapter.values(), cwd=folder)
    # Results are read afterwards: a notebook that fills them must not make itself stale.
    write_json(sidecar, {**before, "results": chapter.key()["results"]})
    return time.monotonic() - start


def workers_at(size: str, workers: int | None = None) -> int:
    """How many notebooks run side by side: by default, one for each core and 8 GB of memory.

    At size full one at a time: these publish seconds, which others at work would change.
    """
    if workers is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        room = max(1, min(os.cpu_count() or 1, memory // MEMORY))
        workers = 1 if size == "full" else room
    if workers < 1:
        raise ValueError(f"workers must be a whole number of 1 or more, got {workers}")
    if size == "full" and workers > 1:
        raise ValueError(
            f"workers must be 1 at size full, got {workers}: its notebooks publish seconds, which "
            "others at work would change; leave workers out"
        )
    return workers


def execute_all(chapters: Sequence[Chapter], workers: int) -> None:
    """Run what is not up to date, `workers` at once; the first failure ends the others.

    One at a time they run in the book's order, as a chapter may draw what an earlier one publishes;
    side by side the largest starts first. Raises RunFailed with the notebook and the failed cell.
    """
    waiting = list(reversed(chapters))
    if workers > 1:  # a notebook's size is the best guess of its time before it has ever run
        waiting.sort(key=lambda one: one.notebook.stat().st_size)
    running: dict[Future, Chapter] = {}
    with processes(workers) as submit, tqdm(total=len(chapters), unit="notebook") as bar:
        while waiting or running:
            while waiting and len(running) < workers:
                one = waiting.pop()
                if one.up_to_date():
                    bar.write(f"{one.name}: up to date")
                    bar.update()
                else:
                    running[submit(run_chapter, one)] = one
            bar.set_description(", ".join(Path(one.name).name for one in running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                one = running.pop(future)
                if future.exception():
                    raise RunFailed(f"{one.name}: {future.exception()}")
                bar.write(f"{one.name}: {future.result():.0f} s")
                bar.update()


def build(size: str, *, root: Path, workers: int | None = None) -> Path:
    """Execute every notebook of the table of contents and build the HTML; warnings are errors.

    `workers` notebooks run side by side, each with its share of the cores (see `workers_at`).
    """
    from divmerge_book import figures
    from divmerge_book.evaluation import experiment
    from divmerge_book.runner import interactive_pages, which_method

    experiment.SIZES[size]  # an unknown one is refused, with those that there are
    workers = workers_at(size, workers)
    folder, source = root / "_build", root / "_build" / "src"
    toc = yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    names = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    chapters = [Chapter(root, n, size) for n in names if n.startswith("notebooks/")]
    execute_all(chapters, workers)
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(root / "book", source, ignore=shutil.ignore_patterns("divmerge_book"))
    figures.landing(source / "results")
    which_method.write(source)
    interactive_pages.write(source)
    for one in chapters:
        (source / one.name).parent.mkdir(exist_ok=True)
        shutil.copy(one.output, source / f"{one.name}.ipynb")
    return write_pages(folder, source)


def write_pages(folder: Path, source: Path) -> Path:
    """Build the HTML beside the old one and swap them when it is complete."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix="pages-") as new:
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
        command += [source, "--config", source / "_config.yml", "--toc", source / "_toc.yml"]
        command += ["-W", "-n", "--keep-going", "--path-output", new]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{done.stdout}\nthe pages were not built: see the warnings above")
        html, old = folder / "html", Path(new, "old")
        if html.exists():
            html.replace(old)
        Path(new, "_build", "html").replace(html)
    print(f"pages: {time.monotonic() - start:.0f} s\nopen file://{html}/index.html")
    return html / "index.html"
