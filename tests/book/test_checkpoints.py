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
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from divmerge_book.evaluation.profiling import peak_bytes
from divmerge_book.models.encoders import load_base
from divmerge_book.models.merged import base_folder, load_with_head, write
from divmerge_book.models.mergekit_export import setting
from helpers import normal
from language_toys import save_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from tqdm import tqdm

from divmerge_core import storage
from divmerge_core.checkpoints import Head, MergeRecord
from divmerge_core.checkpoints.model_card import SCORES
from divmerge_core.checkpoints.safetensors_io import StoredModel, weight_files
from divmerge_core.checkpoints.shards import Planned, write_shards
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients, groups_of
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.storage import sha256

TASKS = ("mood", "place")
LABELS = {"mood": ("bad", "good"), "place": ("near", "far", "unknown")}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {**SIZES, "vocab_size": 40, "intermediate_size": 24, "max_position_embeddings": 12}
BERT = "BertForSequenceClassification"
BIAS = "encoder.layer.0.output.dense.bias"


def moved(model, seed: int):
    """The model with noise on all its parameters."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=100 * seed + number)
    return model


def save(tensors: dict, folder: Path) -> None:
    """Tensors as transformers saves a model's."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
def vectors(zoo) -> TaskVectors:
    """Task vectors of the zoo's experts, loaded by transformers, without the poolers."""

    def state(name: str) -> dict[str, torch.Tensor]:
        model = transformers.AutoModel.from_pretrained(zoo / name, add_pooling_layer=False)
        return {name: tensor.detach() for name, tensor in model.named_parameters()}

    return TaskVectors.from_states(state("base"), {task: state(task) for task in TASKS})


@pytest.fixture(scope="module")
def record(zoo, vectors):
    """Coefficients by tensor for the zoo's experts, of the encoder without its pooler."""
    groups, _ = groups_of(vectors.layout, "layer")
    coeffs = torch.rand(2, len(groups), generator=torch.Generator().manual_seed(3))
    return record_of(zoo / "base", zoo, "divmerge/layer", {"lr": 0.01}, coeffs, groups, "layer")


def record_of(base: Path, experts: Path, method="arithmetic", *more, **fields) -> MergeRecord:
    folders = {task: experts / task for task in TASKS}
    return MergeRecord(method, TASKS, base, folders, *more, **fields)


@pytest.fixture(scope="module")
def merged(vectors, record) -> dict[str, torch.Tensor]:
    """The merge that the record says, in memory."""
    segments = Coefficients(vectors.layout, 2, grouping=record.grouping).segments
    flat = grouped_merge(vectors.base, vectors.deltas, record.coeffs, segments)
    return vectors.layout.unflatten(flat)


@pytest.fixture
def put(record, merged, tmp_path):
    """Writes the merge, or what the options say, to a folder of this name."""

    def written(name: str | Path = "out", record=record, **options) -> Path:
        given = {} if "names" in options or record.method == "arithmetic" else {"merged": merged}
        return write(tmp_path / name, record, progress=False, **{**given, **options})

    return written


@pytest.fixture(scope="module")
def plain(record, merged, tmp_path_factory):
    """The merge on disk, without heads and scores; only to be read."""
    return write(tmp_path_factory.mktemp("plain") / "out", record, merged=merged, progress=False)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in weight_files(folder) for name, t in load_file(file).items()}


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


# --- what is written is what was merged -----------------------------------------------------------
def test_what_is_loaded_is_what_was_merged(zoo, merged, plain):
    loaded, facts = transformers.AutoModel.from_pretrained(plain, output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    parameters, base = dict(loaded.named_parameters()), tensors_in(zoo / "base")
    assert all(torch.equal(parameters[name], tensor) for name, tensor in merged.items())
    copied = set(base) - set(merged)
    assert copied == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(parameters[name], base[name]) for name in copied)


