"""The input of a head, and which models it is not enough for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tuner.data.image_set import ImageSet
from tuner.data.views import View
from tuner.training.head_features import (
    NotCacheable,
    compute_features,
    find_linear_head,
    hash_body,
    put_head,
    sample_features,
    spread_sample,
    verify_head,
)

from .builders import CPU, PREPROCESSING, TinyNet, make_images, make_net


def make_large_images(size: int = 32) -> ImageSet:
    """Return random images for timm's models."""
    pixels = torch.randint(0, 256, (9, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels=pixels, labels=torch.zeros(9, dtype=torch.int64), n_classes=3, rows=torch.arange(9))


def make_timm(name: str, **kwargs: Any) -> nn.Module:
    """Return a timm model with random weights from a seed."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=3, **kwargs)
    return model


class MiddleNet(TinyNet):
    """A tiny net with something between its body and its head, or after the head."""

    def __init__(self, middle: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.between = middle or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.after(self.fc(self.between(self.middle(self.stem(images)))))
        return logits


class TiedNet(nn.Module):
    """Two layers of one weight."""

    def __init__(self, *, is_head_first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: nn.Linear(192, 192) for name in sorted(("body", "head"), reverse=is_head_first)}
        )
        self.layers["body"].weight = self.layers["head"].weight

    def get_classifier(self) -> nn.Module:
        """Return the upper one."""
        return self.layers["head"]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.layers["head"](self.layers["body"](images.flatten(1)))
        return logits


class Functional(nn.Module):
    """A function as a module without children."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        """Return the function of the values and of whether it trains."""
        return self.function(values, self.training)


def verify(model: nn.Module, images: ImageSet | None = None) -> None:
    """Verify on the toy images, unless others are given."""
    verify_head(model, images or make_images(), PREPROCESSING, CPU)


def test_compute_features_keeps_the_order_over_batches_and_trains_nothing() -> None:
    """More images than one batch; what comes is the head's input in eval mode."""
    net, images = make_net(), make_images(150)
    net.train()
    features = compute_features(net, images, PREPROCESSING, CPU, precision="auto")
    expected = net.middle(net.stem((images.pixels.float() / 255 - 0.5) / 0.5))
    torch.testing.assert_close(features, expected)
    assert (features.dtype, features.shape) == (torch.float32, (150, 256))
    assert not net.training
    assert not features.requires_grad
    assert not net.fc._forward_pre_hooks


def test_compute_features_fills_what_it_is_given() -> None:
    """A cache has its own place for them."""
    out = torch.full((64, 256), torch.nan)
    assert compute_features(make_net(), make_images(), PREPROCESSING, CPU, out=out, precision="auto") is out
    torch.testing.assert_close(out, compute_features(make_net(), make_images(), PREPROCESSING, CPU, precision="auto"))


def test_compute_features_of_a_double_model_are_double() -> None:
    """Nothing is rounded on the way."""
    assert (
        compute_features(make_net().double(), make_images(), PREPROCESSING, CPU, precision="auto").dtype
        == torch.float64
    )


@pytest.mark.parametrize("view", [None, View(number=1, seed=3, strength=0.5, horizontal_flip=True)])
def test_sample_features_are_those_of_the_first_images(view: View | None) -> None:
    """Eight, in the same view, and of so few images all."""
    images = make_images()
    features = compute_features(make_net(), images, PREPROCESSING, CPU, view=view, precision="auto")
    sample = sample_features(make_net(), images, PREPROCESSING, CPU, view=view, precision="auto")
    torch.testing.assert_close(sample, features[:8])
    assert len(sample_features(make_net(), make_images(3), PREPROCESSING, CPU, precision="auto")) == 3


def test_spread_sample_takes_images_from_all_over_the_set() -> None:
    """Also where they lie apart in memory."""
    images = make_images(100)
    assert spread_sample(images).rows.tolist() == [0, 14, 28, 42, 56, 70, 84, 99]
    assert torch.equal(spread_sample(images).pixels[3], images.pixels[42])
    backwards = replace(images, positions=torch.arange(100).flip(0))
    assert torch.equal(spread_sample(backwards).pixels[3], images.pixels[57])
    assert len(spread_sample(make_images(3)).pixels) == 3


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"])
def test_verify_head_accepts_timms_models(name: str) -> None:
    """The logits are those of a linear head on the features, in a study's own float32."""
    verify(make_timm(name), make_large_images())


def test_verify_head_accepts_a_1x1_convolution() -> None:
    """It is a linear head of one pixel."""
    net = make_net()
    head = nn.Conv2d(256, 2, 1)
    model = nn.Sequential(net.stem, net.middle, nn.Unflatten(1, (256, 1, 1)), head, nn.Flatten())
    model.get_classifier = lambda: head  # type: ignore[assignment]
    verify(model)
    features = compute_features(model, make_images(), PREPROCESSING, CPU, precision="auto")
    torch.testing.assert_close(features, compute_features(net, make_images(), PREPROCESSING, CPU, precision="auto"))
    weight, bias = torch.randn(2, 256), torch.randn(2)
    put_head(model, weight, bias)
    logits = model((make_images().pixels.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(logits, features @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_verify_head_refuses_a_models_own_dropout(name: str) -> None:
    """``drop_rate`` drops inputs of the head: other ones in every epoch."""
    size = {"img_size": 32} if name == "test_vit" else {}
    with pytest.raises(NotCacheable, match=r"own dropout|input in train mode is not that of eval mode"):
        verify(make_timm(name, drop_rate=0.2, **size), make_large_images())


def test_verify_head_refuses_a_small_dropout_that_shows_in_no_sample() -> None:
    """A rate of 1e-9 trains all the same."""
    with pytest.raises(NotCacheable, match=r"^its own dropout 'between' of 1e-09 lies before its classifier$"):
        verify(MiddleNet(nn.Dropout(1e-9)))


def test_verify_head_refuses_statistics_that_still_move() -> None:
    """A BatchNorm without parameters is frozen with nothing; verifying leaves its statistics alone."""
    net = MiddleNet(nn.BatchNorm1d(256, affine=False))
    with pytest.raises(NotCacheable, match=r"^its classifier's input in train mode is not that of eval mode"):
        verify(net)
    assert torch.equal(net.between.running_mean, torch.zeros(256))  # type: ignore[arg-type]


def test_verify_head_refuses_features_that_depend_on_the_batch() -> None:
    """Centred by the batch's mean, in eval mode too."""
    net = MiddleNet(Functional(lambda values, _: values - values.mean(dim=0)))
    with pytest.raises(NotCacheable, match=r"^an image's features depend on the batch it is in$"):
        verify(net)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_verify_head_refuses_logits_that_something_changes(mode: str) -> None:
    """A temperature after the head, in one mode alone."""
    net = MiddleNet(after=Functional(lambda values, training: values * (2 if training is (mode == "train") else 1)))
    with pytest.raises(NotCacheable, match=rf"^its logits in {mode} mode are not those of its classifier alone$"):
        verify(net)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_verify_head_refuses_a_classifier_that_is_fixed(name: str) -> None:
    """A cohort would train what the trial alone leaves as it is."""
    net = make_net()
    net.fc.get_parameter(name).requires_grad = False
    with pytest.raises(NotCacheable, match=r"^its classifier's weight or bias is fixed, or shared with another layer$"):
        verify(net)


@pytest.mark.parametrize("is_head_first", [True, False])
def test_verify_head_refuses_a_classifier_tied_to_the_body(*, is_head_first: bool) -> None:
    """Its features would change as it trains; whichever of the two layers the model names first."""
    with pytest.raises(NotCacheable, match=r"^its classifier's weight or bias is fixed, or shared with another layer$"):
        verify(TiedNet(is_head_first=is_head_first))


def test_find_linear_head_refuses_two_classifiers() -> None:
    """Distilled models average two."""
    model = make_timm("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=12, depth=1)
    with pytest.raises(NotCacheable, match=r"^it has 2 classifiers \(head, head_dist\)$"):
        find_linear_head(model)


def test_compute_features_refuses_a_head_before_the_pooling() -> None:
    """Its input is a map, not a vector."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(
        NotCacheable, match=r"^its classifier takes \(16, 3, 8, 8\) for 16 images, not one vector each$"
    ):
        compute_features(model, make_images(), PREPROCESSING, CPU, precision="auto")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (nn.Linear(192, 2, bias=False), "has other parameters than a weight and a bias"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(192, 2)), "has other parameters than a weight and a bias"),
        (nn.Sequential(nn.Linear(192, 2)), "is a Sequential, neither linear nor a convolution"),
        (nn.Conv2d(3, 2, 8), "is a convolution that is not 1x1"),
    ],
)
def test_find_linear_head_refuses_other_heads(head: nn.Module, reason: str) -> None:
    """Only a weight and a bias can be trained as a cohort does."""
    model = nn.Sequential(nn.Flatten(), head)
    model.get_classifier = lambda: head  # type: ignore[assignment]
    with pytest.raises(NotCacheable, match=rf"^its classifier '1' {reason}$"):
        find_linear_head(model)


def test_hash_body_sees_all_but_the_head() -> None:
    """Weights and buffers change it, the head and a frozen layer's flags do not."""
    net = make_net()
    before = hash_body(net)
    nn.init.zeros_(net.fc.weight)
    net.stem.requires_grad_(requires_grad=False)
    assert hash_body(net) == before
    changed = {before}
    for tensor in (net.stem[0].weight, net.stem[1].running_mean, net.stem[1].num_batches_tracked):
        with torch.no_grad():
            tensor.view(-1)[0] += 1  # type: ignore[operator]
        changed.add(hash_body(net))
    changed.add(hash_body(net.double()))
    assert len(changed) == 5
