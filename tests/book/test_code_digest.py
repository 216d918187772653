"""Everything that decides a result is in its key, and nothing else is."""

import copy
import functools
import shutil
import sys
import threading
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import language_toys
import local_files
import pytest
import torch
from comparisons import merge, toy
from divmerge_book import TASKS, load_base
from divmerge_book.data import code_digest as digests
from divmerge_book.data import glue
from divmerge_book.data.code_digest import ROOT, code_digest, key_of, module
from divmerge_book.evaluation import cache, hyperparameter_search
from divmerge_book.evaluation import experiment as preparing
from divmerge_book.evaluation.cache import cache_path, cached
from divmerge_book.evaluation.experiment import SIZES, Size, prepare, prepare_language
from divmerge_book.evaluation.hyperparameter_search import Merges
from divmerge_book.evaluation.sizes import LanguageSize
from divmerge_book.models.finetuning import Recipe, described, folder_of
from divmerge_book.models.language import completions as completing
from divmerge_book.models.language.prompts import PROMPTS
from divmerge_book.published import sources
from divmerge_book.studies import corrupted_experts, landscapes, mergeability, robustness
from divmerge_book.studies.prediction_churn import predictions_of
from divmerge_book.user_models import check, load, read
from helpers import TINY_RECIPE, raising, toy_splits, toy_task

from divmerge_core import methods
from divmerge_core.methods import METHODS, parse


@pytest.fixture
def forget():
    """Forgets digests of edited code, and after a test."""

    def clear() -> None:
        for function in (digests.reached_digest, digests.registrations):
            function.cache_clear()

    yield clear
    clear()


@pytest.fixture
def edited(monkeypatch, forget):
    """Makes one module read otherwise: a piece of its text is replaced."""

    def edit(name: str, old: str, new: str) -> None:
        real, text = digests.module, digests.path_of(name).read_text("utf-8")
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda *_: text.replace(old, new))
            changed = digests.Module(name)
        monkeypatch.setattr(digests, "module", lambda n: changed if n == name else real(n))
        forget()

    return edit


OUTCOME, TRAIN = hyperparameter_search.outcome, "divmerge_book.models.finetuning.train"
REACHED = [  # a result, a module, and an edit there that may change the result
    (METHODS["iso_cts"], "core.merging.linalg", "return left @ right", "return -left @ right"),
    (METHODS["ties"], "core.methods.arithmetic", "trimmed).sign()) > 0", "trimmed).sign()) < 0"),
    (corrupted_experts.detection, "book.studies.corrupted_experts", "NOISE = 2.0", "NOISE = 9.0"),
    (robustness.fit_with_corrupted, "book.studies.robustness", "SHARPER = 5.0", "SHARPER = 50.0"),
    (hyperparameter_search.search, "book.evaluation.hyperparameter_search", "= max(r", "= min(r"),
    (METHODS["regmean"], "core.merging.layer_inputs", "gram += x.T @ x", "gram += x.T @ x / 2"),
    (prepare, "book.evaluation.experiment", "batch_size=64", "batch_size=32"),
    (mergeability.merged_pair, "book.interference.spectra", "residual**2", "residual**3"),
    (mergeability.pair_statistics, "book.interference.weights", "= deltas @ d", "= -deltas @ d"),
    (landscapes.grid, "book.interference.behaviour", "p.argmax(-1) !=", "p.argmax(-1) =="),
    (TRAIN, "book.models.finetuning", "adam.zero_grad()", "pass"),
    (TRAIN, "book.models.encoders", "(hidden * mask)", "(hidden)"),
    (METHODS["divmerge"], "core.merging.merged_model", "number % count", "number // count"),
    (METHODS["divmerge"], "core.kernels.merge", "BLOCK = 4096", "BLOCK = 2048"),
    (METHODS["divmerge"], "core.merging.coefficients", "(torch.sigmoid)", "(torch.tanh)"),
    (methods.parse, "core.merging.coefficients", "def block(", "def blocks("),  # a lazy import
    (prepare_language, "book.models.language.prompts", "wanted or spam?", "wanted or not?"),
    (completing.completions, "book.models.language.reading", "def truncate(", "def cut("),
    (OUTCOME, "core.methods.arithmetic", "* (votes @ trimmed)", "+ (votes @ trimmed)"),
]
UNREACHED = [  # and an edit that cannot: of figures, words, other entries, and the cache
    (OUTCOME, "book.figures.baselines", "def is_single_model(", "def is_one_model("),
    (OUTCOME, "book.evaluation.report", 'STATISTICS = ("anp"', 'STATISTICS = ("ratio"'),
    (OUTCOME, "book.runner.method_pages", "def index(", "def contents("),
    (METHODS["ties"], "core.methods.arithmetic", "Trim, elect sign", "Cut, elect sign"),
    (METHODS["ties"], "core.methods.arithmetic", "# one task at a time", "# one by one"),
    (prepare, "book.models.encoders", "give a folder or a hub", "name a folder or a hub"),
    (METHODS["ties"], "core.methods.arithmetic", '"dare"', '"dares"'),
    (OUTCOME, "core.storage", "PATIENCE = 5", "PATIENCE = 50"),
    (prepare, "book.data.tasks", 'ABBR": "abbreviation"', 'ABBR": "short form"'),
    (prepare, "book.evaluation.sizes", '"calls": 60', '"calls": 70'),
]


