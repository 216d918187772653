"""The memory plan: every term by hand, activations as autograd keeps them, valid advice."""

from dataclasses import replace

import pytest
import torch
import transformers
from divmerge_book.planning.gpu_specs import ACCELERATORS, GB
from divmerge_book.planning.language_plans import merge_bytes, operations, step_seconds
from divmerge_book.planning.memory import CONTEXT, Plan, bytes_per_token, changes, plan
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
TINY = Model(
    **{"parameters": 1000, "largest": 300, "layers": 2, "hidden": 10, "inner": 40, "heads": 2},
    **{"keys": 5, "block": 350, "sides": 180, "vocabulary": 30},
)
LARGE = Model(494_032_768, 136_134_656, 24, 896, 4864, 14, 128, 14_912_384, 22_912, 151_936)
LARGE = replace(LARGE, kind="gated", tied=True)


def terms(planned: Plan) -> dict[str, float]:
    return {line.what: line.nbytes for line in planned.lines}


PER_LAYER = 4 * (2 * 10 + 4 + 2) + 4 * (3 * 10 + (10 + 2 * 5) + 2 * 40)


def test_every_term_of_a_fit_by_hand():
    fit = Fit(2, 7, 5, tasks=3, deltas="bfloat16", cached="top", top=4, inputs=10)
    tokens = 3 * 2 * 7
    assert terms(plan(TINY, fit, "t4")) == {
        "base": 4000,
        "merged model": 4000,
        "task vectors": 3 * 1000 * 2,
        "gradients": 300 * 4,
        "activations": tokens * (2 * PER_LAYER + 8 * 10 + 4),
        "logits": 3 * 5 * 30 * 4,
        "gradient of logits": 3 * 5 * 30 * 4,
        "experts' answers": 3 * (10 * 5 // 2) * (12 * 4 + 4),
        "context": CONTEXT,
    }


def test_every_term_of_a_fine_tuning_by_hand():
    assert terms(plan(TINY, Training(rows=3, tokens=5, classes=2), "t4")) == {
        "weights": 4000,
        "AdamW's two means": 8000,
        "gradients": 4000,
        "activations": 15 * (2 * PER_LAYER + 84),
        "logits": 3 * 2 * 4,
        "gradient of logits": 3 * 2 * 4,
        "context": CONTEXT,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradients": "buffer"}, {"gradients": 4000}),
        ({"deltas": "int8"}, {"task vectors": 2 * 1000 * (1 + 4 / 128)}),
        ({"deltas": "streamed"}, {"task vectors": 2 * 1000 * (4 + 4)}),
        ({"deltas": "streamed_bfloat16"}, {"task vectors": 2 * 1000 * (2 + 2 + 4)}),
        ({"deltas": "low_rank", "rank": 3}, {"task vectors": 2 * 4 * 3 * 2 * 180}),
        ({"cached": "float32"}, {"experts' answers": 2 * 200 * 30 * 4}),
        ({"checkpointing": True}, {"activations": 1024 * (2 * 4 * 10 + PER_LAYER + 84)}),
        (
            {"precision": "bfloat16"},
            {
                "weights in bfloat16": 2 * (2 * 350 + 30 * 10),
                "activations": 1024 * (2 * (4 * 26 + 2 * (50 + 20 + 80)) + 84),
                "logits": 8 * 30 * 2,
                "gradient of logits": 8 * 30 * 2,
            },
        ),
        (
            {"ranks": 2},
            {
                **{"base": 2000, "merged model": 2000, "shards in the model": 2000},
                "gathered weights": 4 * (300 + 2 * 350),
                "task vectors": 2 * 4 * 500,
                "gradients": 4 * 350,
                "activations": 512 * (2 * PER_LAYER + 84),
                **{"logits": 4 * 120, "gradient of logits": 4 * 120},
                "experts' answers": 2 * 100 * 30 * 2,
            },
        ),
    ],
    ids=str,
)
def test_a_choice_changes_its_own_lines_only(options, expected):
    before, after = (terms(plan(TINY, Fit(**fields), 1e12)) for fields in ({}, options))
    assert {what: after[what] for what in after if after[what] != before.get(what)} == expected


