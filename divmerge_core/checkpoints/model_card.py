"""How a merged model was made: its record, its coefficients as JSON, and its model card."""

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from jaxtyping import Float
from torch import Tensor

from divmerge_core.checkpoints.heads import MEAN, Head
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.merging.coefficients import GROUPINGS
from divmerge_core.methods import METHODS

SCORES = ("task", "metric", "value", "low", "high")
ABSENT = "not measured"
MEANING = {  # of metrics whose names do not say it
    "majority": "`majority`: accuracy of always predicting the majority class of the test rows.",
    "rouge1": "`rouge1`: F1 of the words in common with the right answer, mean over rows.",
    "ratio": "`ratio`: accuracy, or the score of texts, over the expert's.",
    "kept_margin": "`kept_margin`: accuracy above the majority over the expert's above it.",
    "anp": "`anp`: mean ratio of the tasks whose expert beats the majority by two points or more.",
}


@dataclass(frozen=True)
class MergeRecord:
    """How a merged model was made: all that its card, its coefficients and its recipe say.

    method and options: as in METHODS. base: folder of the base in the hub's layout (config.json,
    safetensors, tokenizer). experts: task -> folder of its expert; may be empty where the merged
    tensors are in memory. coeffs [T, G]: of theta_0 + sum_t Lambda[t, g] tau_t, None where the
    merge is not of this form. groups: names of the G groups; grouping: a name in GROUPINGS.
    base_name: the base's hub name, for the card; its folder's name where empty.
    data: task -> facts such as {"rows": {"merge": 40, "test": 200}, "digest": "ab12..."}; values
    are numbers, texts or mappings of these. scores: mappings with the keys task, metric, value, low
    and high (ends of the 95 % interval; None or NaN where there is none). notes: remarks on these.
    opened: task -> tensors of an expert whose folder holds no whole model, such as an adapter's.

    Raises ValueError where the parts do not fit together, or options are no JSON.
    """

    method: str
    tasks: tuple[str, ...]
    base: Path
    experts: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    coeffs: Float[Tensor, "T G"] | None = None
    groups: tuple[str, ...] = ("model",)
    grouping: str = "task"
    base_name: str = ""
    data: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    scores: Sequence[Mapping[str, object]] = ()
    notes: Sequence[str] = ()
    opened: Mapping[str, StoredModel] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be one or more distinct names, got {list(self.tasks)}")
        if strange := sorted({*self.experts, *self.data} - set(self.tasks)):
            given, tasks = ", ".join(strange), ", ".join(self.tasks)
            raise ValueError(f"experts or data are given for {given}; the tasks are {tasks}")
        shape = (len(self.tasks), len(self.groups))
        if self.coeffs is not None and (
            tuple(self.coeffs.shape) != shape or not torch.isfinite(self.coeffs).all()
        ):
            raise ValueError(
                f"{shape[0]} tasks and {shape[1]} groups need finite coefficients {list(shape)}, "
                f"got {list(self.coeffs.shape)}"
            )
        for row in self.scores:
            if not set(SCORES) <= set(row):
                raise ValueError(f"scores need {', '.join(SCORES)}, got {', '.join(row)}")
        try:
            json.dumps(dict(self.options))
        except TypeError as error:
            raise ValueError(f"options must be plain values that JSON can hold: {error}") from error


def group_numbers(record: MergeRecord, names: Sequence[str]) -> list[int]:
    """Each tensor's column of the coefficients. Raises ValueError for tensors of no group."""
    label = GROUPINGS[record.grouping]
    columns = {group: number for number, group in enumerate(record.groups)}
    if outside := [name for name in names if label(name) not in columns]:
        raise ValueError(
            f"grouping {record.grouping!r} puts {outside[:3]} in groups that have no coefficient; "
            f"there are {', '.join(record.groups[:5])} (names= says which tensors are merged)"
        )
    return [columns[label(name)] for name in names]


def coefficients_json(record: MergeRecord) -> str:
    """Tasks, groups and coefficients [T, G] (null where there are none), method and options.

    Numbers are written in full: reading them gives back the same float32 or float64.
    """
    facts = {
        "method": record.method,
        "options": dict(record.options),
        "tasks": list(record.tasks),
        "grouping": record.grouping,
        "groups": list(record.groups),
        "values": None if record.coeffs is None else record.coeffs.tolist(),
    }
    return json.dumps(facts, indent=1) + "\n"


def card(
    record: MergeRecord,
    base: StoredModel,
    heads: Mapping[str, Head],
    hashes: Mapping[str, str],
    inputs: Mapping[str, str],
    *,
    reason: str,
    ready: str = "",
) -> str:
    """The model card in Markdown with YAML front matter; needs no network.

    hashes, inputs: file -> SHA-256 of the files written and read. reason: why there is no mergekit
    configuration; empty where there is one. ready: on whole models of tasks in the folder.
    """
    again = f"There is no mergekit configuration for this merge: {reason}."
    if not reason:
        command = "mergekit-yaml mergekit_config.yml OUTPUT --no-write-model-card"
        left = ", without the heads of tasks" if heads else ""
        again = f"`{command}` merges the same folders (mergekit 0.1.5){left}."
    parts = (
        front(record),
        f"# {', '.join(record.tasks)}: one merged model",
        made(record),
        "## Coefficients\n\n" + coefficients_table(record),
        "## Data\n\n" + "\n".join([data_table(record), *(f"\n- {n}" for n in record.notes)]),
        "## Scores\n\n" + scores_table(record),
        "## Loading\n\nIn this folder:\n\n" + loading(base, heads) + f"\n\n{ready}" * bool(ready),
        f"## mergekit\n\n{again}",
        "## SHA-256\n\n" + table(("written file", "SHA-256"), hashes.items()),
        table(("input file", "SHA-256"), inputs.items()),
    )
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def front(record: MergeRecord) -> str:
    """The YAML front matter that model hubs read."""
    facts = ModelCardData(
        base_model=record.base_name or record.base.name,
        library_name="transformers",
        tags=["merge", "model-merging", record.method.partition("/")[0]],
    )
    return f"---\n{facts.to_yaml()}\n---"


