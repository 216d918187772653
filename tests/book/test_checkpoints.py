"""A merged model on disk is whole or absent, is what was merged, and says how it was made."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from divmerge_book.evaluation.profiling import peak_bytes
from divmerge_book.models.encoders import load_base
from divmerge_book.models.merged import base_folder, load_with_head, write
from divmerge_book.models.mergekit_export import setting
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from tqdm import tqdm

from divmerge_core import storage
from divmerge_core.checkpoints import Head, MergeRecord
from divmerge_core.checkpoints.model_card import SCORES
from divmerge_core.checkpoints.safetensors_io import (
    Planned,
    StoredModel,
    weight_files,
    write_shards,
)
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients, groups_of
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.storage import sha256

TASKS = ("mood", "place")
LABELS = {"mood": ("bad", "good"), "place": ("near", "far", "unknown")}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {**SIZES, "vocab_size": 40, "intermediate_size": 24, "max_position_embeddings": 12}


def moved(model, seed: int):
    """The model with noise on all its parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A BERT with tokenizer and a classifier of its kind per task, as transformers saves them."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    base = transformers.BertModel(transformers.BertConfig(**CONFIG))
    base.save_pretrained(folder / "base")
    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    transformers.BertTokenizer(vocab=words).save_pretrained(folder / "base")
    (folder / "base" / "LICENSE.txt").write_text("as is")
    for number, task in enumerate(TASKS):
        config = transformers.BertConfig(**CONFIG, num_labels=len(LABELS[task]))
        expert = transformers.BertForSequenceClassification(config)
        expert.bert.load_state_dict(base.state_dict())
        moved(expert, number).save_pretrained(folder / task)
    return folder


@pytest.fixture(scope="module")
def record(zoo):
    """Coefficients by tensor for the zoo's experts, of the encoder without its pooler."""
    layout = vectors_of(zoo).layout
    groups, _ = groups_of(layout, "layer")
    coeffs = torch.rand(2, len(groups), generator=torch.Generator().manual_seed(3))
    experts = {task: zoo / task for task in TASKS}
    return MergeRecord(
        "divmerge/layer", TASKS, zoo / "base", experts, {"lr": 0.01}, coeffs, groups, "layer"
    )


def vectors_of(zoo) -> TaskVectors:
    """Task vectors of the zoo's experts, loaded by transformers, without the poolers."""

    def state(name: str) -> dict[str, torch.Tensor]:
        model = transformers.AutoModel.from_pretrained(zoo / name, add_pooling_layer=False)
        return {name: tensor.detach() for name, tensor in model.named_parameters()}

    return TaskVectors.from_states(state("base"), {task: state(task) for task in TASKS})


def merged_of(zoo, record) -> dict[str, torch.Tensor]:
    """The merge that the record says, in memory."""
    vectors = vectors_of(zoo)
    segments = Coefficients(vectors.layout, 2, grouping=record.grouping).segments
    flat = grouped_merge(vectors.base, vectors.deltas, record.coeffs, segments)
    return vectors.layout.unflatten(flat)


@pytest.fixture(scope="module")
def merged(zoo, record):
    return merged_of(zoo, record)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in weight_files(folder) for name, t in load_file(file).items()}


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(40, (rows, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# --- what is written is what was merged -----------------------------------------------------------


def test_what_is_loaded_is_what_was_merged(zoo, record, merged, tmp_path):
    folder = write(tmp_path / "out", record, merged=merged, progress=False)
    loaded, facts = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in merged.items())
    base = tensors_in(zoo / "base")
    copied = set(base) - set(merged)
    assert copied == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(parameters[name], base[name]) for name in copied)


def test_tokenizer_config_and_licence_of_the_base_come_along(zoo, record, merged, tmp_path):
    folder = write(tmp_path / "out", record, merged=merged, progress=False)
    names = {path.name for path in (zoo / "base").iterdir()}
    assert names <= {path.name for path in folder.iterdir()}
    assert transformers.AutoTokenizer.from_pretrained(folder)("a").input_ids == [2, 5, 3]
    assert load_base(str(folder)).encoder.config.hidden_size == 16
    assert folder.stat().st_mode == (tmp_path / "out").parent.stat().st_mode | 0o55 & 0o777


