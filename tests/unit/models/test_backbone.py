import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tuner.errors import ModelError
from tuner.models.backbone import (
    Preprocessing,
    check_forward,
    create_backbone,
    find_classifiers,
    hash_own_code,
    read_preprocessing,
)
from tuner.spec.own_code import SMALL_CNN
from tuner.spec.sections import BackboneSection

OWN_MODULE = """
from torch import nn

ANSWER = 42

class Net(nn.Module):
    def __init__(self, width, n_outputs):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, n_outputs)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))

def make(num_classes, width=4):
    return Net(width, num_classes)

def make_wrong(num_classes):
    return Net(4, num_classes + 1)

def make_text(num_classes):
    return "a model"

def fail(num_classes):
    raise RuntimeError("no such thing")
"""


def create(name: str, *, image_size: int = 32, n_classes: int = 5, **section: Any) -> nn.Module:
    """Make a backbone with keyword overrides of its section."""
    return create_backbone(name, BackboneSection(**section), n_classes=n_classes, image_size=image_size)


def check(name: str, *, image_size: int, **section: Any) -> None:
    """Make a backbone without memory for its weights and run ``check_forward`` on it."""
    with torch.device("meta"):
        model = create(name, image_size=image_size, **section)
        check_forward(model, image_size=image_size, n_classes=5, name=name)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module of the user's, importable in this test."""
    name = f"own_nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN_MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_hash_own_code_is_of_the_file_as_it_was_imported(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that computes nearly the same, with the same weights, shows in nothing else."""
    name, file = f"{own}:make", tmp_path / f"{own}.py"
    before = hash_own_code(name)
    assert before == sha256(file.read_bytes()).hexdigest()
    file.write_text(f"{file.read_text()}# edited\n")
    assert hash_own_code(name) == before  # what this process computes with
    monkeypatch.delitem(sys.modules, own)
    assert hash_own_code(name) == sha256(file.read_bytes()).hexdigest() != before
    assert hash_own_code("builtins:print") == ""  # nothing to read


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "vit_base_patch16_224", "test_vit.r160_in1k", SMALL_CNN])
def test_create_backbone_makes_models_for_the_study(name: str) -> None:
    """Well-known backbones take 32 px images and return the study's classes."""
    check(name, image_size=32)


def test_create_backbone_passes_kwargs() -> None:
    """Converted weights need another padding and another epsilon."""
    model = create("mobilenetv2_035", kwargs={"bn_eps": 0.25})
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.25}


def test_create_backbone_builds_fixed_size_models_for_the_image_size() -> None:
    """A ViT gets img_size, unless the kwargs have it."""
    assert create("test_vit", image_size=48).get_parameter("pos_embed").shape[1] == 1 + 3 * 3
    model = create("test_vit", image_size=48, kwargs={"img_size": 64})
    assert model.get_parameter("pos_embed").shape[1] == 1 + 4 * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet5",
            (
                r"must be a timm model, 'tuner:small_cnn' or 'package\.module:function', got 'resnet5'"
                r"; did you mean 'resnet50'\?$"
            ),
        ),
        ("tunersmall_cnn", r"got 'tunersmall_cnn'; did you mean 'tuner:small_cnn'\?$"),
        ("tuner:small_cn", r"must name a function of tuner, got 'small_cn'; did you mean 'tuner:small_cnn'\?$"),
        (
            "resnet50.a1_in2k",
            (
                r"must be resnet50 with one of timm's pretrained tags, got 'resnet50\.a1_in2k'"
                r"; did you mean 'resnet50\.a1_in1k'\?$"
            ),
        ),
        ("vit_base_patch16_224_in21k", r"; its name is now 'vit_base_patch16_224\.augreg_in21k'$"),
        ("hf-hub:timm/resnet18", r"must be a timm model, .* got 'hf-hub:timm/resnet18'$"),
        ("not_there.nets:make", r"must name a module that can be imported, got .*No module named 'not_there'"),
        ("math:pi", r"'math:pi' must be a function, got float$"),
    ],
)
def test_create_backbone_refuses_an_unknown_name(name: str, message: str) -> None:
    """The message names the key and suggests what was meant."""
    with pytest.raises(ModelError, match=rf"^space\.backbone: .*{message}"):
        create(name)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("test_resnet", {"colour": 1}, r"must be keyword arguments that timm's test_resnet takes, got .*'colour'"),
        ("test_resnet", {"num_classes": 3}, r"must leave out what the study sets, got num_classes$"),
        ("test_resnet", {"checkpoint_path": "x.pth"}, r"must leave out what the study sets, got checkpoint_path$"),
        ("test_resnet", {"pretrained_cfg_overlay": {"file": "x"}}, r"must leave .*, got pretrained_cfg_overlay$"),
        (SMALL_CNN, {"width": 3}, r"must be empty, got {'width': 3}$"),
    ],
)
def test_create_backbone_refuses_wrong_kwargs(name: str, kwargs: dict[str, Any], message: str) -> None:
    """The message names the table of the study file that holds them."""
    with pytest.raises(ModelError, match=rf'^backbones\."{name}"\.kwargs: {message}'):
        create(name, kwargs=kwargs)


