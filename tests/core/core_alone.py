"""The core without the rest: a merge, a fit, and a checkpoint written and read again.

`python tests/core/core_alone.py` runs it where packages of the book cannot be imported.
"""

import os
import sys
import tempfile
from pathlib import Path

REFUSED = (
    *("transformers", "datasets", "pandas", "matplotlib", "seaborn", "scipy", "sklearn"),
    *("cma", "gguf", "papermill", "nbformat", "divmerge_book"),
)


def refused(function, *given, **options) -> str:
    """What a function says that refuses what it was given; nothing here checks types before."""
    try:
        function(*given, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{given} was taken")


def main() -> None:
    sys.modules.update(dict.fromkeys(REFUSED))  # importing one of them raises ImportError
    import json

    import torch
    from safetensors.torch import save_file

    import divmerge_core
    from divmerge_core import METHODS, Batch, Layout, MergeProblem, TaskVectors
    from divmerge_core.checkpoints import Head, MergeRecord, load_head, write
    from divmerge_core.checkpoints.safetensors_io import StoredModel

    root = Path(divmerge_core.__file__).parent
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        __import__(module.removesuffix(".__init__"))
    assert len(METHODS) > 20
    wanted = torch.cuda.device_count() or "TRITON_INTERPRET" in os.environ
    assert wanted or "triton" not in sys.modules, "its import is slow, and nothing runs on it"

    torch.manual_seed(0)
    base = {"weight": torch.randn(4, 3), "bias": torch.randn(4)}
    states = {
        task: {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in base.items()}
        for task in ("one", "two")
    }
    vectors = TaskVectors.from_states(base, states)
    named = "give a mapping of names to tensors, such as module.state_dict()"
    odd = {"is a Linear": torch.nn.Linear(3, 4), "is a list": [base]}
    for what, given in odd.items():
        for make in (TaskVectors.from_states, TaskVectors.from_adapters):
            assert refused(make, given, {}) == f"the base model {what}; {named}"
        for make in (Layout.of, vectors.layout.flatten):
            assert refused(make, given) == f"the state dict {what}; {named}"
    arrays = {"one": {name: tensor.numpy() for name, tensor in base.items()}}
    assert "expert 'one': weight is a ndarray" in refused(TaskVectors.from_states, base, arrays)
    for given in ([base], {"one": odd["is a Linear"]}, base):
        assert "of tasks to state dicts" in refused(TaskVectors.from_states, base, given)
        assert "of tasks to factors by name" in refused(TaskVectors.from_adapters, base, given)
    assert "names to factors (B, A)" in refused(TaskVectors.from_adapters, base, {"one": base})
    batches = [[Batch({"x": torch.randn(5, 3)}, torch.full((5,), 0.2))] for _ in states]

    def forward(parameters, pairs):
        weight, bias = parameters["weight"], parameters["bias"]
        return [torch.nn.functional.linear(batch.inputs["x"], weight, bias) for _, batch in pairs]

    for given in ({"one": 1.0}, {0: 1, 1: 2}, {0.5}, 1.0, None, "12"):
        said = f"weights is a {type(given).__name__}; give a list with a number for each of one, "
        assert refused(vectors.merge, given).startswith(said)
    assert "one tensor of 16 numbers" in refused(vectors.layout.unflatten, base)
    parts = (vectors.layout, vectors.tasks, vectors.base, vectors.deltas)
    for n, name in enumerate(("layout", "tasks", "base", "deltas")):
        given = [*parts[:n], base, *parts[n + 1 :]]
        assert f"{name} is a dict; give TaskVectors(lay" in refused(TaskVectors, *given)
    for said, *given in (
        ("batches is a function", vectors, forward, batches),
        ("vectors is a list", batches, vectors, forward),
        ("batches is a dict", vectors, dict.fromkeys(states, batches[0]), forward),
        ("forward is a NoneType; give MergeProblem(vec", vectors, batches, None),
        ("batches of 'one' is a Batch; give a list", vectors, sum(batches, []), forward),
    ):
        assert said in refused(MergeProblem, *given)
    problem = MergeProblem(vectors, batches, forward)
    for given in (vectors, states, None):
        said = refused(METHODS["average"], given)
        assert f"of average is a {type(given).__name__}; give MergeProblem(vec" in said
    average = METHODS["task_arithmetic"](problem, scale=0.5)
    torch.testing.assert_close(average, vectors.merge([0.5, 0.5]))
    losses = []
    fitted = METHODS["divmerge"](
        problem, epochs=5, callback=lambda step: losses.append(step.loss), progress=False
    )
    assert losses[-2] < losses[0] and fitted.shape == vectors.base.shape

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text(json.dumps({"hidden_size": 3}))
        save_file(base, folder / "base" / "model.safetensors")
        record = MergeRecord("divmerge", vectors.tasks, folder / "base")
        said = refused(write, folder / "out", record, merged=odd["is a Linear"])
        assert said == f"merged is a Linear; {named}"
        head = Head({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, ("no", "yes"))
        merged = vectors.layout.unflatten(fitted)
        out = write(folder / "out", record, merged=merged, heads={"one": head}, progress=False)
        stored = StoredModel.at(out).tensors
        for key, tensor in merged.items():
            assert torch.equal(stored[key].mapped().view(tensor.shape), tensor)
        assert load_head(out, "one").labels == head.labels
    print("the core works alone")


if __name__ == "__main__":
    main()
