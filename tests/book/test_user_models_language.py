"""Users' language models: described, checked, merged, written, and read by transformers alone."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from divmerge_book import __main__
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.models.language.completions import greedy
from divmerge_book.models.language.models import Language
from divmerge_book.user_models import check, load, merge_and_score, read, write_merged
from divmerge_book.user_models.language_load import reader
from divmerge_book.user_models.streaming import write_from_disk
from language_files import (
    PROMPTS,
    as_chat,
    expert_of,
    logits_of,
    make_language_project,
    prompt_rows,
    save_family,
    write_lines,
)
from language_toys import save_model, tokenizer
from local_files import ROWS, averaged, changed, configured, make_adapter, refused, with_fields
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from divmerge_core.checkpoints import write
from divmerge_core.checkpoints.safetensors_io import SINGLE

# Toy experts move further than fine-tuning does.
pytestmark = pytest.mark.filterwarnings("ignore:task .* the task vector is:UserWarning")
AVERAGE = ("--method", "average")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def load_quietly(path: Path):
    plan = check(read(path))
    return plan, load(plan)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A description of two tiny Llamas; only to be read."""
    return make_language_project(tmp_path_factory.mktemp("home"), labels=None)


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """Its plan and experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_quietly(home)


# --- what is merged -------------------------------------------------------------------------------
def test_an_experts_vector_answers_as_transformers_does(made):
    plan, bench = made
    for number, source in enumerate(plan.experts):
        batch = bench.problem.batches[number][0]
        flat = bench.problem.vectors.expert(source.task.name)
        rows = [ids[mask.bool()] for ids, mask in zip(*batch.inputs.values(), strict=True)]
        alone = logits_of(source.task.expert, [row.tolist() for row in rows])
        wanted = [own[-sum(mask) :] for own, mask in zip(alone, batch.answer, strict=True)]
        found = bench.problem.logits(flat, number, batch)
        assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)
        near = batch.expert.float() - torch.cat(wanted).log_softmax(-1)
        assert near.abs().max() < 0.05  # kept in bfloat16


@pytest.mark.parametrize("method", ["average", "divmerge/block", "divmerge/layer"])
def test_the_folder_is_the_merge_that_transformers_loads(made, tmp_path, cache, method):
    plan, bench = made
    found = merge_and_score(bench, [method], budget=1, progress=False)
    folder = write_merged(plan, bench, found, method, tmp_path / "merged")
    flat, rows = found.made[method].merged, [[5, 6, 7, 8], [9, 4]]
    ours = bench.base.model
    named = bench.problem.vectors.layout.unflatten(flat)
    for row, alone in zip(rows, logits_of(folder, rows), strict=True):
        given = torch.func.functional_call(ours, named, torch.tensor([row])).logits[0]
        assert_close(alone, given, rtol=0, atol=1e-6)
    names = {"config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert names < {file.name for file in folder.iterdir()}
    kept = plan.base.folder / "tokenizer.json"
    assert (folder / kept.name).read_bytes() == kept.read_bytes()
    card = (folder / "README.md").read_text()
    assert "LlamaForCausalLM.from_pretrained" in card and "`rouge1`: F1" in card
    assert (folder / "mergekit_config.yml").is_file()


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi", "gpt_neox", "mixtral", "t5", "bart"])
def test_every_family_makes_the_way_there_and_back(tmp_path, cache, kind):
    """Loaded by transformers, the mean of two experts has the mean of their tensors."""
    more = {"d_kv": 16, "d_ff": 48} if kind == "t5" else {}
    more |= {"encoder_layers": 1, "decoder_layers": 1} if kind == "bart" else {}
    base = save_family(tmp_path / "base", kind, **more)
    splits = dict.fromkeys(["validation", "test", *(["merge"] if kind == "gpt2" else [])])
    project = make_language_project(tmp_path, base=base, **splits)
    assert __main__.main(["merge", str(project), str(tmp_path / "m"), "--method", "average"]) == 0
    folders = [tmp_path / "m", *(tmp_path / "experts" / name for name in PROMPTS)]
    two = kind in ("t5", "bart")
    build = getattr(transformers, f"AutoModelFor{'Seq2Seq' if two else 'Causal'}LM")
    found, *own = (dict(build.from_pretrained(place).named_parameters()) for place in folders)
    for name, tensor in found.items():
        assert_close(tensor, (own[0][name] + own[1][name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("absent", [[], ["merge", "validation", "test"]])
def test_a_t5_with_an_output_matrix_of_its_own_keeps_it(tmp_path, cache, absent):
    """T5 1.1 and FLAN-T5: transformers ties what config.json says is apart, and loads it apart."""
    base = save_family(tmp_path / "base", "t5", d_kv=16, d_ff=48)
    project = make_language_project(tmp_path, base=base, **dict.fromkeys(absent))
    for number, folder in enumerate((base, *(tmp_path / "experts" / name for name in PROMPTS))):
        own = load_file(file := folder / SINGLE)
        own["lm_head.weight"] = own["shared.weight"] + number + 1
        save_file(own, file, {"format": "pt"})
        configured(folder, tie_word_embeddings=False, scale_decoder_outputs=None)
    assert __main__.main(["merge", str(project), str(tmp_path / "merged"), *AVERAGE]) == 0
    build = transformers.AutoModelForSeq2SeqLM.from_pretrained
    merged, mood = build(tmp_path / "merged"), build(tmp_path / "experts" / "mood")
    assert_close(merged.lm_head.weight - merged.shared.weight, torch.full((316, 32), 2.5))
    assert merged.config.scale_decoder_outputs is mood.config.scale_decoder_outputs is False


def test_numbers_that_are_no_parameters_are_told_where_they_differ(tmp_path, cache):
    base = save_family(tmp_path / "base", "bart", encoder_layers=1, decoder_layers=1)
    plan = check(read(make_language_project(tmp_path, base=base)))
    own = load_file(file := tmp_path / "experts" / "mood" / "model.safetensors")
    save_file({n: t + ("logits_bias" in n) for n, t in own.items()}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="'mood': its final_logits_bias is no parameter and diff"):
        load(plan)


def test_the_wrapper_of_a_saved_base_is_not_written_again(home, tmp_path, cache):
    base = Path(shutil.copytree(home.parent / "base", tmp_path / "base"))
    own = load_file(base / "model.safetensors")
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in own.items()}
    save_file(wrapped, base / "model.safetensors", metadata={"format": "pt"})
    folder = averaged(with_fields(home, base=str(base)), tmp_path / "merged")[-1]
    assert load_file(folder / "model.safetensors").keys() == own.keys()


ADAPTERS = {  # how an adapter differs from alpha / r times B A for two matrices
    "": {},
    "rsLoRA, patterns": {"use_rslora": True, "alpha_pattern": {"h.0.attn.c_attn": 9}},
    "saved whole": {"saved": {"transformer.ln_f.bias": torch.ones(32)}},
}


@pytest.mark.parametrize("method", ["average", "ties", "dare", "slerp", *ADAPTERS])
def test_without_rows_models_stay_on_disk_and_the_merge_is_the_same(
    tmp_path, cache, monkeypatch, capsys, method
):
    base, bare = save_family(tmp_path / "base", "gpt2"), dict.fromkeys(ROWS)
    project = make_language_project(tmp_path, base=base, **bare)
    if method in ADAPTERS:
        shapes = {"transformer.h.0.attn.c_attn": (96, 32), "transformer.h.1.mlp.c_fc": (128, 32)}
        plain = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}
        make_adapter(tmp_path / "lora", shapes, **plain, **ADAPTERS[method])
        project, method = changed(project, 0, expert="lora"), "ties"
    command = ["merge", str(project), "--method", method]
    assert __main__.main([*command, str(tmp_path / "disk")]) == 0
    assert "from disk to disk" in capsys.readouterr().out
    if method == "dare":
        assert __main__.main([*command, str(tmp_path / "other"), "--seed", "3"]) == 0
        cards = [(tmp_path / name / "README.md").read_text() for name in ("disk", "other")]
        own = "; all others are the method's own"
        assert f'"seed": 0}}{own}' in cards[0] and f'"seed": 3}}{own}' in cards[1]
    monkeypatch.setattr("divmerge_book.user_models.checking.obstacle", lambda *given: "told so")
    assert __main__.main([*command, str(tmp_path / "memory")]) == 0
    assert "read into memory: told so" in capsys.readouterr().out
    found, wanted = (
        dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        for name in ("disk", "memory")
    )
    if method == "dare":  # which entries go depends on the order of tensors
        assert found.keys() == wanted.keys()
    else:
        assert_close(found, wanted, rtol=0, atol=1e-6)
    for name in ("config.json", "generation_config.json"):
        one, two = (json.loads((tmp_path / n / name).read_text()) for n in ("disk", "memory"))
        assert one["eos_token_id"] == two["eos_token_id"]
    kept = (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "disk" / "tokenizer.json").read_bytes() == kept


@pytest.mark.parametrize("kind, rows", [("llama", True), ("qwen2", False)])
def test_the_folder_is_what_other_programs_read(tmp_path, cache, monkeypatch, kind, rows):
    """What vLLM and llama.cpp's converter look at: index, names, rows, dtype, tokens, template."""
    base, words = save_family(tmp_path / "base", kind), tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(base)
    splits = {} if rows else dict.fromkeys(["validation", "test", "merge"])
    plan = check(read(make_language_project(tmp_path, base=base, **splits)), ["average"])
    if rows:
        bench = load(plan)
        found = merge_and_score(bench, ["average"], budget=1, progress=False)
        given = (plan, bench, found, "average", tmp_path / "merged")
        folder = write_merged(*given, max_shard_bytes=40_000)
    else:
        small = partial(write, max_shard_bytes=40_000)
        monkeypatch.setattr("divmerge_book.user_models.streaming.write", small)
        folder = write_from_disk(plan, "average", tmp_path / "merged", options={})
    parts = {file.name: load_file(file) for file in folder.glob("model-*-of-*.safetensors")}
    held = {name: file for file, tensors in parts.items() for name in tensors}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == held and len(parts) > 1 and set(held) == set(load_file(base / SINGLE))
    config, settings, old = (
        json.loads((place / f"{name}.json").read_text())
        for place, name in ((folder, "config"), (folder, "generation_config"), (base, "config"))
    )
    kept = ("architectures", "model_type", "vocab_size", "dtype", "tie_word_embeddings")
    assert [config[name] for name in kept] == [old[name] for name in kept]
    table = parts[held["model.embed_tokens.weight"]]["model.embed_tokens.weight"]
    assert table.dtype == torch.float32 == getattr(torch, config["dtype"])
    again, its = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, base))
    assert (again.get_vocab(), again.chat_template) == (its.get_vocab(), TEMPLATE)
    assert len(table) == config["vocab_size"] > max(again.get_vocab().values())
    assert settings["eos_token_id"] == config["eos_token_id"] == again.eos_token_id


