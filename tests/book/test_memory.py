"""The memory plan: every term by hand, activations as autograd keeps them, advice that holds."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from divmerge_book.planning.gpu_specs import ACCELERATORS, GB
from divmerge_book.planning.memory import (
    CONTEXT,
    Plan,
    kept_by_layer,
    plan,
    plan_total,
    training_plan,
)
from divmerge_book.planning.step_seconds import forecast, merge_bytes, operations, step_seconds
from divmerge_book.planning.workloads import DELTAS, Fit, Model, Training
from torch.testing import assert_close

from divmerge_core.kernels.delta_storage import CHUNK, Int8Deltas
from divmerge_core.merging.task_vectors import TaskVectors

SMALL = {"vocab_size": 101, "hidden_size": 24, "intermediate_size": 56, "num_attention_heads": 4}
GATED = {**SMALL, "num_key_value_heads": 2, "use_cache": False}
CONFIGS = {
    "llama": lambda layers: transformers.LlamaConfig(num_hidden_layers=layers, **GATED),
    "qwen2": lambda layers: transformers.Qwen2Config(
        num_hidden_layers=layers, tie_word_embeddings=True, **GATED
    ),
    "bert": lambda layers: transformers.BertConfig(num_hidden_layers=layers, **SMALL),
    "gpt2": lambda layers: transformers.GPT2Config(
        **{"vocab_size": 101, "n_embd": 24, "n_inner": 56, "n_head": 4, "n_layer": layers},
        **{"use_cache": False, "bos_token_id": 1, "eos_token_id": 1},
    ),
}
TINY = Model(1000, 300, layers=2, hidden=10, vocabulary=30, inner=40, heads=2, keys=5)


def terms(planned: Plan) -> dict[str, float]:
    return {line.what: line.nbytes for line in planned.lines}


# --- by hand --------------------------------------------------------------------------------------


def test_every_term_of_a_fit_is_what_one_counts_by_hand():
    fit = Fit(3, rows=2, tokens=7, answers=5, deltas="bfloat16", cached="top", top=4, inputs=10)
    per_layer = 4 * (2 * 10 + 4 + 2) + 4 * (3 * 10 + (10 + 2 * 5) + 2 * 40)
    tokens = 3 * 2 * 7
    assert terms(plan(TINY, fit, "t4")) == {
        "base": 4000,
        "live buffer": 4000,
        "task vectors": 3 * 1000 * 2,
        "gradients": 300 * 4,
        "activations": tokens * (2 * per_layer + 8 * 10 + 4),
        "logits": 3 * 5 * 30 * 4,
        "gradient of logits": 3 * 5 * 30 * 4,
        "experts' answers": 3 * (10 * 5 // 2) * (12 * 4 + 4),
        "context": CONTEXT,
    }


def test_every_term_of_a_fine_tuning_is_what_one_counts_by_hand():
    found = terms(training_plan(TINY, Training(rows=3, tokens=5, classes=2), "t4"))
    per_layer = 4 * (2 * 10 + 4 + 2) + 4 * (3 * 10 + (10 + 2 * 5) + 2 * 40)
    assert found == {
        "weights": 4000,
        "AdamW's two means": 8000,
        "gradients": 4000,
        "activations": 15 * (2 * per_layer + 84),
        "logits": 3 * 2 * 4,
        "gradient of logits": 3 * 2 * 4,
        "context": CONTEXT,
    }


def test_the_other_choices_change_their_own_line_only():
    before = terms(plan(TINY, Fit(2), 1e12))

    def changed(**options):
        after = terms(plan(TINY, Fit(2, **options), 1e12))
        return {what: after[what] for what in after if after[what] != before.get(what)}

    assert changed(gradients="buffer") == {"gradients": 4000}
    assert changed(deltas="int8") == {"task vectors": 2 * 1000 * (1 + 4 / 128)}
    assert changed(deltas="streamed") == {"task vectors": 2 * 1000 * (4 + 4)}
    assert changed(deltas="streamed_bfloat16") == {"task vectors": 2 * 1000 * (2 + 2 + 4)}
    assert changed(cached="float32") == {"experts' answers": 2 * 200 * 30 * 4}
    assert changed(checkpointing=True)["activations"] < before["activations"]
    assert set(changed(precision="bfloat16")) == {
        *("weights in bfloat16", "activations", "logits", "gradient of logits")
    }


def test_streaming_takes_two_buffers_whatever_the_size_and_the_rest_on_the_host():
    large = Model(10**9, 10**8, layers=10, hidden=1000, vocabulary=1000)
    planned = plan(large, Fit(7, deltas="streamed"), "h100")
    assert terms(planned)["task vectors"] == 7 * CHUNK * 2 * 4
    assert planned.host == 7 * 4 * 10**9
    assert plan(large, Fit(7), "h100").host == 0


def test_ranks_share_what_is_flat_and_gather_the_rest():
    alone, shared = (terms(plan(TINY, Fit(2, rows=4, ranks=n), 1e12)) for n in (1, 2))
    for what in ("base", "live buffer", "task vectors", "activations", "experts' answers"):
        assert shared[what] == alone[what] / 2
    assert shared["gathered weights"] == 4 * (TINY.ends + 2 * TINY.block)
    assert shared["shares in the model"] == shared["base"]


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
def test_planned_task_vectors_take_what_stored_ones_do(storage):
    base = {"weight": torch.zeros(64, 32)}
    experts = {task: {"weight": torch.randn(64, 32)} for task in "ab"}
    deltas = TaskVectors.from_states(base, experts, storage=storage).deltas
    int8 = isinstance(deltas, Int8Deltas)
    held = deltas.values.nbytes + deltas.scales.nbytes if int8 else deltas.nbytes
    model = Model(64 * 32, 64 * 32, layers=1, hidden=32, vocabulary=2)
    assert terms(plan(model, Fit(2, deltas=storage), "t4"))["task vectors"] == held


def test_planned_factors_take_what_adapters_do():
    config = CONFIGS["llama"](2)
    with torch.device("meta"):
        module = transformers.AutoModel.from_config(config)
    matrices = {n: p.shape for n, p in module.layers.named_parameters() if p.ndim == 2}
    numbers = sum(3 * (rows + columns) for rows, columns in matrices.values())
    model = Model.of(config, head=False)
    found = terms(plan(model, Fit(2, deltas="low_rank", rank=3, classes=2), "t4"))
    assert found["task vectors"] == 2 * 4 * numbers


# --- a model in numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_says_what_the_model_has(name):
    config = CONFIGS[name](3)
    model = Model.of(config)
    head = name in ("llama", "qwen2", "gpt2")
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    if not head:
        model = Model.of(config, head=False)
    made = kind.from_config(config)
    assert model.parameters == sum(p.numel() for p in made.parameters())
    assert model.largest == max(p.numel() for p in made.parameters())
    assert (model.layers, model.hidden, model.inner, model.heads) == (3, 24, 56, 4)
    assert model.keys == (12 if name in ("llama", "qwen2") else 24)
    assert model.vocabulary == (101 if head else 0)
    assert model.tied == (name in ("qwen2", "gpt2"))


def test_a_model_is_planned_without_its_weights():
    """Seventy thousand million parameters in no memory at all."""
    config = transformers.LlamaConfig(
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    )
    model = Model.of(config)
    assert 70e9 < model.parameters < 71e9
    assert not plan(model, Fit(2), "h200").fits


# --- activations ----------------------------------------------------------------------------------


@contextmanager
def kept_tensors(module: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps, by place; the module's own are not counted."""
    own = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    held, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no place is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield held