def test_create_backbone_calls_a_function_of_the_users(own: str) -> None:
    """The function gets the number of classes and the kwargs."""
    model = create(f"{own}:make", kwargs={"width": 7})
    assert model.get_parameter("head.weight").shape == (5, 7)
    check_forward(model, image_size=8, n_classes=5, name="own")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (":missing", r"must name a function of own_nets_\w+, got 'missing'$"),
        (":ANSWER", r"must be a function, got int$"),
        (":make_text", r"must return a torch\.nn\.Module, got str$"),
        (":make_wrong", r"must return a model with 5 outputs, got 'head' with 6; a method get_classifier\(\)"),
        (":fail", r"must return a model, got RuntimeError: no such thing$"),
        ("_broken:make", r"must name a module that can be imported, .*No module named 'a_package_that_is_not_there'"),
    ],
)
def test_create_backbone_refuses_a_wrong_function(own: str, function: str, message: str) -> None:
    """Whatever goes wrong in the user's code is one line that names the backbone."""
    with pytest.raises(ModelError, match=rf"^space\.backbone: .*{message}"):
        create(own + function)


def test_create_backbone_refuses_kwargs_that_the_users_function_does_not_take(own: str) -> None:
    """The message names the table of the study file that holds them."""
    with pytest.raises(ModelError, match=r"\.kwargs: must fit the function's parameters, got .*'depth'"):
        create(f"{own}:make", kwargs={"depth": 7})


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("vit_tiny_patch16_224", 100, r"must be a multiple of 16, the patch of vit_tiny_patch16_224, got 100$"),
        ("inception_v4", 64, r"must be a size that inception_v4 accepts, got 64 \("),
        ("crossvit_tiny_240", 64, r"must be a size that crossvit_tiny_240 accepts, got 64 \("),
    ],
)
def test_check_forward_refuses_an_image_size(name: str, image_size: int, message: str) -> None:
    """The message names the key of the image size, not the layer that failed."""
    with pytest.raises(ModelError, match=rf"^data\.image_size: {message}"):
        check(name, image_size=image_size)


def test_check_forward_refuses_other_outputs_than_logits() -> None:
    """GoogLeNet returns its auxiliary logits too in train mode."""
    with pytest.raises(ModelError, match=r"must return logits of shape \(2, 5\) in train mode, got GoogLeNetOutputs$"):
        check("torchvision.models:googlenet", image_size=64, kwargs={"init_weights": False})


def test_check_forward_leaves_the_model_and_the_seed_alone() -> None:
    """Neither BatchNorm statistics nor the random state move."""
    model = create("test_resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    check_forward(model, image_size=32, n_classes=5, name="test_resnet")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert model.training


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SMALL_CNN, ("fc",)),
        ("test_resnet", ("fc",)),
        ("levit_128s", ("head", "head_dist")),
        ("torchvision.models:squeezenet1_0", ("classifier.1",)),
        ("torchvision.models:resnet18", ("fc",)),
    ],
)
def test_find_classifiers_names_the_classifier(name: str, expected: tuple[str, ...]) -> None:
    """By get_classifier(), which may return two, else the last linear layer, else the last convolution."""
    with torch.device("meta"):
        assert find_classifiers(create(name, image_size=64)) == expected


def test_find_classifiers_refuses_a_model_without_one() -> None:
    """The message says how a model tells."""
    with pytest.raises(ModelError, match=r"must have a classifier .*, got none; a method get_classifier\(\)"):
        find_classifiers(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()))


def test_read_preprocessing_prefers_the_study_file() -> None:
    """Section before pretrained_cfg, key by key."""
    found = read_preprocessing("resnet18.a1_in1k", BackboneSection(mean=(0.1, 0.2, 0.3)))
    assert found == Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.229, 0.224, 0.225), interpolation="bicubic")


@pytest.mark.parametrize("name", [SMALL_CNN, "torchvision.models:resnet18"])
def test_read_preprocessing_is_plain_without_a_pretrained_cfg(name: str) -> None:
    """Models that timm does not know get pixels in [-1, 1]."""
    plain = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")
    assert read_preprocessing(name, BackboneSection()) == plain
