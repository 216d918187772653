"""The benchmarks: implementations compute the same, and measurements mean what they say."""

import math
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from divmerge_book.evaluation import profiling, stored_tables
from divmerge_book.evaluation.provenance import origin
from divmerge_book.figures import costs as cost_figures
from divmerge_book.kernel_benchmarks import disk_merges, implementations, merge_bandwidth, step_time
from divmerge_book.kernel_benchmarks.implementations import IMPLEMENTATIONS, Case, missing
from divmerge_book.models.mergekit_config import read_recipe
from helpers import linear_problem
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch.testing import assert_close

from divmerge_core.divergences import js
from divmerge_core.kernels.delta_storage import Factors, LowRankDeltas
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.table_rows import TableRows
from divmerge_core.merging.task_vectors import Layout, TaskVectors, dense
from divmerge_core.registry import Registry

CPU = torch.device("cpu")


def case(num_tasks=3, dtype=torch.float32):
    return Case.random(implementations.stack_of_layers(5_000, 2), num_tasks, dtype=dtype)


def here(registry, names):
    """Implementations as parameters; those that cannot run are skipped with the reason."""

    def mark(name: str):
        return pytest.mark.skipif(bool(missing(registry, name)), reason=f"{name} is absent")

    return [pytest.param(name, marks=mark(name)) for name in names]


@pytest.mark.parametrize(
    "name", here(IMPLEMENTATIONS, [n for n in IMPLEMENTATIONS if n != "compiled"])
)
def test_implementations_compute_the_same_merge_and_gradient(name):
    one = case()
    if name == "mergekit":  # one coefficient per task
        one.coeffs[:] = one.coeffs[:, :1]
    forward, backward = IMPLEMENTATIONS[name](one)
    vectors = one.vectors
    merged = grouped_merge(vectors.base, vectors.deltas, one.coeffs, one.segments)
    found = forward()  # one vector, or tensors in a list or a dictionary
    tensors = found.values() if isinstance(found, dict) else [*found]
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    assert_close(flat, merged, rtol=1e-5, atol=1e-5)
    if backward is not None:
        inner = grouped_inner(one.grad, vectors.deltas, one.segments)
        assert_close(backward(), inner, rtol=1e-4, atol=1e-3)


def test_what_can_run_is_told_from_what_cannot_and_why():
    registry, names = implementations.DIVERGENCE_IMPLEMENTATIONS, ["ours", "compiled"]
    able, lost = implementations.measurable(registry, "cpu", names)
    assert (able, lost) == (["ours"], {"compiled": "its kernels need a GPU"})
    assert "dictionary" in implementations.measurable(IMPLEMENTATIONS, "cpu")[0]


def test_a_basis_is_timed_beside_task_vectors_with_experts_repeated(toy_problem):
    """T vectors of N numbers, against factors; the third expert is the first again."""
    measured = partial(merge_bandwidth.benchmark_basis, toy_problem, spec="tsv", repeats=1)
    table = merge_bandwidth.summary(measured([2, 3]))
    assert list(table.tasks) == [2] * 5 + [3] * 5 and (table.milliseconds > 0).all()
    assert list(table.contestant[:5]) == ["copy", "ours", "ours", "tsv", "tsv"]
    three = merge_bandwidth.repeated(toy_problem, 3)
    assert_close(three.vectors.deltas[2], toy_problem.vectors.deltas[0])
    given = three.logits(three.vectors.base, 2, three.batches[2][0])
    assert_close(given, toy_problem.logits(toy_problem.vectors.base, 0, toy_problem.batches[0][0]))
    half = merge_bandwidth.summary(measured([2], storage="bfloat16"))
    assert list(half.moved != table.moved[:5]) == [False, True, True, False, False], "float32 parts"


def test_numbers_are_held_in_factors_and_in_the_rows_of_tables():
    factors = Factors(torch.zeros(4, 3), torch.zeros(3, 5), (1, 2))
    table = TableRows(torch.zeros(9, 2), torch.tensor([1, 3]), torch.zeros(2),
                      (torch.tensor([0]), torch.tensor([0, 1])),
                      (torch.zeros(1, 2), torch.zeros(2, 2)), (1, 1))  # fmt: skip
    own = LowRankDeltas((2, 38), {0: factors, 20: table})
    layout = Layout(("w", "table"), ((4, 5), (9, 2)))
    vectors = TaskVectors(layout, ("a", "b"), torch.zeros(38), own)
    assert merge_bandwidth.numbers_held(vectors) == 4 * 3 + 3 * 5 + 2 + 1 * 2 + 2 * 2