def kept(name: str, layers: int, precision: str) -> tuple[int, torch.nn.Module]:
    """Bytes kept for the backward pass of 3 rows of 10 tokens."""
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if name == "bert" else {}
    module = transformers.AutoModel.from_config(CONFIGS[name](layers), **options).eval()
    ids = torch.randint(3, 90, (3, 10))
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with kept_tensors(module) as held, half:
        module(input_ids=ids, attention_mask=torch.ones_like(ids))
    return sum(held.values()), module


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_keeps_exactly_what_the_formula_says(name, precision):
    (more, module), (fewer, _) = kept(name, 3, precision), kept(name, 2, precision)
    model = Model.of(CONFIGS[name](3), head=False)
    block = max((m for m in module.modules() if isinstance(m, torch.nn.ModuleList)), key=len)[0]
    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    copies = 2 * matrices if precision == "bfloat16" else 0
    assert more - fewer == 30 * kept_by_layer(model, precision) + copies


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_encoder_keeps_about_what_is_planned(name):
    found, _ = kept(name, 3, "float32")
    model = Model.of(CONFIGS[name](3), head=False)
    planned = terms(plan(model, Fit(1, rows=3, tokens=10, classes=2), "t4"))["activations"]
    assert abs(planned / found - 1) < 0.05


# --- advice ---------------------------------------------------------------------------------------

LARGE = Model(
    494_032_768, 136_134_656, 24, 896, 151_936, 4864, 14, 128, 14_912_384, 22_912, "gated", True
)
WORK = Fit(7, rows=8, tokens=256, gradients="buffer", cached="float32")


def test_a_plan_that_fits_gives_no_advice():
    planned = plan(LARGE, Fit(2), "h200")
    assert planned.fits and planned.advice == ()


@pytest.mark.parametrize("capacity", [9 * GB, 16 * GB, 24 * GB, 40 * GB])
def test_advice_saves_what_it_says_and_is_enough_where_it_says_so(capacity):
    planned = plan(LARGE, WORK, capacity)
    assert not planned.fits and planned.advice
    for change in planned.advice:
        after = plan_total(LARGE, change.fit)
        assert_close(change.saved, planned.total - after)
        assert change.saved > 0
        assert change.enough == (after <= capacity)
    assert planned.advice[-1].enough or any(change.enough for change in planned.advice)


