"""The gate before any claim of speed: prefix + suffix is the whole model, and training on kept maps is training it.

In double precision over two epochs to a relative 1e-8, with drop-path, dropout, layer decay and BatchNorm whose
statistics matter, over ten architectures. Each check is also shown to fail on a mutant.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.data.views import find_view
from tuner.models.layers import freeze_layers
from tuner.models.partition import Partition, build_bridge, partition_model
from tuner.spec.sections import BackboneSection, DataSection, StudySection, StudySpec
from tuner.spec.space import Choices
from tuner.training.batches import Rows, build_normaliser, find_dtype
from tuner.training.head_features import NotCacheable
from tuner.training.inputs import ImageInputs
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.metrics import Scores
from tuner.training.prefix_maps import (
    CachedPrefix,
    check_rounded,
    compute_maps,
    continue_maps,
    find_map_dtype,
    verify_partition,
)
from tuner.training.prepare import prepare_model
from tuner.trial import EpochResult, TrialParams

from .builders import CPU, PREPROCESSING, make_params
from .test_equivalence import BACKBONES, N_CLASSES, RTOL, TRAIN, VAL, stir

SIZE = 32
OTHERS: dict[str, dict[str, Any]] = {
    "regnetx_002": {"drop_path_rate": 0.3},
    "mobilenetv3_small_050": {"drop_path_rate": 0.3},
    "densenet121": {"block_config": [2, 2, 2, 2]},
    "edgenext_xx_small": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 48], "drop_path_rate": 0.3},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16,
        "depths": [1, 1, 2],
        "num_heads": [1, 2, 4],
        "window_size": 4,
        "drop_path_rate": 0.3,
    },
}
ALL = BACKBONES | OTHERS
CONVOLUTIONAL = ("resnet18", "mobilenetv2_100", "vgg16_bn", "regnetx_002", "mobilenetv3_small_050")
PLAIN: dict[str, Any] = {"augmentation_strength": 0.0, "layer_decay": 0.7}
VIEWS: dict[str, Any] = {
    "augmentation_strength": 0.5,
    "views": 2,
    "view_seed": 4,
    "horizontal_flip": True,
    "class_weights": "balanced",
}


def make_deep_params(**overrides: Any) -> TrialParams:
    """Return a recipe that trains the last two groups, and far."""
    values = {"unfrozen_layers": 2, "epochs": 2, "batch_size": 6, "lr": 0.01, "dropout": 0.3, "label_smoothing": 0.1}
    return make_params(**(values | overrides))


def prepare(name: str, params: TrialParams) -> nn.Module:
    """Return a trial's model in double precision."""
    spec = StudySpec(
        study=StudySection(name="s"),
        data=DataSection(source="digits", image_size=SIZE),
        space={"backbone": Choices(choices=(name,))},
        backbones={name: BackboneSection(weights="random", kwargs=ALL.get(name, {}))},
    )
    return stir(prepare_model(replace(params, backbone=name), spec, N_CLASSES, None)).double()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a trial showed, and the model that it ended with."""

    epochs: tuple[tuple[EpochResult, Scores], ...]
    model: nn.Module


def cut(model: nn.Module, params: TrialParams) -> tuple[nn.Module, Partition]:
    """Return a frozen copy of a model, and its partition."""
    frozen = copy.deepcopy(model).to(memory_format=torch.channels_last)
    freeze_layers(frozen, params.unfrozen_layers)
    return frozen, partition_model(frozen, take_inputs(3, find_dtype(model)))


def take_inputs(n_images: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return some images as a model in a type takes them."""
    return build_normaliser(PREPROCESSING, CPU, dtype)(TRAIN.pixels[:n_images].to(dtype) / 255)


