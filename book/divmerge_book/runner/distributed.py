"""A language model's fit on several devices, from the command line.

torchrun --nproc-per-node 2 -m divmerge_book.runner.distributed --base models/base \
  --expert trec=models/trec --expert movie=models/movie \
  --texts trec=trec.tsv --texts movie=movie.tsv --grouping block --output merged/

Base and experts are folders in the hub's layout. A line of a task's texts is a prompt and, behind a
tab, what the task's own expert answered; without an answer the next token alone counts. Every rank
reads and merges its own share of the weights, and its own rows; the first rank then writes the
merged model, streaming from the folders. Tested with two processes on a CPU; with GPUs it has not
been run by us.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from divmerge_book.models.language.models import Language
from divmerge_book.models.language.reading import answer_tokens, collate
from divmerge_book.models.language.seq2seq import answer_logits
from divmerge_book.models.merged import write
from divmerge_book.planning.memory import plan
from divmerge_book.planning.workloads import Fit, Model
from divmerge_book.runner.fsdp import PRECISIONS, Shards, from_folder, sharded_problem
from divmerge_book.runner.process_group import ProcessGroup, process_group
from divmerge_book.user_models.folders import config_of
from divmerge_core.checkpoints import MergeRecord
from divmerge_core.checkpoints.safetensors_io import StoredModel, weight_files
from divmerge_core.divergences import objective
from divmerge_core.merging.coefficients import GROUPINGS, Coefficients
from divmerge_core.merging.fit import fit_coefficients
from divmerge_core.merging.problem import Batch, Forward
from divmerge_core.merging.task_vectors import STORAGES, Layout


def causal_forward(module: nn.Module) -> Forward:
    """A MergeProblem's `forward` for a causal language model: logits at the answer positions."""
    return lambda parameters, pairs: [answer_logits(module, parameters, b) for _, b in pairs]


def without_weights(make: Callable[..., nn.Module], *arguments: object) -> nn.Module:
    """A model whose parameters are on the device meta, with real buffers and its weights tied."""
    with init_empty_weights(include_buffers=False):
        module = make(*arguments)
    module.tie_weights()
    return module


def text_batches(
    lines: Sequence[str], base: Language, *, batch_size: int, max_length: int
) -> list[Batch]:
    """Batches of "prompt" or "prompt, tab, answer" lines, each answer's tokens to be predicted.

    A prompt that is too long loses its beginning. Raises ValueError for a line whose answer leaves
    no room for a prompt.
    """
    pairs = []
    for number, line in enumerate(lines, start=1):
        prompt, _, answer = line.partition("\t")
        ids = base.tokenizer(prompt).input_ids
        said = answer_tokens(base, answer) if answer else ()
        if not ids or len(said) >= max_length:
            raise ValueError(
                f"line {number} has {len(ids)} tokens of prompt and {len(said)} of answer; "
                f"max_length={max_length} leaves no room for both"
            )
        pairs.append((ids[-(max_length - len(said)) :], said or (0,)))  # any token is the next
    starts = range(0, len(pairs), batch_size)
    return [collate(base, pairs[start : start + batch_size])[0] for start in starts]


