"""Everything that can be said before weights are read: is it right, and does it fit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from divmerge_book.models.encoders import check_device, resolve
from divmerge_book.user_models.description import Description
from divmerge_book.user_models.memory import check_storage, memory_plans
from divmerge_book.user_models.plan import Plan, inspected
from divmerge_book.user_models.streaming import obstacle


def few_inputs(plan: Plan, wanted: int) -> list[str]:
    """Notes on tasks with fewer merge rows than the option `inputs` asks for."""
    counts = plan.table()["merge"]
    return [
        f"task {task!r}: the option inputs is {wanted}, and there are {count} merge rows"
        for task, count in counts[counts < wanted].items()
    ]


def check(
    description: Description,
    methods: Sequence[str] = (),
    *,
    device: str = "cpu",
    precision: str = "float32",
    options: Mapping[str, object] | None = None,
) -> Plan:
    """Everything about a description that can be checked without loading weights.

    methods: those it is to be merged by, with these options; what they need is checked too, of
    memory on the device as well. Raises ValueError with all problems of the first stage that has
    any: methods; paths; the base; experts' architectures, labels and adapters; rows; splits that
    share inputs; tokenizers; storage; memory.
    """
    plan = inspected(description, methods, options or {})
    check_storage(plan)
    if not methods:
        return plan
    resolve(precision, check_device(device))  # they are checked where no memory is planned, too
    wanted = (options or {}).get("inputs") or 0
    plan = replace(plan, notes=(*plan.notes, *few_inputs(plan, wanted)))
    if (why := obstacle(plan, methods, options or {})) is None:
        return replace(plan, place="merged from disk to disk, a few tensors in memory at a time")
    plans = memory_plans(plan, methods, device=device, precision=precision)
    return replace(plan, place=f"models are read into memory: {why}", memory=plans)
