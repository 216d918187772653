"""The suite of FusionBench's GPT-2 experts, on tiny stand-ins saved in the hub's own layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from divmerge_book.data import downloads
from divmerge_book.data.tasks import TASKS
from divmerge_book.published import glue, toy_models
from divmerge_book.user_models import check, load, merge_and_score, read, task_scores
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from divmerge_core.merging.problem import Predictor
from divmerge_core.methods import METHODS, options_of

NAMES = ("cola", "mnli")
FEW = {"merge": 12, "validation": 20, "test": 40}
# GPT-2's matrices are Conv1D; these methods need nn.Linear, and say so.
LINEAR_ALONE = {"wemoe", "esm_pp"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny experts and GLUE files of two tasks; only to be read."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    return toy_models.make_gpt2(folder, tasks=NAMES)


@pytest.fixture(scope="module")
def suite(made, tmp_path_factory):
    """The description of the suite; tasks' splits are in a cache of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DIVMERGE_GLUE_DIR", made["glue"])
        downloads.verify.cache_clear()
        yield described(made, tmp_path_factory.mktemp("suite") / "described")
    downloads.verify.cache_clear()


def described(made, folder: Path, **options) -> Path:
    places = {"base": made["base"], "expert": made["expert"], **options}
    return glue.describe(folder, NAMES, rows=FEW, max_length=32, progress=False, **places)


@pytest.fixture(scope="module")
def bench(suite):
    return load(check(read(suite)))


def copied(made, folder: Path) -> dict:
    """The same stand-ins where a test may change them."""
    shutil.copytree(Path(made["base"]).parent, folder)
    names = {"base": "gpt2", "expert": "gpt2_{task}", "glue": "glue"}
    return {key: str(folder / name) for key, name in names.items()}


def configured(folder: str, task: str, **changes) -> None:
    """An expert's config.json with other entries; None takes one out."""
    path = Path(folder.format(task=task)) / "config.json"
    whole = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))


# --- merging is merging ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_an_expert_in_a_padded_batch_answers_as_it_does_alone_without_padding(bench, made, number):
    """So the last real token is pooled, though GPT-2 has no padding token of its own."""
    folder = made["expert"].format(task=NAMES[number])
    model = transformers.GPT2ForSequenceClassification.from_pretrained(folder).eval()
    flat = bench.problem.vectors.expert(NAMES[number])
    for batch in bench.test[number].batches:
        found = bench.problem.logits(flat, number, batch)
        for ids, mask, row in zip(*batch.inputs.values(), found, strict=True):
            with torch.no_grad():
                alone = model(ids[None, : int(mask.sum())]).logits[0]
            assert_close(row, alone, rtol=0, atol=1e-5)


def test_padding_is_there(bench):
    masks = [batch.inputs["attention_mask"] for batch in bench.test[0].batches]
    assert any((mask == 0).any() for mask in masks)


def test_the_transformer_is_merged_and_every_score_head_stays(bench, made):
    base = load_file(Path(made["base"]) / "model.safetensors")
    assert set(bench.problem.vectors.layout.names) == set(base)
    for expert in bench.experts:
        assert set(expert.head) == {"score.weight"}
        assert len(expert.head["score.weight"]) == len(TASKS[expert.task].answers)


def test_experts_know_their_tasks(bench):
    """They were trained on the sentences' marks, so labels arrive in the heads' own order."""
    found = merge_and_score(bench, ["average"], budget=1, suite=glue.SUITE, progress=False)
    scores = found.report.metrics().query("metric == 'accuracy' and method == 'expert'")
    assert (scores.value > 0.9).all()


def test_a_head_with_named_outputs_in_another_order_gives_the_same_scores(made, suite, tmp_path):
    moved = copied(made, tmp_path / "moved")
    order = [2, 0, 1]
    names = ["entailment", "neutral", "contradiction"]
    weights = Path(moved["expert"].format(task="mnli")) / "model.safetensors"
    state = load_file(weights)
    state["score.weight"] = state["score.weight"][order].clone()
    save_file(state, weights, metadata={"format": "pt"})
    configured(moved["expert"], "mnli", id2label={str(n): names[i] for n, i in enumerate(order)})
    again = load(check(read(described(moved, tmp_path / "described"))))
    assert again.experts[1].manifest["answers"] == ["contradiction", "entailment", "neutral"]
    for one in (load(check(read(suite))), again):
        answers = one.problem.logits(
            one.problem.vectors.expert("mnli"), 1, one.test[1].batches[0]
        ).argmax(-1)
        assert (answers == one.test[1].gold[: len(answers)]).double().mean() > 0.9


def test_the_names_that_the_hub_gives_to_classes_are_understood():
    assert glue.order_of("mrpc", ["not_equivalent", "equivalent"]) == [0, 1]
    assert glue.order_of("qqp", ["duplicate", "not_duplicate"]) == [1, 0]
    assert glue.order_of("rte", ["entailment", "not_entailment"]) == [0, 1]
    assert glue.order_of("mnli", ["LABEL_0", "LABEL_1", "LABEL_2"]) == [0, 1, 2]


