import copy
from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.models.backbone import create_backbone, find_classifiers
from tuner.models.layers import freeze_layers, group_layers
from tuner.spec.own_code import SMALL_CNN
from tuner.spec.sections import BackboneSection

FAMILIES = (
    SMALL_CNN,
    "convnext_atto",
    "csatv2",  # no group_matcher
    "deit_tiny_distilled_patch16_224",  # two classifiers
    "densenet121",
    "edgenext_xx_small",
    "efficientnet_b0",
    "efficientvit_b0",
    "fastvit_t8",
    "ghostnet_100",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "inception_v4",
    "levit_128s",  # two classifiers, each with a BatchNorm
    "mixer_s32_224",
    "mobilenetv2_035",
    "mobilenetv3_small_050",
    "nfnet_l0",
    "pit_ti_224",  # no group_matcher
    "poolformer_s12",  # no group_matcher
    "rdnet_tiny",  # a group_matcher without coarse groups
    "regnetx_002",
    "repvgg_a0",
    "resnet18",
    "resnetv2_50",  # a convolution as classifier
    "swin_tiny_patch4_window7_224",
    "test_byobnet",
    "tf_mobilenetv3_small_minimal_100",
    "torchvision.models:squeezenet1_0",  # a user's function
    "vgg11_bn",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
)
TRAINED_FAMILIES = {
    SMALL_CNN: (),
    "convnext_atto": ("drop_rate", "drop_path_rate"),
    "densenet121": ("drop_rate",),
    "efficientnet_b0": ("drop_rate", "drop_path_rate"),
    "ghostnet_100": ("drop_rate",),
    "levit_128s": ("drop_rate", "drop_path_rate"),
    "mobilenetv3_small_050": ("drop_rate", "drop_path_rate"),
    "poolformer_s12": ("drop_rate", "drop_path_rate"),
    "regnetx_002": ("drop_rate", "drop_path_rate"),
    "swin_tiny_patch4_window7_224": ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"),
    "test_byobnet": ("drop_rate", "drop_path_rate"),
    "test_resnet": ("drop_rate", "drop_path_rate"),
    "torchvision.models:squeezenet1_0": (),
    "vit_tiny_patch16_224": ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"),
}
IMAGE_SIZE = 64


def make_model(name: str, *, device: str = "cpu", drop: tuple[str, ...] = ()) -> nn.Module:
    """A seeded model, with dropout and drop-path where ``drop`` names their arguments."""
    torch.manual_seed(0)
    section = BackboneSection(kwargs=dict.fromkeys(drop, 0.3))
    with torch.device(device):
        return create_backbone(name, section, n_classes=5, image_size=IMAGE_SIZE)


def trainable_names(model: nn.Module) -> set[str]:
    """Names of the parameters that require a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_two_steps(model: nn.Module) -> None:
    """Train as a careless loop does: ``model.train()`` before every step."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        logits = model(torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE))
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def owned_tensors(model: nn.Module, group: tuple[str, ...]) -> dict[str, Tensor]:
    """Parameters of a group, and the buffers of the modules that own them."""
    parameters = dict(model.named_parameters())
    owners = {name.rpartition(".")[0] for name in group}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[0] in owners}
    return {name: tensor.detach().clone() for name, tensor in ({n: parameters[n] for n in group} | buffers).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_group_layers_partitions_the_parameters_with_exactly_the_classifier_first(name: str) -> None:
    """Groups are disjoint, hold everything, and the first is the classifier's parameters."""
    model = make_model(name, device="meta")
    groups = group_layers(model)
    flat = list(chain(*groups))
    head = {
        f"{module}.{parameter}"
        for module in find_classifiers(model)
        for parameter, _ in model.get_submodule(module).named_parameters()
    }
    assert all(groups)
    assert len(flat) == len(set(flat))
    assert set(flat) == {parameter for parameter, _ in model.named_parameters()}
    assert set(groups[0]) == head
    assert len(groups) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_freeze_layers_at_one_trains_exactly_the_classifier(name: str) -> None:
    """At 1 the trainable parameters are those of get_classifier(), in every family."""
    model = make_model(name, device="meta")
    freeze_layers(model, 1)
    assert trainable_names(model) == set(group_layers(model)[0])


@pytest.mark.parametrize(
    ("name", "n_groups"),
    [
        (SMALL_CNN, 4),
        ("resnet50", 6),
        ("vit_base_patch16_224", 14),
        ("vgg16", 15),
        ("convnext_tiny", 7),
        ("test_vit", 8),
        ("poolformer_s12", 4),
    ],
)
def test_group_layers_counts(name: str, n_groups: int) -> None:
    """The counts that the documentation promises."""
    assert len(group_layers(make_model(name, device="meta"))) == n_groups


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg11", {"pre_logits.fc1.weight", "pre_logits.fc1.bias", "pre_logits.fc2.weight", "pre_logits.fc2.bias"}),
        ("mobilenetv3_small_050", {"conv_head.weight", "conv_head.bias"}),
        ("convnext_atto", {"head.norm.weight", "head.norm.bias"}),
    ],
)
def test_group_layers_puts_the_rest_of_the_last_coarse_group_second(name: str, expected: set[str]) -> None:
    """What timm groups with the classifier is a group of its own, right after it."""
    assert set(group_layers(make_model(name, device="meta"))[1]) == expected


