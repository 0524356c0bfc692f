"""The model of a trial: seeded, with its weights, under a fresh head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tuner.models.backbone import create_backbone
from tuner.spec.sections import BackboneSection, DataSection, StudySection, StudySpec
from tuner.spec.space import Choices
from tuner.training.prepare import WeightsCache, prepare_model, start_heads, strip_head

from .builders import copy_state, make_params

NAME = "test_resnet"


def make_spec(**section: Any) -> StudySpec:
    """Return a study over one backbone, described by a section."""
    return StudySpec(
        study=StudySection(name="s"),
        data=DataSection(source="digits", image_size=32),
        space={"backbone": Choices(choices=(NAME,))},
        backbones={NAME: BackboneSection(**section)},
    )


def write_weights(path: Path, n_classes: int = 7) -> nn.Module:
    """Write the weights of a model of other classes, and return it."""
    torch.manual_seed(50)
    model = create_backbone(NAME, BackboneSection(weights="random"), n_classes=n_classes, image_size=32)
    save_file(copy_state(model), path)
    return model


def split_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a model's tensors below the head, and the head's."""
    body = strip_head(model)
    return body, {name: tensor for name, tensor in model.state_dict().items() if name not in body}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert that two states agree in every bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_strip_head_leaves_out_the_classifier_alone() -> None:
    """Everything but the two tensors of the classifier."""
    model = create_backbone(NAME, BackboneSection(weights="random"), n_classes=3, image_size=32)
    _, head = split_state(model)
    assert sorted(head) == ["fc.bias", "fc.weight"]


def test_prepare_model_repeats_random_weights_from_the_seed() -> None:
    """Whatever was drawn before, a seed is a model; another seed is another."""
    spec = make_spec(weights="random")
    first = prepare_model(make_params(backbone=NAME), spec, 3, None)
    torch.rand(5)
    second = prepare_model(make_params(backbone=NAME), spec, 3, None)
    third = prepare_model(make_params(backbone=NAME, seed=8), spec, 3, None)
    assert_equal(copy_state(first), copy_state(second))
    assert not torch.equal(first.get_parameter("fc.weight"), third.get_parameter("fc.weight"))


@pytest.mark.parametrize("pretrained", [True, False])
def test_prepare_model_is_the_same_from_the_cache(tmp_path: Path, pretrained: bool) -> None:
    """The body comes from the file, the head from the seed, with and without a cache, also when the file is gone."""
    path = tmp_path / "w.safetensors"
    source = write_weights(path)
    spec = make_spec() if pretrained else make_spec(weights=str(path))
    pretrained_path = path if pretrained else None
    cache = WeightsCache()
    plain = prepare_model(make_params(backbone=NAME), spec, 3, pretrained_path)
    filled = prepare_model(make_params(backbone=NAME), spec, 3, pretrained_path, cache)
    with torch.no_grad():  # training a model must not reach the cache
        for parameter in filled.parameters():
            parameter.zero_()
    path.unlink()
    cached = prepare_model(make_params(backbone=NAME), spec, 3, pretrained_path, cache)
    assert_equal(copy_state(plain), copy_state(cached))
    assert_equal(strip_head(source), strip_head(cached))


def test_prepare_model_draws_the_head_from_the_seed_alone(tmp_path: Path) -> None:
    """Two seeds share the body of the file and differ in the head."""
    path = tmp_path / "w.safetensors"
    write_weights(path, n_classes=3)
    models = [prepare_model(make_params(backbone=NAME, seed=s), make_spec(weights=str(path)), 3, None) for s in (1, 2)]
    (body_1, head_1), (body_2, head_2) = map(split_state, models)
    assert_equal(body_1, body_2)
    assert not torch.equal(head_1["fc.weight"], head_2["fc.weight"])


@pytest.mark.parametrize("kwargs", [{}, {"stem_type": "deep", "stem_width": 8}])
def test_prepare_model_draws_the_head_last(kwargs: dict[str, Any]) -> None:
    """Whatever a backbone draws before, the first heads of a cohort are those of its trials alone."""
    spec = make_spec(weights="random", kwargs=kwargs)
    heads = [prepare_model(make_params(backbone=NAME, seed=s), spec, 3, None).get_submodule("fc") for s in (1, 2)]
    plain = prepare_model(make_params(backbone=NAME, seed=5), make_spec(weights="random"), 3, None)
    weights, biases = start_heads(plain.get_submodule("fc"), [1, 2])  # type: ignore[arg-type]
    assert torch.equal(weights, torch.stack([head.get_parameter("weight") for head in heads]))
    assert torch.equal(biases, torch.stack([head.get_parameter("bias") for head in heads]))


def test_start_heads_draws_a_convolution_as_a_linear_layer() -> None:
    """The same numbers for the same shape, and the template keeps its own."""
    linear, convolution = nn.Linear(5, 3), nn.Conv2d(5, 3, 1)
    before = linear.weight.detach().clone()
    for a, b in zip(start_heads(linear, [4, 9]), start_heads(convolution, [4, 9]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(linear.weight, before)


def test_start_heads_repeats_a_head_that_is_kept() -> None:
    """All trials start from the file's."""
    head = nn.Linear(5, 3)
    weights, biases = start_heads(head, [4, 9], keep_head=True)
    assert torch.equal(weights, head.weight.detach().expand(2, 3, 5))
    assert torch.equal(biases, head.bias.detach().expand(2, 3))


def test_prepare_model_keeps_the_head_that_the_section_asks_for(tmp_path: Path) -> None:
    """keep_head takes the file's classifier, with a cache too."""
    path = tmp_path / "w.safetensors"
    source, cache = write_weights(path, n_classes=3), WeightsCache()
    for _ in range(2):
        spec = make_spec(weights=str(path), keep_head=True)
        model = prepare_model(make_params(backbone=NAME), spec, 3, None, cache)
        assert_equal(copy_state(source), copy_state(model))


def test_weights_cache_keeps_no_more_than_it_may() -> None:
    """What would fill the cache is not kept."""
    cache = WeightsCache(max_bytes=100)
    cache.keep_state("a", {"x": torch.zeros(20)})
    cache.keep_state("b", {"x": torch.zeros(20)})
    assert cache.get_state("a") is not None
    assert cache.get_state("b") is None