# --- every method that applies --------------------------------------------------------------------


def applying() -> list[str]:
    """Methods that take two experts of one base."""
    kept = []
    for name, facts in METHODS.facts.items():
        if facts.get("optional") != "large" and facts.get("exactly", 2) == 2:
            kept.append(name)
    return kept


@pytest.mark.parametrize("name", applying())
def test_every_method_that_applies_merges_gpt2(bench, name):
    quick = {"epochs": 1, "steps": 2, "progress": False, "score": lambda merged: 0.5}
    options = {key: value for key, value in quick.items() if key in options_of(name)}
    if name in LINEAR_ALONE:
        with pytest.raises(ValueError, match="nn.Linear"):
            METHODS[name](bench.problem, **options)
        return
    merged = METHODS[name](bench.problem, **options)
    assert isinstance(merged, Predictor | torch.Tensor)
    for number, exam in enumerate(bench.test):
        with torch.no_grad():
            logits = bench.problem.logits_of(merged, number, exam.batches[0])
        assert torch.isfinite(logits).all()
        assert logits.shape[1] == len(TASKS[NAMES[number]].answers)


def test_a_fit_that_is_killed_half_way_ends_at_the_same_merge(bench, tmp_path):
    class Killed(Exception):
        pass

    def kill(step) -> None:
        if step.number == 4:
            raise Killed

    def fit(**options) -> torch.Tensor:
        return METHODS["divmerge"](bench.problem, grouping="layer", progress=False, **options)

    with pytest.raises(Killed):
        fit(checkpoint=tmp_path / "fit.pt", callback=kill)
    assert torch.equal(fit(checkpoint=tmp_path / "fit.pt"), fit())


def test_options_are_chosen_on_rows_that_are_not_scored(suite):
    plan = check(read(suite))
    for number, name in enumerate(NAMES):
        rows = [set(plan.rows[split][number]["text"]) for split in ("merge", "validation", "test")]
        assert not rows[1] & rows[2] and not rows[0] & rows[2], name


def test_the_report_carries_the_suites_name(bench):
    found = merge_and_score(bench, ["average"], budget=1, suite=glue.SUITE, progress=False)
    assert set(found.report.rows.suite) == {glue.SUITE}
    assert found.report.provenance["suite"] == glue.SUITE
    assert set(task_scores(found.report, "average").task) == {*NAMES, "all"}


# --- what does not fit is refused, before weights are read ---------------------------------------


def test_where_nobody_names_a_padding_token_the_description_does(made, suite, tmp_path):
    bare = copied(made, tmp_path / "bare")
    for task in NAMES:
        configured(bare["expert"], task, pad_token_id=None)
    path = described(bare, tmp_path / "described")
    plan = check(read(path))
    assert plan.base.tokenizer.pad_token == glue.PAD
    assert {source.model.config.pad_token_id for source in plan.experts} == {0}
    whole = yaml.safe_load(path.read_text())
    for value, words in ((None, "name pad_token in the description"), ("[PAD]", "no token of")):
        path.write_text(yaml.safe_dump(whole | {"pad_token": value}))
        with pytest.raises(ValueError, match=words):
            check(read(path))


def test_heads_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match="2 outputs, the task 3 answers"):
        glue.order_of("mnli", ["LABEL_0", "LABEL_1"])
    with pytest.raises(ValueError, match="GLUE's are entailment, neutral, contradiction"):
        glue.order_of("mnli", ["yes", "no", "maybe"])


def test_unknown_tasks_and_experts_are_refused():
    with pytest.raises(ValueError, match="two or more distinct tasks of cola"):
        glue.identifiers(["cola", "stsb"])
    with pytest.raises(ValueError, match="two or more distinct tasks"):
        glue.identifiers(["cola", "cola"])
    with pytest.raises(ValueError, match="names one model for all tasks"):
        glue.identifiers(NAMES, "tanganke/gpt2_cola")
    with pytest.raises(ValueError, match="no expert for mnli"):
        glue.identifiers(NAMES, {"cola": "somewhere"})
    assert glue.identifiers(NAMES)["mnli"] == "tanganke/gpt2_mnli"


def test_where_the_hub_cannot_be_reached_it_is_said(made, monkeypatch, tmp_path):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="the hub could not be asked"):
        glue.describe(tmp_path / "suite", NAMES, base=made["base"], expert="nobody/gpt2_{task}")
    assert not (tmp_path / "suite").exists()


def test_a_vocabulary_of_its_own_is_refused(made, tmp_path):
    other = copied(made, tmp_path / "other")
    words = ["swapped", *reversed(toy_models.glue_words(NAMES))]
    strange = toy_models.word_tokenizer(words, unk_token=toy_models.END, eos_token=toy_models.END)
    strange.save_pretrained(other["expert"].format(task="cola"))
    with pytest.raises(ValueError, match="its vocabulary differs from the base's"):
        check(read(described(other, tmp_path / "described")))


def test_the_stand_ins_come_in_sizes():
    with pytest.raises(ValueError, match="one of smoke, default"):
        toy_models.sized(toy_models.AMOUNTS, "huge")
