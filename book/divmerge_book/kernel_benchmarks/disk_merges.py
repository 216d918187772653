"""Whole commands that merge from disk to disk, beside mergekit's: seconds and peak memory.

python -m divmerge_book.kernel_benchmarks.disk_merges book/results/kernel/from_disk.json \
    --models /tmp/models --mergekit ENVIRONMENT/bin/mergekit-yaml --shape 135M --rounds 3

Commands take turns, in one run for all methods. Every finished command is stored at once, so the
same line goes on after an interruption.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import yaml
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from divmerge_book.evaluation import stored_tables

EXPERTS = ("one", "two", "three")
# layers, hidden and inner width, vocabulary, heads, heads of keys: of SmolLM2's two smaller models
SHAPES = {"135M": (30, 576, 1536, 49152, 9, 3), "360M": (32, 960, 2560, 49152, 15, 5)}
SHAPES["508M"] = (28, 1024, 3072, 151936, 16, 8)  # 1 GB a model in bfloat16
SHAPES["tiny"] = (2, 64, 96, 500, 4, 2)
METHODS = {  # parameters of every model, and of all
    "linear": ({"weight": 1.0}, {}),
    "task_arithmetic": ({"weight": 0.3}, {}),
    "ties": ({"weight": 0.5, "density": 0.2}, {}),
    "dare_linear": ({"weight": 0.3, "density": 0.5}, {}),
    "slerp": ({}, {"t": 0.5}),
}
COLUMNS = ["shape", "parameters", "round", "method", "command"]
COLUMNS += ["seconds", "processor", "peak", "load"]  # load: processes that wanted one before
BOTH = ("divmerge", "mergekit")
PLAIN = [("peak", name) for name in BOTH]  # without decimals
KINDS = {"seconds": "s", "processor": "processor s", "peak": "MB"}
STARTER = """
import json, os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ,
                       file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
took, processor = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), took, processor, usage.ru_maxrss]))
"""


def make_models(folder: Path, shape: str) -> int:
    """Random base and experts in bfloat16, where they are not there yet; how many parameters."""
    layers, hidden, inner, vocabulary, heads, keys = SHAPES[shape]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"tie_word_embeddings": True, **sizes}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    tensors = {tensor: values.shape for tensor, values in model.named_parameters()}
    for seed, name in enumerate(("base", *EXPERTS)):
        place, state = folder / name, {}
        if (place / "config.json").is_file():
            continue
        place.mkdir(parents=True, exist_ok=True)
        start, noise = (torch.Generator().manual_seed(n) for n in (0, seed))
        for tensor, size in tensors.items():
            numbers = 0.02 * torch.randn(size, generator=start)
            if seed:
                numbers += 0.004 * torch.randn(size, generator=noise)
            state[tensor] = numbers.bfloat16()
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config))
    return model.num_parameters()


def configuration(method: str, folder: Path) -> str:
    """mergekit's YAML, which both commands read."""
    own, common = METHODS[method]
    chosen = EXPERTS[:2] if method == "slerp" else EXPERTS
    models = [{"model": str(folder / e), **({"parameters": own} if own else {})} for e in chosen]
    facts = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        facts["base_model"] = str(folder / (EXPERTS[0] if method == "slerp" else "base"))
    return yaml.safe_dump({**facts, **({"parameters": common} if common else {})})


