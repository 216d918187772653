"""Merges from disk to disk give what the methods give in memory."""

import json
import shutil

import pytest
import torch
from divmerge_book.models.streamed_methods import RULES, cutoffs, kept, rule_of, tally
from helpers import QUIET, normal
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from divmerge_core import METHODS, MergeProblem, TaskVectors
from divmerge_core.checkpoints import MergeRecord, write
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.checkpoints.tensor_sources import blocks

TASKS = ("mood", "place", "time")
SHAPES = {
    **{f"model.layers.{n}.mlp.up_proj.weight": (24, 16) for n in range(2)},
    **{"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,), "empty": (0, 3)},
}


def saved(folder, dtype):
    """A random model and three near it, one with a tensor of zeros, in the hub's layout."""
    state = {name: normal(*shape, seed=len(name)).float() for name, shape in SHAPES.items()}
    for number, name in enumerate(("base", *TASKS)):
        own = {n: t + 0.05 * number * normal(*t.shape, seed=number) for n, t in state.items()}
        own["model.norm.weight"] *= name != "place"
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"vocab_size": 40}))
        tensors = {n: t.to(dtype) for n, t in own.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("zoo"), torch.float32)


def record_of(folder, method, tasks, **options) -> MergeRecord:
    experts = {task: folder / task for task in tasks}
    return MergeRecord(method, tasks, folder / "base", experts, options)


@pytest.mark.parametrize("trim", ["tensor", "global"])
def test_ties_does_not_leave_out_what_is_no_number(zoo, tmp_path, trim):
    for name in ("base", *TASKS):
        shutil.copytree(zoo / name, tmp_path / name)
    file = tmp_path / "mood" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    record = record_of(tmp_path, "ties", TASKS, trim=trim)
    with pytest.raises(ValueError, match="model.norm.weight hold NaN"):
        write(tmp_path / "out", record, rule=rule_of(record), **QUIET)


def in_memory(record) -> dict[str, torch.Tensor]:
    """What METHODS gives, with tensors in the order of the base's file."""
    order = StoredModel.at(record.base).tensors
    states = [load_file(p / "model.safetensors") for p in (record.base, *record.experts.values())]
    base, *experts = ({name: state[name] for name in order} for state in states)
    vectors = TaskVectors.from_states(base, dict(zip(record.tasks, experts, strict=True)))
    problem = MergeProblem(vectors, [[]] * len(experts), lambda parameters, pairs: [])
    return vectors.layout.unflatten(METHODS[record.method](problem, **record.options))


CASES = [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.7}),
    ("ties", {}),
    ("ties", {"trim": "tensor", "weights": "before", "coeffs": [1, 2, 0.5], "scale": 0.6}),
    ("ties", {"keep": 0.37, "combine": "sum", "coeffs": [1, 2, 0.5]}),
    ("dare", {}),
    ("dare", {"drop": 0.4, "rescale": "l1", "seed": 3}),
    ("dare", {"drop": 0.5, "then": "ties", "keep": 0.6, "scale": 1.1}),
    ("slerp", {"t": 0.3}),
]


@pytest.mark.parametrize(("method", "options"), CASES, ids=[str(case) for case in CASES])
def test_a_merge_from_disk_is_the_one_in_memory(zoo, tmp_path, monkeypatch, method, options):
    """In blocks that end within tensors, counted in other blocks, in shards."""
    monkeypatch.setattr("divmerge_core.checkpoints.tensor_sources.BLOCK", 101)
    monkeypatch.setattr("divmerge_book.models.streamed_methods.READ", 67)
    record = record_of(zoo, method, TASKS[: 2 if method == "slerp" else 3], **options)
    out = write(tmp_path / "out", record, rule=rule_of(record), max_shard_bytes=3000, **QUIET)
    found = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    assert_close(found, in_memory(record), rtol=1e-6, atol=1e-6)


def test_every_method_that_streams_is_among_the_cases():
    assert set(RULES) == {method for method, _ in CASES}


def test_a_merge_of_bfloat16_is_rounded_once(tmp_path):
    folder = saved(tmp_path, torch.bfloat16)
    record = record_of(folder, "ties", TASKS, keep=0.5)
    merged = write(folder / "out", record, rule=rule_of(record), **QUIET)
    found = load_file(merged / "model.safetensors")
    wanted = {name: t.bfloat16() for name, t in in_memory(record).items()}
    assert_close(found, wanted, rtol=2**-7, atol=1e-6)
    assert sum(map(torch.Tensor.numel, found.values())) * 0.001 > sum(
        int((found[name] != tensor).sum()) for name, tensor in wanted.items()
    )


@pytest.mark.parametrize(("rows", "size"), [(2, 1), (3, 1000)])
def test_a_cutoff_counted_in_two_passes_is_that_of_a_sort(rows, size):
    base, experts = (
        torch.zeros(size),
        [normal(size, seed=n).float().round(decimals=1) for n in range(rows)],
    )
    ordered = torch.stack(experts).abs().sort(descending=True).values
    for rank in {1, 1 + size // 3, size}:
        found = cutoffs(
            lambda upper: tally((deltas for *_, deltas in blocks(base, experts, 97)), upper),
            torch.full((rows,), rank),
        )
        assert torch.equal(found[:, 0], ordered[:, rank - 1])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"keep": 0.0}, "keep must be in"),
        ("dare", {"rescale": "l2"}, "rescale must be one of"),
        ("slerp", {}, "exactly 2 experts, got 3"),
        ("fisher", {}, "unknown method that merges from disk to disk 'fisher'; choose one of"),
    ],
)
def test_what_a_method_refuses_is_refused_before_files_are_read(tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        rule_of(record_of(tmp_path / "nowhere", method, TASKS, **options))


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9, 1 - 2**-24])
def test_what_is_kept_is_what_one_sequence_of_draws_keeps(drop):
    """What lets DARE draw tensor by tensor, two draws at once, what it draws for a whole model."""
    whole = torch.rand(20_001, generator=torch.Generator().manual_seed(1)) >= drop
    generator = torch.Generator().manual_seed(1)
    parts = [kept(n, drop, generator) for n in (0, 1, 16, 333, 650, 19_001)]
    assert torch.equal(torch.cat(parts), whole)
