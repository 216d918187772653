"""One of the merges on disk, with its coefficients, the tasks' heads and what is known of it."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_book.evaluation.benchmark import check_request
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import defaults
from divmerge_book.models.finetuning import data_digest
from divmerge_book.models.merged import write
from divmerge_book.user_models.checking import check
from divmerge_book.user_models.description import Description, locate, read
from divmerge_book.user_models.language_save import language_facts, write_language
from divmerge_book.user_models.load import load
from divmerge_book.user_models.method_needs import check_budget
from divmerge_book.user_models.plan import Plan
from divmerge_book.user_models.result import MergeResult, merge_and_score, rescored, task_scores
from divmerge_book.user_models.streaming import write_from_disk
from divmerge_book.user_models.vocabulary import grown_base
from divmerge_core.checkpoints import Head, MergeRecord
from divmerge_core.checkpoints.heads import MEAN
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.checkpoints.save import validate_target
from divmerge_core.kernels.delta_storage import part
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.methods import parse


@torch.no_grad()
def coefficients_of(
    vectors: TaskVectors,
    flat: Float[Tensor, " N"],
    grouping: str,
    near: Float[Tensor, "T G"] | None = None,
) -> Float[Tensor, "T G"] | None:
    """Lambda of a merge of the form theta_0 + sum_t Lambda[t, g] tau_t; None for another form.

    Least squares in every group, in float64; where task vectors leave Lambda open (a group that an
    expert did not change), it is the one nearest to `near`, or to 0. A merge has the form where it
    is met within a thousandth of its change, or the rounding of its float32.
    """
    names, groups = groups_of(vectors.layout, grouping)
    count, size = len(vectors.tasks), len(names)
    gram = torch.zeros(size, count, count, dtype=torch.float64)
    along, moved = torch.zeros(size, count, 1, dtype=torch.float64), 0.0
    for (begin, stop), group in zip(vectors.layout.bounds, groups, strict=True):
        deltas = part(vectors.deltas, begin, stop).double().cpu()  # [T, n]
        change = (flat[begin:stop].double() - vectors.base[begin:stop].double()).cpu()
        gram[group] += deltas @ deltas.T
        along[group] += deltas @ change[:, None]
        moved += change.square().sum()
    start = torch.zeros(count, size) if near is None else near
    start = start.double().T[..., None]  # [G, T, 1]
    coeffs = start + torch.linalg.pinv(gram, hermitian=True) @ (along - gram @ start)
    rest = moved + (coeffs * (gram @ coeffs - 2 * along)).sum()  # ||change - made||^2
    limit = 1e-3 * moved.sqrt() + 1e-6 * vectors.base.double().norm().cpu()
    return coeffs[..., 0].T.float() if rest <= limit**2 else None


def in_file(folder: Path, layout: Layout) -> Float[Tensor, " N"]:
    """The merged numbers as they lie in a folder, rounded to its dtypes."""
    model = StoredModel.at(folder)
    own = {name: model.tensors[model.cores[name]] for name in layout.names}
    return layout.flatten({name: t.mapped().view(t.shape).float() for name, t in own.items()})


def grouping_of(spec: str) -> str:
    """The grouping that a method was asked for, or its own; `task` where it has none."""
    name, fixed = parse(spec)
    return fixed.get("grouping", defaults(name).get("grouping", "task"))


def heads_of(plan: Plan, bench: Experiment) -> dict[str, Head]:
    """Every task's head as it is written beside the merged model."""
    found = {}
    for source, expert in zip(plan.experts, bench.experts, strict=True):
        kind = MEAN if source.model is None else type(source.model).__name__
        before = "head." if source.model is None else ""
        tensors = {name.removeprefix(before): tensor for name, tensor in expert.head.items()}
        found[source.task.name] = Head(tensors, source.labels, kind)
    return found


def merge_described(
    description: str | os.PathLike,
    output: str | os.PathLike,
    *,
    methods: Sequence[str] = ("divmerge/layer",),
    budget: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float32",
    overwrite: bool = False,
    options: Mapping[str, object] | None = None,
) -> list[Path]:
    """Merge the models of a description file by every method and write each; prints the scores.

    The command `divmerge merge`. One method writes to `output`, several to `output/METHOD` with
    `-` for `/`. Relative outputs start at the current folder. budget, and options of the methods:
    as in `merge_and_score`.
    Raises ValueError, before weights are read, for whatever a description may have wrong.
    """
    described, output = read(locate(description)), Path(output).expanduser().resolve()
    folders = {method: output for method in methods}
    if len(folders) > 1:
        folders = {method: output / method.replace("/", "-") for method in folders}
    for folder in folders.values():
        target(described, folder, overwrite=overwrite)
    check_request(list(folders), [seed], {}, budget)
    how = {"device": device, "precision": precision}
    plan = check(described, list(folders), **how, options=options)
    tested = zip(plan.tasks, plan.rows["validation"], strict=True)
    check_budget(budget, [task for task, rows in tested if not rows])
    print(plan.summary())
    if not plan.memory:
        given = {"overwrite": overwrite, "options": {"seed": seed, **(options or {})}}
        return [write_from_disk(plan, *item, **given) for item in folders.items()]
    bench = load(plan, **how)
    found = merge_and_score(bench, list(folders), budget=budget, seed=seed, **(options or {}))
    if len(found.closeness):
        print(found.closeness.to_string(index=False))
    for method, folder in folders.items():
        scores = task_scores(found.report, method)
        print(", ".join(filter(None, [method, found.chosen.get(method)])))
        if len(scores):
            print(scores.to_string(index=False, na_rep="-"))
        write_merged(plan, bench, found, method, folder, overwrite=overwrite)
    return list(folders.values())


