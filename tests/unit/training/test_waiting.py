"""A training step never waits for the device, as far as torch's meta device can tell.

Meta tensors have no values, so that every look at one raises: ``item``, ``tolist``, ``bool``, ``nonzero``, ``cpu``.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.data.image_set import ImageSet, move_to
from tuner.models.layers import freeze_layers
from tuner.models.partition import partition_model
from tuner.training import cohort, inputs, loop
from tuner.training.cohort import CohortJob
from tuner.training.loop import TrainingJob, take_steps
from tuner.training.prefix_maps import CachedPrefix
from tuner.training.step_graphs import set_sync_debug_mode

from .builders import SIZE, make_images, make_job, make_net, make_params

META = torch.device("meta")


class NoWaiting(TorchDispatchMode):
    """Refuses copies to the device for which the host waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, unless it is such a copy."""
        kwargs = kwargs or {}
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_copy and not kwargs.get("non_blocking") and not (len(args) > 2 and args[2]):
            source = args[-1] if func is torch.ops.aten.copy_.default else args[0]
            target = args[0].device if func is torch.ops.aten.copy_.default else kwargs.get("device", source.device)
            assert torch.device(target).type == source.device.type, f"{func} waits for the device"
        return func(*args, **kwargs)


@pytest.fixture
def _fused_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let run on the meta device what begins a trial: fused Adam, a generator, counted labels."""
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        monkeypatch.setattr(import_module(name), "_get_fused_kernels_supported_devices", lambda: ["meta", "cpu"])
    for module in (loop, cohort):
        monkeypatch.setattr(module, "start_dropout", lambda seed, _: torch.Generator().manual_seed(seed))
    monkeypatch.setattr(loop, "weigh_classes", lambda _, n_classes: torch.ones(n_classes))


def move_images(images: ImageSet) -> ImageSet:
    """Return images on the meta device, the rows of the index on the CPU, as ``move_to`` leaves them on CUDA."""
    return replace(images, pixels=images.pixels.to(META), labels=images.labels.to(META))


def make_meta_job(model: nn.Module | None = None, **overrides: Any) -> TrainingJob:
    """Return a job on the meta device."""
    job = make_job(model, **overrides)
    return replace(job, train=move_images(job.train), val=None, device=META)


@pytest.mark.usefixtures("_fused_on_meta")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augmentation_strength": 0.5, "horizontal_flip": True},
        {"augmentation_strength": 0.5, "views": 3},
        {"optimizer": "adam", "label_smoothing": 0.1, "unfrozen_layers": 1},
        {"class_weights": "balanced", "batch_size": 24},
    ],
    ids=str,
)
def test_training_step_never_waits_for_the_device(options: dict[str, Any]) -> None:
    """Two epochs of steps, with all that an epoch begins with: order, draws, batches, loss, optimizer, schedule."""
    steps = take_steps(make_meta_job(**options))
    assert next(steps) > 0  # what a trial begins with may wait
    with NoWaiting():
        assert sum(islice(steps, 7)) > 0


@pytest.mark.usefixtures("_fused_on_meta")
@pytest.mark.parametrize("maps_lie", ["meta", "cpu"])
def test_training_step_on_maps_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, maps_lie: str) -> None:
    """Nor on maps that are too large for the device: which of them a batch needs is known on the host as well."""

    def gather(values: Tensor, rows: Tensor, device: torch.device) -> Tensor:
        assert values.device.type == rows.device.type == maps_lie
        return torch.empty((len(rows), *values.shape[1:]), device=device)  # pinned memory needs a GPU

    job = make_meta_job(unfrozen_layers=1)
    net = make_net()
    freeze_layers(net, 1)
    partition = partition_model(net, torch.rand(3, 3, SIZE, SIZE))
    maps = torch.rand(len(job.train.labels), partition.width, device=maps_lie)
    monkeypatch.setattr(inputs, "gather_rows", gather)
    steps = take_steps(replace(job, cached=CachedPrefix(partition=partition, train=lambda _: maps, val=maps)))
    assert next(steps) > 0
    with NoWaiting():
        assert sum(islice(steps, 7)) > 0


