"""What tests/book/test_distributed.py starts in processes: `scale_worker.py MODE FOLDER`."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from divmerge_book.models.encoders import pooled
from divmerge_book.runner.distributed import causal_forward, without_weights
from divmerge_book.runner.fsdp import Shards, WeightSource, sharded_problem
from divmerge_book.runner.process_group import ProcessGroup, process_group
from torch import Tensor, nn

from divmerge_core import Coefficients, TaskVectors, fit_coefficients
from divmerge_core.divergences import js
from divmerge_core.merging.problem import Batch, Forward, MergeProblem

TASKS = ("one", "two", "three")
# Odd sizes: no axis of these but the heads' is a multiple of two.
SMALL = {"vocab_size": 101, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SMALL, "intermediate_size": 21, "num_key_value_heads": 1, "use_cache": False}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "tied": lambda: transformers.Qwen2Config(**GATED, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**GATED, tie_word_embeddings=False),
    "bert": lambda: transformers.BertConfig(
        **SMALL, intermediate_size=21, max_position_embeddings=15, type_vocab_size=1
    ),
}
CASES = {  # name -> model, grouping, storage, optimizer, how many rows in a batch
    "tied, by layer": ("tied", "layer", "float32", "adam", 3),
    "tied, by block, streamed": ("tied", "block", "streamed", "annealed_adam", 4),
    "one row for two ranks": ("tied", "task", "float32", "adam", 1),
    "llama in bfloat16": ("llama", "layer", "bfloat16", "adam", 3),
    "llama, lbfgs": ("llama", "task", "float32", "lbfgs", 2),
    "bert": ("bert", "layer", "float32", "adam", 5),
}


def made(name: str) -> nn.Module:
    """A tiny model with the seed's weights, or without weights inside `without_weights`."""
    if name == "bert":
        return transformers.BertModel(CONFIGS[name](), add_pooling_layer=False).eval()
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def forward_of(name: str, module: nn.Module, heads: Tensor) -> Forward:
    """The forward pass of a language model, or of an encoder with a head per task."""
    if name != "bert":
        return causal_forward(module)

    def forward(parameters, pairs):
        return [pooled(module, parameters, batch.inputs) @ heads[task] for task, batch in pairs]

    return forward


def batches_of(name: str, rows: int, generator: torch.Generator) -> list[list[Batch]]:
    """Two batches per task; the rows of a language model have one to three answer positions."""
    found = []
    for _ in TASKS:
        every = []
        for _ in range(2):
            ids = torch.randint(0, 101, (rows, 7), generator=generator)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if name == "bert":
                every.append(Batch(inputs, torch.full((rows,), 1 / rows)))
                continue
            counts = [1 + row % 3 for row in range(rows)]
            answer = torch.arange(7)[None] >= 7 - torch.tensor(counts)[:, None]
            weight = torch.tensor([1 / (rows * n) for n in counts for _ in range(n)])
            every.append(Batch(inputs, weight, answer))
        found.append(every)
    return found


def from_state(name: str, state: Mapping[str, Tensor]) -> WeightSource:
    """Weights of a state dict in memory."""

    def piece(key: str, start: int, stop: int) -> Tensor:
        return state[key].detach().reshape(-1)[start:stop]

    return WeightSource(name, {key: tuple(tensor.shape) for key, tensor in state.items()}, piece)


def counted(source: WeightSource, read: list[int]) -> WeightSource:
    """The same source; how many numbers are asked for is noted."""

    def piece(name: str, start: int, stop: int) -> Tensor:
        read.append(stop - start)
        return source.piece(name, start, stop)

    return WeightSource(source.name, source.shapes, piece, source.prefix)


def compared(case: str, group: ProcessGroup) -> dict:
    """One fit by this process alone, the same by all ranks; what differs, and what a rank held."""
    name, grouping, storage, optimizer, rows = CASES[case]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    module = made(name)
    base = {key: p.detach().clone() for key, p in module.named_parameters()}
    experts = {
        task: {key: p + 0.05 * torch.randn(p.shape, generator=generator) for key, p in base.items()}
        for task in TASKS
    }
    batches, heads = batches_of(name, rows, generator), torch.randn(3, 12, 4, generator=generator)
    epochs = 3 if optimizer == "lbfgs" else 1
    options = {"optimizer": optimizer, "epochs": epochs, "lr": 1e-2, "progress": False}

    vectors = TaskVectors.from_states(base, experts, storage=storage)
    alone, losses = Coefficients(vectors.layout, 3, grouping=grouping), []
    problem = MergeProblem(vectors, batches, forward_of(name, module, heads))
    merged = fit_coefficients(
        problem, alone, js, callback=lambda step: losses.append(step.loss), **options
    )

    empty = without_weights(made, name)
    held = sum(p.numel() for p in empty.parameters() if not p.is_meta)
    read: list[int] = []
    shards = Shards.of(empty, group)
    sources = {task: counted(from_state(task, experts[task]), read) for task in TASKS}
    own = shards.vectors(counted(from_state("base", base), read), sources, storage=storage)
    shared, seen = Coefficients(own.layout, 3, grouping=grouping), []
    cut = sharded_problem(shards, own, batches, forward_of(name, empty, heads))
    flat = fit_coefficients(cut, shared, js, callback=lambda s: seen.append(s.loss), **options)
    group.require_same(shared.raw, "coefficients")
    again = shared
    if case == next(iter(CASES)):  # the model serves a second fit
        again = Coefficients(own.layout, 3, grouping=grouping)
        fit_coefficients(cut, again, js, **options)
    shards.fill(own.layout.unflatten(flat))
    whole = {key: p.full_tensor() for key, p in empty.named_parameters()}
    expected = vectors.layout.unflatten(merged)
    return {
        "apart": (shared() - alone()).abs().max().item(),
        "again": (shared() - again()).abs().max().item(),
        "moved": (alone() - 1 / 3).abs().max().item(),
        "weights": max((whole[key] - expected[key]).abs().max().item() for key in expected),
        "losses": max(abs(a - b) for a, b in zip(losses[:-1], seen[:-1], strict=True)),
        "before": held,
        "own": own.layout.size,
        "columns": own.deltas.shape[1],
        "read": read,
        "whole": vectors.layout.size,
        "uneven": any(p.shape[0] % group.world for p in base.values()),
        "groups": [len(alone.groups), len(shared.groups)],
    }


def run(mode: str, group: ProcessGroup) -> object:
    """What a mode does, for the file of this rank."""
    if mode == "fits":  # on more ranks fewer cases
        return {case: compared(case, group) for case in list(CASES)[: {2: 6, 3: 2}[group.world]]}
    if mode == "differ":
        return group.require_same(torch.tensor(float(group.rank)), "coefficients")
    for step in range(5):
        if step == 2 and group.rank == 1:
            if mode == "killed":
                os._exit(9)
            raise RuntimeError("no more of this disk")
        group.total(torch.ones(3))
    return "nothing happened"


def main(mode: str, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        with process_group(timeout=60) as group:
            told = run(mode, group)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