def test_streaming_takes_two_buffers_whatever_the_size_and_the_rest_on_the_host():
    planned = plan(LARGE, Fit(tasks=7, deltas="streamed"), "h100")
    assert terms(planned)["task vectors"] == 7 * CHUNK * 2 * 4
    assert planned.host == 7 * 4 * LARGE.parameters
    assert "13.83 GB  beside the device" in str(planned)
    assert plan(LARGE, Fit(tasks=7), "h100").host == 0


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
def test_planned_task_vectors_take_what_stored_ones_do(storage):
    experts = {task: {"weight": torch.randn(64, 32)} for task in "ab"}
    base = {"weight": torch.zeros(64, 32)}
    deltas = TaskVectors.from_states(base, experts, storage=storage).deltas
    int8 = isinstance(deltas, Int8Deltas)
    held = deltas.values.nbytes + deltas.scales.nbytes if int8 else deltas.nbytes
    model = replace(TINY, parameters=64 * 32)
    assert terms(plan(model, Fit(deltas=storage), "t4"))["task vectors"] == held


def test_planned_factors_take_what_adapters_do_and_tied_embeddings_two_gradients():
    config = CONFIGS["llama"](2)
    with torch.device("meta"):
        module = transformers.AutoModel.from_config(config)
    matrices = {n: p.shape for n, p in module.layers.named_parameters() if p.ndim == 2}
    numbers = sum(3 * (rows + columns) for rows, columns in matrices.values())
    model = Model.of(config, head=False)
    found = terms(plan(model, Fit(deltas="low_rank", rank=3, classes=2), "t4"))
    assert found["task vectors"] == 2 * 4 * numbers
    tied = plan(replace(TINY, tied=True), Fit(), 1e12)
    assert terms(tied)["gradients"] == 2 * 300 * 4, "of embeddings and head"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_says_what_the_model_has(name):
    head, config = name != "bert", CONFIGS[name](3)
    model = Model.of(config, head=head)
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    sizes = [parameter.numel() for parameter in kind.from_config(config).parameters()]
    assert (model.parameters, model.largest) == (sum(sizes), max(sizes))
    assert (model.layers, model.hidden, model.inner, model.heads) == (3, 24, 56, 4)
    assert model.keys == (12 if name in ("llama", "qwen2") else 24)
    assert model.vocabulary == 101 * head and model.tied == (name in ("qwen2", "gpt2"))


def test_a_model_of_seventy_billion_parameters_is_planned_without_its_weights():
    config = transformers.LlamaConfig(
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    )
    model = Model.of(config)
    assert 70e9 < model.parameters < 71e9
    assert not plan(model, Fit(), "h200").fits


def kept(name: str, layers: int, precision: str) -> tuple[int, torch.nn.Module]:
    """Bytes kept for the backward pass of 3 rows of 10 tokens, beside the module."""
    torch.manual_seed(0)
    options = {"add_pooling_layer": False} if name == "bert" else {}
    module = transformers.AutoModel.from_config(CONFIGS[name](layers), **options).eval()
    ids, held, alive = torch.randint(3, 90, (3, 10)), {}, []
    own = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no place is used twice
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
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
    assert more - fewer == 30 * bytes_per_token(model, precision) + copies
    if precision == "float32":  # a whole encoder keeps about what is planned
        fit = Fit(rows=3, tokens=10, classes=2, tasks=1)
        assert terms(plan(model, fit, "t4"))["activations"] == pytest.approx(more, rel=0.05)


WORK = Fit(8, 256, tasks=7, gradients="buffer", cached="float32")


@pytest.mark.parametrize("capacity", [9 * GB, 16 * GB, 24 * GB, 40 * GB])
@pytest.mark.parametrize("work", [WORK, Training(rows=64, tokens=256)], ids=["fit", "training"])
def test_advice_saves_what_it_says_and_is_enough_where_it_says_so(work, capacity):
    planned = plan(LARGE, work, capacity)
    assert not planned.fits and planned.advice
    fields = dict(changes(work))
    every = [set(one) for one in fields.values() if not {"tasks", "ranks"} & set(one)]
    enough = []
    for line in planned.advice:
        what, _, saves = line.partition(": saves ")
        enough.append(saves.endswith("(enough)"))
        if what in fields:
            after = plan(LARGE, replace(work, **fields[what]), capacity)
            assert after.total < planned.total and after.fits == enough[-1]
            assert f"{(planned.total - after.total) / 1e9:.2f} GB (" in saves
        else:
            assert what == "all of these with the same tasks and devices" and len(every) > 1
    assert enough == sorted(enough, reverse=True), "enough alone first"


