"""Bases: identities of their components, low rank against dense, embedding tables, fits."""

from dataclasses import replace

import pytest
import torch
from comparisons import mean_divergence, near
from helpers import linear_problem, module_problem, normal, problem_of
from torch import nn

from divmerge_core.divergences import js
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.kernels.table_rows import TableRows
from divmerge_core.merging import merged_model
from divmerge_core.merging.coefficients import Coefficients, groups_of
from divmerge_core.merging.fit import fit_coefficients
from divmerge_core.merging.layer_inputs import embedding_tables, rows_read
from divmerge_core.merging.merged_model import as_read
from divmerge_core.merging.problem import Batch
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.methods.adaptive import adamerging
from divmerge_core.methods.arithmetic import average
from divmerge_core.methods.basis import BASES, basis
from divmerge_core.methods.divmerge import divmerge
from divmerge_core.methods.spectral import tsv_m

CLEAN = ("tsv", "tsv:2", "tsv:3")
SHAPES = {"wide": (6, 9), "tall": (8, 4), "bias": (5,)}
SIZE = 6 * 9 + 8 * 4 + 5


def mixed(num_tasks: int = 3, module: nn.Module | None = None):
    """Two matrices and a vector."""
    rows = [normal(SIZE, seed=seed) for seed in range(num_tasks)]
    return problem_of(*rows, base=0.5, module=module, **SHAPES)


def added(problem, spec: str) -> torch.Tensor:
    """The sum of all components of a basis."""
    found, _ = basis(problem, spec)
    return found.merge([1.0] * len(found.tasks)) - problem.vectors.base


def started(problem, spec: str) -> torch.Tensor:
    """The merge at the start of a fit."""
    found, starts = basis(problem, spec)
    coeffs = Coefficients(found.layout, len(found.tasks), grouping="task", init=starts)
    return grouped_merge(found.base, found.deltas, coeffs().detach(), coeffs.segments)


@pytest.mark.parametrize("spec", CLEAN)
def test_clean_directions_start_at_tsv_m(spec):
    problem = mixed()
    near(started(problem, spec), tsv_m(problem), 1e-6)
    assert basis(problem, spec)[1] == [1, 1, pytest.approx(1 / 3)]


@pytest.mark.parametrize("spec", ["svd", "svd:2", "svd:4", "raw"])
def test_all_own_directions_add_up_to_the_task_vectors(spec):
    problem = mixed()
    near(added(problem, spec), problem.vectors.deltas.sum(dim=0))
    assert basis(problem, spec)[1] == [pytest.approx(1 / 3)] * 3


@pytest.mark.parametrize("spec", ["tsv", "tsv:2", "svd:3", "raw", "ties"])
def test_one_task_alone_gives_its_expert(spec):
    problem = mixed(num_tasks=1)
    kept = problem.vectors.deltas[0]
    if spec == "ties":
        kept = torch.where(kept.abs() >= kept.abs().sort(descending=True).values[17], kept, 0)
    near(added(problem, spec), kept)


@pytest.mark.parametrize("name", ["tsv", "isotropic", "svd"])
def test_the_bands_of_a_task_add_up_to_its_component(name):
    problem = mixed()
    whole = dense(basis(problem, name)[0].deltas)
    parts = dense(basis(problem, f"{name}:3")[0].deltas).view(3, 3, SIZE)
    near(parts.sum(dim=0), whole)
    names = ("task0", "task1", "task2")
    assert basis(problem, f"{name}:2")[0].tasks == (*names, *(f"{one} band 2" for one in names))


def test_the_leading_band_is_a_quarter_of_the_directions():
    problem = problem_of(normal(16, 16), normal(16, 16, seed=1))
    (factors,) = basis(problem, "tsv:2")[0].deltas.factors.values()
    assert factors.ranks == (2, 2, 6, 6)
    sizes = [left.norm(dim=0) * right.norm(dim=1) for left, right in factors.split()]
    assert sizes[0].min() > sizes[2].max() and sizes[1].min() > sizes[3].max()


