"""A fit on several devices finds what one process finds, and no rank holds what it need not."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from divmerge_book.models.language.models import load_language
from divmerge_book.runner import distributed
from divmerge_book.runner.distributed import arguments, causal_forward, checked, text_batches
from divmerge_book.runner.fsdp import from_folder, own_rows, own_stretch, require_shapes
from divmerge_book.runner.process_group import process_device, process_group, validate_world
from helpers import ROOT, WORDS, state_of
from scale_worker import CASES, batches_of, from_state, made
from torch.testing import assert_close

from divmerge_core import Batch, Coefficients, MergeProblem, TaskVectors, fit_coefficients
from divmerge_core.divergences import js

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def started(mode: str, folder: Path, world: int = 2) -> list[object]:
    """What every rank of a run of scale_worker.py tells; None where it was killed."""
    port, processes = str(free_port()), []
    for rank in range(world):
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "tests" / "scale_worker.py"), mode, str(folder)]
        environment = {**os.environ, **QUIET, **place, **address}
        given = {"env": environment, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **given))
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(world)]
    assert mode == "killed" or all(file.exists() for file in files), "\n".join(errors)
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.fixture(scope="module", params=[2, 3])
def fits(request, tmp_path_factory) -> list[dict]:
    """Every case of scale_worker.py, as each of two and of three ranks saw it."""
    return started("fits", tmp_path_factory.mktemp("fits"), request.param)


@pytest.mark.scale
@pytest.mark.parametrize("case", CASES)
def test_ranks_find_what_one_process_finds_and_hold_their_own_share_only(fits, case):
    if case not in fits[0]:
        pytest.skip("three ranks try two cases")
    for rank in fits:
        found = rank[case]
        assert found["apart"] < 1e-5 < 1e-3 < found["moved"]
        assert found["losses"] < 1e-6 and found["weights"] < 1e-5
        assert found["again"] == 0, "a second fit of the same model"
        assert found["uneven"] and found["groups"][0] == found["groups"][1]
        assert found["before"] == 0, "the model comes without weights"
        assert found["columns"] == found["own"] < found["whole"] * 0.65
        assert sum(found["read"]) == 4 * found["own"], "base and three experts"
    assert sum(rank[case]["own"] for rank in fits) == fits[0][case]["whole"]


FAILURES = {  # what each of two ranks says
    "fails": (
        "PeerFailed: rank 0 stops with the others. First failed rank 1: RuntimeError: no more of",
        "RuntimeError: no more of this disk",
    ),
    "killed": ("PeerFailed: rank 0 stops: another rank is gone without a word", None),
    "differ": ("the ranks ended with different coefficients",) * 2,
}


@pytest.mark.scale
@pytest.mark.parametrize("mode", FAILURES)
def test_a_rank_that_fails_is_killed_or_comes_apart_stops_all_and_says_why(tmp_path, mode):
    for said, expected in zip(started(mode, tmp_path), FAILURES[mode], strict=True):
        assert expected in said if expected else said is None


LINES = {"one": ["the old film\tgood", "very new song\tbad here"], "two": ["on the film\tnowhere"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A tiny language model with its tokenizer, two experts, and texts, in the hub's layout."""
    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        **{"vocab_size": len(WORDS) + 1, "hidden_size": 12, "intermediate_size": 21},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(config)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    for name, noise in (("base", 0.0), ("one", 0.05), ("two", 0.05)):
        moved = {key: value + noise * torch.randn_like(value) for key, value in start.items()}
        model.load_state_dict(moved)
        model.tie_weights()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, lines in LINES.items():
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def command(folder: Path, output: Path, **changes) -> list[str]:
    options = {"base": folder / "base", "output": output, "epochs": 3, "grouping": "layer"}
    given = [f"--{key}={value}" for key, value in {**options, **changes}.items()]
    for name in LINES:
        given += ["--expert", f"{name}={folder / name}", "--texts", f"{name}={folder / name}.tsv"]
    return given