def test_the_cards_scores_are_those_of_the_file(home, tmp_path, cache):
    """A base in bfloat16 is written in bfloat16; its rounded weights are what is scored."""
    base = tmp_path / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(home.parent / "base")
    model.bfloat16().save_pretrained(base)
    tokenizer().save_pretrained(base)
    _, bench, found, folder = averaged(with_fields(home, base=str(base)), tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    flat = found.made["average"].merged.bfloat16().float()
    layout = bench.problem.vectors.layout
    assert torch.equal(layout.flatten(dict(again.named_parameters())), flat)
    scores = [sum(row) / 8 for row in evaluate(bench.problem, flat, bench.test).predicted]
    card = (folder / "README.md").read_text()
    assert all(f"{value:.3f}" in card for value in scores)
    assert "base_model: base" in card and str(base) not in card, "a place on this disk only"


def test_the_command_merges_language_models(home, tmp_path, cache, capsys):
    command = ["merge", str(home), str(tmp_path / "merged"), "--method", "task_arithmetic"]
    assert __main__.main([*command, "--budget", "1"]) == 0
    assert "agreement" in capsys.readouterr().out
    assert logits_of(tmp_path / "merged", [[5, 6]])[0].shape == (2, 316)


def test_labels_are_scored_by_likelihood_and_exactly(home, cache):
    for score in ("likelihood", "exact"):
        path = home
        for number, (_, words) in enumerate(PROMPTS.values()):
            path = changed(path, number, labels=words.split(), score=score)
        _, bench = load_quietly(path)
        rows = evaluate(bench.problem, bench.problem.vectors.base, bench.test)
        assert {max(gold) for gold in rows.gold} == {1}
        assert max(map(max, rows.predicted)) <= (1 if score == "likelihood" else 2)


def test_an_expert_of_this_package_is_taken_from_its_folder(
    language_experiment, llama_folder, home, shared_cache
):
    bench, path = language_experiment, changed(home, 0)
    whole = yaml.safe_load(path.read_text()) | {"base": str(llama_folder)}
    tasks = bench.problem.vectors.tasks
    for entry, expert in zip(whole["tasks"], bench.experts, strict=True):
        kept = (shared_cache / "experts").glob(f"lm-{expert.task}-*")
        digest = expert.manifest["model.safetensors"]
        # another test may have trained the same weights under another key: either folder will do
        entry["expert"] = next(str(f) for f in kept if digest in (f / "manifest.json").read_text())
    path.write_text(yaml.safe_dump(whole))
    plan, found = load_quietly(path)
    assert {source.kind for source in plan.experts} == {"package"}
    for mine, theirs in zip(found.problem.vectors.tasks, tasks, strict=True):
        ours = found.problem.vectors.expert(mine)
        assert_close(ours, bench.problem.vectors.expert(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["transformers", "adapter"])
def test_an_expert_from_the_hub_is_taken_at_its_revision(home, tmp_path, monkeypatch, cache, kind):
    """As the hub's client keeps it: a snapshot of links, and a reference by name."""
    kept, source = tmp_path / "hub" / "models--org--mood", home.parent / "experts" / "mood"
    if kind == "adapter":
        source, shapes = tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (32, 32)}
        make_adapter(source, shapes, task_type="CAUSAL_LM", target_modules=["q_proj"])
    for revision in ("main", "v2"):
        (kept / "snapshots" / f"of-{revision}").mkdir(parents=True)
        (kept / "refs").mkdir(exist_ok=True)
        (kept / "refs" / revision).write_text(f"of-{revision}")
    shutil.copytree(source, kept / "blobs")
    for file in source.iterdir():
        (kept / "snapshots" / "of-v2" / file.name).symlink_to(kept / "blobs" / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    plan = check(read(changed(home, 0, expert="org/mood@v2")))
    assert plan.experts[0].task.expert == kept / "snapshots" / "of-v2"
    assert plan.experts[0].kind == kind
    assert load(plan).problem.vectors.norms()[0] > 0
    refused(changed(home, 0, expert="org/mood@v3"), "org/mood@v3", "hub gave none")


# --- chats ----------------------------------------------------------------------------------------
def chatting(folder: Path, *templates: str) -> Path:
    """A project of chats whose experts have these templates, and whose tokenizers begin texts."""
    project = make_language_project(folder, row=as_chat)
    for name, template in zip(PROMPTS, templates, strict=True):
        own = tokenizer()
        own.chat_template = template
        own.save_pretrained(folder / "experts" / name)
    return project


def test_chats_are_read_by_the_experts_template_and_the_last_answer_is_scored(tmp_path, cache):
    plan, bench = load_quietly(chatting(tmp_path, TEMPLATE, TEMPLATE))
    row = prompt_rows("mood", 1)[0]
    text = f"<user>{row['prompt']}<assistant>"
    assert plan.rows["merge"][0]["text"][0] == text
    assert plan.rows["test"][0]["answer"] == [r["answer"] for r in prompt_rows("mood", 8, 11)]
    own = reader(bench.base, plan.experts[0])
    asked = own.tokenizer(text)["input_ids"]
    assert asked == tokenizer()(text, add_special_tokens=False)["input_ids"]
    state = bench.problem.vectors.layout.unflatten(bench.problem.vectors.expert("mood"))
    (said,) = greedy(own, state, [asked], max_new=4)
    assert tuple(asked) + said[:-1] in {
        tuple(ids[mask.bool()].tolist())
        for b in bench.problem.batches[0]
        for ids, mask in zip(b.inputs["input_ids"], b.inputs["attention_mask"], strict=True)
    }


def test_a_chat_template_for_each_expert_is_written_by_name(tmp_path, cache):
    project = chatting(tmp_path, TEMPLATE, TEMPLATE.replace("assistant", "model"))
    plan, bench, found, folder = averaged(project, tmp_path / "merged")
    assert any("chat templates differ" in note for note in plan.notes)
    own = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "good"}]
    for name, end in (("mood", "<assistant>"), ("same", "<model>")):
        options = {"tokenize": False, "chat_template": name}
        assert own.apply_chat_template(chat, **options).endswith(end)
    assert own.apply_chat_template(chat, tokenize=False).endswith("<assistant>")