def named(given: Sequence[str], what: str) -> dict[str, Path]:
    """NAME=PATH options as a mapping. Raises ValueError for another form, or a missing path."""
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"--{what} takes NAME=PATH, got {text!r}")
        found[name] = Path(path).expanduser()
    if missing := [str(path) for path in found.values() if not path.exists()]:
        raise ValueError(f"--{what}: {', '.join(missing)} does not exist")
    return found


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line, read and checked as far as names and files go."""
    lead = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("divmerge_book.runner.distributed", description=lead)
    add = parser.add_argument
    add("--base", required=True, help="folder of the base model")
    add("--expert", action="append", default=[], metavar="NAME=FOLDER", help="one per task")
    add("--texts", action="append", default=[], metavar="NAME=FILE", help="one per task")
    add("--output", required=True, help="folder for the merged model: new, or empty")
    add("--divergence", default="js")
    add("--grouping", default="block", choices=list(GROUPINGS))
    add("--epochs", type=int, default=4)
    add("--lr", type=float, default=1e-2)
    add("--seed", type=int, default=0)
    add("--optimizer", default="adam", choices=["adam", "annealed_adam", "lbfgs"])
    add("--batch-size", type=int, default=4, help="rows per task and step, of all ranks")
    add("--max-length", type=int, default=256, help="tokens of a prompt and its answer")
    add("--storage", default="float32", choices=list(STORAGES), help="of task vectors")
    add("--precision", default="float32", choices=list(PRECISIONS), help="of gathered weights")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--world", type=int, default=None, help="refuse to run with another number of processes")
    return parser.parse_args(given)


def checked(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Experts' folders and lines of text by task. Raises ValueError for what does not fit."""
    experts, texts = named(options.expert, "expert"), named(options.texts, "texts")
    if not experts or set(experts) != set(texts):
        raise ValueError(
            f"every task needs --expert and --texts; experts are given for {sorted(experts)}, "
            f"texts for {sorted(texts)}"
        )
    lines = {name: texts[name].read_text("utf-8").splitlines() for name in experts}
    lines = {name: [line for line in every if line.strip()] for name, every in lines.items()}
    empty = [name for name, every in lines.items() if not every]
    if empty or options.batch_size < 1:
        raise ValueError(f"no text in those of {empty}, or --batch-size below 1")
    output = Path(options.output)
    if output.is_file() or output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty; name a new folder")
    for folder in (Path(options.base), *experts.values()):
        weight_files(folder)
    objective(options.divergence)
    return experts, lines


def fit(options: argparse.Namespace, group: ProcessGroup) -> None:
    """Fit, on every rank alike; the first one tells, and writes the merged model."""
    experts, lines = checked(options)
    config = config_of(Path(options.base))
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{options.base} is a {config.model_type}, no causal language model")
    tell = partial(print, file=sys.stderr) if group.rank == 0 else lambda text: None
    tell(planned(options, config, len(experts), group.world))
    module = without_weights(AutoModelForCausalLM.from_config, config)
    prefix = f"{module.base_model_prefix}."
    shards = Shards.of(module, group, precision=options.precision)
    sources = {task: from_folder(folder, prefix) for task, folder in experts.items()}
    vectors = shards.vectors(from_folder(options.base, prefix), sources, storage=options.storage)
    base = Language(options.base, module, AutoTokenizer.from_pretrained(options.base), "", "")
    sizes = {"batch_size": options.batch_size, "max_length": options.max_length}
    batches = [text_batches(lines[task], base, **sizes) for task in experts]
    problem = sharded_problem(shards, vectors, batches, causal_forward(module))
    core = StoredModel.at(Path(options.base), prefix).core  # groups have the folder's names
    layout = Layout(tuple(map(core, vectors.layout.names)), vectors.layout.shapes)
    coefficients = Coefficients(layout, len(experts), grouping=options.grouping).to(group.device)
    settings = {name: getattr(options, name) for name in ("epochs", "lr", "seed", "optimizer")}
    loss = objective(options.divergence)
    fit_coefficients(problem, coefficients, loss, progress=group.rank == 0, **settings)
    group.require_same(coefficients.raw, "coefficients")
    if group.rank == 0:
        said = {"divergence": options.divergence, "grouping": options.grouping, **settings}
        record = MergeRecord(
            method="divmerge",
            tasks=tuple(experts),
            base=Path(options.base),
            experts=dict(experts),
            options=said,
            coeffs=coefficients().detach().cpu(),
            groups=coefficients.groups,
            grouping=options.grouping,
        )
        write(options.output, record)
        tell(f"merged model in {options.output}")


def planned(
    options: argparse.Namespace, config: transformers.PretrainedConfig, tasks: int, world: int
) -> str:
    """One rank's memory plan as a table, against its GPU, or its part of the host's memory."""
    work = Fit(
        tasks=tasks,
        rows=options.batch_size,
        tokens=options.max_length,
        deltas=options.storage,
        precision=options.precision,
        cached="float32",
        ranks=world,
    )
    if options.device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world
    return str(plan(Model.of(config), work, room))


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(sys.argv[1:] if given is None else given)
    with process_group(options.device, world=options.world) as group:
        fit(options, group)


if __name__ == "__main__":
    main()