def test_isotropic_directions_have_one_size():
    problem = problem_of(normal(8, 8), normal(8, 8, seed=1))
    total = added(problem, "isotropic").view(8, 8)
    values = torch.linalg.svdvals(total)
    near(values, torch.linalg.svdvals(added(problem, "tsv").view(8, 8)).mean().expand(8))


def test_the_factors_hold_two_numbers_per_parameter_of_a_square_matrix():
    problem = problem_of(*(normal(16, 16, seed=seed) for seed in range(4)))
    (factors,) = basis(problem, "tsv:2")[0].deltas.factors.values()
    assert factors.left.numel() + factors.right.numel() == 2 * 16 * 16


@pytest.mark.parametrize("spec", ["tsv:2", "isotropic", "svd:2"])
def test_components_merge_and_give_gradients_as_their_dense_form(spec):
    problem = mixed()
    found = basis(problem, spec)[0]
    segments = Segments.of(found.layout.bounds, groups_of(found.layout, "layer")[1])
    coeffs = normal(len(found.tasks), 3)
    store, matrix = found.deltas, dense(found.deltas)
    near(*(grouped_merge(found.base, deltas, coeffs, segments) for deltas in (store, matrix)))
    slope = normal(SIZE)
    near(grouped_inner(slope, store, segments), grouped_inner(slope, matrix, segments))
    some = [1, 0]
    near(dense(store.rows(some)), matrix[some])


# --- embedding tables -----------------------------------------------------------------------------
class Reader(nn.Module):
    """A sum of rows of a table through a matrix; `tied` multiplies by the table once more."""

    def __init__(self, tied: bool):
        super().__init__()
        self.words, self.tied = nn.Embedding(6, 3), tied
        self.dense = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.dense(self.words(input=x).sum(dim=1))
        return found @ self.words.weight.T if self.tied else found


def reading(tied: bool = False):
    """Two experts of a reader, and inputs that read rows 1, 2 and 4 of its table."""
    module = Reader(tied).double()
    base = {name: normal(*value.shape) for name, value in module.named_parameters()}
    experts = {
        f"task{t}": {name: value + normal(*value.shape, seed=t + 1) for name, value in base.items()}
        for t in range(2)
    }
    texts = [torch.tensor([[1, 2], [2, 2]]), torch.tensor([[4, 1], [2, 4]])]
    weight = torch.full((2,), 0.5, dtype=torch.float64)
    batches = [[Batch({"x": text}, weight)] for text in texts]
    return module_problem(module, experts, batches, base=base)


def test_rows_that_inputs_read_are_found_and_all_rows_of_a_tied_table():
    problem, tied = reading(), reading(tied=True)
    (read,) = rows_read(problem, embedding_tables(problem)).values()
    assert read.nonzero()[:, 0].tolist() == [1, 2, 4]
    assert rows_read(tied, embedding_tables(tied))["words.weight"].all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gradients", ["stream", "buffer"])
def test_a_fit_of_read_rows_ends_where_one_of_whole_tables_does(tied, gradients, monkeypatch):
    problem = reading(tied)
    vectors, starts = basis(problem, "tsv:2")

    def fit():
        seen = []
        coefficients = Coefficients(vectors.layout, 4, grouping="layer", init=starts)
        merged = fit_coefficients(
            *(problem, coefficients, js),
            **{"vectors": vectors, "gradients": gradients, "epochs": 5, "progress": False},
            callback=lambda step: seen.append((step.loss or 0.0, step.flat.clone())),
        )
        return merged, seen

    cut = as_read(problem, vectors).deltas.factors[0]
    assert len(cut.read) == (6 if tied else 3)
    merged, seen = fit()
    monkeypatch.setattr(merged_model, "as_read", lambda problem, vectors: vectors)
    expected, wanted = fit()
    near(merged, expected)
    for (loss, flat), (other, whole) in zip(seen, wanted, strict=True):
        assert loss == pytest.approx(other, abs=1e-12)
        near(flat, whole)


