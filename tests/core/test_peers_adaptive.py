"""Learnt methods beside FusionBench's own loops, on the same experts and inputs."""

from types import SimpleNamespace

import pytest
import torch
from helpers import LinearModel, linear_problem
from torch.testing import assert_close

from divmerge_core.divergences import entropy
from divmerge_core.merging.linalg import elected
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods.adaptive import adamerging, entropy_of_mean_logit
from divmerge_core.methods.arithmetic import task_arithmetic
from divmerge_core.methods.corrected import surgery

# FusionBench and what it imports warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("fusion_bench")

CLOSE = {"rtol": 0, "atol": 1e-5}
STEPS = 6


def model_of(problem: MergeProblem, flat: torch.Tensor) -> LinearModel:
    """A model of its own with parameters `flat`."""
    layout = problem.vectors.layout
    classes, features = layout.shapes[-2]
    model = LinearModel(features, classes)
    model.load_state_dict(layout.unflatten(flat))
    return model


def peers_model(problem: MergeProblem, init: float):
    """FusionBench's module with a coefficient per task and tensor, unclamped as in its configs."""
    from fusion_bench.models.wrappers.layer_wise_fusion import (
        LayerWiseMergedModel,
        get_layer_wise_weights,
    )

    vectors = problem.vectors
    return LayerWiseMergedModel(
        get_layer_wise_weights(len(vectors.tasks), len(vectors.layout.names), init),
        model_of(problem, vectors.base),
        [model_of(problem, vectors.expert(name)) for name in vectors.tasks],
        clamp_weights=False,
        tie_weights=True,
        strict=False,
    )


def peers_merge(problem: MergeProblem, lr: float) -> torch.Tensor:
    """FusionBench's own loop of layer-wise AdaMerging, on one batch per task."""
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from omegaconf import DictConfig

    class Adaptation(LayerWiseAdaMergingAlgorithm):
        modelpool = SimpleNamespace(model_names=list(problem.vectors.tasks))

        def get_shuffled_test_loader_iter(self, task):
            number = problem.vectors.tasks.index(task)
            return iter([(problem.batches[number][0].inputs["x"],)])

        def compute_logits(self, module, images, task):
            return module(images)

    config = {"optimizer": "adam", "lr": lr, "max_steps": STEPS}
    algorithm = Adaptation(DictConfig({**config, "fabric": None}))
    module = algorithm.test_time_adaptation(peers_model(problem, 0.3))
    return problem.vectors.layout.flatten(module.merge_and_unload().state_dict())


@pytest.fixture
def problem() -> MergeProblem:
    """Three float32 experts with one batch each, so that order has no part in it."""
    return linear_problem(batches=1, dtype=torch.float32)


def test_layer_wise_adamerging_goes_the_way_of_fusionbenchs_loop(problem):
    merged = adamerging(problem, epochs=STEPS, lr=1e-2, progress=False)
    assert (merged - task_arithmetic(problem)).abs().max() > 0.01
    assert_close(merged, peers_merge(problem, 1e-2), **CLOSE)


@pytest.mark.parametrize("mean_logit", [False, True])
def test_one_steps_gradient_is_fusionbenchs_with_either_entropy(problem, mean_logit):
    """Its GPT-2 and Flan-T5 loops average the batch's logits before the same entropy."""
    from fusion_bench.method.adamerging.entropy_loss import entropy_loss

    module, losses = peers_model(problem, 0.3), []
    module.merge_weights()
    for batches in problem.batches:
        logits = module(batches[0].inputs["x"])
        losses.append(entropy_loss(logits.mean(0, keepdim=True) if mean_logit else logits))
    sum(losses).backward()
    of_rows = entropy_of_mean_logit if mean_logit else entropy
    flat = task_arithmetic(problem).requires_grad_()
    ours = sum(
        batches[0].weight @ of_rows(problem.logits(flat, task, batches[0]))
        for task, batches in enumerate(problem.batches)
    )
    ours.backward()
    grads = [
        [(grad * delta).sum() for grad, delta in zip(places(flat.grad), places(row), strict=True)]
        for places in [lambda x: problem.vectors.layout.unflatten(x).values()]
        for row in problem.vectors.deltas
    ]
    assert_close(ours.detach(), sum(losses).detach(), **CLOSE)
    assert_close(torch.tensor(grads), module.merge_weight.grad, **CLOSE)


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_adamerging_plus_plus_elects_as_fusionbench_splits(problem, keep):
    """It cuts d K down to a whole number of kept entries and keeps one more; we round d K.

    So it is given the share that it reads as our number.
    """
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging_split

    deltas = problem.vectors.deltas
    count = round(keep * deltas.shape[1])
    entries, total = ties_merging_split(deltas, (count - 0.5) / deltas.shape[1], "dis-sum")
    assert_close(elected(deltas, keep), entries, **CLOSE)
    assert_close(elected(deltas, keep).sum(0), total, **CLOSE)


@pytest.fixture
def wrapper(monkeypatch):
    """FusionBench's adapters: it names a class, in a hint alone, that newer transformers lack."""
    from transformers.models.clip import modeling_clip

    monkeypatch.setattr(modeling_clip, "CLIPVisionTransformer", object, raising=False)
    from fusion_bench.models.surgery.surgerymodelwrapper import SurgeryModelWrapper

    return SurgeryModelWrapper


def test_surgery_takes_the_steps_of_fusionbenchs_adapters(problem, wrapper):
    ours = surgery(problem, steps=STEPS, batch_size=5, lr=1e-3, seed=3, progress=False)
    merged = model_of(problem, task_arithmetic(problem))
    tasks = list(problem.vectors.tasks)
    adapters = wrapper(merged, tasks, projection_dim=4)
    drawn = torch.rand(16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bound = getattr(adapters, f"feature_mapping_to_head_down_proj_{tasks[0]}").weight.abs().max()
    assert 0.3 < bound <= 0.5  # it draws from the same range, 1 / sqrt(D)
    for task in tasks:
        down = getattr(adapters, f"feature_mapping_to_head_down_proj_{task}")
        down.weight.data = ((2 * drawn - 1) / 2).float()
    adam = torch.optim.Adam(adapters.collect_trainable_params(), lr=1e-3)
    for _ in range(STEPS):
        for number, task in enumerate(tasks):
            batch = problem.batches[number][0]
            x = batch.inputs["x"]
            features, _, _ = adapters.compute_surgery_features(lambda model, x=x: model(x), task)
            expert = problem.logits(problem.vectors.expert(task), number, batch)
            adam.zero_grad()
            torch.nn.functional.l1_loss(features, expert).backward()
            adam.step()
    for number, task in enumerate(tasks):
        batch = problem.batches[number][0]
        x = batch.inputs["x"]
        features, plain, _ = adapters.compute_surgery_features(lambda model, x=x: model(x), task)
        assert (features - plain).abs().max() > 1e-3
        assert_close(ours.logits(number, batch), features.detach(), **CLOSE)