def keep_maps(model: nn.Module, params: TrialParams, *, is_mutant: bool = False, delay: int = 0) -> CachedPrefix:
    """Return a model's maps as the product keeps them; a mutant's BatchNorm takes the batch's statistics."""
    precision = params.precision
    frozen, partition = cut(model, params)
    if is_mutant:
        for module in frozen.modules():
            module.training = isinstance(module, nn.BatchNorm2d)

    def compute(epoch: int) -> Tensor:
        view = find_view(params, epoch + delay)
        return keep(compute_maps(frozen, partition, TRAIN, PREPROCESSING, CPU, precision=precision, view=view))

    def keep(maps: Tensor) -> Tensor:
        return maps.to(find_map_dtype(CPU, precision)) if precision == "bfloat16" else maps

    val = keep(compute_maps(frozen, partition, VAL, PREPROCESSING, CPU, precision=precision))
    return CachedPrefix(partition=partition, train=compute, val=val)


def train(model: nn.Module, params: TrialParams, cached: CachedPrefix | None) -> Run:
    """Train a copy of a model by the ordinary loop, on images or on maps."""
    job = TrainingJob(
        model=copy.deepcopy(model),
        params=params,
        train=TRAIN,
        val=VAL,
        preprocessing=PREPROCESSING,
        device=CPU,
        cached=cached,
    )
    return Run(epochs=tuple(train_epochs(job)), model=job.model)


def assert_same(found: Run, expected: Run) -> None:
    """Assert that two trainings showed and made the same."""
    for (result, scores), (wanted, wanted_scores) in zip(found.epochs, expected.epochs, strict=True):
        timed = {name: getattr(wanted, name) for name in ("seconds", "val_seconds", "images_per_second")}
        assert vars(replace(result, **timed)) == pytest.approx(vars(wanted), rel=RTOL)
        assert scores.report == wanted_scores.report
    expected_state = expected.model.state_dict()
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, expected_state[name], rtol=RTOL, atol=1e-10, msg=name)


def check(name: str, recipe: dict[str, Any], keep: Callable[..., CachedPrefix] = keep_maps) -> None:
    """Assert that training a backbone's suffix on its kept maps is the ordinary training of the whole model."""
    params = make_deep_params(**recipe)
    model = prepare(name, params)
    whole = train(model, params, None)
    before = model.state_dict()
    moved = [key for key, value in whole.model.named_parameters() if not torch.equal(value, before[key])]
    still = [key for key, value in whole.model.named_parameters() if torch.equal(value, before[key])]
    assert moved
    assert still
    assert_same(train(model, params, keep(model, params)), whole)


@pytest.mark.parametrize("name", ALL)
def test_training_on_kept_maps_is_training_the_whole_model(name: str) -> None:
    """The suffix ends where the whole model does, and shows the same numbers on the way."""
    check(name, VIEWS)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "test_vit"])
def test_training_on_maps_of_plain_images_is_training_the_whole_model(name: str) -> None:
    """Without augmentation, and with a learning rate for each layer group."""
    check(name, PLAIN)


@pytest.mark.parametrize("name", ALL)
def test_training_on_maps_kept_in_bfloat16_is_training_the_whole_model_in_it(name: str) -> None:
    """The losses are those of bfloat16, not of float32.

    Equal to the bit where bfloat16 crosses the cut, and rounded where a residual stream in float32 does.
    """
    params = make_deep_params(**PLAIN, precision="bfloat16")
    model = prepare(name, params).float()
    rounded, on_maps = (list_losses(train(model, params, maps)) for maps in (None, keep_maps(model, params)))
    assert on_maps == pytest.approx(rounded, rel=5e-3)
    assert rounded != list_losses(train(model, replace(params, precision="float32"), None))
    assert name not in CONVOLUTIONAL or on_maps == rounded