@pytest.mark.usefixtures("_fused_on_meta")
@pytest.mark.parametrize(
    "wait",
    [
        lambda logits: logits * float(logits.sum()),
        lambda logits: logits if logits.sum() > 0 else logits * 2,
        lambda logits: logits * logits.detach().cpu().to(META),
        lambda logits: logits[logits[:, 0].nonzero()[:, 0]],
        lambda logits: logits + torch.zeros(1).to(META),
    ],
)
def test_training_step_that_waits_is_noticed(wait: Callable[[Tensor], Tensor]) -> None:
    """The test above can fail: a value, a branch, a copy back, a size that depends on values, a copy from the host."""
    net = make_net()
    steps = take_steps(make_meta_job(net))
    next(steps)
    net.register_forward_hook(lambda _, __, logits: wait(logits))
    with NoWaiting(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        next(steps)


@pytest.mark.usefixtures("_fused_on_meta")
@pytest.mark.parametrize("labels_lie", ["meta", "cpu"])
def test_step_of_a_cohort_never_waits_for_the_device(labels_lie: str) -> None:
    """Nor does the order of its epoch; labels that lie on the host with their images are fetched once."""
    params = tuple(make_params(unfrozen_layers=1, seed=seed) for seed in range(3))
    job = CohortJob(
        params=params,
        features=lambda _: torch.rand(64, 5, device=META),
        labels=torch.arange(64, device=labels_lie) % 2,
        val_features=torch.rand(8, 5, device=META),
        val_labels=torch.arange(8, device=META) % 2,
        n_classes=2,
        weights=torch.rand(3, 2, 5),
        biases=torch.rand(3, 2),
        device=META,
    )
    heads = cohort._Cohort(job)
    # Up to the end of the epoch, where the losses are looked at, all at once.
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        heads.run_epoch(job.features(1), 1)
    assert heads._optimizer._n_steps == 4


def list_inputs(net: nn.Module) -> list[Tensor]:
    """Collect what a net is given."""
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


@pytest.mark.parametrize("options", [{}, {"augmentation_strength": 0.5}, {"augmentation_strength": 0.5, "views": 2}])
def test_training_step_has_channels_last_and_a_fused_optimizer(options: dict[str, Any]) -> None:
    """Whatever comes before the model, it is given what tensor cores want."""
    net = make_net()
    seen = list_inputs(net)
    next(take_steps(make_job(net, **options)))
    assert all(inputs.is_contiguous(memory_format=torch.channels_last) for inputs in seen)
    assert net.stem.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    training = loop._Training(make_job(**options))
    assert all(group["fused"] for group in training._optimizer.param_groups)


@pytest.fixture
def _sync_is_an_error() -> Iterator[None]:
    yield
    set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("_sync_is_an_error")
@pytest.mark.parametrize("is_on_host", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("options", [{}, {"augmentation_strength": 0.5, "dropout": 0.3}, {"batch_size": 24}], ids=str)
def test_training_step_never_waits_for_cuda(is_on_host: bool, optimizer: str, options: dict[str, Any]) -> None:
    """In torch's own words: no synchronising call in an epoch's steps, images on the device or on the host."""
    device = torch.device("cuda", 0)
    images = make_images() if is_on_host else move_to(make_images(), device)
    net = make_net()
    seen = list_inputs(net.stem[1])
    job = replace(make_job(net, optimizer=optimizer, **options), train=images, val=None, device=device)
    steps = take_steps(job)
    for _ in range(5):  # an epoch and a step: what is tried once may wait
        next(steps)
    set_sync_debug_mode("error")
    for _ in range(8):
        next(steps)
    assert seen[-1].dtype == torch.bfloat16
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
    assert not torch.backends.cudnn.benchmark
