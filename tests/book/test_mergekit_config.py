"""mergekit's own YAML: read as mergekit reads it, merged, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from divmerge_book import __main__
from divmerge_book.models.mergekit_config import Recipe, at, read_recipe
from divmerge_book.models.mergekit_folders import named
from divmerge_book.models.mergekit_merge import merge_config, summary
from local_files import make_base, make_expert
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from divmerge_core.checkpoints import MergeRecord, save
from divmerge_core.checkpoints.safetensors_io import Stored

SHAPES = {"model.embed_tokens.weight": (30, 8), "model.layers.0.mlp.up_proj.weight": (12, 8)}
SHAPES |= {"model.layers.1.self_attn.q_proj.weight": (8, 8), "model.norm.weight": (8,)}
CONFIG = {"vocab_size": 30, "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Base and two experts in the hub's layout, with a tokenizer."""
    folder = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        (folder / name / "tokenizer.json").write_text("{}")
        tensors = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def put(zoo, tmp_path):
    """Writes a configuration of this method, with base and both experts unless it says more.

    A field that is called as a model gives another folder for it.
    """

    def written(method: str, weights=({}, {}), base="base", **fields):
        other = {name: fields.pop(name) for name in ("a", "b") if name in fields}
        other = {n: str(m) if isinstance(m, Path) else m for n, m in other.items()}
        models = [
            {"model": other.get(name, str(zoo / name)), **({"parameters": w} if w else {})}
            for name, w in zip(("a", "b"), weights, strict=True)
        ]
        whole = {"merge_method": method, "models": models, **fields}
        if base:
            whole["base_model"] = str(other.get(base, zoo / base))
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({n: v for n, v in whole.items() if v is not None}))
        return path

    return written


def states(zoo):
    return [load_file(zoo / name / "model.safetensors") for name in ("base", "a", "b")]


def result(path, tmp_path):
    return load_file(merge_config(path, tmp_path / "out") / "model.safetensors")