def test_the_smallest_change_that_is_enough_comes_first():
    advice = plan(LARGE, WORK, 40 * GB).advice
    enough = [change.saved for change in advice if change.enough]
    assert advice[0].enough and enough == sorted(enough)
    assert [change.enough for change in advice] == sorted((c.enough for c in advice), reverse=True)


def test_where_nothing_is_enough_alone_several_are_taken_together():
    last = plan(LARGE, WORK, 9 * GB).advice[-1]
    assert last.what.startswith("together: ") and last.enough
    assert last.fit.ranks == 1 and last.fit.tasks == 7, "no task is dropped before it has to be"


def test_what_the_issue_asks_for_is_among_the_advice():
    told = " ".join(change.what for change in plan(LARGE, WORK, 9 * GB).advice)
    for words in ("bfloat16", "int8", "streamed", "tensor by tensor", "tasks", "rows", "check"):
        assert words in told


def test_a_fine_tuning_that_does_not_fit_is_told_of_checkpointing():
    planned = training_plan(LARGE, Training(rows=64, tokens=256), "t4")
    assert not planned.fits
    assert {"gradient checkpointing"} <= {change.what for change in planned.advice}
    assert training_plan(LARGE, planned.advice[0].fit, "t4").fits


def test_a_plan_prints_as_a_table():
    planned = plan(LARGE, WORK, "t4")
    text = str(planned)
    for line in planned.lines:
        assert line.what in text and line.why in text
    assert "does not fit T4" in text and "fits L4" not in text
    assert "- task vectors in bfloat16: saves 6.92 GB" in text


# --- seconds --------------------------------------------------------------------------------------


def test_a_merge_moves_two_t_and_three_vectors():
    moved, streamed = merge_bytes(TINY, Fit(5))
    assert (moved, streamed) == ((2 * 5 + 3) * 4 * 1000, 0)
    moved, streamed = merge_bytes(TINY, Fit(5, deltas="streamed_bfloat16"))
    assert (moved, streamed) == ((2 * 5 * 2 + 3 * 4) * 1000, 2 * 5 * 2 * 1000)


def test_operations_are_six_per_weight_and_token():
    fit = Fit(2, rows=3, tokens=1)
    body = 6 * 2 * 3 * TINY.layers * TINY.block
    attention = 3 * 2 * 3 * 4 * 1 * 10 * 2
    head = 6 * 10 * 30 * 2 * 3
    assert operations(TINY, fit) == body + attention + head
    assert operations(TINY, Fit(2, rows=3, tokens=1, checkpointing=True)) > operations(TINY, fit)


def test_seconds_are_bytes_and_operations_over_the_data_sheet():
    gpu, fit = ACCELERATORS["h100"], Fit(5, precision="bfloat16")
    found = step_seconds(LARGE, fit, gpu)
    assert_close(found["merge"], merge_bytes(LARGE, fit)[0] / 3.35e12)
    assert_close(found["model"], operations(LARGE, fit) / 989e12)
    assert_close(found["step"], found["merge"] + found["model"] + found["divergence"])
    assert found["divergence, plain"] > found["divergence"]
    streamed = step_seconds(LARGE, Fit(5, precision="bfloat16", deltas="streamed"), gpu)
    assert_close(streamed["merge"], 2 * 5 * 4 * LARGE.parameters / 64e9)  # the link is narrower


def test_the_forecast_has_a_row_per_gpu_with_its_source():
    table = forecast(LARGE, Fit(7, precision="bfloat16"))
    assert len(table) == len(ACCELERATORS) and table.source.str.contains("data sheet").all()
    assert table.set_index("gpu").half["T4"] == "float16"
    assert (table.fits | (table.advice != "")).all()
    sizes = [gpu.memory / GB for gpu in ACCELERATORS.values()]
    assert sizes == [16, 24, 40, 80, 80, 141]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fit(0), "tasks must be 1 or more"),
        (lambda: Fit(2, deltas="int4"), f"deltas must be one of {', '.join(DELTAS)}"),
        (lambda: Fit(2, gradients="hook"), "gradients must be one of stream, buffer"),
        (lambda: Fit(2, precision="half"), "precision must be one of float32, bfloat16"),
        (lambda: Training(rows=0), "rows and tokens must be 1 or more"),
        (lambda: Model(0, 1, 1, 1), "of 1 or more, got 0"),
        (lambda: Model(9, 1, 1, 1, kind="swish"), "kind must be one of gated, gelu, gelu_new"),
        (lambda: plan(TINY, Fit(2), "t5"), "unknown accelerator 't5'"),
        (lambda: plan(TINY, Fit(2), -1.0), "more than 0 bytes"),
        (lambda: plan(Model(9, 1, 1, 1), Fit(2), "t4"), "give classes in Fit"),
        (lambda: training_plan(Model(9, 1, 1, 1), Training(), "t4"), "give classes in Training"),
    ],
)
def test_bad_plans_are_refused_with_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()
