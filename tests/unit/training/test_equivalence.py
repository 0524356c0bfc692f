"""The gate before any claim of speed: features are the whole model, and a cohort is each trial alone.

In double precision over two epochs to a relative 1e-8, with a learning rate that moves the heads by more than 1 %,
dropout, drop-path and BatchNorm whose statistics matter. Each check is also shown to fail on a mutant.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.data.augment import augment
from tuner.data.image_set import ImageSet
from tuner.data.views import View, draw_view, find_view
from tuner.models.backbone import find_classifiers
from tuner.models.layers import freeze_layers
from tuner.spec.sections import BackboneSection, DataSection, StudySection, StudySpec
from tuner.spec.space import Choices
from tuner.training import cohort as cohort_module
from tuner.training import head_features
from tuner.training.batches import build_normaliser
from tuner.training.cohort import CohortJob, train_cohort
from tuner.training.epoch_numbers import Diverged
from tuner.training.head_features import compute_features, find_linear_head, put_head, verify_head
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.metrics import Scores
from tuner.training.prepare import prepare_model, start_heads
from tuner.trial import EpochResult, TrialParams

from .builders import CPU, PREPROCESSING, make_net, make_params
from .builders import make_images as make_toy_images

N_CLASSES = 3
RTOL = 1e-8
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {"drop_path_rate": 0.3},
    "mobilenetv2_100": {"drop_path_rate": 0.3},
    "test_vit": {"drop_path_rate": 0.3},
    "convnext_atto": {"depths": [1, 1, 1, 1], "drop_path_rate": 0.3},
    "vgg16_bn": {"mlp_ratio": 0.02},
}
ComputeFeatures = Callable[[nn.Module, ImageSet, View | None], Tensor]


def make_images(n_images: int, seed: int, size: int = 32) -> ImageSet:
    """Return blocks of noise, in rows of an index that are not their positions; the last class is rare."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n_images, 3, 4, 4), generator=generator)
    pixels = blocks.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3).to(torch.uint8)
    labels = torch.randint(0, 2 * N_CLASSES, (n_images,), generator=generator).sub_(N_CLASSES).clamp_(min=0)
    rows = torch.randperm(1000, generator=generator)[:n_images]
    return ImageSet(pixels=pixels, labels=labels, n_classes=N_CLASSES, rows=rows)


TRAIN, VAL = make_images(19, 1), make_images(11, 2)  # batches of 6, 6 and 6: the single image left over is left out


def make_head_params(**overrides: Any) -> TrialParams:
    """Return a recipe that trains the head alone, and far."""
    values = {"unfrozen_layers": 1, "epochs": 2, "batch_size": 6, "lr": 0.05, "dropout": 0.3, "label_smoothing": 0.1}
    return make_params(**(values | overrides))