@pytest.mark.parametrize("depth", ["head", "middle"])
@pytest.mark.parametrize("name", TRAINED_FAMILIES)
def test_freeze_layers_keeps_frozen_groups_bit_for_bit(name: str, depth: str) -> None:
    """Two training steps with dropout and drop-path move no parameter and no buffer below the cut."""
    model = make_model(name, drop=TRAINED_FAMILIES[name])
    groups = group_layers(model)
    n_unfrozen = 1 if depth == "head" else len(groups) // 2
    freeze_layers(model, n_unfrozen)
    before = [owned_tensors(model, group) for group in groups]
    train_two_steps(model)
    for number, group in enumerate(groups):
        after = owned_tensors(model, group)
        moved = [key for key, tensor in after.items() if not torch.equal(tensor, before[number][key])]
        assert bool(moved) == (number < n_unfrozen), (number, moved)


@pytest.mark.parametrize("name", TRAINED_FAMILIES)
def test_freeze_layers_makes_the_frozen_prefix_deterministic_in_train_mode(name: str) -> None:
    """Whatever the random state, every frozen module returns the same for the same images."""
    model = make_model(name, drop=TRAINED_FAMILIES[name])
    freeze_layers(model, max(1, len(group_layers(model)) // 2))
    model.train()
    seen: list[Tensor] = []
    for module in model.modules():
        if not module.training:
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        seen.clear()
        with torch.no_grad():
            model(images)
        runs.append([output for output in seen if isinstance(output, Tensor)])
    assert runs[0]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def frozen_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules that stay in eval mode through ``model.train()``."""
    model.train()
    return (name for name, module in model.named_modules() if not module.training)


def test_freeze_layers_gives_a_dropout_to_the_next_layer_with_parameters() -> None:
    """The dropout in front of the trainable classifier is active, the one in front of the frozen fc1 is not."""
    model = make_model(SMALL_CNN)
    freeze_layers(model, 1)
    assert set(frozen_modules(model)) == {"conv1", "conv2", "dropout1", "fc1"}


def test_freeze_layers_keeps_batch_norm_without_parameters_below_the_cut_in_eval() -> None:
    """BatchNorm(affine=False) has nothing to freeze but its statistics."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(5)
    )
    model(torch.randn(2, 3, 8, 8))
    freeze_layers(model, 1)
    statistics = model[1].running_mean.clone()  # type: ignore[operator]
    model.train()
    model(torch.randn(2, 3, 8, 8))
    assert torch.equal(model[1].running_mean, statistics)  # type: ignore[arg-type]
    freeze_layers(model, 2)
    model.train()
    model(torch.randn(2, 3, 8, 8))
    assert not torch.equal(model[1].running_mean, statistics)  # type: ignore[arg-type]


def test_freeze_layers_survives_train_on_a_frozen_submodule() -> None:
    """Frozen modules stay in eval mode even if train() is called on one of them directly."""
    model = make_model("test_resnet")
    freeze_layers(model, 2)
    model.get_submodule("layer1").train()
    for module in model.get_submodule("layer1").modules():
        module.train()
    assert not any(module.training for module in model.get_submodule("layer1").modules())


def test_freeze_layers_can_be_called_again() -> None:
    """A second call forgets the first: all groups train, and every module follows train()."""
    model = make_model("test_resnet")
    freeze_layers(model, 1)
    freeze_layers(model, len(group_layers(model)))
    assert trainable_names(model) == {name for name, _ in model.named_parameters()}
    assert list(frozen_modules(model)) == []
    freeze_layers(model, 1)
    assert "layer4" in set(frozen_modules(model))


def test_freeze_layers_holds_for_a_deep_copy() -> None:
    """A copy of a frozen model has its own frozen modules, and can be unfrozen without touching the first."""
    model = make_model("test_resnet")
    freeze_layers(model, 1)
    twin = copy.deepcopy(model)
    assert set(frozen_modules(twin)) == set(frozen_modules(model))
    freeze_layers(twin, len(group_layers(twin)))
    assert list(frozen_modules(twin)) == []
    assert "layer4" in set(frozen_modules(model))


def test_freeze_layers_keeps_the_mode_of_the_model() -> None:
    """A model in eval mode is in eval mode afterwards."""
    model = make_model("test_resnet").eval()
    freeze_layers(model, 2)
    assert not any(module.training for module in model.modules())


class _FixedEmbedding(nn.Module):
    """A model whose author made one parameter untrainable, and put others into the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.position = nn.Parameter(torch.ones(3), requires_grad=False)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)


def test_group_layers_without_matcher_gives_bare_parameters_to_the_stem() -> None:
    """Parameters of the model itself are in the last group, with the first child."""
    groups = group_layers(_FixedEmbedding())
    assert groups == (("head.weight", "head.bias"), ("scale", "position", "body.weight", "body.bias"))


def test_freeze_layers_never_trains_what_was_made_untrainable() -> None:
    """A fixed embedding stays fixed at every depth, also after a second call."""
    model = _FixedEmbedding()
    for unfrozen_layers in (1, 2, 1, 2):
        freeze_layers(model, unfrozen_layers)
    assert trainable_names(model) == {"scale", "body.weight", "body.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("unfrozen_layers", [0, 7])
def test_freeze_layers_refuses_a_count_outside_the_groups(unfrozen_layers: int) -> None:
    """The message names the key and how many groups there are."""
    message = rf"^space\.unfrozen_layers: must lie in \[1, 6\] for ResNet, got {unfrozen_layers}$"
    with pytest.raises(ModelError, match=message):
        freeze_layers(make_model("test_resnet"), unfrozen_layers)


class _HalfMatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)

    def group_matcher(self, *, coarse: bool) -> object:  # noqa: ARG002 - timm's signature
        return lambda name: None if name.startswith("body") else 0


def test_group_layers_refuses_a_matcher_that_fails() -> None:
    """A user's model may bring its own; a parameter without a group is said."""
    with pytest.raises(
        ModelError, match=r"group_matcher of _HalfMatched must give every parameter a group, got TypeError"
    ):
        group_layers(_HalfMatched())
