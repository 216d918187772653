"""What methods need of a user's tasks, told before anything is read."""

from collections.abc import Mapping, Sequence

from divmerge_book.evaluation.benchmark import check_fit_for, check_request
from divmerge_core.methods import METHODS, options_of, parse


def check_methods(
    specs: Sequence[str],
    tasks: Sequence[str],
    lacking: Mapping[str, Sequence[str]],
    overrides: Mapping[str, object] | None = None,
) -> None:
    """Raise ValueError for methods that these tasks cannot be merged by, and what they lack.

    lacking: split (`merge`, `validation`) -> tasks without rows of it. overrides: options of the
    methods; `inputs` may be more than the book's suites have.
    """
    given = dict(overrides or {})
    check_request(specs, [0], given | ({"inputs": 1} if "inputs" in given else {}))
    check_fit_for(specs, [tasks], given)
    for spec in specs:
        name, _ = parse(spec)
        if METHODS.facts[name].get("returns") == "predictor":
            raise ValueError(
                f"{spec} returns no single merged model, so none can be written; choose one that "
                "does, such as divmerge/layer"
            )
        reads = "unlabelled inputs" in METHODS.facts[name]["needs"]
        needed = {"merge": reads, "validation": "score" in options_of(name)}
        for split in (split for split, needs in needed.items() if needs and lacking[split]):
            uses = "reads unlabelled inputs" if split == "merge" else "searches with a score"
            raise ValueError(
                f"{spec} {uses}: give task {', '.join(map(repr, lacking[split]))} a {split} split "
                f"({split}: FILE), or choose a method that needs none, such as average or ties"
            )


def check_budget(budget: int | None, without: Sequence[str]) -> None:
    """Raise ValueError for a search of several candidates where tasks have no validation rows."""
    if without and (budget or 1) > 1:
        raise ValueError(
            f"budget is {budget} candidates on validation rows, and task "
            f"{', '.join(map(repr, without))} has none: leave it out for published options, or "
            "give the task a validation split (validation: FILE)"
        )