def target(description: Description, output: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Where the merged model goes; relative paths start at the description's own folder.

    Raises ValueError now, and not after the merge, for a folder that holds something already, that
    is, holds or lies in the base or an expert, or where nothing can be written.
    """
    folder = (description.path.parent / Path(output).expanduser()).resolve()
    base = (description.path.parent / Path(description.base).expanduser()).resolve()
    rows = [file for task in description.tasks for file in task.files().values()]
    given = (base, description.path, *rows, *(task.expert for task in description.tasks))
    if os.path.ismount(folder) or Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"output {folder} is a mount point, or holds the current folder, and is replaced as a "
            "whole; name a new folder in it"
        )
    beside = next(path for path in folder.parents if path.exists())
    try:
        validate_target(folder, filter(Path.exists, given), overwrite)
        tempfile.TemporaryFile(dir=beside).close()
    except OSError as error:
        raise ValueError(f"output {folder}: {beside} cannot be written to ({error})") from error
    return folder


def write_merged(
    plan: Plan,
    bench: Experiment,
    found: MergeResult,
    spec: str,
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    **options: object,
) -> Path:
    """Put one of the merges on disk with heads, card, coefficients and recipe; see checkpoints.

    options: of `checkpoints.write`, such as dtype or max_shard_bytes. Raises ValueError for a
    method that was not run.
    """
    if spec not in found.made:
        raise ValueError(f"{spec!r} was not merged; there are {', '.join(found.made)}")
    vectors, made, grouping = bench.problem.vectors, found.made[spec], grouping_of(spec)
    scales_tasks = made.fit and made.fit["tasks"] == list(vectors.tasks)  # else a basis
    near = torch.tensor(made.fit["coefficients"]) if scales_tasks else None
    storage = plan.description.storage
    own_words = plan.vocabulary is not None and plan.vocabulary.owners
    data = {
        source.task.name: {
            "rows": {split: len(rows[n] or ()) for split, rows in plan.rows.items()},
            **({"digest": data_digest(merge)[:16]} if (merge := plan.rows["merge"][n]) else {}),
            "labels": ", ".join(source.labels),
            "expert": source.kind,
            **({"task vector": storage} if storage != "float32" else {}),
            **(language_facts(plan, bench, n) if plan.tokens else {}),
            **({"own tokens": plan.vocabulary.added(n)} if own_words else {}),
        }
        for n, source in enumerate(plan.experts)
    }
    record = MergeRecord(
        method=spec,
        tasks=vectors.tasks,
        base=plan.base.folder,
        experts={source.task.name: source.task.expert for source in plan.experts},
        options={k: v for k, v in found.options[spec].items() if k != "grouping"},
        coeffs=coefficients_of(vectors, made.merged, grouping, near),
        groups=groups_of(vectors.layout, grouping)[0],
        grouping=grouping,
        data=data,
        scores=(scores := task_scores(found.report, spec).to_dict("records")),
        base_name=(shown := plan.portable)["base_name"],
        notes=(*shown["notes"], *found.notes, *filter(None, [found.chosen.get(spec)])),
    )
    if plan.tokens:
        again, parts = partial(rescored, found.report, bench, spec), (plan, bench, made.merged)
        options |= {"rescored": again, "overwrite": overwrite}
        return write_language(folder, record, *parts, **options)
    merged, heads = vectors.layout.unflatten(made.merged), heads_of(plan, bench)

    def read_back(new: Path) -> None:
        """The card's scores are those of the file: the record holds this very list."""
        read = in_file(new, vectors.layout).to(made.merged.device)
        if not torch.equal(read, made.merged):
            report = rescored(found.report, bench, spec, read)
            scores[:] = task_scores(report, spec).to_dict("records")

    options |= {"heads": heads, "tokenizer": plan.base.tokenizer, "written": read_back}
    size = plan.base.shapes[plan.base.table][0]
    if not own_words and size == plan.vocabulary.rows:
        return write(folder, record, merged=merged, overwrite=overwrite, **options)
    with tempfile.TemporaryDirectory() as place:  # tables and tokenizer are more than the base's
        options["shell"] = grown_base(plan.base, plan.vocabulary.rows, Path(place))
        return write(folder, record, merged=merged, overwrite=overwrite, **options)