@pytest.mark.parametrize(
    ("case", "counts"), [*((case, True) for case in REACHED), *((c, False) for c in UNREACHED)]
)
def test_code_is_in_a_digest_where_the_result_reaches_it(edited, case, counts):
    thing, module_name, old, new = case
    before = code_digest(thing)
    edited(f"divmerge_{module_name}", old, new)
    assert (code_digest(thing) != before) == counts


def test_a_move_changes_no_digest(tmp_path, monkeypatch, forget):
    """`linalg` moves into `methods`, and its first function into a module of its own."""
    before, root = code_digest(METHODS["iso_cts"]), tmp_path / "divmerge_core"
    shutil.copytree(ROOT[0], root, ignore=shutil.ignore_patterns("__pycache__"))
    text = (root / "merging" / "linalg.py").read_text("utf-8")
    start, stop = text.index("def polar"), text.index("def truncated")
    (root / "methods" / "polar.py").write_text(f"import torch\n\n\n{text[start:stop]}", "utf-8")
    rest = f"from divmerge_core.methods.polar import polar\n{text[:start]}{text[stop:]}"
    (root / "methods" / "linear.py").write_text(rest, "utf-8")
    (root / "merging" / "linalg.py").unlink()
    for path in root.rglob("*.py"):
        moved = path.read_text("utf-8").replace("core.merging.linalg", "core.methods.linear")
        path.write_text(moved, "utf-8")
    monkeypatch.setattr(digests, "ROOT", (root, ROOT[1]))
    monkeypatch.setattr(digests, "module", functools.cache(digests.Module))
    monkeypatch.setattr(digests, "modules", functools.cache(digests.modules.__wrapped__))
    forget()
    assert code_digest(METHODS["iso_cts"]) == before


def test_one_method_counts_where_only_one_is_called(edited):
    """What TIES found does not change with another method, what calls any method does."""
    apart = partial(code_digest, hyperparameter_search.outcome, apart="METHODS")
    before = apart(), code_digest(hyperparameter_search.outcome)
    edited("divmerge_core.methods.spectral", "def tsv_m(", "def tsv_n(")
    assert apart() == before[0] and code_digest(hyperparameter_search.outcome) != before[1]


def test_a_notebooks_own_function_counts_by_its_text(monkeypatch):
    def mine(problem):
        return problem

    def other(problem):
        return problem + 1

    for function in (mine, other):
        monkeypatch.setattr(function, "__module__", "__main__")
    assert code_digest(mine) != code_digest(other)


def test_what_a_function_was_closed_over_counts():
    def closed(over):
        return lambda: over()

    over = (corrupted_experts.detection, predictions_of, Recipe)
    assert len({code_digest(closed(one)) for one in over}) == 3
    assert code_digest(partial(max, over[0])) == code_digest(over[0])


def test_what_is_left_out_by_name_is_there():
    assert {*digests.DRIVERS, *digests.KEEPERS} <= digests.modules()
    assert {name for one in digests.modules() for name in module(one).bound} >= digests.VALUES


