"""Storage of users' task vectors, and the memory that a merge needs, before it is read."""

import json

import pytest
import torch
from divmerge_book import __main__
from divmerge_book.planning.memory import CONTEXT
from divmerge_book.user_models import check, load, memory, merge_and_score, read, write_merged
from helpers import WORDS, raising
from language_files import make_language_project
from local_files import LABELS, changed, make_adapter, pooler_and_head, refused, with_fields
from torch.testing import assert_close

from divmerge_core.kernels.delta_storage import Int8Deltas, LowRankDeltas, dense, part

pytestmark = pytest.mark.filterwarnings("ignore:task .*is this the base:UserWarning")
MATRICES = {f"bert.encoder.layer.{n}.attention.self.query": (32, 32) for n in range(2)}
GB = 10**9


@pytest.mark.parametrize(
    "storage, close", [("bfloat16", 2**-8), ("int8", 1 / 100), ("streamed", 0)]
)
def test_task_vectors_are_kept_as_the_description_says(project, bench, tmp_path, storage, close):
    plan = check(read(with_fields(project, storage=storage)), ["average"])
    other = load(plan)
    wanted, found = bench.problem.vectors, other.problem.vectors
    largest = wanted.deltas.abs().max()
    assert_close(dense(found.deltas), wanted.deltas, rtol=0, atol=float(close * largest))
    assert isinstance(found.deltas, Int8Deltas) == (storage == "int8")
    assert other.digest != bench.digest
    made = merge_and_score(other, ["average"], progress=False)
    write_merged(plan, other, made, "average", tmp_path / "merged")
    assert f"{storage}" in (tmp_path / "merged" / "README.md").read_text()
    coeffs = json.loads((tmp_path / "merged" / "coefficients.json").read_text())["values"]
    assert_close(torch.tensor(coeffs), torch.full((2, 1), 0.5))
    begin, stop = found.layout.bounds[3]
    assert torch.equal(part(found.deltas, begin, stop), dense(found.deltas)[:, begin:stop])


def test_adapters_are_kept_as_factors(project, tmp_path):
    lora = project
    for n, name in enumerate(LABELS):
        saved = pooler_and_head(len(LABELS[name]))
        make_adapter(tmp_path / name, MATRICES, saved=saved, rank=2 + n, r=2 + n)
        lora = changed(lora, n, expert=str(tmp_path / name), labels=LABELS[name])
    wanted = load(check(read(lora))).problem.vectors
    plan = check(read(with_fields(lora, storage="low_rank")), ["divmerge/task"])
    found = load(plan).problem.vectors
    assert isinstance(found.deltas, LowRankDeltas) and found.tasks == wanted.tasks
    assert_close(dense(found.deltas), wanted.deltas, rtol=1e-5, atol=1e-6)
    assert_close(found.expert("mood"), wanted.expert("mood"), rtol=1e-5, atol=1e-6)
    for begin, stop in found.layout.bounds:
        assert_close(part(found.deltas, begin, stop), wanted.deltas[:, begin:stop])


def test_a_storage_that_experts_do_not_have_is_refused(project, tmp_path):
    table = "bert.embeddings.word_embeddings.weight"
    saved = {table: torch.ones(len(WORDS), 32), **pooler_and_head(2)}
    make_adapter(tmp_path / "lora", MATRICES, saved=saved)
    path = changed(project, 0, expert=str(tmp_path / "lora"), labels=LABELS["mood"])
    path = with_fields(path, storage="low_rank")
    refused(path, "saved ['embeddings.word_embeddings.weight'] whole")
    refused(with_fields(project, storage="low_rank"), "is a whole model; take int8")
    refused(with_fields(project, storage="int4"), "storage: Input should be 'float32', 'bfloat16'")


def test_the_plan_has_what_a_fit_holds(project, plan, bench):
    (fit,) = check(read(project), ["divmerge/layer"]).memory
    merging, reading = check(read(project), ["average"]).memory
    terms = {line.what: line.nbytes for line in (*fit.lines, *reading.lines)}
    vectors = bench.problem.vectors
    assert terms.pop("what is read or written") == 2 * vectors.base.nbytes
    assert reading.total == merging.total + 2 * vectors.base.nbytes
    for what in ("base", "loaded base", "merged model", "merges"):
        assert terms[what] == vectors.base.nbytes, what
    assert terms["task vectors"] == vectors.deltas.nbytes
    assert terms["gradients"] == 4 * max(map(torch.Tensor.numel, bench.base.encoder.parameters()))
    assert terms["context"] == CONTEXT and {"logits", "activations"} <= terms.keys()
    (both,) = check(read(project), ["divmerge/layer", "regmean"]).memory
    assert "not counted: what regmean holds" in str(both) and "not counted" not in str(fit)
    assert not plan.memory, "without methods nothing is planned"
    (free,) = check(read(with_fields(project, storage="bfloat16")), ["ties"]).memory
    held = {line.what: line.nbytes for line in free.lines}
    assert held["task vectors"] == vectors.deltas.nbytes / 2
    assert held["working copies"] == 2 * vectors.deltas.nbytes and "gradients" not in held


def test_a_model_of_a_strange_shape_is_planned_but_for_its_activations(project, monkeypatch):
    strange = raising(AttributeError("no num_attention_heads"))
    monkeypatch.setattr(memory.Model, "of", strange)
    told = check(read(project), ["divmerge/layer"]).memory
    assert {line.what for line in told[0].lines} >= {"base", "task vectors", "merged model"}


@pytest.mark.parametrize("free, whole", [(1.0001, 8), (1.0001, 1.0001)])
def test_a_merge_without_room_is_told_before_anything_is_read(
    project, monkeypatch, capsys, free, whole
):
    sizes = int(free * GB), int(whole * GB)
    monkeypatch.setattr(memory, "room", lambda place: sizes)
    code = __main__.main(["check", str(project)])
    said = capsys.readouterr()
    words = said.out if whole > free else said.err
    assert code == (0 if whole > free else 2)
    assert "does not fit this machine's memory" in words and "- storage: int8: saves" in words
    assert ("1.00 GB in all" in words) == (whole == free)


def test_the_plan_of_a_language_model_counts_its_answers(tmp_path, monkeypatch):
    path = make_language_project(tmp_path)
    (fit,) = check(read(path), ["divmerge/task"]).memory
    terms = {line.what: line.nbytes for line in fit.lines}
    words = read(path).max_new * 316 * 2
    assert terms["experts' answers"] == 2 * 5 * words
    monkeypatch.setattr(memory, "room", lambda place: (1, 2 * GB))
    advice = "\n".join(check(read(path), ["divmerge/task"]).memory[-1].advice)
    assert "half as many merge rows" in advice and "half of max_new" in advice
    assert "without rows, methods that need none are merged from disk to disk" in advice
    disk = dict.fromkeys(["merge", "validation", "test"])
    for n in range(2):
        path = changed(path, n, **disk)
    told = check(read(path), ["ties"])
    assert told.memory == () and "from disk to disk" in told.summary()