def stir(model: nn.Module) -> nn.Module:
    """Make norms and layer scales matter, which a new model's do not."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)  # type: ignore[union-attr]
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def prepare(name: str, params: TrialParams) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a trial's model in double precision, and its first head drawn without it."""
    spec = StudySpec(
        study=StudySection(name="s"),
        data=DataSection(source="digits", image_size=32),
        space={"backbone": Choices(choices=(name,))},
        backbones={name: BackboneSection(weights="random", kwargs=BACKBONES[name])},
    )
    model = prepare_model(replace(params, backbone=name), spec, N_CLASSES, None)
    other = prepare_model(replace(params, backbone=name, seed=params.seed + 1), spec, N_CLASSES, None)
    heads = start_heads(find_linear_head(other), [params.seed])
    return stir(model).double(), heads


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a trial showed, and the head that it ended with."""

    epochs: tuple[tuple[EpochResult, Scores], ...]
    ending: str
    """Why it ended early; empty if it did not."""
    weight: Tensor
    bias: Tensor


def run_alone(model: nn.Module, params: TrialParams, train: ImageSet = TRAIN, val: ImageSet = VAL) -> Run:
    """Train the head of a whole model by the ordinary loop; the model is not changed."""
    model = copy.deepcopy(model)
    job = TrainingJob(model=model, params=params, train=train, val=val, preprocessing=PREPROCESSING, device=CPU)
    epochs: list[tuple[EpochResult, Scores]] = []
    ending = ""
    try:
        epochs.extend(train_epochs(job))  # keeps what came before an exception
    except Diverged as error:
        ending = str(error)
    head = find_linear_head(model)
    bias = head.get_parameter("bias").detach()
    return Run(epochs=tuple(epochs), ending=ending, weight=head.weight.detach().flatten(1), bias=bias)


def compute(model: nn.Module, images: ImageSet, view: View | None) -> Tensor:
    """Compute features as the product does."""
    return compute_features(model, images, PREPROCESSING, CPU, view=view, precision="auto")


def make_cohort(
    model: nn.Module,
    params: tuple[TrialParams, ...],
    heads: tuple[Tensor, Tensor],
    *,
    compute: ComputeFeatures = compute,
    sets: tuple[ImageSet, ImageSet] = (TRAIN, VAL),
    delay: int = 0,
) -> CohortJob:
    """Return a cohort on a model's features; ``delay`` shows the view of a later epoch."""
    train, val = sets
    return CohortJob(
        params=params,
        features=lambda epoch: compute(model, train, find_view(params[0], epoch + delay)),
        labels=train.labels,
        val_features=compute(model, val, None),
        val_labels=val.labels,
        n_classes=train.n_classes,
        weights=heads[0],
        biases=heads[1],
        device=CPU,
    )


def run_cohort(job: CohortJob, stopping: dict[int, frozenset[int]] | None = None) -> dict[int, Run]:
    """Train a cohort; ``stopping`` names the trials that are pruned after an epoch."""
    runs = {
        index: Run(epochs=(), ending="", weight=job.weights[index], bias=job.biases[index])
        for index in range(len(job.params))
    }
    epochs = train_cohort(job)
    stopped: frozenset[int] | None = None
    while (shown := advance(epochs, stopped)) is not None:
        for index, result in shown.results.items():
            if isinstance(result, Diverged):
                runs[index] = replace(runs[index], ending=str(result))
            else:
                weight, bias = (tensor.clone() for tensor in shown.heads[index])
                runs[index] = replace(runs[index], epochs=(*runs[index].epochs, result), weight=weight, bias=bias)
        stopped = (stopping or {}).get(shown.epoch)
    return runs


def advance(epochs: Any, stopped: frozenset[int] | None) -> cohort_module.CohortEpoch | None:
    """Return the next epoch of a cohort, None after the last."""
    try:
        shown: cohort_module.CohortEpoch = epochs.send(stopped)
    except StopIteration:
        return None
    return shown


def assert_same_run(found: Run, expected: Run) -> None:
    """Assert that two trainings showed and made the same."""
    assert found.ending == expected.ending
    assert len(found.epochs) == len(expected.epochs)
    for (result, scores), (wanted, wanted_scores) in zip(found.epochs, expected.epochs, strict=True):
        timed = {name: getattr(wanted, name) for name in ("seconds", "val_seconds", "images_per_second")}
        timeless = replace(result, **timed)
        assert vars(timeless) == pytest.approx(vars(wanted), rel=RTOL)
        assert scores.report == wanted_scores.report
    if not expected.ending:
        torch.testing.assert_close(found.weight, expected.weight, rtol=RTOL, atol=1e-12)
        torch.testing.assert_close(found.bias, expected.bias, rtol=RTOL, atol=1e-12)


def assert_moved(run: Run, first: Tensor) -> None:
    """Assert that training moved a head by more than 1 %."""
    assert (run.weight - first).norm() > 0.01 * first.norm()


def check_backbone(name: str, compute: ComputeFeatures = compute, delay: int = 0, **overrides: Any) -> None:
    """Assert that a cohort of one on a backbone's features is the ordinary training of the whole model."""
    params = make_head_params(**overrides)
    model, heads = prepare(name, params)
    assert torch.equal(heads[0][0].double(), find_linear_head(model).weight.flatten(1))
    whole = run_alone(model, params)
    assert_moved(whole, heads[0][0])
    assert_same_run(run_cohort(make_cohort(model, (params,), heads, compute=compute, delay=delay))[0], whole)


