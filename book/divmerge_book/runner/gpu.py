"""What a machine with a GPU measures in a few minutes, without network: a plan of steps.

`make gpu`, or `python -m divmerge_book.runner.gpu FOLDER --encoder PATH`. Every step is a process
with a limit of seconds and stores its tables in FOLDER; `summary.json` there says what was done and
why the rest was not. Without a GPU, or with --dry-run, the steps run at toy size, and the summary
says so. Experts and merges are cached: the same command goes on where the time ended.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pandas as pd
import torch

from divmerge_book.data.glue import glue_folder
from divmerge_book.data.tasks import SUITES
from divmerge_book.evaluation import stored_tables
from divmerge_book.evaluation.benchmark import compare
from divmerge_book.evaluation.provenance import origin
from divmerge_book.kernel_benchmarks import implementations as field
from divmerge_book.kernel_benchmarks import merge_bandwidth as measure
from divmerge_book.kernel_benchmarks import step_time
from divmerge_book.models.encoders import classifier_forward, load_base, make_batches
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.registry import Registry
from divmerge_core.storage import write_json

ROOT = Path(__file__).resolve().parents[3]
# name -> function(Given) that stores tables and says in a sentence what it found; seconds: its
# limit. It raises ValueError for what this machine lacks.
STEPS = Registry("step of the plan")
LEAST, LACKS = 15, 3  # seconds that a step is begun with; the exit code of a step that lacks a part
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
METHODS = ("average", "task_arithmetic", "ties", "tsv_m", "divmerge/task", "divmerge/layer")
METHODS += ("adamerging/task", "adamerging/layer", "regmean", "divmerge+")


@dataclass(frozen=True)
class Given:
    """The folder of the tables, the encoder (a name or a folder), and whether the run is dry."""

    folder: Path
    encoder: str
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def save(self, name: str, **tables: pd.DataFrame) -> None:
        facts = {"size": "smoke" if self.dry else "full", "device": self.device.type}
        facts |= {"encoder": self.encoder, "peers": field.versions()}
        stored_tables.save(self.folder / f"{name}.json", tables, **facts)

    def able(self, registry: Registry, *names: str) -> list[str]:
        """Those of an implementation's names (none: all) that this machine has."""
        return [n for n in names or registry if not field.missing(registry, n, self.device.type)]


@STEPS.register("tests", seconds=120)
def tests(given: Given) -> str:
    """The tests marked gpu; without a GPU, one of the kernels' in Triton's interpreter."""
    chosen = ["-k", "sum_by_hand"] if given.dry else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen, "tests/core"]
    if given.dry:
        command[-1] += "/test_merge_kernel.py"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    if done.returncode:
        raise (ValueError if "No module named" in last else RuntimeError)(last)
    return last


def merges(given: Given, *, name: str, names: Iterable[str], millions: Iterable[float]) -> str:
    """Merge and gradient of eight tasks beside a copy of memory, and the roof of arithmetic."""
    parts, device = [], given.device
    for size in (0.01,) if given.dry else millions:
        layout = field.stack_of_layers(int(1e6 * size))
        case = field.Case.random(layout, 8, device=device)
        pick = given.able(field.IMPLEMENTATIONS, *names)
        parts.append(measure.benchmark_merge(case, pick, repeats=2 if given.dry else 15))
    roof = pd.DataFrame({"gigaflops": [measure.matrix_rate(device, 64 if given.dry else 8192)]})
    given.save(name, rows=pd.concat(parts), roof=roof)
    own = measure.summary(parts[-1]).query("contestant == 'ours'")
    shares = [f"{row.part} {row.floor:.0%}" for row in own.itertuples()]
    return f"divmerge_core's share of copy bandwidth: {', '.join(shares)}"


quick = [n for n in field.IMPLEMENTATIONS if n != "compiled"]
quick_merges = partial(merges, name="merge", names=quick, millions=(1.0, 4.0, 22.0, 64.0))
STEPS.register("merge", seconds=75)(quick_merges)


@STEPS.register("divergence", seconds=75)
def divergences(given: Given) -> str:
    """Loss and gradient of JS over a vocabulary, beside its definition, compiled, and Liger."""
    pick, parts = given.able(field.DIVERGENCE_IMPLEMENTATIONS), []
    for shape in ((4, 50),) if given.dry else ((256, 32_000), (1024, 49_152), (512, 151_936)):
        rows = measure.benchmark_divergence(pick, shape, given.device, repeats=15)
        parts.append(rows.assign(positions=shape[0], vocabulary=shape[1]))
    given.save("divergence", rows=pd.concat(parts))
    return medians(parts[-1])


def medians(rows: pd.DataFrame) -> str:
    """Median milliseconds of every implementation, in words."""
    found = 1e3 * rows.groupby("contestant", sort=False).seconds.median()
    return ", ".join(f"{name} {value:.3g} ms" for name, value in found.items())


@STEPS.register("graphs", seconds=45)
def graphs(given: Given) -> str:
    """Merge and gradient launched one by one, and replayed as one CUDA graph."""
    if given.dry:
        raise ValueError("CUDA graphs need a GPU")
    parts = []
    for size in (0.1, 1, 22):
        case = field.Case.random(field.stack_of_layers(int(1e6 * size)), 8, device=given.device)
        deltas, segments, out = case.vectors.deltas, case.segments, torch.empty_like(case.grad)

        def step(case=case, deltas=deltas, segments=segments, out=out) -> torch.Tensor:
            how = {"out": out, "validate": False}
            grouped_merge(case.vectors.base, deltas, case.coeffs, segments, **how)
            return grouped_inner(out, deltas, segments)

        step()  # compiles, and uploads the table of blocks
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        calls = {("launches", "both"): step, ("graph", "both"): graph.replay}
        parts.append(measure.side_by_side(calls, given.device, 15).assign(parameters=out.numel()))
    given.save("graphs", rows=pd.concat(parts))
    return medians(parts[0])


