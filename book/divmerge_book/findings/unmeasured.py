"""What is not measured yet: what it would show, the command that measures it, and its time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from divmerge_book.evaluation.report import Report
from divmerge_book.findings.in_short import PLACES

RUN = "python -m divmerge_book run notebooks"
GLUE = "DIVMERGE_GLUE_DIR=FOLDER"
ON_GLUE = "-p suite glue_encoder -p encoder minilm"
FITTED = "divmerge/task,divmerge/layer,divmerge+,adamerging/task,adamerging/layer"
EIGHT = "average,task_arithmetic,ties,tsv_m,regmean,adamerging/layer,divmerge/layer,divmerge+"
WORDS = "average,task_arithmetic,ties,tsv_m,adamerging/layer,divmerge/task,divmerge/layer,divmerge+"
LANGUAGE = f"{GLUE} {RUN}/15_language_model.ipynb lm.ipynb -p suite glue_lm -p methods {WORDS}"


@dataclass(frozen=True)
class Missing:
    """A measurement, the file of its result, and the command.

    like: a stored Report of the same encoder, which says what a fit takes; empty where none is.
    """

    what: str
    file: str
    command: str
    like: str = ""


MEASUREMENTS = (
    Missing(
        "GLUE's seven tasks: the other methods, three seeds of experts",
        "baselines/glue_encoder_minilm.json",
        f"{GLUE} {RUN}/06_baselines.ipynb glue.ipynb -p size full {ON_GLUE} -p budget 3 "
        "-p seeds 0,1,2 -p publish true",
        "embedded.json",
    ),
    Missing(
        "GLUE, T = 2 to 6: six subsets for each T, with the spread over subsets, seeds and rows",
        "scaling/glue_encoder_minilm/sample.json",
        f"{GLUE} {RUN}/10_how_many_tasks.ipynb count.ipynb -p size full {ON_GLUE} -p subsets 6 "
        f"-p methods average,ties,tsv_m,regmean,{FITTED} -p publish true",
        "embedded.json",
    ),
    Missing(
        "An encoder of five times the size (all-mpnet-base-v2 in MODEL), T = 4, one seed",
        "baselines/glue_encoder_all-mpnet-base-v2.json",
        f"{GLUE} {RUN}/06_baselines.ipynb mpnet.ipynb -p size full -p suite glue_encoder "
        f"-p encoder MODEL/all-mpnet-base-v2 -p tasks sst2,qqp,qnli,mnli -p methods {EIGHT} "
        "-p budget 3 -p seeds 0 -p publish true",
    ),
    Missing(
        "The embedded suite with MiniLM: the other methods, three seeds",
        "baselines/embedded_minilm.json",
        f"{RUN}/06_baselines.ipynb minilm.ipynb -p size full -p encoder minilm -p budget 6 "
        "-p seeds 0,1,2 -p publish true",
        "embedded.json",
    ),
    Missing(
        "SmolLM2-135M on GLUE's seven tasks as prompts, the whole model trained",
        "language/glue_lm.json",
        f"{LANGUAGE} -p size full -p seeds 0 -p publish true",
        "language/embedded_lm.json",
    ),
    Missing(
        "The same with LoRA experts of rank 8, beside those trained whole",
        "language/glue_lm_lora_8.json",
        f"{LANGUAGE} -p size full -p seeds 0 -p trains lora:8 -p publish true",
        "language/embedded_lm.json",
    ),
)


def fit_takes(report: Report) -> str:
    """Mean seconds of DivMerge's fits per layer on a Report's largest subset, in words."""
    fits = [fit for fit in report.fits if fit["method"] == "divmerge/layer"]
    most = max((fit["subset"] for fit in fits), key=len)
    costs = [fit.get("cost", fit)["seconds"] for fit in fits if fit["subset"] == most]
    suite = report.provenance["suite"]
    return f"{sum(costs) / len(costs):.0f} s ({suite}, T = {most.count('+') + 1})"


def table(folder: Path | None = None, every: Sequence[Missing] = MEASUREMENTS) -> pd.DataFrame:
    """A row per measurement whose file is not stored: what, command, what a fit takes.

    folder: of the stored results; None for the book's. A fit's seconds are those stored for the
    same encoder, on other tasks; not known where there are none.
    """
    folder = folder or next(filter(Path.is_dir, PLACES), PLACES[0])
    rows = []
    for one in every:
        if not (folder / one.file).is_file():
            known = one.like and (folder / one.like).is_file()
            took = fit_takes(Report.load(folder / one.like)) if known else "not known"
            rows.append((one.what, one.command, took))
    return pd.DataFrame(rows, columns=["Not measured", "Command", "One fit per layer takes"])
