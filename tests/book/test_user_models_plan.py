"""Users' models are described in a file and checked before weights are read."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import local_files
import pytest
import torch
import yaml
from divmerge_book.user_models import check, load, locate, read, target
from helpers import MARKERS, WORDS, raising
from local_files import LABELS, ROWS, changed, lone, make_expert, refused, tokenizer, with_fields
from safetensors.torch import load_file, save_file

TASK = "{name: a, expert: e, merge: m}"


def text_file(folder: Path, text: str, name: str = "models.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# --- the description ------------------------------------------------------------------------------
def test_yaml_and_json_say_the_same(project):
    whole = yaml.safe_load(project.read_text())
    whole["tasks"][0]["labels"] = ["\N{GRINNING FACE}", "\\ud83d"]
    project = text_file(project.parent, yaml.safe_dump(whole, allow_unicode=True), "same.yaml")
    text = "\ufeff" + json.dumps(whole, indent="\t")  # an editor's byte order mark
    path = text_file(project.parent, text, "models.json")
    one, other = read(project), read(path)
    assert one.tasks == other.tasks and one.base == other.base and one.max_length == 16
    assert (one.path, other.path) == (project, path)
    assert list(one.tasks[0].files()) == ["merge", "validation", "test"]


def test_labels_are_words_as_they_are_written_and_null_is_absent(tmp_path):
    task = "{name: %s, expert: e, merge: m.csv, labels: [no, yes, 1], test: null}"
    path = text_file(tmp_path, f"base: b\ntasks:\n- {task % 'a'}\n- {task % 'b'}\n")
    (first, _) = read(path).tasks
    assert first.labels == ("no", "yes", "1") and list(first.files()) == ["merge"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("base: b\nbases: c\n", ["line 2", "unknown field 'bases'", "did you mean 'base'"]),
        ("base: b\nbase: c\ntasks: []\n", ["line 2", "twice"]),
        ("base: b\n", ["line 1", "lacks tasks"]),
        (f"base: b\ntasks: [{TASK}]\n", ["line 2", "two tasks or more"]),
        (f"base: b\ntasks:\n- {TASK}\n- {TASK.upper()}", ["line 4: unknown field 'NAME'"]),
        (f"base: b\ntasks:\n- {TASK}\n- {TASK.replace(' a', ' A')}", ["two tasks have the name"]),
        ("base: b\ntasks:\n- {name: a}\n- {name: b}\n", ["line 3: tasks[1] lacks expert"]),
        ("base: [b]\ntasks:\n- 1\n- 2\n", ["line 3: tasks[1]: must be fields", "3 problems"]),
        ("base: b\nmax_length: long\ntasks: []\n", ["line 2: max_length", "got 'long'"]),
        ("base: b\nmax_length: 1\ntasks: []\n", ["line 2: max_length", "equal to 2, got '1'"]),
        ("base: b\n  tasks: 1\n", ["line 2"]),
        ("base: b\ntasks:\n\t- a\n", ["line 3", "indent with spaces"]),
        ("base: b\x07\n", ["is no YAML"]),
        ("base: b\n[1, 2]: c\n", ["line 2", "a list or mapping is no name of a field"]),
        ("base: b\ntasks: &a [*a, *a]\n", ["stands inside of what it names"]),
        ("base: b\n---\nbase: c\n", ["line 2", "another document; give each a file of its own"]),
        ("base: b\nrest: &a {x: 1}\nmore:\n  <<: *a\n", ["line 4", "behind << are not read"]),
        ("base: ~nobody-here/b\ntasks: []\n", ["line 1: base: ~nobody-here/b begins with ~"]),
        ("", ["empty", "base, tasks, max_length"]),
    ],
)
def test_a_wrong_description_is_refused_with_its_line(tmp_path, text, words):
    refused(text_file(tmp_path, text), "models.yaml", *words)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"name": "a b"}, ["'a b'", "no spaces"]),
        ({"labels": ["one"]}, ["labels: must be two or more distinct"]),
        ({"labels": "one"}, ["should be a valid list", "got 'one'"]),
        ({"columns": {"txt": "t"}}, ["unknown field 'txt'", "text, pair, label"]),
        ({"test": ["a", "b"]}, ["test: Input is not a valid path"]),
        ({"merge": "no.csv", "expert": "no"}, ["'mood': expert names", "description's own folder"]),
        ({"labels": ["positive", "negative"]}, ["in another order", "id2label in config.json"]),
        ({"labels": ["negative", "neutral", "positive"]}, ["2 outputs", "negative", "positive"]),
        ({"labels": ["good", "bad"]}, ["['good', 'bad']", "['negative', 'positive']"]),
        ({"validation": "data/mood-test.csv"}, ["stand in validation and in test"]),
        ({"expert": "data"}, ["holds no expert", "adapter_config.json"]),
        ({"expert": "experts\\mood"}, ["does not exist", "write / between folders"]),
        ({"expert": "$HOME/mood"}, ["does not exist", "variables of the shell are not replaced"]),
        ({"expert": "file:///no/mood"}, ["does not exist", "it is an address: give a folder"]),
        ({"name": "All"}, ["tables call the mean over tasks 'all'"]),
        ({"name": "base"}, ["cards the base 'base'"]),
        ({"columns": {"text": "text", "pair": "text"}}, ["names a column twice"]),
        ({"expert": "data/mood-merge.csv"}, ["a file: give its folder"]),
    ],
)
def test_a_wrong_field_of_a_task_is_refused(project, fields, words):
    refused(changed(project, 0, **fields), *words)


def test_broken_json_and_other_endings_are_refused(tmp_path):
    refused(text_file(tmp_path, '{"base": \n', "a.json"), "a.json, line 2")
    refused(text_file(tmp_path, "base: b", "a.toml"), ".yaml, .yml, .json")
    refused(tmp_path / "none.yaml", "there is no description")


def test_a_description_is_found_from_the_notebooks_folder_and_from_the_shells(
    tmp_path, monkeypatch
):
    for folder in ("here/notebooks", "shell"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/notebooks")
    monkeypatch.setenv("PWD", str(tmp_path / "shell"))
    for place in ("here/one.yaml", "shell/two.yaml", "here/notebooks/three.yaml"):
        (tmp_path / place).write_text("base: b")
        assert locate(Path(place).name) == (tmp_path / place).resolve()
    with pytest.raises(ValueError, match="looked at .*notebooks/four.yaml"):
        locate("four.yaml")


# --- what is checked before weights are read ------------------------------------------------------
def test_a_plan_has_kinds_labels_and_counts(plan):
    table = plan.table()
    assert list(table.index) == list(MARKERS) and set(table.expert) == {"transformers"}
    assert list(table.labels) == [", ".join(LABELS[name]) for name in MARKERS]
    assert [list(table[split]) for split in ROWS] == [[n] * 2 for n in ROWS.values()]
    assert plan.notes == ()


def test_headers_are_read_by_the_check_and_weights_are_not(project, tmp_path):
    def build(folder: Path) -> None:
        make_expert(folder, project.parent / "base", LABELS["mood"])
        tensors = load_file(folder / "model.safetensors")
        tensors["classifier.bias"].fill_(float("nan"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    plan = check(read(lone(project, tmp_path, "cut", build)))
    with pytest.raises(ValueError, match="classifier.bias holds NaN"):
        load(plan)
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(plan.description.path, "is no whole safetensors file but damaged")


def test_rows_are_asked_for_only_by_methods_that_read_them(project):
    bare = dict.fromkeys(ROWS)
    path = changed(changed(project, 0, **bare), 1, **bare)
    plan = check(read(path), ["average", "ties", "task_arithmetic"])
    assert [list(plan.table()[split]) for split in ROWS] == [[0, 0]] * 3
    assert sum("neither merge nor test rows" in note for note in plan.notes) == 2
    merge = changed(path, 0, merge="data/mood-merge.csv")
    for methods, message in (
        (["average", "divmerge/layer"], "divmerge/layer reads unlabelled .* task 'place' a merge"),
        (["evolved_coefficients"], "searches with a score: give task 'mood', 'place' a validation"),
        (["twin"], "returns no single merged model"),
    ):
        with pytest.raises(ValueError, match=message):
            check(read(merge), methods)


def test_all_missing_paths_are_reported_at_once(project):
    path = changed(changed(project, 0, merge="no.csv"), 1, expert="nowhere")
    refused(path, "2 problems", "no.csv", "nowhere", "description's own folder")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 48}, ["hidden_size = 48", "has 32"]),
        ({"num_hidden_layers": 3}, ["num_hidden_layers = 3"]),
        ({"num_attention_heads": 4}, ["num_attention_heads = 4"]),
        ({"hidden_act": "relu"}, ["hidden_act = 'relu'"]),
        ({"architectures": ["BertForMaskedLM"]}, ["BertForMaskedLM", "sequence classification"]),
    ],
)
def test_another_architecture_is_refused(project, tmp_path, changes, words):
    def build(folder: Path) -> None:
        local_files.config("bert", **changes).save_pretrained(folder)
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")

    path = lone(project, tmp_path, "other", build)
    refused(changed(path, 0, labels=None), *words)


def test_another_family_is_refused(project, tmp_path):
    def build(folder: Path) -> None:
        make_expert(folder, local_files.make_base(tmp_path / "roberta", "roberta"), LABELS["mood"])

    refused(lone(project, tmp_path, "other", build), "model_type = 'roberta'", "this very base")


def test_a_head_without_names_takes_the_descriptions_labels_or_numbers(project, tmp_path):
    def build(folder: Path) -> None:
        make_expert(folder, project.parent / "base", ["LABEL_0", "LABEL_1"])

    path = lone(project, tmp_path, "plain", build)
    refused(path, "label 'negative'", "none of 0, 1", "more")
    named = changed(path, 0, labels=["negative", "positive"])
    assert check(read(named)).experts[0].labels == ("negative", "positive")


def test_other_vocabularies_special_tokens_and_tokenizations_are_refused(project, tmp_path):
    mask = tokenizer()
    mask.mask_token = "[UNK]"
    swapped = tokenizer(vocabulary=[*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]])
    for made, words in [
        (swapped, "is token 5 of its expert and token 6 of the base"),
        (mask, "mask token is '[UNK]'"),
        (tokenizer("plain"), "cuts up"),
        (None, None),  # without one it reads as the base does
    ]:

        def build(folder: Path, made=made) -> None:
            make_expert(folder, project.parent / "base", LABELS["mood"])
            for left in folder.glob("*token*"):
                left.unlink()
            if made is not None:
                made.save_pretrained(folder)

        path = lone(project, tmp_path, f"of {words}", build)
        if made is None:
            assert check(read(path)).tasks == tuple(MARKERS)
        else:
            refused(path, words)


def test_inputs_longer_than_the_models_positions_are_refused(project):
    refused(with_fields(project, max_length=64), "max_length is 64", "to 32 tokens")
    refused(with_fields(project, max_length=2), "max_length is 2", "3 (with its special tokens)")


def test_positions_of_roberta_begin_after_its_padding_tokens(tmp_path):
    project = local_files.make_project(tmp_path, "roberta")  # 34 of them, and padding is token 0
    assert check(read(with_fields(project, max_length=33))).base.positions == 33
    refused(with_fields(project, max_length=34), "max_length is 34", "to 33 tokens")


def test_inputs_that_are_cut_are_counted(project):
    (note,) = check(read(with_fields(project, max_length=4))).notes[:1]
    assert re.search("'mood': max_length 4 shortens 12 of 12 merge inputs .up to", note)


def test_more_inputs_than_a_task_has_rows_are_said(project):
    plans = [check(read(project), ["divmerge"], options={"inputs": count}) for count in (12, 13)]
    said = "task {!r}: the option inputs is 13, and there are 12 merge rows"
    assert [plan.notes for plan in plans] == [(), tuple(map(said.format, MARKERS))]


def test_a_padding_token_that_only_experts_name_is_used_and_noted(tmp_path):
    project = local_files.make_project(tmp_path, "gpt2")

    for folder in ("base", "experts/mood", "experts/place"):
        local_files.configured(tmp_path / folder, pad_token_id=None)
    plan = check(read(project))
    assert "names no pad_token_id" in plan.notes[0]
    assert [source.model.config.pad_token_id for source in plan.experts] == [0, 0]
    local_files.configured(tmp_path / "experts/mood", pad_token_id=1)
    refused(project, "pad with ['[PAD]', '[UNK]']", "one padding token")


def test_seen_inputs_and_missing_classes_are_noted(project):
    rows = [row for row in local_files.toy_rows("mood")["merge"] if row["label"] == "positive"]
    local_files.write_rows(project.parent / "data" / "seen.csv", rows)
    notes = check(read(changed(project, 0, test="data/seen.csv"))).notes
    assert "merge inputs too" in notes[0] and "no test row has the label negative" in notes[1]


def test_a_card_names_models_as_others_can_find_them(project, tmp_path):
    cached = tmp_path / "models--some--bert" / "snapshots" / "0123"
    shutil.copytree(project.parent / "base", cached)
    project = changed(project, 1, expert="experts/mood", labels=None, test=None, validation=None)
    plan = check(read(with_fields(project, base=str(cached))))
    plan = replace(plan, notes=(f"base {cached}: odd", *plan.notes))
    assert plan.portable["base_name"] == "some/bert" and str(tmp_path) not in str(plan.portable)
    assert plan.portable["notes"][:2] == (
        "base some/bert: odd",
        "task 'place' and task 'mood' have the same folder, mood",
    )


@pytest.mark.parametrize(
    "output",
    [
        *("base", "experts", "experts/mood/merged", "/proc/merged", "data", "data/mood-test.csv"),
        *("models.yaml", "models.yaml/merged", "x" * 300, "full"),
    ],
)
def test_an_output_that_would_harm_or_cannot_be_written_is_refused_at_once(project, output):
    (project.parent / "full" / "notes").mkdir(parents=True, exist_ok=True)
    words = "is, holds or lies in|cannot be written to|holds notes, no part of a model"
    with pytest.raises(ValueError, match=words):
        target(read(project), output, overwrite=True)


def test_a_base_that_is_nowhere_is_refused(project, monkeypatch):
    offline = raising(OSError("no network here"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    words = "'no/such' is neither a folder beside the description nor a packaged model"
    refused(with_fields(project, base="no/such"), words, "no network here")