PLAIN: dict[str, Any] = {"augmentation_strength": 0.0}
VIEWS: dict[str, Any] = {
    "augmentation_strength": 0.5,
    "views": 2,
    "view_seed": 4,
    "horizontal_flip": True,
    "class_weights": "balanced",
}


@pytest.mark.parametrize("recipe", [PLAIN, VIEWS], ids=["plain", "views"])
@pytest.mark.parametrize("name", BACKBONES)
def test_features_are_the_whole_model(name: str, recipe: dict[str, Any]) -> None:
    """A head on features ends where the head of the whole model does, and shows the same numbers on the way."""
    check_backbone(name, **recipe)


@pytest.mark.parametrize("name", BACKBONES)
def test_verify_head_accepts_the_backbones_of_the_gate(name: str) -> None:
    """What equals the whole model is not refused, and verifying changes no tensor."""
    model, _ = prepare(name, make_head_params())
    before = copy.deepcopy(model.state_dict())
    verify_head(model, TRAIN, PREPROCESSING, CPU)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def compute_with_batch_statistics(model: nn.Module, images: ImageSet, view: View | None) -> Tensor:
    """Compute features of a model whose BatchNorm alone is in train mode: a mutant."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.training = True
    seen: list[Tensor] = []
    model.get_submodule(find_classifiers(model)[0]).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach().flatten(1))
    )
    model(build_normaliser(PREPROCESSING, CPU, torch.float64)(show(images, view)))
    return seen[0]


def show(images: ImageSet, view: View | None) -> Tensor:
    """Return pixels as a view shows them, image by image."""
    pixels = images.pixels.double() / 255
    if view is None:
        return pixels
    return torch.cat(
        [
            augment(
                image[None],
                draw_view(view.seed, row[None], view=view.number, strength=view.strength),
                strength=view.strength,
                horizontal_flip=view.horizontal_flip,
            )
            for image, row in zip(pixels, images.rows, strict=True)
        ]
    )


def test_features_of_a_batchnorm_in_train_mode_are_found_out() -> None:
    """The mutant whose frozen BatchNorm takes the batch's statistics does not pass."""
    with pytest.raises(AssertionError):
        check_backbone("resnet18", compute_with_batch_statistics, **PLAIN)


def test_features_of_the_wrong_view_are_found_out() -> None:
    """The mutant that is one view ahead does not pass."""
    with pytest.raises(AssertionError):
        check_backbone("test_vit", delay=1, **VIEWS)


def check_views(name: str = "test_vit") -> None:
    """Assert that the features of a view are those of images that are augmented one by one beforehand."""
    model, _ = prepare(name, make_head_params())
    view = View(number=1, seed=4, strength=0.5, horizontal_flip=True)
    found = compute(model, TRAIN, view)
    freeze_layers(model, 1)
    seen: list[Tensor] = []
    find_linear_head(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(1)))
    model.eval()(build_normaliser(PREPROCESSING, CPU, torch.float64)(show(TRAIN, view)))
    torch.testing.assert_close(found, seen[0], rtol=RTOL, atol=1e-10)


def test_features_of_a_view_are_those_of_augmented_images() -> None:
    """Each image is shown in its own version, whatever batch it comes in."""
    check_views()