def torchrun(*given: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    place = ["--master-port", str(free_port()), "-m", "divmerge_book.runner.distributed"]
    options = {"env": {**os.environ, **QUIET}, "capture_output": True, "text": True}
    return subprocess.run([*launch, *place, *given], timeout=300, **options)


@pytest.mark.scale
def test_torchrun_writes_the_model_that_one_process_would(folders, tmp_path):
    output = tmp_path / "merged"
    done = torchrun(*command(folders, output))
    assert done.returncode == 0, done.stderr
    assert "task vectors" in done.stderr and "total" in done.stderr  # the plan, told once
    told = json.loads((output / "coefficients.json").read_text())

    auto = transformers.AutoModelForCausalLM
    models = {name: auto.from_pretrained(folders / name) for name in ("base", "one", "two")}
    states = {name: state_of(model) for name, model in models.items()}
    module = models["base"]
    vectors = TaskVectors.from_states(states.pop("base"), states)
    reader = load_language(str(folders / "base"))
    batches = [text_batches(one, reader, batch_size=4, max_length=256) for one in LINES.values()]
    coefficients = Coefficients(vectors.layout, 2, grouping="layer")
    problem = MergeProblem(vectors, batches, causal_forward(module))
    merged = fit_coefficients(problem, coefficients, js, epochs=3, progress=False)
    groups = [told["groups"].index(group.removeprefix("model.")) for group in coefficients.groups]
    values = torch.tensor(told["values"])[:, groups]
    assert_close(values, coefficients().detach(), atol=1e-5, rtol=0)
    written = auto.from_pretrained(output).state_dict()
    for name, tensor in vectors.layout.unflatten(merged).items():
        assert_close(written[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.scale
def test_torchrun_stops_with_the_reason_where_the_number_of_processes_is_wrong(folders, tmp_path):
    done = torchrun(*command(folders, tmp_path / "merged", world=3))
    assert done.returncode != 0
    assert "3 processes are wanted, torchrun started 2; say --nproc-per-node 3" in done.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(7,), (1,), (12, 3), (5, 2, 2)])
def test_stretches_of_all_ranks_tile_a_tensor(shape, world):
    stretches = [own_stretch(shape, rank, world) for rank in range(world)]
    assert stretches[0][0] == 0 and stretches[-1][1] == torch.Size(shape).numel()
    assert all(one[1] == two[0] for one, two in zip(stretches, stretches[1:], strict=False))


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", ["tied", "bert"])
def test_losses_of_ranks_add_up_to_the_batchs(name, rows, world):
    generator = torch.Generator().manual_seed(0)
    batch = batches_of(name, rows, generator)[0][0]
    shares = [own_rows(batch, rank, world) for rank in range(world)]
    assert len({len(share.inputs["input_ids"]) for share in shares}) == 1, "as many on each"

    def loss(one: Batch):  # a number that depends on the row and on the position
        places = torch.arange(7).expand_as(one.inputs["input_ids"])
        each = one.inputs["input_ids"] * 10.0 + (0 if one.answer is None else places)
        return one.weight @ (each.sum(dim=1) if one.answer is None else each[one.answer])

    assert_close(sum(loss(share) for share in shares), loss(batch))


@pytest.mark.parametrize("name", ["tied", "llama", "bert"])
def test_a_model_without_weights_keeps_its_names_ties_and_buffers(name):
    empty = distributed.without_weights(made, name)
    full = made(name)
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())
    shapes = {key: p.shape for key, p in full.named_parameters()}
    assert {key: p.shape for key, p in empty.named_parameters()} == shapes
    for key, buffer in full.named_buffers():
        assert torch.equal(buffer, empty.get_buffer(key))
    assert not torch.nn.Linear(2, 2).weight.is_meta, "only inside"