STEPS.register("compiled", seconds=60)(
    partial(merges, name="merge_compiled", names=("ours", "compiled"), millions=(22.0,))
)


def random_problem(base, num_tasks: int, rows: int) -> MergeProblem:
    """A fit's work without data: experts near the base, random heads, texts of random words."""
    torch.manual_seed(0)
    words = sorted(base.tokenizer.get_vocab())
    texts = [" ".join(words[n] for n in torch.randint(len(words), (24,))) for _ in range(rows)]
    batches = make_batches(datasets.Dataset.from_dict({"text": texts}), base, batch_size=4)[0]
    states, heads = {}, []
    for task in range(num_tasks):
        moved = {name: w + 1e-3 * torch.randn_like(w) for name, w in base.state.items()}
        states[f"task{task}"] = moved
        weight = torch.randn(2, base.encoder.config.hidden_size, device=base.device)
        heads.append({"weight": weight, "bias": weight.new_zeros(2)})
    forward = classifier_forward(base, heads, precision="auto")
    vectors = TaskVectors.from_states(base.state, states)
    return MergeProblem(vectors, [batches] * num_tasks, forward, base.encoder)


@STEPS.register("fit", seconds=75)
def fit(given: Given) -> str:
    """Steps of a fit per layer of eight experts of the encoder, in bfloat16 where there is any."""
    base = load_base(given.encoder, str(given.device))
    problem = random_problem(base, 2 if given.dry else 8, 8 if given.dry else 64)
    steps = step_time.benchmark_step(problem, given.able(step_time.STEPS), rounds=2)
    given.save("fit", steps=steps, parts=step_time.step_parts(problem))
    return f"a step: {medians(steps)}"


def scores(given: Given, *, suite: str, seed: int) -> str:
    """The suite's experts, and methods by one candidate each; a Report after the first ones too."""
    tasks = list(SUITES[suite].tasks)
    if suite == "glue_encoder":
        if glue_folder() is None:
            raise ValueError("DIVMERGE_GLUE_DIR names no folder with GLUE's rows")
        tasks = [task for task in tasks if (glue_folder() / task).is_dir()]
    how = {"size": "smoke" if given.dry else "full", "seeds": [seed], "budget": 1}
    how |= {"device": given.device.type, "encoder": given.encoder}
    for methods in (METHODS[:1],) if given.dry else (METHODS[:6], METHODS):
        report = compare(suite, tasks, methods=methods, **how)
        report.save(given.folder / f"{suite}_{seed}.json")
    found = report.metrics().query("metric == 'anp'").set_index("method").value
    words = ", ".join(f"{name} {value:.1%}" for name, value in found.items())
    return f"ANP: {words or 'none, as no expert beats the majority class'}"


for seed in range(3):
    for suite in ("glue_encoder", "embedded"):
        step = partial(scores, suite=suite, seed=seed)
        STEPS.register(f"{suite}_{seed}", seconds=300)(step)


def measured(given: Given, name: str, limit: float | int) -> tuple[str, str]:
    """Run a step in a process: `done`, `skipped` or `failed`, and what it found or why not."""
    log = given.folder / f"{name}.log"
    command = [sys.executable, "-m", __spec__.name, str(given.folder), "--step", name]
    command += ["--encoder", given.encoder] + ["--dry-run"] * given.dry
    environment = os.environ | OFFLINE | ({"TRITON_INTERPRET": "1"} if given.dry else {})
    with open(log, "w") as said:
        child = subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            return "skipped", f"not finished in {limit:.0f} s; see {log.name}"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    last = (log.read_text().strip() or "no output").splitlines()[-1]
    return {0: "done", LACKS: "skipped"}.get(code, "failed"), last


def run(given: Given, minutes: float | int, steps: Iterable[str] = STEPS) -> list[dict]:
    """Run the steps while time is left; the summary is printed, and stored after every step."""
    end, rows = time.monotonic() + 60 * minutes, []
    note = "a dry run at toy size: not measured on a GPU" if given.dry else "measured on a GPU"
    for name in steps:
        begin, limit = time.monotonic(), STEPS.facts[name]["seconds"]
        left = min(limit, end - begin)
        state, why = "skipped", f"no time: {max(left, 0):.0f} s left of {minutes:g} minutes"
        if left >= LEAST:
            state, why = measured(given, name, left)
        took = round(time.monotonic() - begin, 1)
        rows.append({"step": name, "state": state, "seconds": took, "said": why})
        print(f"{name:15s} {state:8s} {took:6.1f} s  {why}", flush=True)
        facts = origin(device=given.device.type, encoder=given.encoder, peers=field.versions())
        write_json(given.folder / "summary.json", {"note": note, "steps": rows, "origin": facts})
    print(f"{facts['device']}, torch {facts['torch']}, {facts['date']}: {note}; {given.folder}")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "_build" / "gpu")
    parser.add_argument("--encoder", default="minilm", help="a folder, or a name in the cache")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    dry = asked.dry_run or not torch.cuda.is_available()
    given = Given(asked.folder.resolve(), asked.encoder, dry)
    given.folder.mkdir(parents=True, exist_ok=True)
    if asked.step is None:
        return int(any(row["state"] == "failed" for row in run(given, asked.minutes)))
    try:
        print(STEPS[asked.step](given))
    except ValueError as error:
        print(" ".join(str(error).split()))
        return LACKS
    return 0


if __name__ == "__main__":
    sys.exit(main())
