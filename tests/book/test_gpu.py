"""The plan for a GPU: steps within their time, skipped ones with a reason; a dry run on the CPU."""

import json
import sys
import time
from dataclasses import replace

import pytest
from divmerge_book import SIZES, Recipe, Report
from divmerge_book.evaluation import stored_tables
from divmerge_book.runner import gpu

from divmerge_core.registry import Registry


@pytest.fixture
def given(tmp_path, tiny_folder):
    return gpu.Given(tmp_path, str(tiny_folder), dry=True)


def test_every_step_with_a_twin_on_the_cpu_stores_its_tables(given, glue_rows, monkeypatch):
    few = replace(SIZES["smoke"], glue_recipe=Recipe(rows=32, epochs=1))
    monkeypatch.setitem(SIZES, "smoke", few)
    for name in ("merge", "divergence", "fit"):
        assert "ours" in gpu.STEPS[name](given) or name == "merge"
        tables, facts = stored_tables.load(given.folder / f"{name}.json")
        assert (facts["size"], facts["device"]) == ("smoke", "cpu")
        assert all((table.seconds > 0).all() for key, table in tables.items() if "seconds" in table)
    said = gpu.STEPS["glue_encoder_0"](given)
    report = Report.load(given.folder / "glue_encoder_0.json")
    assert said.startswith("ANP: ") and set(report.rows.task) == {"cola", "sst2", "mnli"}


def test_what_the_machine_lacks_is_the_reason(given, monkeypatch):
    monkeypatch.delenv("DIVMERGE_GLUE_DIR", raising=False)
    for step, why in (("glue_encoder_1", "DIVMERGE_GLUE_DIR"), ("graphs", "CUDA graphs need")):
        with pytest.raises(ValueError, match=why):
            gpu.STEPS[step](given)
    lacking = ["fit", "--encoder", str(given.folder / "none"), "--dry-run"]
    assert gpu.main([str(given.folder), "--step", *lacking]) == gpu.LACKS


CHILD = "import sys, time; print('said', sys.argv[-1]); {}"
ENDS = {"ends": "0", "lacks": "sys.exit(3)", "breaks": "1 / 0", "hangs": "time.sleep(60)"}


def test_the_summary_has_a_row_for_every_step_and_says_why_not(given, monkeypatch):
    plan = Registry("step")
    for name in ENDS:
        plan.register(name, seconds=1 if name == "hangs" else 60)(None)
    real = gpu.subprocess.Popen

    def child(command, **options):
        return real([sys.executable, "-c", CHILD.format(ENDS[command[5]])], **options)

    monkeypatch.setattr(gpu, "STEPS", plan)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    monkeypatch.setattr(gpu.subprocess, "Popen", child)
    begin = time.monotonic()
    rows = gpu.run(given, 1, ENDS)
    assert time.monotonic() - begin < 50
    assert [row["state"] for row in rows] == ["done", "skipped", "failed", "skipped"]
    assert "ZeroDivisionError" in rows[2]["said"] and "not finished in 1 s" in rows[3]["said"]
    stored = json.loads((given.folder / "summary.json").read_text())
    assert stored["steps"] == rows and "not measured on a GPU" in stored["note"]
    assert stored["origin"]["device"] == "cpu"
    assert gpu.run(given, 0, ["ends"])[0]["said"] == "no time: 0 s left of 0 minutes"