def test_chats_are_read_by_a_tokenizer_in_python_too(tmp_path):
    project, own = chatting(tmp_path, TEMPLATE, TEMPLATE), transformers.ByT5Tokenizer(extra_ids=0)
    own.chat_template = TEMPLATE
    for name in ("base", "experts/mood", "experts/same"):
        own.save_pretrained(tmp_path / name)
    plan = check(read(with_fields(project, max_length=100)))
    found = reader(Language("", torch.nn.Module(), own, "", ""), plan.experts[0]).tokenizer
    assert found("good")["input_ids"] == own("good", add_special_tokens=False)["input_ids"]


def test_an_empty_answer_of_a_chat_is_no_turn(tmp_path):
    project, row = chatting(tmp_path, TEMPLATE, TEMPLATE), {"prompt": "good", "answer": ""}
    write_lines(tmp_path / "data" / "mood-merge.jsonl", [as_chat(row)])
    assert check(read(project)).rows["merge"][0]["text"][:] == ["<user>good<assistant>"]


def test_no_template_of_the_base_stays_beside_the_experts_own(tmp_path):
    project, own = make_language_project(tmp_path, **dict.fromkeys(ROWS)), tokenizer()
    own.chat_template = {"default": TEMPLATE, "tools": TEMPLATE}
    own.save_pretrained(tmp_path / "base")
    for name in PROMPTS:  # in the file where older versions of transformers put it
        path = tmp_path / "experts" / name / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "mine"}))
    assert __main__.main(["merge", str(project), str(tmp_path / "m"), "--method", "average"]) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == "mine"