def test_a_merge_computed_on_the_way_is_the_one_in_memory(record, merged, tmp_path):
    held = write(tmp_path / "held", record, merged=merged, progress=False)
    names = tuple(merged)
    way = write(tmp_path / "way", record, names=names, max_shard_bytes=5000, progress=False)
    assert_close(tensors_in(way), tensors_in(held), rtol=1e-6, atol=1e-7)


def test_a_merge_computed_from_bfloat16_is_that_of_float32_rounded_once(zoo, tmp_path):
    found = []
    for kind in (torch.bfloat16, torch.float32):  # the same numbers in both
        place = tmp_path / str(kind)
        for name in ("base", *TASKS):
            shutil.copytree(zoo / name, place / name)
            tensors = load_file(zoo / name / "model.safetensors")
            tensors = {name: tensor.bfloat16().to(kind) for name, tensor in tensors.items()}
            save_file(tensors, place / name / "model.safetensors", metadata={"format": "pt"})
        experts = {task: place / task for task in TASKS}
        coeffs = torch.tensor([[0.37], [0.71]])
        record = MergeRecord("arithmetic", TASKS, place / "base", experts, coeffs=coeffs)
        folder = write(place / "out", record, dtype="bfloat16", progress=False)
        found.append(tensors_in(folder))
    assert {tensor.dtype for tensor in found[0].values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_pieces_of_a_tensor_join_without_a_seam(record, merged, tmp_path, monkeypatch):
    whole = write(tmp_path / "whole", record, names=tuple(merged), progress=False)
    for module in ("safetensors_io", "tensor_sources"):
        monkeypatch.setattr(f"divmerge_core.checkpoints.{module}.PIECE", 37)
    pieces = write(tmp_path / "pieces", record, names=tuple(merged), progress=False)
    assert_close(tensors_in(pieces), tensors_in(whole), rtol=1e-6, atol=1e-7)


def test_one_expert_with_coefficient_one_is_that_expert_with_its_head(zoo, tmp_path):
    expert = transformers.AutoModelForSequenceClassification.from_pretrained(zoo / "place").eval()
    outside = {
        name: tensor
        for name, tensor in expert.state_dict().items()
        if name.startswith(("classifier", "bert.pooler"))
    }
    record = MergeRecord(
        "arithmetic", ("place",), zoo / "base", {"place": zoo / "place"}, coeffs=torch.ones(1, 1)
    )
    names = [name for name in vectors_of(zoo).layout.names]
    head = Head(outside, LABELS["place"], "BertForSequenceClassification")
    folder = write(tmp_path / "out", record, names=names, heads={"place": head}, progress=False)
    again = load_with_head(folder, "place")
    assert list(again.config.id2label.values()) == list(LABELS["place"])
    with torch.no_grad():
        assert_close(again(**inputs()).logits, expert(**inputs()).logits, rtol=1e-5, atol=1e-6)


def test_a_linear_head_answers_as_it_did_while_merging(toy_problem, tiny_folder, experts, tmp_path):
    vectors = toy_problem.vectors
    flat = vectors.merge([0.6, 0.4])
    record = MergeRecord(
        "task_arithmetic", vectors.tasks, tiny_folder, coeffs=torch.tensor([[0.6], [0.4]])
    )
    heads = {e.task: Head(e.head, tuple(e.manifest["answers"])) for e in experts}
    state = vectors.layout.unflatten(flat)
    folder = write(tmp_path / "out", record, merged=state, heads=heads, progress=False)
    for number, task in enumerate(vectors.tasks):
        batch = toy_problem.batches[number][0]
        with torch.no_grad():
            found = load_with_head(folder, task)(**batch.inputs).logits
        assert_close(found, toy_problem.logits(flat, number, batch))


def test_a_task_without_a_head_is_told_which_have_one(zoo, record, merged, tmp_path):
    folder = write(tmp_path / "out", record, merged=merged, progress=False)
    with pytest.raises(ValueError, match="no head for 'mood'; it has none"):
        load_with_head(folder, "mood")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float32])