def test_one_draw_for_a_whole_batch_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that shows all images of a batch in one version passes neither check."""

    def draw_once(view_seed: int, rows: Tensor, *, view: int, strength: float) -> Tensor:
        return draw_view(view_seed, rows[:1], view=view, strength=strength).expand(len(rows), -1)

    monkeypatch.setattr(head_features, "draw_view", draw_once)
    with pytest.raises(AssertionError):
        check_views()
    with pytest.raises(AssertionError):
        check_backbone("test_vit", **VIEWS)


# --- a cohort is each trial alone ---

TOY = (make_toy_images(33), make_toy_images(20, seed=1))
VARIED: tuple[dict[str, Any], ...] = (
    {"seed": 1, "lr": 0.05, "dropout": 0.0, "label_smoothing": 0.0, "momentum": 0.0, "weight_decay": 0.0},
    {"seed": 2, "lr": 0.02, "dropout": 0.5, "label_smoothing": 0.2, "momentum": 0.9, "weight_decay": 0.1},
    {"seed": 3, "lr": 0.1, "dropout": 0.1, "label_smoothing": 0.0, "momentum": 0.5, "weight_decay": 0.01},
    {"seed": 2, "lr": 0.03, "dropout": 0.0, "label_smoothing": 0.4, "momentum": 0.95, "warmup_fraction": 0.5},
)


def vary(**shared: Any) -> tuple[TrialParams, ...]:
    """Return trials that differ in all that a cohort may vary."""
    return tuple(make_head_params(**({"batch_size": 8} | shared | own)) for own in VARIED)


def make_body() -> nn.Module:
    """Return a net in double precision, whose head each trial draws anew."""
    return stir(make_net()).double()


def list_runs_alone(params: tuple[TrialParams, ...]) -> Iterator[tuple[Run, Tensor]]:
    """Train each trial by the ordinary loop; yield its run, and the weight that it started from."""
    for one in params:
        model = make_body()
        weights, biases = start_heads(find_linear_head(make_net()), [one.seed])
        put_head(model, weights[0], biases[0])
        yield run_alone(model, one, *TOY), weights[0]


def run_together(params: tuple[TrialParams, ...], stopping: dict[int, frozenset[int]] | None = None) -> dict[int, Run]:
    """Train all trials as one cohort."""
    heads = start_heads(find_linear_head(make_net()), [one.seed for one in params])
    return run_cohort(make_cohort(make_body(), params, heads, sets=TOY), stopping)


def check_cohort(**shared: Any) -> None:
    """Assert that a cohort's trials are what each of them is alone."""
    params = vary(**shared)
    together = run_together(params)
    for index, (alone, first) in enumerate(list_runs_alone(params)):
        assert_moved(alone, first)
        assert_same_run(together[index], alone)


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_cohort_is_each_trial_alone(optimizer: str, class_weights: str) -> None:
    """Own rates, decays, momenta, smoothing, dropout, warm-up and seeds, as the ordinary loop has them."""
    check_cohort(optimizer=optimizer, class_weights=class_weights)


def test_cohort_in_parts_is_the_whole_cohort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory bounds how many trials are gathered at once, the numbers stay."""
    monkeypatch.setattr(cohort_module, "_PART_BYTES", 1)
    check_cohort()


def test_cohort_that_takes_the_mean_over_trials_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant whose loss is a mean over trials, so that each takes a fourth of its step, does not pass."""
    true_gradient = cohort_module.differentiate_loss

    def differentiate_mean(logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        losses, slopes = true_gradient(logits, *rest)
        return losses, slopes / len(logits)

    monkeypatch.setattr(cohort_module, "differentiate_loss", differentiate_mean)
    with pytest.raises(AssertionError):
        check_cohort(optimizer="sgd")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_cohort_loses_trials_without_touching_the_others(optimizer: str) -> None:
    """One is pruned after the first epoch, one diverges: the others keep their numbers, and it says why."""
    params = vary(optimizer=optimizer, epochs=3)
    params = (*params[:2], replace(params[2], lr=1e300, weight_decay=0.1), params[3])
    whole = run_together((params[0], params[1], params[3]))
    lossy = run_together(params, {1: frozenset({0})})
    alone = [run for run, _ in list_runs_alone(params)]
    assert alone[2].ending.startswith("training loss is ")
    assert_same_run(lossy[2], alone[2])
    assert [len(run.epochs) for run in lossy.values()] == [1, 3, len(alone[2].epochs), 3]
    assert lossy[0].epochs[0][0].val_loss == pytest.approx(alone[0].epochs[0][0].val_loss, rel=RTOL)
    for index, position in ((1, 1), (3, 2)):
        assert_same_run(lossy[index], whole[position])
        assert_same_run(lossy[index], alone[index])