def test_chats_that_a_template_refuses_and_chats_without_one(tmp_path):
    words = "{{ raise_exception('no system role') }}"
    refused(chatting(tmp_path / "a", words, TEMPLATE), "chat template refuses", "no system role")
    refused(chatting(tmp_path / "c", "{{ 1 / 0 }}", TEMPLATE), "chat template refuses", "by zero")
    refused(chatting(tmp_path / "d", " ", TEMPLATE), "chat template writes no text of [{'role'")
    refused(make_language_project(tmp_path / "b", row=as_chat), "neither", "has a chat template")


# --- what is refused before weights are read ------------------------------------------------------
@pytest.mark.parametrize(
    "fields, words",
    [
        ({"columns": {"prompt": "ask"}}, ["no column 'ask'", "prompt, answer"]),
        ({"columns": {"answer": "reply"}}, ["no column 'reply'", "assistant's last message"]),
        ({"columns": {"text": "prompt"}}, ["text: only for kind: classifier"]),
        ({"columns": {"messages": "answer"}}, ["a list of messages, each with a role"]),
        ({"labels": ["positive", "bad"]}, ["'negative'", "is none of positive, bad"]),
        ({"score": "likelihood"}, ["score 'likelihood' is for tasks with labels"]),
        ({"score": "bleu"}, ["'likelihood', 'exact' or 'rouge1'", "got 'bleu'"]),
        ({"columns": {"prompt": "prompt", "messages": "chat"}}, ["come from one column", "'chat'"]),
        (
            {"labels": ["positive", "negative", "negative film"]},
            ["'negative film' begins with the tokens of 'negative'", "never wins by score"],
        ),
        (
            {"labels": ["positive", "negative", "Negative!"], "score": "exact"},
            ["the label 'Negative!' is, but for case and marks, 'negative'"],
        ),
        ({"validation": "data/mood-test.jsonl"}, ["stand in validation and in test"]),
        ({"expert": "data"}, ["holds no expert"]),
        ({"expert": "experts/none"}, ["expert names", "does not exist"]),
        ({"expert": "/no/such/place/none"}, ["expert names /no/such", "does not exist"]),
    ],
)
def test_a_wrong_field_is_refused(home, fields, words):
    refused(changed(home, 0, **fields), *words)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"answer": ["yes", "no"]}, ["line 2: the answer ['yes', 'no'] in column", "is no text"]),
        ({"answer": "y\ud83d"}, ["line 2: the answer in column", "half of a character"]),
        ({"messages": [{"role": "user", "content": "good"}]}, ["'prompt' and 'messages'"]),
    ],
)
def test_a_wrong_row_is_refused(home, tmp_path, row, words):
    rows = [{"prompt": "one film", "answer": "yes"}, {"prompt": "two", "answer": "no"} | row]
    refused(changed(home, 0, test=str(write_lines(tmp_path / "rows.jsonl", rows))), *words)


