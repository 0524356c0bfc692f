"""Recorded steps are compared and timed before they train, and nothing else changes."""

from dataclasses import replace
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.training import step_graphs
from tuner.training.device import is_device_lost
from tuner.training.head_features import keeping_buffers
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.step_graphs import Record, Step, StepGraphs

from .builders import copy_state, make_images, make_job, make_net, make_params

MANY = 1000


def record_in_place(model: nn.Module, step: Step, inputs: Tensor, labels: Tensor) -> Step:
    """Return a step whose batch, loss and gradients lie in the same place each time, as those of a CUDA graph do."""
    kept_inputs, kept_labels = inputs.clone(), labels.clone()
    loss = step(kept_inputs, kept_labels)
    gradients = [(each, each.grad) for each in model.parameters() if each.grad is not None]

    def replay(inputs: Tensor, labels: Tensor) -> Tensor:
        kept_inputs.copy_(inputs)
        kept_labels.copy_(labels)
        model.zero_grad(set_to_none=True)  # a graph does not add to what is there
        loss.copy_(step(kept_inputs, kept_labels))
        for parameter, gradient in gradients:
            assert parameter.grad is not None
            gradient.copy_(parameter.grad)
            parameter.grad = gradient
        return loss

    return replay


@pytest.fixture(autouse=True)
def _recorded_steps_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have recorded steps take no time, since here they are the same; and short trials be long enough."""
    monkeypatch.setattr(step_graphs, "_LEAST_STEPS", 6)
    monkeypatch.setattr(step_graphs, "_time", lambda step, *_: 0.0 if "replay" in step.__qualname__ else 1.0)


def make_step(model: nn.Module) -> Step:
    """Return a step of a model on images."""

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def find(graphs: StepGraphs, model: nn.Module | None = None, n_steps: int = MANY, **params: Any) -> Step | None:
    """Return the recorded step of a small net, if it is found."""
    model, images = (model or make_net()).train(), make_images(16)
    inputs = images.pixels.float() / 255
    return graphs.find(model, make_step(model), inputs, images.labels, make_params(**params), n_steps=n_steps)


def train(job: TrainingJob) -> list[tuple[float, float]]:
    """Train to the end, and return the losses of every epoch."""
    return [(result.train_loss, result.val_loss) for result, _ in train_epochs(job)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 24},
        {"unfrozen_layers": 1, "class_weights": "balanced"},
        {"optimizer": "sgd", "label_smoothing": 0.1, "augmentation_strength": 0.5},
    ],
    ids=str,
)
def test_training_on_recorded_steps_is_the_plain_one(options: dict[str, Any]) -> None:
    """All bits are the same, with a smaller last batch, frozen layers, and weighted classes."""
    n_replayed = 0

    def record(*args: Any) -> Step:
        replay = record_in_place(*args)

        def counting_replay(inputs: Tensor, labels: Tensor) -> Tensor:
            nonlocal n_replayed
            n_replayed += 1
            return replay(inputs, labels)

        return counting_replay

    plain = make_job(epochs=2, **options)
    recorded = replace(make_job(epochs=2, **options), graphs=StepGraphs(pytest.fail, record))
    assert train(recorded) == train(plain)
    expected = copy_state(plain.model)
    assert all(torch.equal(expected[name], tensor) for name, tensor in copy_state(recorded.model).items())
    n_whole = 64 // plain.params.batch_size
    assert n_replayed == 2 * n_whole + 1  # once to compare


def refuse_to_record(*_: object) -> Step:
    """Fail the test."""
    pytest.fail("recorded")


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"epochs": 1}])
def test_step_is_not_recorded_where_it_must_not_or_cannot_pay(options: dict[str, Any]) -> None:
    """A graph knows nothing of the head's own draws; a short trial is over before it is recorded."""
    job = replace(make_job(**({"epochs": 2} | options)), graphs=StepGraphs(pytest.fail, refuse_to_record))
    assert train(job) == train(make_job(**({"epochs": 2} | options)))


def test_micro_batches_are_not_recorded() -> None:
    """Each part's gradients would overwrite those of the part before."""
    graphs = StepGraphs(pytest.fail, refuse_to_record)
    job = replace(make_job(epochs=2), micro_batch=8)
    assert train(replace(job, model=make_net(), graphs=graphs)) == train(job)


def test_recording_leaves_model_and_draws_as_they_were() -> None:
    """Comparing spends nothing that the training will need: statistics, seeds, gradients."""
    model = nn.Sequential(make_net(), nn.Dropout(0.5)).train()
    before = copy_state(model)
    torch.manual_seed(3)
    assert find(StepGraphs(pytest.fail, record_in_place), model) is not None
    found = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), found)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def record_other_loss(model: nn.Module, step: Step, inputs: Tensor, labels: Tensor) -> Step:
    """Record a step with a mistake."""
    replay = record_in_place(model, step, inputs, labels)
    return lambda inputs, labels: replay(inputs, labels) * 1.1


def record_old_batch(model: nn.Module, step: Step, inputs: Tensor, labels: Tensor) -> Step:
    """Record a step that forgets to take the next batch."""
    kept = inputs.clone()
    return lambda _, labels: step(kept, labels)


def record_still_buffers(model: nn.Module, step: Step, inputs: Tensor, labels: Tensor) -> Step:
    """Record a step that leaves the statistics of a BatchNorm as they are."""

    def run(inputs: Tensor, labels: Tensor) -> Tensor:
        with keeping_buffers(model):
            return step(inputs, labels)

    return run