def altered(zoo, tmp_path, name, tensors=()):
    """A copy of a model with other tensors."""
    shutil.copytree(zoo / name, folder := tmp_path / f"other_{name}")
    tensors = load_file(folder / "model.safetensors") | dict(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_ties_trims_each_tensor_weighs_then_elects_and_divides_by_weights(zoo, put, tmp_path):
    weights, densities = (0.4, 1.1), (0.5, 0.3)
    given = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    found = result(put("ties", given, parameters={"lambda": 0.7}), tmp_path)
    base, *experts = states(zoo)
    for name, start in base.items():
        entries = []
        for expert, weight, density in zip(experts, weights, densities, strict=True):
            delta = (expert[name] - start).flatten()
            kept = delta.abs().argsort(descending=True)[: int(density * len(delta))]
            entries.append(torch.zeros_like(delta).index_put((kept,), weight * delta[kept]))
        moved = torch.zeros(start.numel())
        for place, (one, two) in enumerate(zip(*entries, strict=True)):
            sign = 1 if one + two >= 0 else -1
            agree = [(x, w) for x, w in zip((one, two), weights, strict=True) if x * sign > 0]
            if agree:
                moved[place] = sum(x for x, _ in agree) / sum(w for _, w in agree)
        assert_close(found[name], start + 0.7 * moved.view(start.shape))


def test_weights_by_filter_and_by_depth_are_those_of_every_tensor(zoo, put, tmp_path):
    weights = [{"filter": "mlp", "value": 0.5}, {"filter": "q_proj", "value": [0.0, 0.8]}]
    path = put("task_arithmetic", ({"weight": [*weights, {"value": 0.2}]}, {"weight": 0.1}))
    found, (base, a, b) = result(path, tmp_path), states(zoo)
    for name, own in zip(SHAPES, (0.2, 0.5, 0.8, 0.2), strict=True):
        start = base[name]
        assert_close(found[name], start + own * (a[name] - start) + 0.1 * (b[name] - start))


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_needs_no_base_and_divides_by_the_weights(zoo, put, tmp_path, normalize):
    path = put("linear", ({"weight": 1}, {"weight": 3}), None, parameters={"normalize": normalize})
    found, (_, a, b) = result(path, tmp_path), states(zoo)
    shown = json.loads((tmp_path / "out" / "coefficients.json").read_text())["values"]
    assert shown == ([[0.25], [0.75]] if normalize else None)  # of task vectors of the first model
    by = 4 if normalize else 1
    assert_close(found, {name: (a[name] + 3 * b[name]) / by for name in a})


@pytest.mark.parametrize(("method", "files"), [("linear", 2), ("slerp", 2), ("task_arithmetic", 3)])
def test_a_model_as_the_base_is_read_and_hashed_once(put, tmp_path, monkeypatch, method, files):
    read, hashed = [], []
    mapped = Stored.mapped
    monkeypatch.setattr(Stored, "mapped", lambda own: read.append(own) or mapped(own))
    monkeypatch.setattr(save, "sha256", lambda file: hashed.append(file) or str(file))
    base = {"linear": None, "slerp": "a"}.get(method, "base")
    given = {"base": base, "parameters": {"t": 0.5} if method == "slerp" else {"weight": 1.0}}
    card = (merge_config(put(method, **given), tmp_path / "out") / "README.md").read_text()
    assert len(set(hashed)) == len(hashed) == files and len(read) == files * len(SHAPES)
    assert all(f"| {name}/model.safetensors |" in card for name in ("base", "b"))
    what = "2 experts of base" if method == "task_arithmetic" else "2 models"
    assert f"{what}, merged into one model." in card and "without the heads" not in card


def test_slerp_goes_from_the_base_model_to_the_other(zoo, put, tmp_path):
    for t, end in ((0.0, "b"), (1.0, "a")):
        found = result(put("slerp", base="b", parameters={"t": t}), tmp_path / end)
        assert_close(found, load_file(zoo / end / "model.safetensors"))


def test_dare_that_drops_nothing_is_task_arithmetic_and_draws_alike_each_time(zoo, put, tmp_path):
    weights = ({"weight": 0.3}, {"weight": 0.6})
    sums = result(put("task_arithmetic", weights), tmp_path / "sums")
    assert_close(result(put("dare_linear", weights), tmp_path / "all"), sums)
    half = put("dare_linear", weights, parameters={"density": 0.5})
    once, again = (result(half, tmp_path / name) for name in ("once", "again"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert (once["model.embed_tokens.weight"] == states(zoo)[0]["model.embed_tokens.weight"]).any()


def test_a_list_is_read_between_its_entries_over_depth():
    assert [at([0, 1, 0.5], "x", depth) for depth in (0.0, 0.25, 0.5, 1.0)] == [0, 0.5, 1, 0.5]
    assert at([0.2, 0.9], "x", 3 / 7) * 4096 < 2048  # as mergekit rounds: one entry fewer
    assert at(["1e-1", 0.5], "x", 0.0) == 0.1 and at([], "x", 0.0) is None  # YAML reads a text
    assert [at([True, False], "x", depth) for depth in (0.0, 0.5, 1.0)] == [True, True, False]
    assert at([{"filter": "mlp", "value": 2}], "attn", 0.0) is None


@pytest.mark.parametrize("form", ["yml", "json"])
def test_the_command_writes_dtype_tokenizer_file_and_card(zoo, put, tmp_path, capsys, form):
    path = put("linear", [{"weight": 1}] * 2, None, dtype="float32", out_dtype="bfloat16")
    if form == "json":
        facts = json.dumps(yaml.safe_load(path.read_text()), indent=1)
        (path := tmp_path / "config.json").write_text(facts)
    assert __main__.main(["check", str(path)]) == 0
    assert "linear of 2 models, 4 tensors, from disk to disk" in capsys.readouterr().out
    assert __main__.main(["merge", str(path), str(tmp_path / "out")]) == 0
    assert "merged model in" in capsys.readouterr().out
    out = tmp_path / "out"
    assert (out / "mergekit_config.yml").read_text() == path.read_text()
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert (out / "tokenizer.json").is_file()
    assert "| a | 0.5 |" in (out / "README.md").read_text()
    assert __main__.main(["merge", str(path), str(out)]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert __main__.main(["merge", str(path), str(out), "--method", "ties"]) == 2


BOTH = ({"weight": 1}, {"weight": 1})


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_a_slice_has_parameters_between_its_sources_and_the_files(zoo, put, tmp_path, key):
    folders = [altered(zoo, tmp_path, name) for name in ("a", "b")]
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({"vocab_size": 30, key: 2}))
    sources = [{"model": str(folder), "layer_range": [0, 2]} for folder in folders]
    sources[0]["parameters"] = {"weight": [{"filter": "mlp", "value": 0.5}]}
    slices = [{"sources": sources, "parameters": {"weight": 0.2, "normalize": False}}]
    fields = {"slices": slices, "parameters": {"weight": 0.9, "normalize": True}}
    found = result(put("linear", base=None, models=None, **fields), tmp_path)
    _, a, b = states(zoo)
    for name, own in zip(SHAPES, (0.2, 0.5, 0.2, 0.2), strict=True):
        assert_close(found[name], own * a[name] + 0.2 * b[name])


def test_a_zero_tensor_is_at_a_right_angle_to_every_other(zoo, put, tmp_path):
    zero = altered(zoo, tmp_path, "a", {"model.norm.weight": torch.zeros(8)})
    path = put("slerp", base="a", parameters={"t": 0.5}, a=zero)
    end = states(zoo)[2]["model.norm.weight"]
    assert_close(result(path, tmp_path)["model.norm.weight"], end * 0.5**0.5)


@pytest.mark.parametrize("narrow", ["base", "a"])
def test_numbers_are_as_wide_as_the_widest_model_unless_the_file_says(zoo, put, tmp_path, narrow):
    tensors = load_file(zoo / narrow / "model.safetensors")
    other = altered(zoo, tmp_path, narrow, {n: tensor.bfloat16() for n, tensor in tensors.items()})
    found = result(put("ties", BOTH, **{narrow: other}), tmp_path)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_a_revision_beside_a_path_is_asked_of_the_hub(zoo, put, tmp_path, monkeypatch):
    asked = []

    def download(name, revision, **_):
        asked.append((name, revision))
        return str(cached)

    cached = tmp_path / "models--x--y" / "snapshots" / "0a1b"
    shutil.copytree(zoo / "base", cached)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for model in ({"model": {"path": "x/y", "revision": "v1"}}, "x/y@v1"):
        recipe, _ = read_recipe(put("ties", BOTH, base=None, base_model=model))
        assert recipe.record.base_name == "x/y"
    assert asked == [("x/y", "v1")] * 2


@pytest.mark.parametrize("name", ["base", "a"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("lm_head.weight", "lacks lm_head.weight, which .* holds; all are merged"),
        ("model.layers.2.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", ""),
    ],
)
def test_all_but_buffers_must_be_in_every_model(zoo, put, tmp_path, name, more, message):
    path = put("ties", BOTH, **{name: altered(zoo, tmp_path, name, {more: torch.ones(9)})})
    if message:
        with pytest.raises(ValueError, match=message):
            read_recipe(path)
    else:
        assert (more in result(path, tmp_path)) == (name == "base")


def test_two_equal_models_are_said(zoo, put, tmp_path):
    shutil.copytree(zoo / "a", tmp_path / "twin")
    said = summary(put("ties", BOTH, b=tmp_path / "twin")).splitlines()
    assert said[1:] == [f"note: {zoo / 'a'} and {tmp_path / 'twin'} have equal weights"]
    assert "note" not in summary(put("ties", BOTH))


def test_a_configuration_that_decides_otherwise_is_said(zoo, put, tmp_path):
    """Of equal shapes, so that nothing else would show it."""
    folder = altered(zoo, tmp_path, "b")
    other = {"rope_theta": 5e5, "num_attention_heads": 2, "vocab_size": 31, "use_cache": False}
    other |= {"id2label": {"0": "yes", "1": "no"}}
    configs = {folder: CONFIG | other, (base := altered(zoo, tmp_path, "base")): CONFIG}
    configs[base] |= {"rope_theta": 1e4, "num_attention_heads": 2, "use_cache": True}
    configs[base] |= {"id2label": {"0": "no", "1": "yes"}}
    for place, config in configs.items():
        (place / "config.json").write_text(json.dumps(config))
    path = put("task_arithmetic", BOTH, base=base, b=folder)
    labels, note = summary(path).splitlines()[1:]
    assert "id2label = {'0': 'yes', '1': 'no'}" in labels
    assert f"{folder} has rope_theta = 500000.0, and the merged folder will have 10000.0" in note
    written = merge_config(path, tmp_path / "out")
    assert json.loads((written / "config.json").read_text())["rope_theta"] == 10000.0


def test_models_of_two_architectures_are_told_to_be_that(put, tmp_path):
    make_expert(tmp_path / "b", make_base(tmp_path / "bert"), ["no", "yes"])
    with pytest.raises(ValueError, match="lacks classifier.bias.* models of one architecture"):
        read_recipe(put("linear", BOTH, base=None, b=tmp_path / "b"))


def test_encoder_and_decoder_have_each_a_depth():
    names = [f"{part}.{n}.weight" for part, n in (("encoder.block", 3), ("decoder.block", 1))]
    record, names = MergeRecord("linear", ("a",), Path()), [*names, "encoder.block.1.weight"]
    recipe = Recipe("linear", record, [{}], [{"weight": [0, 1]}], names)
    assert [recipe.value("weight", name) for name in recipe.names] == [1, 1, 1 / 3]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_what_is_no_number_is_not_left_out(zoo, put, tmp_path, method):
    broken = altered(zoo, tmp_path, "a", {"model.norm.weight": torch.full((8,), torch.nan)})
    path = put(method, BOTH, a=broken)
    with pytest.raises(ValueError, match="numbers of model.norm.weight hold NaN"):
        merge_config(path, tmp_path / "out")


def test_a_folder_that_is_no_whole_model_is_refused(zoo, put, tmp_path):
    packed = torch.ones(4, dtype=torch.int8)
    folder = altered(zoo, tmp_path, "a", {"model.norm.weight": packed})
    with pytest.raises(ValueError, match="norm.weight is stored as torch.int8, so it is quantised"):
        read_recipe(put("ties", BOTH, a=folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="other_a holds no config.json; give a whole model"):
        read_recipe(put("ties", BOTH, a=folder))


def test_tokens_are_not_matched_and_no_model_stands_twice(zoo, put, tmp_path):
    other = altered(zoo, tmp_path, "a")
    path = put("ties", BOTH, tokenizer_source="base", a=other)
    read_recipe(path)
    (other / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0}}}))
    with pytest.raises(ValueError, match="number their tokens otherwise"):
        read_recipe(path)
    with pytest.raises(ValueError, match="b stands twice"):
        read_recipe(put("ties", BOTH, a=zoo / "b"))