def test_tokenizer_config_and_licence_of_the_base_come_along(zoo, plain):
    names = {path.name for path in (zoo / "base").iterdir()}
    assert names <= {path.name for path in plain.iterdir()}
    assert transformers.AutoTokenizer.from_pretrained(plain)("a").input_ids == [2, 5, 3]
    assert load_base(str(plain)).encoder.config.hidden_size == 16
    assert plain.stat().st_mode == plain.parent.stat().st_mode | 0o55 & 0o777


def test_a_merge_computed_on_the_way_is_the_one_in_memory(put, merged, plain, monkeypatch):
    """In shards, and in pieces of tensors that join without a seam."""
    names = tuple(merged)
    way = put("way", names=names, max_shard_bytes=5000)
    monkeypatch.setattr("divmerge_core.checkpoints.tensor_sources.BLOCK", 37)
    for folder in (way, put("pieces", names=names)):
        assert_close(tensors_in(folder), tensors_in(plain), rtol=1e-6, atol=1e-7)


def test_a_merge_computed_from_bfloat16_is_that_of_float32_rounded_once(zoo, put, tmp_path):
    found = []
    for kind in (torch.bfloat16, torch.float32):  # the same numbers in both
        place = tmp_path / str(kind)
        for name in ("base", *TASKS):
            shutil.copytree(zoo / name, place / name)
            tensors = load_file(zoo / name / "model.safetensors")
            save({n: tensor.bfloat16().to(kind) for n, tensor in tensors.items()}, place / name)
        record = record_of(place / "base", place, coeffs=torch.tensor([[0.37], [0.71]]))
        found.append(tensors_in(put(place / "out", record, dtype="bfloat16")))
    assert {tensor.dtype for tensor in found[0].values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_one_expert_with_coefficient_one_is_that_expert_with_its_head(zoo, vectors, put):
    expert = transformers.AutoModelForSequenceClassification.from_pretrained(zoo / "place").eval()
    parts = expert.state_dict().items()
    outside = {name: t for name, t in parts if name.startswith(("classifier", "bert.pooler"))}
    one = {"place": zoo / "place"}
    record = MergeRecord("arithmetic", ("place",), zoo / "base", one, coeffs=torch.ones(1, 1))
    heads = {"place": Head(outside, LABELS["place"], BERT)}
    again = load_with_head(put("out", record, names=vectors.layout.names, heads=heads), "place")
    assert list(again.config.id2label.values()) == list(LABELS["place"])
    ids = torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, 5:] = 0
    with torch.no_grad():
        assert_close(again(**inputs).logits, expert(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_a_linear_head_answers_as_it_did_while_merging(toy_problem, tiny_folder, experts, put):
    vectors = toy_problem.vectors
    flat, coeffs = vectors.merge([0.6, 0.4]), torch.tensor([[0.6], [0.4]])
    record = MergeRecord("task_arithmetic", vectors.tasks, tiny_folder, coeffs=coeffs)
    heads = {e.task: Head(e.head, tuple(e.manifest["answers"])) for e in experts}
    folder = put("out", record, merged=vectors.layout.unflatten(flat), heads=heads)
    for number, task in enumerate(vectors.tasks):
        batch = toy_problem.batches[number][0]
        with torch.no_grad():
            found = load_with_head(folder, task)(**batch.inputs).logits
        assert_close(found, toy_problem.logits(flat, number, batch))


def test_a_task_without_a_head_is_refused_with_those_that_have_one(plain):
    with pytest.raises(ValueError, match="no head for 'mood'; it has none"):
        load_with_head(plain, "mood")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float32])
def test_a_dtype_is_that_of_every_weight_and_of_the_config(put, merged, dtype):
    folder = put(dtype=dtype)
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    found = tensors_in(folder)
    assert {tensor.dtype for tensor in found.values()} == {kind}
    assert all(torch.equal(found[name], tensor.to(kind)) for name, tensor in merged.items())
    assert transformers.AutoModel.from_pretrained(folder).dtype == kind


