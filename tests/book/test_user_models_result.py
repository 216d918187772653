"""Merges of users' models: scores, closeness, coefficients, and the folder on disk."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace

import local_files
import pandas as pd
import pytest
import torch
import transformers
from divmerge_book import Report, __main__, user_models
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import own_experts
from divmerge_book.models.merged import load_with_head
from divmerge_book.user_models import check, load, merge_and_score, read, task_scores, write_merged
from divmerge_book.user_models import save as save_module
from divmerge_book.user_models.labels import order_note
from divmerge_book.user_models.result import rescored
from helpers import MARKERS, raising
from language_files import make_language_project
from local_files import LABELS, ROWS, averaged, changed, make_expert, make_project, toy_rows
from safetensors.torch import load_file
from torch.testing import assert_close

from divmerge_core import METHODS, MergeProblem
from divmerge_core.divergences import js

# Toy experts move further than fine-tuning does.
pytestmark = pytest.mark.filterwarnings("ignore:task .* the task vector is:UserWarning")


# --- results --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def found(bench, module_cache):
    """Three merges of the two experts; only to be read."""
    specs = ["average", "ties", "divmerge/layer"]
    return merge_and_score(bench, specs, budget=1, epochs=1, inputs=8, progress=False)


def test_every_method_is_scored_beside_experts_and_base(found):
    methods = ["expert", "base", "average", "ties", "divmerge/layer"]
    assert list(found.report.rows.method.unique()) == methods
    assert all(len(row.gold) == ROWS["test"] for row in found.report.rows.itertuples())
    assert found.report.provenance["suite"] == "local"


def test_closeness_is_the_mean_divergence_and_the_share_of_equal_answers(bench, found):
    problem, exam = bench.problem, bench.test[1]
    row = found.closeness.query("method == 'average' and task == 'place'").iloc[0]
    with torch.no_grad():
        sides = [
            torch.cat([problem.logits(flat, 1, batch) for batch in exam.batches])
            for flat in (problem.vectors.expert("place"), found.made["average"].merged)
        ]
    assert row.rows == "test"
    assert row.divergence == pytest.approx(js(*sides).mean().item(), abs=1e-7)
    same = (sides[0].argmax(-1) == sides[1].argmax(-1)).double().mean().item()
    assert row.agreement == pytest.approx(same)


def test_closeness_by_kl_is_from_the_expert_to_the_merge(bench, monkeypatch):
    sides = {"logits": [0.9, 0.1], "logits_of": [0.5, 0.5]}  # of experts, of merges
    for name, side in sides.items():

        def given(problem, flat, task, batch, side=side):
            return torch.tensor(side).log().expand(len(batch.weight), -1)

        monkeypatch.setattr(MergeProblem, name, given)
    found = user_models.closeness(bench, {"half": bench.problem.vectors.base}, divergence="kl")
    wanted = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)  # .368; the other way it is .511
    assert list(found.divergence) == pytest.approx([wanted, wanted])


def test_only_labelled_tasks_are_scored(project, cache):
    path = changed(project, 0, validation=None, test=None)
    found = merge_and_score(load(check(read(path))), ["average"], progress=False)
    assert set(found.report.rows.task) == {"place"}
    assert dict(found.closeness.groupby("task").rows.first()) == {"mood": "merge", "place": "test"}
    bench = load(check(read(changed(path, 1, validation=None, test=None))))  # none at all
    found = merge_and_score(bench, ["task_arithmetic"], progress=False)
    assert found.report is None and set(found.closeness.rows) == {"merge"}
    published = METHODS.facts["task_arithmetic"]["search"][0]  # no rows to choose a scale on
    assert found.options["task_arithmetic"] == published
    assert task_scores(found.report, "task_arithmetic").empty
    with pytest.raises(ValueError, match="a validation split"):
        merge_and_score(bench, ["evolved_coefficients"], progress=False)


def test_without_any_rows_weights_are_merged_and_nothing_is_measured(project, tmp_path, capsys):
    bare = dict.fromkeys(ROWS)
    path = changed(changed(project, 0, **bare), 1, **bare)
    command = ["merge", str(path), str(tmp_path / "merged"), "--method", "average"]
    assert __main__.main(command) == 0
    said = capsys.readouterr().out
    assert "agreement" not in said and "from disk to disk" in said
    for name in MARKERS:  # heads are the experts' own
        folders = project.parent / "experts" / name, tmp_path / "merged" / "tasks" / name
        classifier = transformers.AutoModelForSequenceClassification
        own, ready = (classifier.from_pretrained(folder) for folder in folders)
        for part in ("classifier.weight", "bert.pooler.dense.weight"):
            assert torch.equal(ready.get_parameter(part), own.get_parameter(part))
        assert ready.config.id2label == own.config.id2label
    base, *experts = (
        transformers.AutoModel.from_pretrained(folder).get_input_embeddings().weight
        for folder in (tmp_path / "merged", *(project.parent.glob("experts/*")))
    )
    assert_close(base, sum(experts) / 2, rtol=0, atol=1e-6)


def test_check_refuses_what_a_method_lacks_with_exit_code_2(project, capsys):
    path = changed(project, 0, merge=None)
    assert __main__.main(["check", str(path)]) == 2
    assert "divmerge/layer reads unlabelled inputs: give task 'mood'" in capsys.readouterr().err
    assert __main__.main(["check", str(path), "--method", "average"]) == 0
    assert "negative, positive" in capsys.readouterr().out


def test_the_example_says_what_comes_next_and_replaces_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert __main__.main(["example", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    monkeypatch.setattr(
        user_models.example, "make_example", lambda folder: folder / "my_models.yaml"
    )
    assert __main__.main(["example", "a b"]) == 0
    check_it, merge_it = capsys.readouterr().out.splitlines()[1:]
    assert shlex.split(check_it) == ["divmerge", "check", "a b/my_models.yaml"]
    assert shlex.split(merge_it)[:4] == ["divmerge", "merge", "a b/my_models.yaml", "a b/merged"]


def test_a_method_without_a_single_model_is_refused(bench):
    with pytest.raises(ValueError, match="no single merged model"):
        merge_and_score(bench, ["twin"], progress=False)


def test_coefficients_are_found_again_from_the_merge(bench, found):
    vectors, made = bench.problem.vectors, found.made
    near = torch.tensor(made["divmerge/layer"].fit["coefficients"])
    again = save_module.coefficients_of(vectors, made["divmerge/layer"].merged, "layer", near)
    assert_close(again, near, rtol=0, atol=1e-4)
    average = save_module.coefficients_of(vectors, made["average"].merged, "task")
    assert_close(average, torch.full((2, 1), 0.5), rtol=0, atol=1e-5)
    assert save_module.coefficients_of(vectors, made["ties"].merged, "task") is None
    near, still = torch.tensor([[0.25], [0.75]]), vectors.map(torch.zeros_like)  # all are open
    assert_close(save_module.coefficients_of(still, vectors.base, "task", near), near)
    assert_close(save_module.coefficients_of(still, vectors.base, "task"), torch.zeros(2, 1))


def test_an_expert_that_another_order_of_labels_would_lift_is_remarked():
    said, meant = [0, 1, 2] * 20, [2, 1, 0] * 20  # outputs in the order c, b, a
    note = order_note("t", said, meant, "abc")
    assert re.search("right on 0.33 .* 1.00 if its outputs were c, b, a;", note)
    assert order_note("t", said, said, "abc") is None, "all right as it is"
    assert order_note("t", [0] * 60, meant, "abc") is None, "a constant answer has no order"


def test_labels_in_another_order_are_warned_of(plan, bench, found, cache, tmp_path, monkeypatch):
    def swapped(*arguments, **labels) -> pd.DataFrame:
        said = [0, 1] * (ROWS["test"] // 2)
        found = own_experts(*arguments, **labels)
        return found.assign(predicted=[said] * 2, gold=[said[::-1], said])

    monkeypatch.setattr(user_models.result, "own_experts", swapped)
    said = "'mood': the expert is right on 0.00 of the rows"
    with pytest.warns(UserWarning, match=said):
        told = merge_and_score(bench, ["average"], progress=False)
    write_merged(plan, bench, replace(found, notes=told.notes), "average", tmp_path / "merged")
    assert said in (tmp_path / "merged" / "README.md").read_text(), "the card has the warning"


def test_the_grouping_is_the_one_asked_for_or_the_methods_own():
    specs = ("divmerge/layer", "divmerge", "ties")
    assert list(map(save_module.grouping_of, specs)) == ["layer", "task", "task"]


@pytest.mark.parametrize("kind", ["distilbert", "t5"])
def test_what_is_written_answers_as_what_was_merged(tmp_path, cache, kind):
    plan, bench, found, folder = averaged(make_project(tmp_path, kind), tmp_path / "merged")
    encoder = transformers.AutoModel.from_pretrained(folder)
    merged = bench.problem.vectors.layout.unflatten(found.made["average"].merged)
    for name, tensor in merged.items():
        assert torch.equal(encoder.get_parameter(name), tensor)
    for number, task in enumerate(plan.tasks):
        model, batch = load_with_head(folder, task), bench.test[number].batches[0]
        with torch.no_grad():
            wanted = bench.problem.logits(found.made["average"].merged, number, batch)
            assert_close(model(**batch.inputs).logits, wanted, rtol=0, atol=1e-5)
        assert list(model.config.id2label.values()) == LABELS[task]
        alone = transformers.pipeline("text-classification", model=str(folder / "tasks" / task))
        texts = [row["text"] for row in toy_rows(task)["test"]]
        lengths = torch.tensor([len(ids) for ids in plan.base.tokenizer(texts).input_ids])
        batches = bench.test[number].batches
        answers = torch.cat([model(**b.inputs).logits.argmax(-1) for b in batches]).tolist()
        order = lengths.argsort(stable=True).tolist()
        said = [LABELS[task].index(one["label"]) for one in alone([texts[n] for n in order])]
        assert said == answers
    card = (folder / "README.md").read_text()
    for words in ('from_pretrained("tasks/mood")', "average", "negative", str(ROWS["merge"])):
        assert words in card


def test_a_base_that_is_a_classifier_leaves_its_head_behind(tmp_path, cache):
    project = make_project(tmp_path)
    make_expert(tmp_path / "base", tmp_path / "base", ["x", "y", "z"], seed=9, scale=0)
    plan, bench, found, folder = averaged(project, tmp_path / "merged")
    assert "classifier.bias" in plan.notes[0] and "left out" in plan.notes[0]
    stored = load_file(folder / "model.safetensors")
    assert not any("classifier" in name for name in stored)
    card = (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert not {"architectures", "id2label", "label2id"} & set(config)
    assert "base base: 2 tensors left out" in card and str(tmp_path) not in card
    own = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tasks/place")
    assert list(own.config.id2label.values()) == LABELS["place"]
    assert torch.equal(own.classifier.bias, bench.experts[1].head["classifier.bias"])


def test_only_what_was_merged_can_be_written(plan, bench, found, tmp_path):
    with pytest.raises(ValueError, match="was not merged; there are average"):
        write_merged(plan, bench, found, "fisher", tmp_path / "x")


def test_scores_of_a_task_have_intervals_around_them(found):
    table = task_scores(found.report, "average").set_index("task")
    drawn = table[table.low.notna()]
    assert (drawn.low <= drawn.value).all() and (drawn.value <= drawn.high).all()
    right = found.report.metrics().query("method == 'average' and metric == 'accuracy'")
    assert right.set_index("task").value.to_dict() == dict(table[table.metric == "accuracy"].value)


def test_scores_stand_beside_the_expert_and_the_majority_class():
    gold = [0, 0, 0, 1] * 10  # majority class: .75
    said = {"expert": gold, "average": [0, 0, 1, 1] * 10, "base": [1] * 40}
    rows = [
        {"method": m, "task": task, "predicted": p if task == "a" else gold[::-1], "gold": gold}
        for m, p in said.items()
        for task in ("a", "b")  # the expert of b is below the majority: it does not count
    ]
    report = Report(pd.DataFrame(rows).assign(suite="local", subset="a+b", seed=0))
    table = task_scores(report, "average").set_index(["task", "metric"])
    assert table.value["a", "accuracy"] == table.value["a", "ratio"] == 0.75
    assert table.value["a", "majority"] == table.value["b", "majority"] == 0.75
    assert table.value["a", "kept_margin"] == 0 == table.value["all", "kept_margin"]
    assert table.low["a", "kept_margin"] < 0 < table.high["a", "kept_margin"]
    assert table.value["b", "ratio"] == 1 and math.isnan(table.low["b", "ratio"])
    assert math.isnan(table.value["b", "kept_margin"])
    assert task_scores(report, "base").set_index(["task", "metric"]).value["a", "kept_margin"] == -2


def test_the_command_merges_what_a_file_describes(project, tmp_path, cache, capsys):
    command = ["merge", str(project), str(tmp_path / "merged"), "--budget", "2"]
    assert __main__.main([*command, "--method", "average", "--method", "task_arithmetic"]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and "agreement" in said and "negative, positive" in said
    assert re.search(r"^task_arithmetic, options: the best of 2 sets on the validation", said, re.M)
    assert re.search(r"mood +majority +[\d.]+ +- +-\n", said), "no interval, and no NaN"
    for name, searched in {"average": False, "task_arithmetic": True}.items():
        assert f"merged model in {(folder := tmp_path / 'merged' / name)}" in said
        assert load_with_head(folder, "mood").config.num_labels == 2
        assert ("best of 2 sets" in (folder / "README.md").read_text()) == searched
    assert __main__.main(command + ["--method", "average"]) == 2, "the folder is not empty"
    assert __main__.main(["merge", str(project), str(tmp_path / "x"), "--method", "linear"]) == 2
    assert "(did you mean 'average'?)" in capsys.readouterr().err
    bare = make_project(tmp_path / "bare")
    bare.write_text(re.sub(r" *validation: .*\n", "", bare.read_text()))
    command = ["merge", str(bare), str(tmp_path / "x"), "--method", "ties", "--budget", "3"]
    assert __main__.main(command) == 2
    assert "budget is 3 candidates on validation rows" in capsys.readouterr().err


def test_options_are_set_and_wrong_ones_are_refused_first(project, tmp_path, cache, capsys):
    command = ["merge", str(project), str(tmp_path / "merged"), "--method", "task_arithmetic"]
    assert __main__.main([*command, "--set", "scale=0.25"]) == 0
    told = json.loads((tmp_path / "merged" / "coefficients.json").read_text())
    assert told["options"]["scale"] == 0.25
    assert_close(torch.tensor(told["values"]), torch.full((2, 1), 0.25))
    for given, words in (
        ("scale=much", "task_arithmetic: scale is 'much'; Input should be a valid number"),
        ("lr=1", "no such options ['lr']; these methods take ['scale']"),
        ("scale", "--set takes NAME=VALUE"),
    ):
        command[2] = str(tmp_path / "other")
        check_too = ["check", str(project), "--method", "task_arithmetic", "--set", given]
        capsys.readouterr()
        assert __main__.main([*command, "--set", given]) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
        assert __main__.main(check_too) == 2 and capsys.readouterr().err == said


def test_the_cards_scores_are_those_of_the_file(project, tmp_path, cache, monkeypatch):
    """A base in bfloat16 is written in bfloat16; its rounded weights are what is scored."""
    base = tmp_path / "base"
    shutil.copytree(project.parent / "base", base)
    save = transformers.AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained
    save(base)
    plan = check(read(local_files.with_fields(project, base=str(base))))
    bench = load(plan)
    found = merge_and_score(bench, ["average"], budget=1, progress=False)
    exact, layout = found.made["average"].merged, bench.problem.vectors.layout
    parts = layout.unflatten(exact)
    kinds = {n: t.dtype for n, t in load_file(base / "model.safetensors").items()}
    rounded = layout.flatten({name: parts[name].to(kinds[name]) for name in layout.names})
    assert not torch.equal(exact, rounded)
    folder = write_merged(plan, bench, found, "average", tmp_path / "merged")
    assert torch.equal(save_module.in_file(folder, layout), rounded)
    wanted = task_scores(rescored(found.report, bench, "average", rounded), "average")
    asked = []
    again = lambda *given: asked.append(given[-1]) or found.report  # noqa: E731
    monkeypatch.setattr(save_module, "rescored", again)
    write_merged(plan, bench, found, "average", tmp_path / "again")
    assert torch.equal(asked[0], rounded), "what is scored is the file"
    card = (folder / "README.md").read_text()
    assert all(f"{value:.3f}" in card for value in wanted.value.dropna())


def test_an_output_that_others_stand_in_is_refused_before_the_merge(
    project, tmp_path, cache, capsys, monkeypatch
):
    command = ["merge", str(project), str(tmp_path / "out"), "--overwrite", "--method", "average"]
    assert __main__.main(command) == 0
    shutil.copytree(tmp_path / "out", tmp_path / "out" / "ties")
    assert __main__.main(command) == 2
    assert "holds ties, no part of a model; name" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / "ties")
    monkeypatch.chdir(tmp_path / "out")
    assert __main__.main(command) == 2
    assert "holds the current folder" in capsys.readouterr().err


def test_a_refusal_is_one_message_and_exit_code_2(tmp_path, capsys):
    assert __main__.main(["check", str(tmp_path / "none.yaml")]) == 2
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(r"error: there is no file '.*none.yaml'; .*\n", err)


def stopping(bench: Experiment, passes: float = math.inf) -> tuple[Experiment, list]:
    """The models, which stop the program at a pass; and a list that grows with every pass."""
    seen = []

    def forward(parameters, pairs):
        seen.append(pairs)
        if len(seen) == passes:
            raise KeyboardInterrupt
        return bench.problem.forward(parameters, pairs)

    return replace(bench, problem=replace(bench.problem, forward=forward)), seen


@pytest.mark.parametrize("make", [make_project, make_language_project])
def test_a_fit_of_users_models_that_was_stopped_goes_on(tmp_path, cache, make):
    bench = load(check(read(make(tmp_path / "home"))))
    asked = {"budget": 1, "epochs": 10, "inputs": 8, "progress": False}
    (counted, passes), spec = stopping(bench), "divmerge/layer"
    whole = merge_and_score(counted, [spec], **asked).made[spec]
    with pytest.raises(KeyboardInterrupt):
        merge_and_score(stopping(bench, len(passes) // 2)[0], [spec], **asked)
    counted, fewer = stopping(bench)
    again = merge_and_score(counted, [spec], **asked).made[spec]
    assert torch.equal(again.merged, whole.merged) and again.fit == whole.fit
    assert len(fewer) < 0.8 * len(passes)


def test_an_interrupted_merge_has_exit_code_130(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save_module, "load", raising(KeyboardInterrupt()))
    command = ["merge", str(project), str(tmp_path / "merged"), "--method", "average"]
    assert __main__.main(command) == 130 and not (tmp_path / "merged").exists()
    assert "interrupted" in capsys.readouterr().err