def test_answers_that_max_new_cuts_are_said(home, tmp_path):
    rows = [{"prompt": f"film {n}", "answer": "yes" * n} for n in (1, 9)]
    path = changed(home, 0, validation=None, test=str(write_lines(tmp_path / "r.jsonl", rows)))
    (note,) = check(read(path)).notes
    assert "task 'mood': 1 of 2 answers have more tokens than max_new, 4 (up to" in note
    write_lines(tmp_path / "r.jsonl", [{"prompt": "good", "answer": word} for word in ("ж", "no")])
    (note,) = check(read(path)).notes
    assert "1 of 2 answers, such as 'ж', have no word in a-z or 0-9" in note
    rows = [{"prompt": f"good{end}", "answer": "no"} for end in (" ", "", "\n")]
    write_lines(tmp_path / "r.jsonl", rows)
    (note,) = check(read(path)).notes
    assert "task 'mood': 2 of 8 prompts end with a space or a new line, the others" in note


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 48}, ["config.json and the weights disagree"]),
        ({"vocab_size": 300}, ["the weights disagree", "is [316, 32], not [300, 32]"]),
        ({"rope_theta": 5.0, "rope_parameters": None}, ["rope_parameters", "this very base"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["leave `kind` out"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["is quantised"]),
        ({"tie_word_embeddings": False}, ["lacks 1 tensors", "lm_head.weight"]),
        ({"num_hidden_layers": 3}, ["lacks 9 tensors", "layers.2"]),
        ({"auto_map": {"AutoModel": "own.Model"}}, ["code of its own"]),
    ],
)
def test_a_config_that_does_not_fit_is_refused(home, tmp_path, changes, words):
    shutil.copytree(home.parent / "experts" / "mood", tmp_path / "other")
    configured(tmp_path / "other", **changes)
    path = changed(home, 0, expert=str(tmp_path / "other"))
    refused(path, *words)