def test_a_folder_gives_the_numbers_that_the_model_has(folders):
    module = transformers.AutoModelForCausalLM.from_pretrained(folders / "one")
    stored = from_folder(folders / "one")
    whole = from_state("one", dict(module.named_parameters()))
    for name, shape in whole.shapes.items():
        core = name.removeprefix(stored.prefix)
        assert stored.shapes[core] == shape
        assert torch.equal(stored.piece(core, 2, 6), whole.piece(name, 2, 6))


def test_answers_are_the_positions_that_predict_them(folders):
    base = load_language(str(folders / "base"))
    (batch,) = text_batches(["the film\tgood bad", "song"], base, batch_size=2, max_length=9)
    (whole,) = text_batches(["the film good bad"], base, batch_size=1, max_length=9)
    read, asked = batch.inputs["input_ids"], whole.inputs["input_ids"][0]
    assert read[0].tolist() == asked.tolist()  # that the answer ends is predicted, and not read
    assert batch.answer[0].tolist() == [False, True, True, True]  # by "film", "good" and "bad"
    last = int(batch.inputs["attention_mask"][1].sum()) - 1
    assert batch.answer[1].nonzero().flatten().tolist() == [last]
    assert_close(batch.weight.sum(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="line 1 has .* max_length=2 leaves no room"):
        text_batches(["the\tgood bad"], base, batch_size=1, max_length=2)


PLACE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "1"}


class Elsewhere:
    """A gradient reducer of which the others have nothing to add."""

    def gather(self, vectors, segments):
        return lambda: torch.zeros(len(vectors.tasks), segments.num_groups)

    def total(self, loss):
        return loss + 1.0


def test_a_fit_on_several_devices_watches_the_loss_of_all(problem):
    losses = []
    for reducer in (None, Elsewhere()):
        coefficients = Coefficients(problem.vectors.layout, 3)
        options = {"epochs": 1, "callback": lambda step: losses.append(step.loss)}
        own = replace(problem, reducer=reducer)
        fit_coefficients(own, coefficients, js, progress=False, **options)
    assert_close(losses[4], losses[0] + 1.0)  # three steps and an end each
    assert_close(coefficients().detach(), torch.full((3, 1), 1 / 3))  # no gradient came


def test_what_torchrun_did_not_start_and_another_number_of_processes_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="is started by torchrun"), process_group():
        pass
    assert validate_world(PLACE, 2) == (0, 2)
    with pytest.raises(ValueError, match="4 processes are wanted, torchrun started 2"):
        validate_world(PLACE, 4)


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    assert process_device("cpu", PLACE) == torch.device("cpu")
    for device, count, message in (
        ("cuda", 1, "there are 1; start torchrun with --nproc-per-node 1"),
        ("cuda", 0, "or say device='cpu'"),
        ("cuda:1", 0, "device must be one of cpu, cuda, got 'cuda:1'"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(ValueError, match=message):
            process_device(device, PLACE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--expert", "three"], "--expert takes NAME=PATH, got 'three'"),
        (["--expert", "three=nowhere"], "nowhere does not exist"),
        (["--texts", "three=README.md"], "every task needs --expert and --texts"),
        (["--batch-size", "0"], "--batch-size below 1"),
        (["--divergence", "jss"], "unknown divergence 'jss'"),
        (["--output", "tests"], "exists and is not empty"),
    ],
)
def test_a_wrong_option_is_refused_before_loading(folders, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(ROOT)
    options = arguments([*command(folders, tmp_path / "merged"), *changes])
    with pytest.raises(ValueError, match=message):
        checked(options)
    checked(arguments(command(folders, tmp_path / "merged")))


def test_an_expert_of_another_shape_is_named(folders):
    source = from_folder(folders / "one")
    require_shapes(source, {"model.norm.weight": (12,)})
    for wanted, message in (
        ({"model.norm.weight": (13,)}, r"norm.weight has shape \(12,\), the model has \(13"),
        ({"lm_head.bias": (3,)}, "lm_head.bias has shape unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            require_shapes(source, wanted)
