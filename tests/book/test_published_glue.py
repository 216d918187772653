"""The suite of FusionBench's GPT-2 experts, on toy models saved in the hub's own layout."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from divmerge_book.data.tasks import TASKS
from divmerge_book.published import glue
from divmerge_book.published.toy_models import make_toys
from divmerge_book.user_models import check, load, read
from helpers import raising
from local_files import configured, with_fields
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from divmerge_core.merging.problem import Predictor
from divmerge_core.methods import METHODS, options_of

NAMES = ("cola", "mnli")
FEW = {"merge": 4, "validation": 8, "test": 24}
# GPT-2's matrices are Conv1D; these methods need nn.Linear, and say so.
LINEAR_ALONE = {"wemoe", "esm_pp"}
# Toy experts move further than fine-tuning does.
pytestmark = pytest.mark.filterwarnings("ignore:task .* the task vector is:UserWarning")
METHODS_OF_TWO = [
    name
    for name, facts in METHODS.facts.items()
    if facts.get("optional") != "large" and facts.get("exactly", 2) == 2
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Toy experts and GLUE files of two tasks; only to be read."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    make_toys(folder, NAMES, steps=60)
    return folder


@pytest.fixture(scope="module")
def suite(made, module_cache, tmp_path_factory):
    """The description of the suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVMERGE_GLUE_DIR", str(made / "data"))
        yield described(made, tmp_path_factory.mktemp("suite") / "described")


def described(made: Path, folder: Path) -> Path:
    experts = {task: str(made / "experts" / task) for task in NAMES}
    options = {"base": str(made / "base"), "experts": experts, "rows": FEW, "max_length": 32}
    return glue.describe(folder, NAMES, progress=False, **options)


@pytest.fixture(scope="module")
def bench(suite):
    return load(check(read(suite)))


# --- merging is merging ---------------------------------------------------------------------------
def test_an_expert_in_a_padded_batch_answers_as_it_does_alone_without_padding(bench, made):
    """So the last real token is pooled, though GPT-2 has no padding token of its own."""
    padded = 0
    for number, task in enumerate(NAMES):
        kind = transformers.GPT2ForSequenceClassification
        model = kind.from_pretrained(made / "experts" / task).eval()
        flat = bench.problem.vectors.expert(task)
        for batch in bench.test[number].batches:
            found = bench.problem.logits(flat, number, batch)
            for ids, mask, row in zip(*batch.inputs.values(), found, strict=True):
                padded += int((mask == 0).any())
                with torch.no_grad():
                    alone = model(ids[None, : int(mask.sum())]).logits[0]
                assert_close(row, alone, rtol=0, atol=1e-5)
    assert padded


def test_the_transformer_is_merged_and_every_score_head_stays(bench, made):
    base = load_file(made / "base" / "model.safetensors")
    assert set(bench.problem.vectors.layout.names) == set(base)
    for expert in bench.experts:
        assert set(expert.head) == {"score.weight"}
        assert len(expert.head["score.weight"]) == len(TASKS[expert.task].answers)


def accuracies(bench) -> list[float]:
    """Of each expert on its own task."""
    found = []
    for number, (task, split) in enumerate(zip(NAMES, bench.test, strict=True)):
        flat = bench.problem.vectors.expert(task)
        given = [bench.problem.logits(flat, number, batch) for batch in split.batches]
        found.append((torch.cat(given).argmax(-1) == split.gold).double().mean().item())
    return found


def test_a_head_with_named_outputs_in_another_order_scores_the_same(made, bench, suite, tmp_path):
    """Experts were trained on the sentences' marks, so labels arrive in the heads' own order."""
    moved = shutil.copytree(made, tmp_path / "moved")
    order, expert = [2, 0, 1], moved / "experts" / "mnli"
    names = ["entailment", "neutral", "contradiction"]
    weights = expert / "model.safetensors"
    state = load_file(weights)
    state["score.weight"] = state["score.weight"][order].clone()
    save_file(state, weights, metadata={"format": "pt"})
    configured(expert, id2label={str(n): names[i] for n, i in enumerate(order)})
    again = load(check(read(described(moved, tmp_path / "described"))))
    assert again.experts[1].manifest["answers"] == ["contradiction", "entailment", "neutral"]
    assert accuracies(again) == accuracies(bench) and min(accuracies(bench)) > 0.9


def test_the_names_that_the_hub_gives_to_classes_are_understood():
    assert glue.order_of("mrpc", ["not_equivalent", "equivalent"]) == [0, 1]
    assert glue.order_of("qqp", ["duplicate", "not_duplicate"]) == [1, 0]
    assert glue.order_of("rte", ["entailment", "not_entailment"]) == [0, 1]
    assert glue.order_of("mnli", ["LABEL_0", "LABEL_1", "LABEL_2"]) == [0, 1, 2]
    with pytest.raises(ValueError, match="2 outputs, the task 3 answers"):
        glue.order_of("mnli", ["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="GLUE's are entailment, neutral, contradiction"):
        glue.order_of("mnli", ["yes", "no", "maybe"])


# --- every method that applies --------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS_OF_TWO)
def test_every_method_that_applies_merges_gpt2(bench, name):
    quick = {"epochs": 1, "steps": 1, "progress": False, "score": lambda merged: 0.5}
    options = {key: value for key, value in quick.items() if key in options_of(name)}
    if name in LINEAR_ALONE:
        with pytest.raises(ValueError, match="nn.Linear"):
            METHODS[name](bench.problem, **options)
        return
    merged = METHODS[name](bench.problem, **options)
    assert isinstance(merged, Predictor | torch.Tensor)
    for number, batches in enumerate(bench.problem.batches):
        with torch.no_grad():
            logits = bench.problem.logits_of(merged, number, batches[0])
        assert torch.isfinite(logits).all()
        assert logits.shape[1] == len(TASKS[NAMES[number]].answers)


def test_options_are_chosen_on_rows_that_are_not_scored(suite):
    plan = check(read(suite))
    for number, name in enumerate(NAMES):
        rows = [set(plan.rows[split][number]["text"]) for split in ("merge", "validation", "test")]
        assert not rows[1] & rows[2] and not rows[0] & rows[2], name


# --- what does not fit is refused, before weights are read ---------------------------------------
def test_where_nobody_names_a_padding_token_the_description_does(made, suite, tmp_path):
    bare = shutil.copytree(made, tmp_path / "bare")
    for task in NAMES:
        configured(bare / "experts" / task, pad_token_id=None)
    path = described(bare, tmp_path / "described")
    plan = check(read(path))
    assert plan.base.tokenizer.pad_token == glue.PAD
    assert {source.model.config.pad_token_id for source in plan.experts} == {0}
    for value, words in ((None, "name pad_token in the description"), ("[PAD]", "no token of")):
        with pytest.raises(ValueError, match=words):
            check(read(with_fields(path, pad_token=value)))


def test_without_an_expert_for_a_task_or_the_hub_the_error_says_so(made, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no expert for mnli; there are cola"):
        glue.describe(tmp_path / "suite", NAMES, experts={"cola": "somewhere"})
    offline = raising(OSError("no route to host"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"the hub gave none \(OSError"):
        glue.describe(tmp_path / "suite", NAMES, base=str(made / "base"))
    assert not (tmp_path / "suite").exists()