class Cancelling(nn.Module):
    """Adds a thousand to a convolution's output and takes it off again, of which bfloat16 leaves a few units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, N_CLASSES)
        nn.init.constant_(self.get_parameter("stem.bias"), 1000.0)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.fc((self.stem(images) - 1000.0).relu().mean((2, 3)))
        return logits


def test_maps_that_bfloat16_does_not_hold_are_refused() -> None:
    """Before any is kept; those of an ordinary model pass."""
    params = make_deep_params(unfrozen_layers=1)
    net = Cancelling().to(memory_format=torch.channels_last)
    freeze_layers(net, 1)
    partition = partition_model(net, take_inputs(3, torch.float32))
    with pytest.raises(NotCacheable, match="not kept well enough in bfloat16"):
        check_rounded(net, partition, TRAIN, PREPROCESSING, CPU, view=None)
    frozen, partition = cut(prepare("resnet18", params).float(), params)
    check_rounded(frozen, partition, TRAIN, PREPROCESSING, CPU, view=None)


def test_a_suffix_that_begins_with_a_strided_kernel_is_the_whole_model_in_bfloat16() -> None:
    """Where it is fed float32 it computes on in bfloat16, as the whole model does."""
    params = make_deep_params(**PLAIN, precision="bfloat16")
    model = prepare("mobilenetv1_100", params).float()
    whole, on_maps = (list_losses(train(model, params, maps)) for maps in (None, keep_maps(model, params)))
    assert on_maps == whole


def list_losses(run: Run) -> list[float]:
    """Return what each epoch showed."""
    return [loss for result, _ in run.epochs for loss in (result.train_loss, result.val_loss)]


@pytest.mark.parametrize("name", ALL)
def test_verify_partition_accepts_the_backbones_of_the_gate(name: str) -> None:
    """What equals the whole model is not refused, and verifying changes no tensor."""
    params = make_deep_params()
    frozen, partition = cut(prepare(name, params), params)
    before = copy.deepcopy(frozen.state_dict())
    verify_partition(frozen, partition, TRAIN, PREPROCESSING, CPU)
    assert all(torch.equal(before[key], value) for key, value in frozen.state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_maps_of_a_later_cut_follow_from_those_of_an_earlier_one(name: str) -> None:
    """The two ways to the head's input, from images and from what the last group but one is fed, give the same."""
    model = prepare(name, make_deep_params())
    (at_earlier, earlier), (at_later, later) = (cut(model, make_deep_params(unfrozen_layers=n)) for n in (2, 1))
    bridge = build_bridge(at_earlier, take_inputs(3), earlier=earlier, later=later)
    expected, maps = (
        compute_maps(at_later, each, VAL, PREPROCESSING, CPU, precision="auto") for each in (later, earlier)
    )
    found, told = torch.full_like(expected, torch.nan), []
    continue_maps(
        at_later, bridge, maps, VAL, CPU, out=found, on_progress=lambda *done: told.append(done), precision="auto"
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert told[-1] == (len(VAL.labels), len(VAL.labels))


def test_maps_of_a_batchnorm_in_train_mode_are_found_out() -> None:
    """The mutant whose frozen BatchNorm takes the batch's statistics does not pass."""
    with pytest.raises(AssertionError):
        check("resnet18", PLAIN, lambda model, params: keep_maps(model, params, is_mutant=True))


def test_maps_of_the_wrong_view_are_found_out() -> None:
    """The mutant that is one view ahead does not pass."""
    with pytest.raises(AssertionError):
        check("test_vit", VIEWS, lambda model, params: keep_maps(model, params, delay=1))


def test_a_cut_one_group_too_high_is_found_out() -> None:
    """The mutant that trains one group less than the recipe asks does not pass."""

    def keep(model: nn.Module, params: TrialParams) -> CachedPrefix:
        return keep_maps(model, replace(params, unfrozen_layers=1))

    with pytest.raises(AssertionError):
        check("resnet18", PLAIN, keep)


def test_epoch_without_maps_augments_its_images_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast their places would be computed in bfloat16, a third of a pixel off and more."""
    params = replace(make_deep_params(**VIEWS), precision="bfloat16", epochs=1)
    model = prepare("mobilenetv2_100", params)
    seen: list[bool] = []
    take = ImageInputs.take

    def watch(self: ImageInputs, rows: Rows, draws: Tensor | None) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return take(self, rows, draws)

    monkeypatch.setattr(ImageInputs, "take", watch)
    train(model, params, replace(keep_maps(model, params), train=lambda _: None))
    assert seen
    assert not any(seen)