def test_all_that_tokenizers_read_goes_along(zoo, put, tmp_path):
    base = altered(zoo, tmp_path, "base")
    (base / "additional_chat_templates").mkdir()
    names = ["source.spm", "bpe.codes", "qwen.tiktoken", "processor_config.json", "LICENSE.txt"]
    for name in (*names, "chat_template.json", "additional_chat_templates/tool.jinja"):
        (base / name).write_text(name)
    out = merge_config(put("ties", BOTH, base=base), tmp_path / "out")
    assert (out / "additional_chat_templates" / "tool.jinja").is_file()
    assert all((out / name).read_text() == name for name in (*names, "chat_template.json"))


def test_folders_of_one_name_are_numbered_and_those_of_the_cache_called_as_on_the_hub():
    cached = [Path(f"hub/models--x--{name}/snapshots/0a1b") for name in "ab"]
    assert named(cached) == ("a", "b")
    assert named([Path("x/a"), Path("y/a"), Path("a-1")]) == ("a-1", "a-2", "a-1-3")


@pytest.mark.parametrize(
    ("method", "weights", "fields", "message"),
    [
        ("della", BOTH, {}, "merge_method 'della' is not one of linear, slerp"),
        ("ties", BOTH, {"chat_template": "auto"}, "unknown field 'chat_template'"),
        ("ties", BOTH, {"tokenizer_source": "union"}, "tokenizer_source 'union': only base is"),
        ("ties", ({"weight": 1, "densty": 1}, {}), {}, "ties takes density.*got densty"),
        ("ties", ({"weight": 1}, {}), {}, "needs a weight for model.embed_tokens.weight"),
        ("ties", BOTH, {"base": None}, "ties needs a base_model"),
        ("linear", BOTH, {}, "linear has no base_model"),
        ("slerp", ({}, {}), {"parameters": {"t": 0.5}}, "slerp takes base_model and one other"),
        ("ties", BOTH, {"dtype": "int8"}, "dtype must be one of"),
        ("ties", BOTH, {"base": "a+lora"}, "adapters are not read here"),
        ("ties", BOTH, {"models": None, "slices": [{"sources": [{"model": "a"}]}]}, "slices|hub"),
        ("ties", BOTH, {"models": None}, "give models, or one slice"),
        ("ties", BOTH, {"parameters": {"density": 2}}, r"density must be in \[0, 1\], got 2"),
        ("ties", BOTH, {"parameters": {"lambda": float("inf")}}, "lambda must be a finite number"),
        ("linear", ({"weight": ["a", 1]}, {"weight": 1}), {"base": None}, "weight must be a fin"),
        ("dare_ties", ({"weight": 1, "density": -0.1}, {"weight": 1}), {}, "got -0.1 for model.em"),
        ("ties", BOTH, {"parameters": {"normalize": 0.5}}, "normalize must be true or false, got"),
        ("ties", ({"weight": [{"filter": "m", "valu": 1}]}, {}), {}, "filters and values"),
        ("ties", ({"weight": [{"fliter": "m", "value": 1}]}, {}), {}, "filters and values"),
        ("ties", ({"weight": [{"filter": "x", "value": 1}, 1]}, {}), {}, "filters and values"),
        ("ties", ({"weight": [{"filter": 1, "value": 1}]}, {}), {}, "filters and values"),
        ("ties", ({"weight": []}, {"weight": 1}), {}, "needs a weight for model.embed_tokens"),
        ("ties", ({"weight": 1, "lambda": 1}, {}), {}, "one model ties takes .*; got lambda"),
        ("slerp", ({"t": 0.5}, {}), {"base": "a"}, "for one model slerp takes none; got t"),
        ("task_arithmetic", BOTH, {"parameters": {"density": 1}}, "weight; got density"),
        ("linear", ({"weight": 1}, {"weight": -1}), {"base": None}, "weights sum to 0 for model"),
        ("ties", BOTH, {"models": [{"model": "a", "layer_range": [0, 1]}]}, "field 'layer_range'"),
        ("ties", BOTH, {"a": {"model": {"path": "a", "revison": "x"}}}, "has a path and at most a"),
        ("ties", BOTH, {"a": {"model": {"pat": "a"}}}, "has a path and at most a revision"),
        ("ties", BOTH, {"dtype": "int8", "out_dtype": "float32"}, "dtype must be one of"),
        ("ties", BOTH, {"models": None, "slices": []}, "give models, or one slice"),
        ("ties", BOTH, {"base": None, "base_model": "~no/a"}, "~ and no user here is called so"),
    ],
)
def test_what_is_unread_is_refused_by_both_commands(put, capsys, method, weights, fields, message):
    path, told = put(method, weights, **fields), []
    with pytest.raises(ValueError, match=message):
        read_recipe(path)
    for command in (["check", str(path)], ["merge", str(path), str(path.with_name("out"))]):
        assert __main__.main(command) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