def test_one_expert_twice_and_a_task_without_rows_are_said(home, tmp_path):
    path = changed(changed(home, 0, expert="experts/same"), 0, merge=None, test=None)
    notes = check(read(path)).notes
    assert "have the same folder" in notes[0] and "neither merge nor test rows" in notes[1]
    for name, other in (("experts/same", "task 'mood'"), ("base", "the base")):
        shutil.copytree(home.parent / name, tmp_path / name)
        (note,) = check(read(changed(path, 1, expert=str(tmp_path / name)))).notes[:1]
        assert f"task 'same' and {other} have equal weights, {tmp_path / name}, " in note


def test_other_families_and_untied_heads_are_refused(home, tmp_path):
    other = expert_of(save_model(tmp_path / "a", "qwen2"), tmp_path / "qwen", seed=1)
    refused(changed(home, 0, expert=str(other)), "model_type = 'qwen2'", "this very base")
    make_adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (32, 32)})
    refused(with_fields(home, base=str(tmp_path / "lora")), "holds an adapter; give the model")
    refused(with_fields(home, kind="classifier", max_new=None), "write kind: language")
    base = save_family(tmp_path / "gemma2", "gemma2")
    project = make_language_project(tmp_path / "b", base=base, **dict.fromkeys(ROWS))
    configured(tmp_path / "b" / "experts" / "mood", attn_logit_softcapping=30.0)
    refused(project, "attn_logit_softcapping = 30.0, the base", "has 50.0", "this very base")
    other = save_model(tmp_path / "untied", tied=False)
    refused(changed(home, 0, expert=str(other)), "lm_head.weight", "tied in all or in none")


def test_prompts_that_do_not_fit_are_refused(home, tmp_path):
    long = [{"prompt": "good film " * 200, "answer": "yes"}]
    path = changed(home, 0, merge=str(write_lines(tmp_path / "long.jsonl", long)))
    refused(path, "longest prompt has", "max_length is 64")
    path = with_fields(path, max_length=4000)
    refused(path, "longest prompt has", "more than the 256 that the model reads")