def record_added_gradients(model: nn.Module, step: Step, inputs: Tensor, labels: Tensor) -> Step:
    """Record a step that adds its gradients to those before: a mistake that its loss does not show."""
    replay = record_in_place(model, step, inputs, labels)

    def add(inputs: Tensor, labels: Tensor) -> Tensor:
        loss = replay(inputs, labels)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = 2 * parameter.grad
        return loss

    return add


def fail_to_record(*_: object) -> Step:
    """Raise as torch does where a step waits for the device."""
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with …")


OTHER = "its recorded steps are not those that it takes"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (record_other_loss, OTHER),
        (record_old_batch, OTHER),
        (record_still_buffers, OTHER),
        (record_added_gradients, OTHER),
        (fail_to_record, "CUDA error: operation not permitted when stream is capturing"),
    ],
)
def test_backbone_that_cannot_be_recorded_is_given_up_with_one_note(record: Record, reason: str) -> None:
    """Its trials launch their kernels, and are not tried again; other backbones are."""
    notes: list[str] = []
    graphs = StepGraphs(notes.append, record)
    assert find(graphs, backbone="one") is None
    assert find(graphs, backbone="one", batch_size=8) is None
    assert notes == [f"one trains without CUDA graphs: {reason}"]
    assert find(graphs, backbone="two") is None
    assert len(notes) == 2


def run_out_of_memory(*_: object) -> Step:
    """Raise as torch does where a recording finds no room."""
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("record", [fail_to_record, run_out_of_memory])
def test_lost_device_is_told_as_such(monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    """If the device no longer answers, whatever was said, the worker must end and another one take over."""
    monkeypatch.setattr(step_graphs, "_answers", lambda _: False)
    with pytest.raises(RuntimeError, match="the device does not answer after a step") as caught:
        find(StepGraphs(pytest.fail, record))
    assert is_device_lost(caught.value)


def test_recording_out_of_memory_gives_nothing_up() -> None:
    """The next trial may have the room."""
    tried: list[int] = []

    def record(*args: Any) -> Step:
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record_in_place(*args)

    graphs = StepGraphs(pytest.fail, record)
    assert find(graphs) is None
    assert find(graphs) is not None


def test_slower_recorded_steps_are_not_used_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was timed once holds for all trials of the same shape, and for no others."""
    tried: list[int] = []

    def record(*args: Any) -> Step:
        tried.append(1)
        return record_in_place(*args)

    monkeypatch.setattr(step_graphs, "_time", lambda step, *_: 1.0 if "replay" in step.__qualname__ else 0.5)
    graphs = StepGraphs(pytest.fail, record)
    assert find(graphs) is None
    assert find(graphs) is None
    assert len(tried) == 1
    assert find(graphs, batch_size=32) is None
    assert len(tried) == 2


def test_step_is_recorded_again_where_the_trial_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording takes 0.2 s and saves 1 ms a step."""

    def record(*args: Any) -> Step:
        sleep(0.2)
        return record_in_place(*args)

    monkeypatch.setattr(step_graphs, "_time", lambda step, *_: 0.001 if "replay" in step.__qualname__ else 0.002)
    graphs = StepGraphs(pytest.fail, record)
    assert find(graphs) is not None
    assert find(graphs, n_steps=200) is None
    assert find(graphs, n_steps=1_000_000) is not None


def slowed(step: Step, seconds: float) -> Step:
    """Return a step that takes longer."""

    def wait(inputs: Tensor, labels: Tensor) -> Tensor:
        sleep(seconds)
        return step(inputs, labels)

    return wait


def test_clock_tells_a_slow_step_from_a_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real clock, and the batch stays as it was whatever a step writes into it."""
    monkeypatch.undo()
    inputs, labels = torch.rand(4, 3), torch.zeros(4)
    before = inputs.clone()
    step: Step = lambda inputs, _: inputs.mul_(2).sum()  # noqa: E731 - one line
    model = make_net()
    assert step_graphs._time(slowed(step, 0.05), model, inputs, labels) > step_graphs._time(step, model, inputs, labels)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize(("mistake", "agrees"), [(0.0, True), (0.02, True), (0.2, False)])
@pytest.mark.parametrize("part", ["loss", "gradients", "buffers"])
def test_steps_agree_tensor_by_tensor_on_a_device(part: str, mistake: float, *, agrees: bool) -> None:
    """But for the order of sums; a large tensor does not hide a small one, unless that is nothing but rounding."""

    def make(factor: float) -> step_graphs._Tried:
        factors = {name: factor if name == part else 1.0 for name in ("loss", "gradients", "buffers")}
        return step_graphs._Tried(
            loss=torch.tensor(2.0) * factors["loss"],
            gradients=[torch.ones(3), torch.full((2,), 0.01) * factors["gradients"], torch.full((2,), 1e-9) * factor],
            buffers=[torch.tensor(10_000), torch.ones(2) * factors["buffers"]],
        )

    assert step_graphs._agree(make(1 + mistake), make(1.0), torch.device("cuda")) is agrees


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"batch_size": 24}, {"optimizer": "sgd", "unfrozen_layers": 1}], ids=str)
def test_cuda_records_a_step(options: dict[str, Any]) -> None:
    """A real graph: the same losses but for rounding, and it was used."""
    device, used = torch.device("cuda", 0), []

    def record(*args: Any) -> Step:
        replay = step_graphs.record_graph(*args)

        def counting_replay(inputs: Tensor, labels: Tensor) -> Tensor:
            used.append(1)
            return replay(inputs, labels)

        return counting_replay

    plain = replace(make_job(make_net().double(), epochs=2, **options), device=device)
    recorded = replace(plain, model=make_net().double(), graphs=StepGraphs(pytest.fail, record))
    assert train(recorded) == [pytest.approx(losses, rel=1e-6) for losses in train(plain)]
    assert len(used) == 2 * (64 // plain.params.batch_size) + 1