def test_a_dtype_is_that_of_every_weight_and_of_the_config(record, merged, tmp_path, dtype):
    folder = write(tmp_path / "out", record, merged=merged, dtype=dtype, progress=False)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    found = tensors_in(folder)
    assert {tensor.dtype for tensor in found.values()} == {kind}
    assert all(torch.equal(found[name], tensor.to(kind)) for name, tensor in merged.items())
    assert transformers.AutoModel.from_pretrained(folder).dtype == kind


def test_without_a_dtype_every_tensor_keeps_the_bases(zoo, record, merged, tmp_path):
    base = tmp_path / "half"
    model = transformers.BertModel.from_pretrained(zoo / "base")
    model.to(torch.bfloat16).save_pretrained(base)
    folder = write(
        tmp_path / "out", replace(record, base=base), merged=merged, names=None, progress=False
    )
    assert {tensor.dtype for tensor in tensors_in(folder).values()} == {torch.bfloat16}


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    twice = {name: t.contiguous().clone() for name, t in model.state_dict().items()}
    save_file(twice, tmp_path / "base" / "model.safetensors")  # as some checkpoints are
    moved(model.eval(), 1).save_pretrained(tmp_path / "expert")
    experts = {"mood": tmp_path / "expert"}
    record = MergeRecord(
        "arithmetic", ("mood",), tmp_path / "base", experts, coeffs=torch.ones(1, 1)
    )
    folder = write(tmp_path / "out", record, progress=False)
    assert "lm_head.weight" in twice and "lm_head.weight" not in tensors_in(folder)
    again = transformers.GPT2LMHeadModel.from_pretrained(folder)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_old_spellings_of_the_base_become_todays(real, tmp_path):
    base = base_folder("bert_tiny")
    raw = load_file(base / "model.safetensors")
    assert "bert.embeddings.LayerNorm.gamma" in raw
    loaded = load_base("bert_tiny")
    record = MergeRecord("arithmetic", ("mood",), base)
    folder = write(tmp_path / "out", record, merged=loaded.state, progress=False)
    assert load_base(str(folder)).digest == loaded.digest
    assert "bert.embeddings.LayerNorm.weight" in tensors_in(folder)


# --- shards ---------------------------------------------------------------------------------------