def test_where_nothing_is_enough_alone_all_together_may_be_and_a_plan_prints_as_a_table():
    first, *rest = plan(LARGE, WORK, 9 * GB).advice
    assert first.startswith("all of these") and first.endswith("(enough)")
    assert all(line.endswith("(not enough alone)") for line in rest)
    told = " ".join(rest)
    for words in ("bfloat16", "int8", "streamed", "tensor by tensor", "tasks", "row", "check"):
        assert words in told
    assert plan(LARGE, Fit(), "h200").advice == ()
    planned = plan(LARGE, WORK, "t4")
    text = str(planned)
    assert all(line.what in text and line.why in text for line in planned.lines)
    assert "does not fit T4" in text and "- task vectors in bfloat16: saves 6.92 GB" in text


def test_a_merge_moves_two_t_and_three_vectors():
    assert merge_bytes(TINY, Fit(tasks=5)) == ((2 * 5 + 3) * 4 * 1000, 0)
    moved = merge_bytes(TINY, Fit(tasks=5, deltas="streamed_bfloat16"))
    assert moved == ((2 * 5 * 2 + 3 * 4) * 1000, 2 * 5 * 2 * 1000)
    moved, _ = merge_bytes(TINY, Fit(tasks=5, deltas="low_rank", rank=3))
    assert moved == 3 * 4 * 1000 + 2 * 5 * 4 * 3 * 2 * 180


def test_operations_are_six_per_weight_and_token():
    fit = Fit(rows=3, tokens=1)
    body = 6 * 2 * 3 * TINY.layers * TINY.block
    attention = 3 * 2 * 3 * 4 * 1 * 10 * 2
    head = 6 * 10 * 30 * 2 * 3
    assert operations(TINY, fit) == body + attention + head
    again = operations(TINY, replace(fit, checkpointing=True))
    assert again == (body + attention) * 4 / 3 + head


def test_seconds_are_bytes_and_operations_over_the_data_sheet():
    gpu, fit = ACCELERATORS["h100"], Fit(tasks=5, precision="bfloat16")
    found = step_seconds(LARGE, fit, gpu)
    assert_close(found["merge"], merge_bytes(LARGE, fit)[0] / 3.35e12)
    assert_close(found["model"], operations(LARGE, fit) / 989e12)
    assert_close(found["divergence"], 3 * 5 * 4 * 151_936 * 2 / 3.35e12)
    assert_close(found["step"], found["merge"] + found["model"] + found["divergence"])
    assert_close(found["divergence, plain"], found["divergence"] * 7 / 3)
    single = step_seconds(LARGE, replace(fit, precision="float32"), gpu)
    assert_close(single["model"], operations(LARGE, fit) / 67e12)
    streamed = step_seconds(LARGE, replace(fit, deltas="streamed"), gpu)
    assert_close(streamed["merge"], 2 * 5 * 4 * LARGE.parameters / 64e9)  # the link is narrower


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fit(tasks=0), "tasks must be 1 or more"),
        (lambda: Fit(deltas="int4"), f"deltas must be one of {', '.join(DELTAS)}, got 'int4'"),
        (lambda: Fit(gradients="hook"), "gradients must be one of stream, buffer"),
        (lambda: Fit(precision="half"), "precision must be one of float32, bfloat16"),
        (lambda: Fit(cached="int8"), "cached must be one of float32, bfloat16, top"),
        (lambda: Training(rows=0), "rows must be 1 or more, got 0"),
        (lambda: plan(TINY, Fit(), "t5"), "unknown accelerator 't5'"),
        (lambda: plan(TINY, Fit(), -1.0), "more than 0 bytes"),
        (lambda: plan(replace(TINY, vocabulary=0), Fit(), "t4"), "to answer with; give classes"),
        (lambda: plan(replace(TINY, vocabulary=0), Training(), "t4"), "give classes"),
        (lambda: Model.of(transformers.PretrainedConfig()), "transformers makes no model of"),
    ],
)
def test_bad_plans_are_refused_with_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()