def versions() -> str:
    """Versions of Python and of what is installed of torch and transformers."""
    found = [f"python {platform.python_version()}"]
    for package in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def made(record: MergeRecord) -> str:
    """Base, method, options, date and versions."""
    name = record.method.partition("/")[0]
    source = f" ({METHODS.facts[name]['source']})" if name in METHODS else ""
    own = "the method's own"
    options = f"{json.dumps(dict(record.options))}; all others are {own}" * bool(record.options)
    alone = record.base in map(Path, record.experts.values())  # one stands for the base
    what = "models" if alone else f"experts of {record.base_name or record.base.name}"
    return (
        f"{len(record.tasks)} {what}, merged into one model.\n\n"
        f"- method: {record.method}{source}\n"
        f"- options: {options or own}\n"
        f"- made: {date.today()}, with {versions()}"
    )


def coefficients_table(record: MergeRecord) -> str:
    """The coefficients, or their mean and range over groups."""
    if record.coeffs is None:
        return "This method does not merge by coefficients of task vectors."
    rows = zip(record.tasks, record.coeffs.double(), strict=True)
    summary = [(t, *(f"{x:.4g}" for x in (r.mean(), r.min(), r.max()))) for t, r in rows]
    if len(record.groups) == 1:
        return table(("task", "coefficient"), [row[:2] for row in summary])
    return (
        f"By {record.grouping}, {len(record.groups)} groups of tensors; all of them are in "
        "`coefficients.json`.\n\n"
        + table(("task", "mean over groups", "smallest", "largest"), summary)
    )


def flat(facts: object, before: str = "") -> dict[str, object]:
    """Nested facts under joined names: {"rows": {"test": 9}} -> {"rows test": 9}."""
    if not isinstance(facts, Mapping):
        return {before: facts}
    parts = (flat(value, f"{before} {key}".strip()) for key, value in facts.items())
    return {name: value for part in parts for name, value in part.items()}


def data_table(record: MergeRecord) -> str:
    """Which rows were used for what: one line per task."""
    facts = {task: flat(record.data.get(task, {})) for task in record.tasks}
    if not (columns := list(dict.fromkeys(name for row in facts.values() for name in row))):
        return "Not stated."
    rows = [(t, *(row.get(name, "not stated") for name in columns)) for t, row in facts.items()]
    return table(("task", *columns), rows)


def scores_table(record: MergeRecord) -> str:
    """Every score with its interval, and "not measured" where there is none."""
    if not record.scores:
        return f"{ABSENT.capitalize()}."
    found = {(row["task"], row["metric"]): score_text(row) for row in record.scores}
    metrics = list(dict.fromkeys(metric for _, metric in found))
    missing = {(t, m): ABSENT for t in record.tasks for s, m in found if s in record.tasks}
    tasks = dict.fromkeys([*record.tasks, *(task for task, _ in found)])
    found = missing | found
    rows = [(task, *(found.get((task, metric), "") for metric in metrics)) for task in tasks]
    notes = (text for metric, text in MEANING.items() if metric in metrics)
    note = " ".join(["Value, and ends of the 95 % interval.", *notes])
    return f"{note}\n\n{table(('task', *metrics), rows)}"


def score_text(row: Mapping[str, object]) -> str:
    """`0.912 [0.880, 0.941]`, without the interval where there is none."""
    value, low, high = (math.nan if row[key] is None else row[key] for key in SCORES[2:])
    if math.isnan(value):
        return ABSENT
    ends = "" if math.isnan(low) or math.isnan(high) else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{ends}"


MEAN_HEAD = """\
```python
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
encoder = AutoModel.from_pretrained(".").float().eval()
head = load_file("heads/{task}.safetensors")
inputs = tokenizer(["a text"], return_tensors="pt", padding=True)
mask = inputs["attention_mask"][..., None]
hidden = encoder(**inputs).last_hidden_state
logits = (hidden * mask).sum(1) / mask.sum(1) @ head["weight"].T + head["bias"]
```"""
OWN_HEAD = """\
```python
from safetensors.torch import load_file
from transformers import AutoTokenizer, {kind}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {kind}.from_pretrained(".", num_labels={count}, ignore_mismatched_sizes=True).eval()
model.load_state_dict(load_file("heads/{task}.safetensors"), strict=False)  # MISSING in the report
logits = model(**tokenizer(["a text"], return_tensors="pt", padding=True)).logits
```"""


def loading(base: StoredModel, heads: Mapping[str, Head]) -> str:
    """Lines of Python that load the model, with transformers alone."""
    if not heads:
        kind = (base.config.get("architectures") or ["AutoModel"])[0]
        code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained(".")'
        return f"```python\n{code}\n```"
    rows = [(task, ", ".join(head.labels)) for task, head in heads.items()]
    first = {head.architecture: task for task, head in reversed(heads.items())}
    codes = [
        (MEAN_HEAD if kind == MEAN else OWN_HEAD).format(
            task=task, kind=kind, count=len(heads[task].labels)
        )
        for kind, task in first.items()
    ]
    call = f'`divmerge_book.models.merged.load_with_head(".", "{rows[0][0]}")`'
    labels = "Labels in the order of the logits:\n\n" + table(("task", "labels"), rows)
    return "\n\n".join([*codes, f"The same with this project's package: {call}.", labels])