def test_a_table_keeps_decay_as_one_number_and_trained_rows_alone():
    table, read = normal(6, 3).float(), torch.tensor([0, 1, 4])
    shrunk = table.clone()
    for _ in range(200):
        shrunk *= 1 - 1e-5
    trained = table * 0.98
    trained[[1, 2]] += 1
    found = TableRows.of(table, read, torch.stack([shrunk, trained]) - table, (1, 1, 0, 0))
    near(found.left, torch.tensor([0.99999**200 - 1, -0.02]), 1e-5)
    assert [places.tolist() for places in found.places] == [[], [1]]  # row 2 is not read
    out, coeffs = table.clone(), torch.tensor([1.0, 2.0, 5.0, 7.0])
    found.merge(table, coeffs, out)
    expected = table.clone()
    expected[read] = (shrunk + 2 * (trained - table))[read]
    near(out, expected, 1e-5)  # as near as training's rounding errors


def test_a_group_that_cuts_a_table_is_refused():
    problem = reading()
    store = as_read(problem, basis(problem, "tsv")[0]).deltas
    with pytest.raises(ValueError, match="cut a table"):
        grouped_inner(normal(30), store, Segments(((0, 9, 0), (9, 30, 1))))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "streamed"])
def test_embedding_tables_keep_their_task_vectors(storage):
    problem = reading()
    base = problem.vectors.layout.unflatten(problem.vectors.base.float())
    rows = problem.vectors.base + problem.vectors.deltas
    states = [problem.vectors.layout.unflatten(row.float()) for row in rows]
    vectors = TaskVectors.from_states(base, dict(zip("ab", states, strict=True)), storage=storage)
    found, starts = basis(replace(problem, vectors=vectors), "tsv:2")
    assert starts == [0.5, 1, 0.5]  # table, matrix, bias
    found = added(replace(problem, vectors=vectors), "tsv:2")
    near(found[:18], dense(vectors.deltas).sum(dim=0)[:18], 1e-6)


# --- fits -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", BASES)
@pytest.mark.parametrize("method", [divmerge, adamerging])
def test_every_basis_is_fitted(method, spec):
    problem = linear_problem(num_tasks=2)
    merged = method(problem, basis=spec, init=None, lr=0.05, epochs=10, progress=False)
    before = started(problem, spec)
    if method is divmerge:
        assert mean_divergence(problem, merged) < mean_divergence(problem, before)
    assert not torch.equal(merged, before)


def test_tasks_that_agree_keep_what_they_share():
    """Equal experts: the mean of their vectors is the expert, in tensors that are not split."""
    problem = problem_of(normal(5), normal(5), **{"bias": (5,)})
    near(started(problem, "tsv"), average(problem), 1e-6)


def test_a_checkpoint_of_another_basis_is_refused(tmp_path):
    problem, file = linear_problem(num_tasks=2), tmp_path / "fit.pt"
    options = {"epochs": 1, "progress": False, "checkpoint": file}
    divmerge(problem, basis="tsv", **options)
    with pytest.raises(ValueError, match="task vectors"):
        divmerge(problem, basis="isotropic", **options)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("spectral", "unknown basis 'spectral'"),
        ("tsv:0", "tsv, isotropic, svd take a whole number of bands"),
        ("tsv:x", "whole number of bands"),
        ("tsv:", "whole number of bands"),
        ("raw:2", "the others no number"),
        ("ties:1.5", r"keep must be in \(0, 1\]"),
    ],
)
def test_what_is_no_basis_is_refused(spec, says):
    with pytest.raises(ValueError, match=says):
        divmerge(linear_problem(), basis=spec, progress=False)


def test_essential_directions_need_inputs_and_a_module():
    problem = linear_problem()
    with pytest.raises(ValueError, match="module"):
        basis(replace(problem, module=None), "essential")
    with pytest.raises(ValueError, match="inputs"):
        basis(replace(problem, batches=[[] for _ in problem.batches]), "essential")


def test_components_of_another_layout_or_base_are_refused():
    problem = linear_problem()
    coefficients = Coefficients(problem.vectors.layout, 3)
    moved = replace(problem.vectors, base=problem.vectors.base + 1)
    for vectors in (linear_problem(features=5).vectors, moved):
        with pytest.raises(ValueError, match="another layout or base"):
            fit_coefficients(problem, coefficients, js, vectors=vectors)