def test_without_a_dtype_every_tensor_keeps_the_bases(zoo, record, put, tmp_path):
    model = transformers.BertModel.from_pretrained(zoo / "base")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    found = tensors_in(put("out", replace(record, base=tmp_path / "half")))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_tied_weights_are_written_once_and_stay_tied(put, tmp_path):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    twice = {name: t.contiguous().clone() for name, t in model.state_dict().items()}
    save(twice, tmp_path / "base")  # as some checkpoints are
    moved(model.eval(), 1).save_pretrained(tmp_path / "mood")
    one = {"mood": tmp_path / "mood"}
    record = MergeRecord("arithmetic", ("mood",), tmp_path / "base", one, coeffs=torch.ones(1, 1))
    folder = put("out", record)
    assert "lm_head.weight" in twice and "lm_head.weight" not in tensors_in(folder)
    again, ids = transformers.GPT2LMHeadModel.from_pretrained(folder), torch.arange(6)[None]
    with torch.no_grad():
        assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_a_head_that_equals_the_embeddings_is_loaded_so_by_any_architecture(put, tmp_path):
    """By Llama's own default it has a head apart, which would then be a random one."""
    save_model(tmp_path / "base")
    save_model(tmp_path / "apart", seed=1, tied=False)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tensors = tensors_in(tmp_path / "base")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save({**tensors, **head}, tmp_path / "base")
    record = partial(MergeRecord, "arithmetic", ("a",), tmp_path / "base", coeffs=torch.ones(1, 1))
    folder = put("out", record({"a": tmp_path / "base"}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_close(loaded.lm_head.weight.detach(), head["lm_head.weight"])
    with pytest.raises(ValueError, match="'a' has its own head, the base's is its"):
        put("two", record({"a": tmp_path / "apart"}))


def test_old_spellings_of_the_base_become_todays(real, put):
    base, loaded = base_folder("bert_tiny"), load_base("bert_tiny")
    assert "bert.embeddings.LayerNorm.gamma" in load_file(base / "model.safetensors")
    folder = put("out", MergeRecord("arithmetic", ("mood",), base), merged=loaded.state)
    assert load_base(str(folder)).digest == loaded.digest
    assert "bert.embeddings.LayerNorm.weight" in tensors_in(folder)


# --- shards ---------------------------------------------------------------------------------------
def test_shards_hold_no_more_than_was_said_and_the_index_has_every_tensor(put, merged):
    folder, most = put(max_shard_bytes=4000), 4000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    assert len(held) > 3 and "model.safetensors" not in held
    assert next(iter(held)) == f"model-00001-of-{len(held):05d}.safetensors"
    assert index["weight_map"] == {name: file for file, own in held.items() for name in own}
    nbytes = [sum(tensor.nbytes for tensor in own.values()) for own in held.values()]
    assert all(n <= most or len(own) == 1 for n, own in zip(nbytes, held.values(), strict=True))
    assert index["metadata"]["total_size"] == sum(nbytes)
    assert set(merged) <= set(index["weight_map"])


def test_a_shard_is_filled_up_to_the_limit_and_never_beyond(tmp_path):
    sizes = {"a": 10, "b": 10, "c": 5, "d": 30, "e": 16, "f": 1}  # numbers of 4 bytes
    plan = [Planned(n, torch.float32, (k,), partial(torch.zeros, k)) for n, k in sizes.items()]
    write_shards(tmp_path, plan, max_bytes=80, wrote=lambda count: None)
    held = [set(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert held == [{"a", "b"}, {"d"}, {"c"}, {"e", "f"}]


def test_memory_is_bounded_by_a_few_tensors_and_not_by_shards_or_models(put, tmp_path):
    put("first")  # all is imported now
    shapes = {f"encoder.layer.{n}.weight": (1 << 12, 512) for n in range(10)}
    for seed, name in enumerate(("base", *TASKS)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        transformers.BertConfig(**CONFIG).save_pretrained(tmp_path / name)
        save(tensors, tmp_path / name)
    tensor = tensors.popitem()[1].nbytes
    del tensors
    large = record_of(tmp_path / "base", tmp_path, coeffs=torch.ones(2, 1))
    peak = peak_bytes(lambda: put("out", large), torch.device("cpu"))
    # one model is 10 tensors, all that are read 30: neither is held
    assert not peak > 12 * tensor, f"{peak / 1e6:.0f} MB for tensors of {tensor / 1e6:.0f} MB"


# --- all or nothing -------------------------------------------------------------------------------
def exit_of(function, *arguments) -> int:
    """The exit code of a child process that calls this.

    It shares no lock with this process: whatever it holds when it dies is its own, and what a
    thread holds here is not held there.
    """

    def alone() -> None:
        tqdm.set_lock(threading.RLock())  # it is shared between processes otherwise
        function(*arguments)

    child = multiprocessing.get_context("fork").Process(target=alone, daemon=True)
    child.start()
    child.join()
    return child.exitcode


def complete(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether the folder has a whole model with exactly these tensors."""
    found = tensors_in(folder)
    same = set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in found)
    return same and (folder / "README.md").is_file()


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


def test_a_kill_at_any_line_leaves_a_whole_model_or_none(record, put, tmp_path):
    alone, target = replace(record, experts={}, coeffs=None), tmp_path / "out"

    def make(name: str = "out") -> Path:
        return put(name, alone, max_shard_bytes=6000)

    expected, found = tensors_in(make("whole")), {"nothing": 0, "part, hidden": 0, "model": 0}
    lines = dying_at(None, lambda: make("again"))
    last = range(lines - 3, lines + 1)  # the swap and what is cleared away after it
    for line in sorted({*range(1, lines, max(1, lines // 4)), *last}):
        assert exit_of(dying_at, line, make) == -signal.SIGKILL
        if target.exists():
            assert complete(target, expected)
            target.rename(tmp_path / f"done-{line}")
            found["model"] += 1
        else:
            part = storage.beside(target, storage.NEW).exists()
            found["part, hidden" if part else "nothing"] += 1
    assert all(found.values()), found
    assert complete(make(), expected)
    assert list(tmp_path.glob(".*")) == []  # what was killed has been swept


@pytest.mark.parametrize("swap", [True, False])
def test_a_model_is_replaced_whole_wherever_the_process_dies(
    record, put, merged, tmp_path, monkeypatch, swap
):
    """Killed before every single call that changes names or waits for the disk, in turn."""
    alone, target = replace(record, experts={}, coeffs=None), tmp_path / "out"
    old = {name: torch.zeros_like(tensor) for name, tensor in merged.items()}
    before, after = tensors_in(put("out", alone, merged=old)), tensors_in(put("new", alone))
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
        put("out", alone, overwrite=True)

    states = []
    for calls in range(100):
        code = exit_of(dying, calls)
        if not target.exists():
            assert not swap  # where folders cannot be swapped there is none for a moment
            states.append("none")
            put("out", alone, merged=old, overwrite=True)  # the next writer finds the old one
            continue
        states.append("new" if complete(target, after) else "old")
        assert states[-1] == "new" or complete(target, before)
        if code == 0:
            break
        if states[-1] == "new":
            put("out", alone, merged=old, overwrite=True)
    assert code == 0 and states[0] == "old" and states[-1] == "new"
    assert list(tmp_path.glob(".*")) == []


def test_a_full_disk_leaves_nothing_and_says_so(put, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; choose a writable folder"):
        put()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="GB free; make room"):
        put()


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), None, f"{BIAS} hold NaN or inf; nothing was written"),
        (1e6, "float16", "1e\\+06, too large for torch.float16; take bfloat16"),
    ],
)
def test_numbers_that_are_not_finite_leave_nothing(put, merged, tmp_path, value, dtype, message):
    with pytest.raises(ValueError, match=message):
        put(merged=merged | {BIAS: torch.full_like(merged[BIAS], value)}, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# --- refusals -------------------------------------------------------------------------------------
def test_a_folder_in_use_is_refused(zoo, put, tmp_path):
    folder = put()
    kept = sha256(folder / "model.safetensors")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("hello")
    (tmp_path / "part").mkdir()
    shutil.copyfile(folder / "README.md", tmp_path / "part" / "README.md")
    for place, overwrite, message in [
        (folder, False, "not empty; name a new folder, or say overwrite=True"),
        (zoo / "mood", True, "is, holds or lies in .*mood"),
        (zoo, True, "is, holds or lies in"),
        (zoo / "mood" / "merged", False, "is, holds or lies in .*mood"),
        (tmp_path / "letters", True, "holds one.txt, no part of a model"),
        (tmp_path / "part", True, "holds no model"),
        (tmp_path / "letters" / "one.txt", False, "is a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            put(place, overwrite=overwrite)
    (folder / "my_notes.txt").write_text("mine")
    shutil.copytree(folder, folder / "ties")
    with pytest.raises(ValueError, match="holds my_notes.txt, ties, no part of a model"):
        put(folder, overwrite=True)
    shutil.rmtree(folder / "ties")
    (folder / "my_notes.txt").unlink()
    (tmp_path / "empty").mkdir()
    assert sha256(folder / "model.safetensors") == kept
    assert sha256(put("empty") / "model.safetensors") == kept


def test_a_model_that_another_run_wrote_meanwhile_is_kept(put, merged, tmp_path, monkeypatch):
    wait = storage.locked

    @contextmanager
    def after_the_other(target):
        monkeypatch.setattr(storage, "locked", wait)
        put()
        with wait(target):
            yield

    monkeypatch.setattr(storage, "locked", after_the_other)
    with pytest.raises(ValueError, match="exists and is not empty"):
        put(merged={name: torch.zeros_like(tensor) for name, tensor in merged.items()})
    assert complete(tmp_path / "out", tensors_in(put("again")))


def mood(*head) -> dict:
    return {"heads": {"mood": Head(*head)}}


WIDE = {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes must be 1 or more, got 0"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16 or None"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"names": ("nothing.weight",)}, "do not both hold \\['nothing.weight'\\]"),
        ({"merged": {}}, "merged holds nothing"),
        ({"merged": {"strange": torch.ones(1)}}, "\\['strange'\\].*which .*base has not"),
        ({"merged": {BIAS: torch.ones(3)}}, "dense.bias has shape \\[3\\], .*base has \\[16\\]"),
        ({"heads": {"other": Head({}, ("a", "b"))}}, "heads for other, which are none"),
        (mood({}, ("a",)), "two or more distinct labels"),
        (mood({}, ("a", "b")), "must hold .*weight.*, got {}"),
        (mood({}, ("a", "b"), "Oracle"), "no class 'Oracle'"),
        (mood({}, ("a", "b"), BERT), "lacks \\['classifier.bias', 'classifier.weight'\\]"),
        (mood(WIDE, ("a", "b"), BERT), "'classifier.weight', \\(3, 16\\), \\(2, 16\\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(put, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        put(**options)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_do_not_fit_are_refused(zoo, record, put, tmp_path):
    config = transformers.BertConfig(**{**CONFIG, "vocab_size": 41})
    transformers.BertModel(config).save_pretrained(tmp_path / "larger")
    shutil.copytree(zoo / "base", tmp_path / "base")
    tensors, lost = tensors_in(zoo / "base"), "encoder.layer.1.attention.self.query.weight"
    del tensors[lost]
    save(tensors, tmp_path / "base")
    names = [name for name in tensors if "pooler" not in name]
    experts = {**record.experts, "mood": tmp_path / "larger"}
    for changes, chosen, message in [
        ({"experts": experts}, None, "'mood': embeddings.word_embeddings.weight has shape"),
        ({}, None, "puts \\['pooler.dense.*in groups that have no coeff"),
        ({"coeffs": None}, None, "needs record.coeffs and a folder"),
        ({"base": zoo}, None, "lacks model.safetensors"),
        ({"base": tmp_path / "base"}, names, f"base lacks .'{lost}'., which expert 'mood' holds"),
    ]:
        with pytest.raises(ValueError, match=message):
            put("out", replace(record, **changes), names=chosen)
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
    text, size = json.dumps(header).encode(), max(stop for _, (_, stop) in places.values())
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
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "hold the same tensor"),
    ],
)
def test_an_index_names_whole_files_beside_it_alone(tmp_path, index, message):
    for name in ("secret/model", "model/one", "model/two"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        StoredModel.at(tmp_path / "model")


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


# --- what the card says ---------------------------------------------------------------------------
def test_coefficients_come_back_from_json_to_the_last_bit(record, plain):
    found = json.loads((plain / "coefficients.json").read_text())
    assert torch.equal(torch.tensor(found["values"]), record.coeffs)
    assert tuple(found["groups"]) == record.groups and tuple(found["tasks"]) == record.tasks
    assert (found["method"], found["options"]) == ("divmerge/layer", {"lr": 0.01})
    assert found["grouping"] == "layer"


@pytest.fixture(scope="module")
def heads():
    classifier = {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.zeros(3)}
    linear = {"weight": torch.eye(2, 16), "bias": torch.zeros(2)}
    place = Head(classifier, LABELS["place"], BERT)
    return {"mood": Head(linear, LABELS["mood"]), "place": place}


@pytest.fixture(scope="module")
def scored(record, merged, heads, tmp_path_factory):
    """A folder with heads and scores, written without a network; only to be read."""
    rows = [
        ("mood", "accuracy", 0.9, 0.85, 0.95),
        ("mood", "macro_f1", 0.5, None, None),
        ("all", "anp", 0.97, 0.9, 1.01),
    ]
    scores = [dict(zip(SCORES, row, strict=True)) for row in rows]
    data = {"mood": {"rows": {"merge": 40, "test": 200}, "digest": "ab|c"}}
    record = replace(record, scores=scores, data=data, base_name="someone/bert")
    options = {"merged": merged, "heads": heads, "max_shard_bytes": 6000, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the card asks the network"))
        return write(tmp_path_factory.mktemp("scored") / "out", record, **options)


def test_the_card_gives_the_hash_of_every_weight(scored, zoo):
    hashes = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", card_of(scored), re.M))
    written = {path.relative_to(scored).as_posix(): path for path in scored.rglob("*.safetensors")}
    given = {f"{n}/model.safetensors": zoo / n / "model.safetensors" for n in ("base", *TASKS)}
    assert len(written) > 4
    assert hashes == {name: sha256(path) for name, path in (written | given).items()}


def test_the_card_says_what_was_measured_and_what_was_not(scored, plain):
    text = card_of(scored)
    for line in (
        "| task | accuracy | macro_f1 | anp |",
        "| mood | 0.900 [0.850, 0.950] | 0.500 |  |",
        "| place | not measured | not measured |  |",
        "| all |  |  | 0.970 [0.900, 1.010] |",
        "| mood | 40 | 200 | ab\\|c |",
        "| place | not stated | not stated | not stated |",
        "method: divmerge/layer (Touayouch et al. 2026)",
        f"torch {torch.__version__}",
    ):
        assert line in text
    facts = yaml.safe_load(text.split("---\n", 2)[1])
    assert facts["base_model"] == "someone/bert" and facts["library_name"] == "transformers"
    assert {"merge", "divmerge"} <= set(facts["tags"])
    for line in ("## Scores\n\nNot measured.\n", "## Data\n\nNot stated.\n"):
        assert line in card_of(plain)


def run_code(folder: Path, monkeypatch) -> list[tuple[str, dict]]:
    """The card's blocks of Python, each with the names that it leaves."""
    monkeypatch.chdir(folder)
    found = [(code, {}) for code in re.findall(r"```python\n(.*?)```", card_of(folder), re.S)]
    for code, names in found:
        exec(code, names)
    return found


def test_the_cards_code_gives_what_load_with_head_gives(scored, monkeypatch):
    blocks = run_code(scored, monkeypatch)
    assert len(blocks) == 2
    for code, names in blocks:
        task = re.search(r"heads/(\w+)", code)[1]
        tokens = names["tokenizer"](["a text"], return_tensors="pt", padding=True)
        assert_close(names["logits"], load_with_head(scored, task)(**tokens).logits)


def test_the_cards_code_runs_on_a_model_of_half_precision(put, heads, monkeypatch):
    folder = put(heads={"mood": heads["mood"]}, dtype="bfloat16")
    ((_, names),) = run_code(folder, monkeypatch)
    tokens = names["tokenizer"](["a text"], return_tensors="pt", padding=True)
    found = load_with_head(folder, "mood")(**tokens).logits
    assert_close(found, names["logits"], rtol=0.05, atol=0.05)


def test_a_card_without_heads_loads_the_bare_model(plain, monkeypatch):
    ((_, names),) = run_code(plain, monkeypatch)
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


def first(filters: list[dict], name: str) -> float:
    """The weight of a tensor, by mergekit's rule: the first filter that its name contains."""
    return next(f["value"] for f in filters if f.get("filter", "") in name)


def test_the_recipe_has_every_tensors_coefficient(spelled, put):
    recipe = yaml.safe_load((put("out", spelled) / "mergekit_config.yml").read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    assert recipe["parameters"] == {"normalize": False, "lambda": 1.0}
    for model, task, row in zip(recipe["models"], TASKS, spelled.coeffs, strict=True):
        weights = model["parameters"]["weight"]
        assert [first(weights, name) for name in spelled.groups] == row.tolist()
        for name in ("pooler.dense.weight", "cls.predictions.bias"):
            assert first(weights, name) == 0
        assert model["model"]["model"]["path"] == str(spelled.experts[task])


def test_blocks_whose_numbers_contain_each_other_keep_their_own_weight():
    names = [f"encoder.layer.{n}.{part}" for n in range(12) for part in ("weight", "more.weight")]
    names += ["embeddings.weight", "embeddings.layer.1.weight", "layer.1.weight"]
    values = {name: float(number // 2) for number, name in enumerate(names)}
    found = setting(values, "bert.")
    for before in ("", "bert."):
        assert {name: first(found, before + name) for name in values} == values
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
        ({"base": None}, "base lacks bert.embeddings.word_embeddings.weight"),  # a bare encoder's
    ],
)
def test_a_merge_without_a_recipe_says_why(spelled, record, put, change, reason):
    if change.get("coeffs") is not None:
        change = {"coeffs": change["coeffs"] * spelled.coeffs}
    folder = put("out", record if "base" in change else replace(spelled, **change))
    assert not (folder / "mergekit_config.yml").exists() and reason in card_of(folder)


def test_an_expert_whose_head_is_not_tied_as_the_bases_has_no_recipe(spelled, put, tmp_path):
    experts = {**spelled.experts, TASKS[0]: tmp_path / "own"}
    shutil.copytree(spelled.experts[TASKS[0]], tmp_path / "own")
    tensors = tensors_in(tmp_path / "own")
    tensors["cls.predictions.decoder.weight"] = torch.rand(CONFIG["vocab_size"], 2)
    save_file(tensors, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    text = card_of(put("out", replace(spelled, experts=experts)))
    assert "own has cls.predictions.decoder.weight, the base has not" in text