def measured(command: list[str], log: Path) -> tuple[float, float, float]:
    """Seconds, seconds of processors, and peak bytes in memory of a command.

    A small process starts it, for Linux counts what its starter held as its own. Raises
    RuntimeError with what the command said where it fails.
    """
    with open(log, "w") as said:
        small = [sys.executable, "-S", "-c", STARTER, *command]
        done = subprocess.run(small, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
    code, took, processor, peak = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return took, processor, peak * (1.0 if sys.platform == "darwin" else 1024.0)


def rows_of(folder: Path, shape: str, mergekit: str, number: int, done: set) -> Iterator[tuple]:
    """A row of every method and command of a round that is not done yet; the two take turns."""
    parameters, out = make_models(folder / shape, shape), folder / "merged"
    for place, method in enumerate(METHODS):
        config = folder / f"{method}.yml"
        config.write_text(configuration(method, folder / shape))
        commands = {
            "divmerge": [sys.executable, "-m", "divmerge_book", "merge", str(config), str(out)],
            "mergekit": [mergekit, str(config), str(out), "--no-write-model-card"],
        }
        for name in list(commands)[:: (-1) ** (number + place)]:
            if (shape, number, method, name) in done:
                continue
            shutil.rmtree(out, ignore_errors=True)
            load = os.getloadavg()[0]
            found = measured(commands[name], out.with_suffix(".log"))
            yield (shape, parameters, number, method, name, *found, load)
    shutil.rmtree(out, ignore_errors=True)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """By shape and method: medians of both commands, and mergekit's over this package's."""
    parts = rows.groupby(["shape", "method", "command"], sort=False)
    table, found = parts[["seconds", "processor", "peak"]].median().unstack(), {}
    for column, unit in (("seconds", 1), ("processor", 1), ("peak", 1e6)):
        for name in BOTH:
            found[column, name] = table[column, name] / unit
        found[column, "ratio"] = table[column, "mergekit"] / table[column, "divmerge"]
    return pd.DataFrame(found)


def as_markdown(folder: Path | None = None) -> str:
    """The stored comparison as a table with its origin, or what measures it where none is stored.

    folder: with from_disk.json; None for the book's results, from here or from `notebooks`.
    """
    places = [Path(up, "book", "results", "kernel") for up in (".", "..")]
    file = (folder or next(filter(Path.is_dir, places), places[0])) / "from_disk.json"
    if not file.is_file():
        return f"Not measured here: there is no {file.name}; the module `{__spec__.name}` makes it."
    tables, facts = stored_tables.load(file)
    rows, lines = tables["rows"], []
    for (shape, method), row in summary(rows).iterrows():
        cells = [
            f"{row[c, n]:.{0 if (c, n) in PLAIN else 1}f}" for c in KINDS for n in (*BOTH, "ratio")
        ]
        lines.append(f"| {method} | {shape} | {' | '.join(cells)} |")
    heads = [f"{name}, {word}" for word in KINDS.values() for name in (*BOTH, "ratio")]
    first = ["| method | parameters | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    times = rows.groupby(["shape", "method", "command"]).size()
    said = (
        f"Medians of {times.min()} to {times.max()} whole commands each, in turn, with "
        f"{facts['dtype']} models and mergekit {facts['peers']['mergekit']}; {facts['machine']}, "
        f"{facts['date']}. In the minute before a command {rows.load.min():.1f} to "
        f"{rows.load.max():.1f} processes wanted a core, the command before it among them; "
        "processor seconds depend less on other programs than seconds do."
    )
    return "\n".join([*first, *lines, "", f"*{said}*"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", type=Path, required=True, help="folder of the random models")
    parser.add_argument("--mergekit", required=True, help="the command mergekit-yaml")
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    asked = [str(Path(given.mergekit).with_name("python")), "-c", code]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    facts = {"size": "full", "dtype": "bfloat16", "threads": torch.get_num_threads()}
    facts |= {"device": "cpu", "peers": {"mergekit": version}}
    rows = pd.DataFrame(columns=COLUMNS)
    if given.output.is_file():
        rows = stored_tables.load(given.output)[0]["rows"]
    done = set(rows[["shape", "round", "method", "command"]].itertuples(index=False, name=None))
    for number in range(given.rounds):
        for row in rows_of(given.models, given.shape, given.mergekit, number, done):
            print(*row, flush=True)
            rows = pd.DataFrame([*rows.itertuples(index=False, name=None), row], columns=COLUMNS)
            stored_tables.save(given.output, {"rows": rows}, **facts)


if __name__ == "__main__":
    main()