def test_shards_hold_no_more_than_was_said_and_the_index_has_every_tensor(record, merged, tmp_path):
    most = 4000
    folder = write(tmp_path / "out", record, merged=merged, max_shard_bytes=most, progress=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and not (folder / "model.safetensors").exists()
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for path in files:
        held = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(
            held
        )
        nbytes = sum(tensor.nbytes for tensor in held.values())
        assert nbytes <= most or len(held) == 1
        total += nbytes
    assert index["metadata"]["total_size"] == total
    assert set(merged) <= set(index["weight_map"])


def test_a_shard_is_filled_up_to_the_limit_and_never_beyond(tmp_path):
    sizes = {"a": 10, "b": 10, "c": 5, "d": 30, "e": 16, "f": 1}  # numbers of 4 bytes

    def planned(name: str, size: int) -> Planned:
        return Planned(name, torch.float32, (size,), lambda start, stop: torch.arange(start, stop))

    plan = [planned(name, size) for name, size in sizes.items()]
    write_shards(tmp_path, plan, max_bytes=80)
    files = sorted(tmp_path.glob("*.safetensors"))
    held = [set(load_file(file)) for file in files]
    assert held == [{"a", "b"}, {"d"}, {"c"}, {"e", "f"}]


def test_memory_is_bounded_by_a_shard_and_not_by_models(record, merged, tmp_path):
    write(tmp_path / "first", record, merged=merged, progress=False)  # all is imported now
    rows = 1 << 12
    config = transformers.BertConfig(**CONFIG)
    shapes = {f"encoder.layer.{n}.weight": (rows, 512) for n in range(10)}
    for seed, name in enumerate(("base", *TASKS)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        config.save_pretrained(tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors")
    model = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    experts = {task: tmp_path / task for task in TASKS}
    large = MergeRecord("arithmetic", TASKS, tmp_path / "base", experts, coeffs=torch.ones(2, 1))
    shard = model // 5

    def part() -> None:
        write(tmp_path / "out", large, max_shard_bytes=shard, progress=False)

    peak = peak_bytes(part, torch.device("cpu"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5
    print(f"{peak / 1e6:.0f} MB")
    assert not peak > 3 * shard, f"{peak / 1e6:.0f} MB for shards of {shard / 1e6:.0f} MB"


# --- all or nothing -------------------------------------------------------------------------------


def in_a_child(function) -> multiprocessing.Process:
    """A started child that shares no lock with this process: whatever it holds when it dies is
    its own, and what a thread holds here is not held there."""

    def alone() -> None:
        tqdm.set_lock(threading.RLock())  # it is shared between processes otherwise
        function()

    child = multiprocessing.get_context("fork").Process(target=alone, daemon=True)
    child.start()
    return child


def complete(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether the folder has a whole model with exactly these tensors."""
    found = tensors_in(folder)
    if not (folder / "README.md").is_file() or set(found) != set(expected):
        return False
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def dying_at(line: int | None, function) -> int:
    """Run a function and die before the n-th line of ours that runs (None: never).

    Returns how many lines ran. The place of death is a line and no time, so a run repeats it.
    """
    lines = 0

    def traced(frame, event, argument):
        nonlocal lines
        file = Path(frame.f_code.co_filename)
        if file.parent.name != "checkpoints" and file != Path(storage.__file__):
            return None
        lines += event == "line"
        if lines == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return traced

    sys.settrace(traced)
    try:
        function()
    finally:
        sys.settrace(None)
    return lines


def test_a_kill_at_any_line_leaves_a_whole_model_or_none(record, merged, tmp_path):
    record, target = replace(record, experts={}, coeffs=None), tmp_path / "out"
    options = {"max_shard_bytes": 6000, "progress": False, "merged": merged}
    expected = tensors_in(write(tmp_path / "whole", record, **options))
    lines = dying_at(None, lambda: write(tmp_path / "again", record, **options))
    found = {"nothing": 0, "part, hidden": 0, "model": 0}
    last = range(lines - 3, lines + 1)  # the swap and what is cleared away after it
    for line in sorted({*range(1, lines, max(1, lines // 4)), *last}):
        child = in_a_child(
            lambda line=line: dying_at(line, lambda: write(target, record, **options))
        )
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if target.exists():
            assert complete(target, expected)
            target.rename(tmp_path / f"done-{line}")
            found["model"] += 1
        else:
            part = storage.beside(target, storage.NEW).exists()
            found["part, hidden" if part else "nothing"] += 1
    assert all(found.values()), found
    write(target, record, **options)
    assert complete(target, expected)
    assert list(tmp_path.glob(".*")) == []  # what was killed has been swept


@pytest.mark.parametrize("swap", [True, False])
def test_a_model_is_replaced_whole_wherever_the_process_dies(
    record, merged, tmp_path, monkeypatch, swap
):
    """Killed before every single call that changes names or waits for the disk, in turn."""
    record = replace(record, experts={}, coeffs=None)
    old = {name: torch.zeros_like(tensor) for name, tensor in merged.items()}
    target = tmp_path / "out"
    before = tensors_in(write(target, record, merged=old, progress=False))
    after = tensors_in(write(tmp_path / "new", record, merged=merged, progress=False))
    if not swap:
        monkeypatch.setattr(storage, "exchanged", lambda one, other: False)

    def dying(calls: int) -> None:
        left = iter(range(calls))

        def counted(real):
            def call(*args):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            return call

        for name in ("replace", "fsync"):
            monkeypatch.setattr(storage.os, name, counted(getattr(os, name)))
        monkeypatch.setattr(storage, "exchanged", counted(storage.exchanged))
        write(target, record, merged=merged, overwrite=True, progress=False)

    states = []
    for calls in range(100):
        child = in_a_child(lambda calls=calls: dying(calls))
        child.join()
        if not target.exists():
            assert not swap  # where folders cannot be swapped there is none for a moment
            states.append("none")
            write(target, record, merged=old, progress=False)
            continue
        states.append("new" if complete(target, after) else "old")
        assert states[-1] == "new" or complete(target, before)
        if child.exitcode == 0:
            break
        if states[-1] == "new":
            write(target, record, merged=old, overwrite=True, progress=False)
    assert child.exitcode == 0 and states[0] == "old" and states[-1] == "new"
    assert list(tmp_path.glob(".*")) == []


def test_a_full_disk_leaves_nothing_and_says_so(record, merged, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; choose a writable folder"):
        write(tmp_path / "out", record, merged=merged, progress=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and Free)
    with pytest.raises(ValueError, match="GB free; make room"):
        write(tmp_path / "out", record, merged=merged, progress=False)


class Free:
    free = 10


def test_numbers_that_are_not_finite_leave_nothing(record, merged, tmp_path):
    name = "encoder.layer.0.output.dense.bias"
    broken = merged | {name: torch.full_like(merged[name], float("nan"))}
    with pytest.raises(ValueError, match=f"{name} hold NaN or inf; nothing was written"):
        write(tmp_path / "out", record, merged=broken, progress=False)
    large = merged | {name: torch.full_like(merged[name], 1e6)}
    with pytest.raises(ValueError, match="1e\\+06, too large for torch.float16; take bfloat16"):
        write(tmp_path / "out", record, merged=large, dtype="float16", progress=False)
    assert list(tmp_path.iterdir()) == []


# --- refusals -------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(zoo, record, merged, tmp_path):
    options = {"merged": merged, "progress": False}
    folder = write(tmp_path / "out", record, **options)
    kept = sha256(folder / "model.safetensors")
    with pytest.raises(ValueError, match="not empty; name a new one, or say overwrite=True"):
        write(folder, record, **options)
    with pytest.raises(ValueError, match="holds the base or an expert"):
        write(zoo / "mood", record, overwrite=True, **options)
    with pytest.raises(ValueError, match="holds the base or an expert"):
        write(zoo, record, overwrite=True, **options)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no model, so it is not overwritten"):
        write(tmp_path / "letters", record, overwrite=True, **options)
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "letters" / "one.txt", record, **options)
    assert sha256(folder / "model.safetensors") == kept
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", record, **options)
    assert sha256(tmp_path / "empty" / "model.safetensors") == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes must be 1 or more, got 0"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16 or None"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"names": ("nothing.weight",)}, "do not both hold \\['nothing.weight'\\]"),
        ({"merged": {}}, "merged holds nothing"),
        ({"merged": {"strange": torch.ones(1)}}, "\\['strange'\\].*which .*base has not"),
        (
            {"merged": {"encoder.layer.0.output.dense.bias": torch.ones(3)}},
            "dense.bias has shape \\[3\\], .*base has \\[16\\]",
        ),
        ({"heads": {"other": Head({}, ("a", "b"))}}, "heads for other, which are none"),
        ({"heads": {"mood": Head({}, ("a",))}}, "two or more distinct labels"),
        ({"heads": {"mood": Head({}, ("a", "b"))}}, "must hold .*weight.*, got {}"),
        ({"heads": {"mood": Head({}, ("a", "b"), "Oracle")}}, "no class 'Oracle'"),
        (
            {"heads": {"mood": Head({}, ("a", "b"), "BertForSequenceClassification")}},
            "lacks \\['classifier.bias', 'classifier.weight'\\]",
        ),
        (
            {
                "heads": {
                    "mood": Head(
                        {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(2)},
                        ("a", "b"),
                        "BertForSequenceClassification",
                    )
                }
            },
            "'classifier.weight', \\(3, 16\\), \\(2, 16\\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    record, merged, tmp_path, options, message
):
    given = {"merged": None if "names" in options else merged, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", record, **given)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_do_not_fit_are_refused(zoo, record, tmp_path):
    config = transformers.BertConfig(**{**CONFIG, "vocab_size": 41})
    transformers.BertModel(config).save_pretrained(tmp_path / "larger")
    experts = {**record.experts, "mood": tmp_path / "larger"}
    with pytest.raises(ValueError, match="'mood': embeddings.word_embeddings.weight has shape"):
        write(tmp_path / "out", replace(record, experts=experts), progress=False)
    with pytest.raises(ValueError, match="puts \\['pooler.dense.*in groups that have no coeff"):
        write(tmp_path / "out", record, progress=False)  # its coefficients leave the pooler out
    with pytest.raises(ValueError, match="needs record.coeffs and a folder"):
        write(tmp_path / "out", replace(record, coeffs=None), progress=False)
    with pytest.raises(ValueError, match="larger lacks model.safetensors|lacks model.safetensors"):
        write(tmp_path / "out", replace(record, base=tmp_path), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_file_cut_short_or_longer_is_noticed_before_its_numbers_are_read(zoo, tmp_path):
    content = (zoo / "base" / "model.safetensors").read_bytes()
    for wrong in (content[:4], content[:100], content[:-1], content + b"\0", b""):
        (tmp_path / "model.safetensors").write_bytes(wrong)
        with pytest.raises(ValueError, match="no whole safetensors file.* fetch or save it again"):
            StoredModel.at(tmp_path)


@pytest.mark.parametrize(
    "places",
    [
        {"a": ([4], [0, 8]), "b": ([2], [8, 16])},  # reads a neighbour's bytes
        {"a": ([2], [0, 8]), "b": ([2], [4, 12])},  # overlap
        {"a": ([2], [0, 8]), "b": ([2], [12, 20])},  # a gap
        {"a": ([-2], [0, 8]), "b": ([2], [8, 16])},
        {"a": ([2], [0, 8]), "b": ([2], [16, 8])},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, places):
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        for name, (shape, offsets) in places.items()
    }
    text = json.dumps(header).encode()
    size = max(stop for _, (_, stop) in places.values())
    content = len(text).to_bytes(8, "little") + text + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="no whole safetensors file but damaged"):
        StoredModel.at(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../secret/model.safetensors"}}, "names '../secret/model.safetens"),
        ({"weight_map": {"a": "/secret/model.safetensors"}}, "names '/secret/model.safetensors'"),
        ({"weight_map": {"a": "lost.safetensors"}}, "lacks lost.safetensors"),
        ({"weight_map": {"a": 3}}, "is no index of weights"),
        ({"weights": {}}, "is no index of weights"),
        ([], "is no index of weights"),
    ],
)
def test_an_index_names_whole_files_beside_it_alone(tmp_path, index, message):
    for folder in ("secret", "model"):
        (tmp_path / folder).mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "secret" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        StoredModel.at(tmp_path / "model")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="two of its files hold the same tensor"):
        StoredModel.at(tmp_path)


def test_a_base_that_lacks_what_experts_hold_is_refused(zoo, record, tmp_path):
    shutil.copytree(zoo / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    lost = "encoder.layer.1.attention.self.query.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    names = [name for name in tensors if "pooler" not in name]
    with pytest.raises(ValueError, match=f"base lacks .'{lost}'., which expert 'mood' holds"):
        write(tmp_path / "out", replace(record, base=tmp_path / "base"), names=names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("mood", "mood")}, "distinct names"),
        ({"tasks": ("mood",), "experts": {}}, "1 tasks and"),
        ({"coeffs": torch.full((2, 1), torch.nan), "groups": ("model",)}, "need finite coeff"),
        ({"data": {"other": {}}}, "given for other; the tasks are mood, place"),
        ({"options": {"callback": print}}, "plain values that JSON can hold"),
        ({"scores": [{"task": "mood"}]}, "scores need task, metric, value, low, high, got task"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(record, change, message):
    with pytest.raises(ValueError, match=message):
        replace(record, **change)


# --- what is told ---------------------------------------------------------------------------------


def test_coefficients_come_back_from_json_to_the_last_bit(record, merged, tmp_path):
    folder = write(tmp_path / "out", record, merged=merged, progress=False)
    found = json.loads((folder / "coefficients.json").read_text())
    assert torch.equal(torch.tensor(found["values"]), record.coeffs)
    assert tuple(found["groups"]) == record.groups and tuple(found["tasks"]) == record.tasks
    assert (found["method"], found["options"]) == ("divmerge/layer", {"lr": 0.01})
    assert found["grouping"] == "layer"


@pytest.fixture
def told(record, merged, tmp_path, monkeypatch):
    """A folder with heads and scores, written without a network."""

    def offline(*args, **options):
        raise AssertionError("the card asks the network")

    monkeypatch.setattr(socket, "socket", offline)
    rows = [
        ("mood", "accuracy", 0.9, 0.85, 0.95),
        ("mood", "macro_f1", 0.5, None, None),
        ("all", "anp", 0.97, 0.9, 1.01),
    ]
    scores = [dict(zip(SCORES, row, strict=True)) for row in rows]
    data = {"mood": {"rows": {"merge": 40, "test": 200}, "digest": "ab|c"}}
    heads = {
        "mood": Head({"weight": torch.ones(2, 16), "bias": torch.zeros(2)}, LABELS["mood"]),
        "place": Head(
            {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.zeros(3)},
            LABELS["place"],
            "BertForSequenceClassification",
        ),
    }
    record = replace(record, scores=scores, data=data, base_name="someone/bert")
    options = {"max_shard_bytes": 6000, "progress": False}
    return write(tmp_path / "out", record, merged=merged, heads=heads, **options)


def test_the_card_gives_the_hash_of_every_weight(told, zoo):
    text = (told / "README.md").read_text()
    hashes = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", text, re.M))
    written = [path for path in told.rglob("*.safetensors")]
    assert len(written) > 4
    for path in written:
        assert hashes.pop(path.relative_to(told).as_posix()) == sha256(path)
    for name in ("base", *TASKS):
        assert hashes.pop(f"{name}/model.safetensors") == sha256(zoo / name / "model.safetensors")
    assert hashes == {}


def test_the_card_says_what_was_measured_and_what_was_not(told):
    text = (told / "README.md").read_text()
    assert "| task | accuracy | macro_f1 | anp |" in text
    assert "| mood | 0.900 [0.850, 0.950] | 0.500 |  |" in text
    assert "| place | not measured | not measured |  |" in text
    assert "| all |  |  | 0.970 [0.900, 1.010] |" in text
    assert "| mood | 40 | 200 | ab\\|c |" in text
    assert "| place | not stated | not stated | not stated |" in text
    assert "method: divmerge/layer (Touayouch et al. 2026)" in text
    assert f"torch {torch.__version__}" in text


def test_a_card_without_scores_claims_none(record, merged, tmp_path):
    folder = write(tmp_path / "out", record, merged=merged, progress=False)
    text = (folder / "README.md").read_text()
    assert "## Scores\n\nNot measured.\n" in text and "## Data\n\nNot stated.\n" in text


def test_the_cards_front_matter_is_yaml(told):
    _, front, _ = (told / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == "someone/bert"
    assert facts["library_name"] == "transformers"
    assert "merge" in facts["tags"] and "divmerge" in facts["tags"]


def test_the_cards_code_gives_what_load_with_head_gives(told, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (told / "README.md").read_text(), re.S)
    monkeypatch.chdir(told)
    assert len(blocks) == 2
    for code in blocks:
        names: dict = {}
        exec(code, names)
        task = re.search(r"heads/(\w+)", code)[1]
        tokens = names["tokenizer"](["a text"], return_tensors="pt", padding=True)
        assert_close(names["logits"], load_with_head(told, task)(**tokens).logits)


def test_the_cards_code_runs_on_a_model_of_half_precision(record, merged, tmp_path, monkeypatch):
    heads = {"mood": Head({"weight": torch.eye(2, 16), "bias": torch.zeros(2)}, LABELS["mood"])}
    options = {"heads": heads, "dtype": "bfloat16", "progress": False}
    folder = write(tmp_path / "out", record, merged=merged, **options)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    tokens = names["tokenizer"](["a text"], return_tensors="pt", padding=True)
    found = load_with_head(folder, "mood")(**tokens).logits
    assert_close(found, names["logits"], rtol=0.05, atol=0.05)


def test_a_card_without_heads_loads_the_bare_model(record, merged, tmp_path, monkeypatch):
    folder = write(tmp_path / "out", record, merged=merged, progress=False)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["model"], transformers.BertModel)


# --- the recipe for mergekit ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def spelled(zoo, record, tmp_path_factory):
    """The same merge, of a base whose names on disk are those of its experts: bert.encoder..."""
    folder = tmp_path_factory.mktemp("spelled") / "base"
    model = transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG))
    model.bert.load_state_dict(tensors_in(zoo / "base"), strict=False)
    model.save_pretrained(folder)
    return replace(record, base=folder)


def weights_of(recipe: dict, number: int, names: list[str]) -> list[float]:
    """The weight of every tensor, by mergekit's rule: the first filter that its name contains."""
    listed = recipe["models"][number]["parameters"]["weight"]
    if isinstance(listed, float):
        return [listed] * len(names)
    return [next(f["value"] for f in listed if f.get("filter", "") in name) for name in names]


def test_the_recipe_has_every_tensors_coefficient(spelled, merged, tmp_path):
    folder = write(tmp_path / "out", spelled, merged=merged, progress=False)
    recipe = yaml.safe_load((folder / "mergekit_config.yml").read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    assert recipe["parameters"] == {"normalize": False, "lambda": 1.0}
    for task, row in enumerate(spelled.coeffs):
        assert weights_of(recipe, task, list(spelled.groups)) == row.tolist()
        assert weights_of(recipe, task, ["pooler.dense.weight", "cls.predictions.bias"]) == [0, 0]
    paths = [model["model"]["model"]["path"] for model in recipe["models"]]
    assert paths == [str(spelled.experts[task]) for task in TASKS]


def test_blocks_whose_numbers_contain_each_other_keep_their_own_weight():
    names = [f"encoder.layer.{n}.{part}" for n in range(12) for part in ("weight", "more.weight")]
    names += ["embeddings.weight", "embeddings.layer.1.weight", "layer.1.weight"]
    values = {name: float(number // 2) for number, name in enumerate(names)}
    found = setting(values, "bert.")
    for before in ("", "bert."):
        for name, value in values.items():
            first = next(f for f in found if f.get("filter", "") in before + name)
            assert first["value"] == value
    assert found[-1] == {"value": 0.0}
    blocks = {name: values[name] for name in names[:24]}
    assert len(setting(blocks, "bert.")) == 13  # one filter a block, and the rest
    assert setting(dict.fromkeys(names, 0.25), "bert.") == 0.25


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"coeffs": None, "method": "ties"}, "ties is not a sum of task vectors"),
        ({"experts": {}}, "the experts are not all given as folders"),
        ({"coeffs": 1.01}, "differ from these by"),
    ],
)
def test_a_merge_without_a_recipe_says_why(spelled, merged, tmp_path, change, reason):
    if change.get("coeffs") is not None:
        change = {"coeffs": change["coeffs"] * spelled.coeffs}
    changed = replace(spelled, **change)
    folder = write(tmp_path / "out", changed, merged=merged, progress=False)
    assert not (folder / "mergekit_config.yml").exists()
    assert reason in (folder / "README.md").read_text()


def test_names_that_mergekit_cannot_match_have_no_recipe(record, merged, tmp_path):
    folder = write(tmp_path / "out", record, merged=merged, progress=False)  # a bare encoder's
    assert not (folder / "mergekit_config.yml").exists()
    assert "base lacks bert.embeddings.word_embeddings.weight" in (folder / "README.md").read_text()