def test_random_cases_have_the_size_and_dtype_asked_for():
    for size in (1e5, 1e6, 2e7):
        assert implementations.stack_of_layers(int(size)).size == pytest.approx(size, rel=0.05)
    half = case(dtype=torch.bfloat16)
    assert half.vectors.deltas.dtype == torch.bfloat16 and half.vectors.base.dtype == torch.float32
    assert_close(dense(half.vectors.deltas), dense(case().vectors.deltas), rtol=2**-8, atol=0)


def test_an_implementation_that_is_not_installed_says_so():
    registry = Registry("implementation")
    registry.register("nobody", package="no-such-package")(lambda case: None)
    registry.register("torch", package="torch")(lambda case: None)
    registry.register("kernel", gpu=True)(lambda case: None)
    assert missing(registry, "kernel") == "its kernels need a GPU"
    assert missing(registry, "kernel", "cuda") is None
    assert missing(registry, "nobody") == "the package no-such-package is not installed"
    assert missing(registry, "torch") is None


@pytest.mark.parametrize("name", ["ours", "plain"])
def test_implementations_compute_the_same_gradient_of_the_divergence(name):
    generator = torch.Generator().manual_seed(0)
    expert, merged = (torch.randn(5, 11, generator=generator) for _ in range(2))
    leaf = merged.clone().requires_grad_()
    js(expert, leaf).sum().backward()
    found = implementations.DIVERGENCE_IMPLEMENTATIONS[name](expert, merged)()
    assert_close(found, leaf.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "counts"), [("dictionary", (20, 16)), ("ours", (6, 5))])
def test_the_usual_merge_moves_five_t_and_four_t_vectors_and_ours_the_floor(name, counts):
    one = Case.random(implementations.stack_of_layers(100_000, 2), 4)
    moved = [merge_bandwidth.bytes_moved(part) for part in IMPLEMENTATIONS[name](one)]
    unit = 4 * one.vectors.layout.size
    assert [nbytes / unit for nbytes in moved] == pytest.approx(counts, rel=0.05)


def test_bytes_are_counted_on_one_thread_and_the_threads_come_back():
    torch.set_num_threads(2)
    try:
        seen = []
        merge_bandwidth.bytes_moved(lambda: seen.append(torch.get_num_threads()))
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("missing", ["status", "clear_refs", "lines"])
def test_peak_memory_is_nan_where_it_cannot_be_asked(missing, tmp_path, monkeypatch):
    """Systems without /proc, sandboxes that let nobody write to it, and those that tell less."""
    told = "" if missing == "lines" else "VmRSS:\t 10 kB\nVmHWM:\t 30 kB\n"
    if missing != "status":
        tmp_path.joinpath("status").write_text(told)
    if missing == "clear_refs":
        tmp_path.joinpath("clear_refs").mkdir()  # cannot be written to, by root neither
    monkeypatch.setattr(profiling, "PROCESS", tmp_path)
    called = []
    assert math.isnan(profiling.peak_bytes(lambda: called.append(1), CPU))
    assert called == [1]


def test_peak_memory_sees_what_a_call_holds_and_frees():
    peak = merge_bandwidth.peak_bytes(lambda: torch.ones(20_000_000).sum(), CPU)
    assert math.isnan(peak) or 70e6 < peak < 120e6


def test_every_round_measures_every_implementation_once():
    rows = merge_bandwidth.benchmark_merge(case(), ["ours", "dictionary"], repeats=3)
    counts = rows.groupby(["contestant", "part"]).size()
    assert set(counts) == {3} and len(counts) == 5
    assert (rows.seconds > 0).all() and set(rows.tasks) == {3}
    rows = merge_bandwidth.benchmark_divergence(["ours", "plain"], (5, 11), CPU, repeats=2)
    assert set(rows.groupby(["contestant", "part"]).size()) == {2} and (rows.bytes > 0).all()


def rows_by_hand():
    """Two rounds of a model of 100 numbers and 2 tasks; a copy moves 200 numbers in 2 s."""
    times = [("copy", "forward", 2, 2), ("dictionary", "forward", 10, 20)]
    times += [("ours", "forward", 5, 5), ("ours", "backward", 3, 6)]  # 4 N numbers, floor 4 s
    rows = pd.DataFrame(times, columns=["contestant", "part", 0, 1])
    rows = rows.melt(["contestant", "part"], var_name="round", value_name="seconds")
    return rows.assign(tasks=2, parameters=100, bytes=800, peak=400.0)


def test_the_summary_by_hand():
    table = merge_bandwidth.summary(rows_by_hand()).set_index(["contestant", "part"])
    assert table.floor["copy", "forward"] == 1
    assert table.floor["ours", "forward"] == pytest.approx(4 / 5)
    assert table.milliseconds["ours", "backward"] == 4500
    assert table.floor["ours", "backward"] == pytest.approx(3 / 4.5)
    usual = table.loc["dictionary", "forward"]
    assert (usual.ratio, usual.moved, usual.peak) == (3, 2, 1)  # 3: the median of 2 and 4