def executed(call) -> set[tuple[str, str]]:
    """The package's functions and classes that run in a call: module, and top-level name."""
    codes, own = set(), tuple(f"{folder}/" for folder in ROOT)

    def watch(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(own):
            codes.add(frame.f_code)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found = set()
    for code in codes:
        folder = next(one for one in ROOT if code.co_filename.startswith(f"{one}/"))
        parts = Path(code.co_filename).relative_to(folder.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found.add((name, code.co_qualname.split(".")[0]))
    return {(name, what) for name, what in found if name not in digests.KEEPERS and what[0] != "<"}


def unreached(ran: set[tuple[str, str]], *things: object, apart: str | None = None) -> list:
    """What ran and is not reached from these."""
    places = [place for one in digests.leaves(things) for place in digests.start(one)]
    reached = digests.reached(places, apart)
    return sorted((m, n) for m, n in ran if not reached & set(module(m).find(n)))


@pytest.mark.parametrize("name", METHODS)
def test_all_that_runs_in_a_method_is_reached_from_it(name):
    problem = toy(name)
    ran = executed(lambda: merge(problem, name))
    assert unreached(ran, METHODS[name], methods.parse, type(problem)) == []


def test_all_that_runs_in_a_preparation_or_an_outcome_is_reached(toys, cache, monkeypatch):
    assert unreached(executed(lambda: prepare("toy", size="toy")), prepare) == []
    bench, makes = prepare("toy", size="toy"), []

    def noted(bench, make, *what, method=None):
        makes.append(make)
        return cached(bench, make, *what, method=method)

    monkeypatch.setattr(hyperparameter_search, "cached", noted)
    size = replace(SIZES["toy"], epochs=1)
    for spec in ("divmerge/block", "ties", "regmean"):
        options = hyperparameter_search.candidates(spec, size, 0, {}, bench.problem)[0]
        ran = executed(partial(OUTCOME, Merges(bench, spec), options))
        reached = (prepare, METHODS[parse(spec)[0]], cached)
        assert unreached(ran, makes[-1], *reached, apart="METHODS") == [], spec


def test_all_that_runs_in_a_language_preparation_is_reached(llama_folder, glue_rows, cache):
    size = replace(language_toys.SIZE, base=str(llama_folder))
    ran = executed(lambda: prepare_language("glue", ["sst2", "cola"], size=size, progress=False))
    assert unreached(ran, prepare_language) == []


RECIPES = {
    **{"rows": 20, "epochs": 1, "lr": 2e-2, "batch_size": 8, "max_length": 10, "warmup": 0.2},
    **{"weight_decay": 0.1, "precision": "bfloat16"},
}


def test_every_field_of_a_recipe_is_in_an_experts_key(tiny, cache):
    assert set(RECIPES) == {field.name for field in fields(Recipe)}
    recipes = [TINY_RECIPE, *(replace(TINY_RECIPE, **{n: v}) for n, v in RECIPES.items())]
    task = toy_task("mood")
    folders = {folder_of(described(tiny, task, recipe, seed=0)[0]) for recipe in recipes}
    assert len(folders) == len(recipes)


def test_all_else_that_decides_an_expert_is_in_its_key(tiny, cache, monkeypatch):
    def key(base=tiny, seed=0, **changes) -> Path:
        task = replace(toy_task("mood"), **changes)
        return folder_of(described(base, task, TINY_RECIPE, seed=seed)[0])

    relabelled = toy_splits("mood")
    text, pair, answer = relabelled["train"][0]
    other = {"negative": "positive", "positive": "negative"}[answer]
    relabelled["train"][0] = (text, pair, other)
    elsewhere = replace(tiny, encoder=copy.deepcopy(tiny.encoder).to("meta"))
    found = [key(), key(seed=1), key(base=replace(tiny, digest="other")), key(base=elsewhere)]
    found.append(key(read=lambda: relabelled, origin=lambda: "relabelled"))
    found.append(key(answers=("positive", "negative"), origin=lambda: "turned"))
    version = digests.installed
    for library in ("torch", "transformers", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setattr(digests, "installed", lambda n, x=library: version(n) + "+" * (n == x))
            found.append(key())
    monkeypatch.setattr("divmerge_book.models.finetuning.code_digest", lambda name: "other code")
    found.append(key())
    assert len(set(found)) == len(found)


SIZE_FIELDS = {
    **{"merge_rows": 8, "validation_rows": 8, "test_rows": 8, "precision": "bfloat16"},
    "recipe": replace(TINY_RECIPE, epochs=1),
}
# Options of methods and of the search: in the key of each result by their values.
OPTIONS = {"seeds": (1,), "inputs": 4, "epochs": 1, "candidates": 2, "calls": 9, "steps": 9}
OPTIONS["glue_recipe"] = replace(TINY_RECIPE, epochs=1)  # of another suite


def test_every_field_of_a_size_that_decides_an_experiment_is_in_its_digest(toys, tmp_path):
    size = SIZES["toy"]
    folder = Path(shutil.copytree(size.encoder, tmp_path / "other"))
    weights = load_base(str(folder)).encoder
    with torch.no_grad():
        next(weights.parameters())[0, 0] += 0.01
    weights.save_pretrained(folder)
    values = {**SIZE_FIELDS, **OPTIONS, "encoder": str(folder)}
    assert set(values) == {field.name for field in fields(Size)}
    before = prepare("toy", size=size).digest
    for field, value in values.items():
        other = prepare("toy", size=replace(size, **{field: value})).digest
        assert (other != before) == (field not in OPTIONS), field


def test_all_else_that_decides_a_bench_is_in_its_digest(toys, monkeypatch):
    def with_rows(split: str):
        rows = toy_splits("mood")
        text, *rest = rows[split][0]
        return {**rows, split: [(f"{text} book", *rest), *rows[split][1:]]}

    found = [prepare("toy", size="toy", seed=seed).digest for seed in (0, 1)]
    found += [prepare("toy", ["place", "mood"], size="toy").digest]
    for split in ("merge", "validation", "test"):
        task = replace(toy_task("mood"), read=partial(with_rows, split), origin=partial(str, split))
        with monkeypatch.context() as patch:
            patch.setitem(TASKS, "mood", task)
            found.append(prepare("toy", size="toy").digest)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "check_device", lambda device: torch.device("meta"))
        found.append(prepare("toy", size="toy").digest)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "code_digest", lambda thing: "other code")
        found.append(prepare("toy", size="toy").digest)
    assert len(set(found)) == len(found)
    bench = prepare("toy", size="toy")
    assert bench.select(["place"]).digest not in {bench.digest, bench.select(["mood"]).digest}


def test_all_that_decides_a_result_is_in_its_key(toys, monkeypatch):
    bench = prepare("toy", size="toy")
    options = {"grouping": "block", "epochs": 1, "lr": 0.1, "seed": 0}
    monkeypatch.setattr(
        hyperparameter_search, "cached", lambda *what, **how: {"place": cache_path(*what, **how)}
    )

    def key(bench=bench, spec="divmerge/block", points=0, **changes) -> Path:
        return OUTCOME(Merges(bench, spec, points), {**options, **changes})["place"]

    found = [key(), key(bench=replace(bench, digest="other")), key(spec="divmerge/task")]
    found += [key(points=3), key(epochs=2), key(lr=0.2), key(seed=1)]
    found += [key(grouping="layer"), key(inputs=4)]
    for library in digests.LIBRARIES:
        other = {**digests.versions(), library: "other"}
        with monkeypatch.context() as patch:
            patch.setattr(cache, "versions", lambda other=other: other)
            found.append(key())
    monkeypatch.setattr(cache, "code_digest", lambda *things, **options: "other code")
    found.append(key())
    assert len(set(found)) == len(found)


def test_a_key_takes_values_and_nothing_that_only_looks_like_one():
    assert key_of(Recipe()) != key_of(Recipe(epochs=4))
    assert key_of([1, 2]) == key_of((1, 2)) and key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    for thing in (torch.zeros(2000), toy_task("mood").read, Path("here")):  # their text hides much
        with pytest.raises(TypeError):
            key_of(thing)


COMPLETED = {"max_length": 40, "max_new": 5, "batch_size": 3, "precision": "bfloat16", "top": 4}


def test_all_that_decides_completions_is_in_their_key(llama, qwen, glue_rows, monkeypatch):
    class Reached(Exception):
        """Says where the first part would be kept."""

    def once(target, make, *, folder):
        raise Reached(target)

    monkeypatch.setattr(completing, "once", once)
    texts = [{"text": f"film {n} " * 30} for n in range(3)]

    def key(base=llama, task="sst2", rows=texts, **changes) -> str:
        settings = {"key": ["one"], "max_length": 60, "max_new": 4, "progress": False, **changes}
        with pytest.raises(Reached) as caught:
            completing.completions(base, base.state, PROMPTS[task], rows, **settings)
        return caught.value.args[0].parent.name

    found = [key(), key(key=["other"]), key(base=qwen), key(task="cola"), key(rows=texts[:2])]
    found += [key(**{name: value}) for name, value in COMPLETED.items()]
    monkeypatch.setattr(completing, "code_digest", lambda thing: "other code")
    found.append(key())
    assert len(set(found)) == len(found)


LANGUAGE_FIELDS = {
    **{"recipe": replace(language_toys.RECIPE, lr=1e-3), "blocks": 1, "merge_rows": 4},
    **{"validation_rows": 6, "test_rows": 8, "batch_size": 3, "top": 5, "storage": "bfloat16"},
    **{"precision": "bfloat16", "checkpointing": True},
}
LANGUAGE_OPTIONS = {"seeds": (1,), "epochs": 1, "candidates": 2}


def test_every_field_of_a_language_size_is_in_its_experiments_digest(llama_folder, qwen, glue_rows):
    def digest(size: LanguageSize) -> str:
        return prepare_language("glue", ["sst2", "cola"], size=size, progress=False).digest

    size = replace(language_toys.SIZE, base=str(llama_folder))
    values = {**LANGUAGE_FIELDS, **LANGUAGE_OPTIONS, "base": qwen.name}
    assert set(values) == {field.name for field in fields(LanguageSize)}
    before = digest(size)
    for field, value in values.items():
        changed = digest(replace(size, **{field: value})) != before
        assert changed == (field not in LANGUAGE_OPTIONS), field


@pytest.mark.parametrize("split", ["merge", "validation", "test"])
@pytest.mark.parametrize("column", ["text", "label"])
def test_every_row_of_a_users_own_is_in_the_digest(tmp_path, split, column):
    path = local_files.make_project(tmp_path)
    before = load(check(read(path))).digest
    rows = local_files.toy_rows("mood")[split]
    labels = {row["label"] for row in rows}
    first = {**rows[0], "text": f"{rows[0]['text']} book"}
    if column == "label":
        first = {**rows[0], "label": (labels - {rows[0]["label"]}).pop()}
    local_files.write_rows(tmp_path / "data" / f"mood-{split}.csv", [first, *rows[1:]])
    changed = load(check(read(path))).digest != before
    assert changed == ((split, column) != ("merge", "label"))  # a merge sees no labels


@pytest.mark.parametrize("change", ["length", "precision", "vocabulary", "settings", "weights"])
def test_all_else_that_decides_a_users_merge_is_in_the_digest(tmp_path, change):
    path, options = local_files.make_project(tmp_path), {}
    before = load(check(read(path))).digest
    if change == "length":
        path.write_text(path.read_text().replace("max_length: 16", "max_length: 15"))
    elif change == "precision":
        options["precision"] = "bfloat16"
    elif change == "weights":
        folder, labels = tmp_path / "experts" / "mood", local_files.LABELS["mood"]
        local_files.make_expert(folder, tmp_path / "base", labels, seed=9)
    else:
        name = {"vocabulary": "base/tokenizer_config.json", "settings": "experts/mood/config.json"}
        file = tmp_path / name[change]
        file.write_text(file.read_text().rstrip()[:-1] + ', "note": 1}')
    assert load(check(read(path)), **options).digest != before


def test_the_hubs_glue_is_known_by_its_revision(monkeypatch):
    monkeypatch.delenv("DIVMERGE_GLUE_DIR", raising=False)
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return {}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = glue.glue_digest("rte")
    glue.glue_rows("rte")
    assert asked == [("nyu-mll/glue", "rte", {"revision": glue.REVISION})]
    monkeypatch.setattr(glue, "REVISION", "0" * 40)
    assert glue.glue_digest("rte") != before


def test_a_hub_data_sets_revision_is_asked_or_the_one_last_read(monkeypatch, tmp_path):
    monkeypatch.setattr(glue, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(glue.huggingface_hub, "dataset_info", lambda name: SimpleNamespace(sha="a"))
    revision = glue.hub_revision.__wrapped__
    assert revision("stanfordnlp/imdb") == "a"
    unreachable = raising(ConnectionError("offline"))
    monkeypatch.setattr(glue.huggingface_hub, "dataset_info", unreachable)
    assert revision("stanfordnlp/imdb") is None
    kept = tmp_path / "datasets--stanfordnlp--imdb" / "refs" / "main"
    kept.parent.mkdir(parents=True)
    kept.write_text("b\n")
    assert revision("stanfordnlp/imdb") == "b"


def test_a_hub_data_sets_revision_is_read_and_keyed(monkeypatch, tmp_path):
    asked, source = [], sources.SOURCES["imdb"]
    task = sources.task_of("imdb", source)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: asked.append(options) or {})
    found = []
    for sha in ("a", "b"):
        monkeypatch.setattr(sources, "hub_revision", lambda name, sha=sha: sha)
        sources.tables("imdb", source)
        found.append(task.origin())
    assert asked == [{"revision": "a"}, {"revision": "b"}] and len(set(found)) == 2