def test_the_caption_says_where_it_was_measured():
    facts = {"model": "toy", "dtype": "float32", "repeats": 2, "device": "cpu", "threads": 1}
    text = merge_bandwidth.caption(origin(**facts))
    for words in ("toy, task vectors in float32, 2 rounds, cpu,", "1 threads, torch", "sured 20"):
        assert words in text
    assert merge_bandwidth.matrix_rate(CPU, 64) > 0


SINGLE = linear_problem(dtype=torch.float32)


def test_all_steps_see_the_same_number_of_batches():
    table = step_time.benchmark_step(SINGLE, ["ours", "ours_buffer", "dictionary"], rounds=2)
    counts = table.groupby(["contestant", "round"]).size()
    assert len(set(counts)) == 1 and len(counts) == 6
    assert (table.seconds > 0).all()


@pytest.mark.parametrize("name", here(step_time.STEPS, ["fusion_bench"]))
def test_peers_take_a_step(name):
    table = step_time.benchmark_step(SINGLE, [name], rounds=1)
    assert (table.seconds > 0).all()


def test_a_step_is_split_into_its_parts():
    parts = step_time.step_parts(SINGLE)
    names = ["merge", "forward pass", "backward pass", "gradient of the merge"]
    assert list(parts) == names and (parts > 0).all().all()


def test_figures_draw_what_they_are_given():
    axes = lambda: Figure().subplots()  # noqa: E731
    table = merge_bandwidth.summary(rows_by_hand())
    ax = cost_figures.time_curve(axes(), table, "forward", "tasks")
    assert "ms" in ax.get_ylabel() or "milliseconds" in ax.get_ylabel()
    assert len(ax.lines) == 3  # ours, the dictionary and the floor
    (floor,) = [line for line in ax.lines if line.get_label() == "floor: copy bandwidth"]
    assert floor.get_ydata() == pytest.approx([4000])
    ax = cost_figures.bars(axes(), table, "moved", {"floor": 7})
    assert [text.get_text().strip() for text in ax.texts] == ["4.0", "2.0"]
    ax = cost_figures.roofline(axes(), table, gigabytes=20, gigaflops=100)
    assert "operations per byte" in ax.get_xlabel()
    ax = cost_figures.step_shares(axes(), {"merge": 1.0, "forward pass": 3.0})
    assert [text.get_text() for text in ax.texts] == ["merge\n25 %", "forward pass\n75 %"]


# --- whole commands -------------------------------------------------------------------------------
def test_both_commands_can_read_the_models_and_configurations_that_are_made(tmp_path):
    count = disk_merges.make_models(tmp_path, "tiny")
    for method in disk_merges.METHODS:
        (tmp_path / "config.yml").write_text(disk_merges.configuration(method, tmp_path))
        recipe, dtype = read_recipe(tmp_path / "config.yml")
        assert (recipe.method, dtype) == (method, torch.bfloat16)
    sizes = [tensor.numel() for tensor in load_file(tmp_path / "one/model.safetensors").values()]
    assert sum(sizes) == count


def test_a_command_is_measured_by_itself_and_its_failure_is_told(tmp_path):
    code = "import time; x = b'1' * 50_000_000; time.sleep(0.2)"
    took, processor, peak = disk_merges.measured([sys.executable, "-c", code], tmp_path / "log")
    assert took > 0.2 and processor < took + 0.2 and 5e7 < peak < 1.5e8
    failing = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RuntimeError, match="no such thing"):
        disk_merges.measured(failing, tmp_path / "log")


def test_the_table_has_medians_and_ratios(tmp_path):
    rows = [
        ("135M", 1, n, "ties", name, factor * (1.0 + n), 2.0 * factor, 1e6 * factor, 3.0)
        for n in range(3)
        for name, factor in (("divmerge", 1), ("mergekit", 4))
    ]
    rows = pd.DataFrame(rows, columns=disk_merges.COLUMNS)
    row = disk_merges.summary(rows).loc["135M", "ties"]
    assert (row["seconds", "divmerge"], row["seconds", "ratio"]) == (2, 4)
    stored_tables.save(
        tmp_path / "from_disk.json", {"rows": rows}, dtype="bfloat16", peers={"mergekit": "0.1.5"}
    )
    text = disk_merges.as_markdown(tmp_path)
    assert "| ties | 135M | 2.0 | 8.0 | 4.0 | 2.0 | 8.0 | 4.0 | 1 | 4 | 4.0 |" in text
    assert "Medians of 3 to 3 whole commands" in text
    assert "Not measured here" in disk_merges.as_markdown(tmp_path / "none")
