"""Where a model is cut, what crosses, and which models are refused."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.models.crossing import Crossing, pack_maps, unpack_maps
from tuner.models.layers import freeze_layers
from tuner.models.partition import build_bridge, partition_model
from tuner.models.tracing import NotSeparable

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem and a block that train or not, and a head; ``join`` says what happens between stem and block."""

    def __init__(self, join: Callable[["Net", Tensor], Tensor] = lambda _, maps: maps) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.fc = nn.Linear(6, 2)
        self.register_buffer("scale", torch.full((4, 1, 1), 2.0))
        self.join = join

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.fc(self.block(self.join(self, self.stem(images))).mean((2, 3)))
        return logits


def freeze(model: nn.Module, unfrozen_layers: int = 2) -> nn.Module:
    """Return a model in train mode, its stem frozen."""
    freeze_layers(model, unfrozen_layers)
    return model.train()


def run_both(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the logits of a model and of its two parts, with the same draws."""
    partition = partition_model(model, IMAGES)
    torch.manual_seed(3)
    whole = copy.deepcopy(model)(IMAGES)  # its statistics move
    torch.manual_seed(3)
    return whole, partition.bind_suffix(model)(partition.bind_prefix(model)(IMAGES))


JOINS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda _, maps: maps,
    "buffer": lambda net, maps: maps * net.get_buffer("scale"),
    "sizes": lambda _, maps: functional.interpolate(maps, size=(maps.shape[2] // 2, maps.shape[3] // 2)),
    "number of images": lambda _, maps: maps.flatten(1).reshape(maps.shape[0], 4, 14, 14),
    "whole shape": lambda _, maps: maps.sigmoid().expand(maps.shape),
    "two tensors": lambda _, maps: maps.chunk(2, dim=1)[0].repeat(1, 2, 1, 1) + maps,
}


@pytest.mark.parametrize("join", JOINS.values(), ids=list(JOINS))
@pytest.mark.parametrize("in_train", [True, False])
def test_parts_are_the_whole(join: Callable[[Net, Tensor], Tensor], in_train: bool) -> None:
    """In both modes, whatever lies between what is frozen and what trains."""
    whole, apart = run_both(freeze(Net(join)).train(in_train))
    torch.testing.assert_close(apart, whole)


class Reshaping(Net):
    """A net whose trained part needs the number of images, and a table of frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.register_parameter("table", nn.Parameter(torch.rand(4, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        maps = self.stem(images)
        n_images = maps.shape[0]
        table = self.stem.table.exp()  # type: ignore[operator]
        maps = self.block(maps * table)
        logits: Tensor = self.fc((maps.reshape(n_images, 6, -1) + table.mean()).mean(2))
        return logits


def test_number_of_images_and_frozen_tables_are_the_suffixs_own() -> None:
    """One is taken from the maps, whatever batch they come in; the other is computed on both sides."""
    model = freeze(Reshaping()).eval()
    partition = partition_model(model, IMAGES)
    (crossing,) = partition.crossings
    assert crossing.shape == (4, 14, 14)
    maps = partition.bind_prefix(model)(IMAGES)
    torch.testing.assert_close(partition.bind_suffix(model)(maps[:1]), model(IMAGES[:1]))


@pytest.mark.parametrize("join", JOINS.values(), ids=list(JOINS))
def test_bridge_leads_from_a_cut_to_a_later_one_and_never_back(join: Callable[[Net, Tensor], Tensor]) -> None:
    """Whatever crosses either; what lies below both is not computed again."""
    model = freeze(Net(join), 1)
    later = partition_model(model, IMAGES)
    below = copy.deepcopy(model)
    earlier = partition_model(freeze(below), IMAGES)
    bridge = build_bridge(below, IMAGES, earlier=earlier, later=later)
    with torch.no_grad():
        for parameter in below.stem.parameters():  # type: ignore[union-attr]
            parameter.fill_(torch.nan)
        maps = earlier.bind_prefix(model)(IMAGES)
        freeze_layers(below, 1)
        torch.testing.assert_close(bridge.bind(below)(maps), later.bind_prefix(model)(IMAGES))
    with pytest.raises(NotSeparable, match="does not follow from what crosses an earlier cut"):
        build_bridge(model, IMAGES, earlier=later, later=earlier)


def test_suffix_trains_the_models_own_parameters_and_no_others() -> None:
    """There is one set of weights, and its gradients are those of the whole model."""
    model = freeze(Net())
    partition = partition_model(model, IMAGES)
    partition.bind_suffix(model)(partition.bind_prefix(model)(IMAGES)).sum().backward()  # type: ignore[no-untyped-call]
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("block.", "fc."))}


def test_partition_serves_every_model_that_is_built_alike() -> None:
    """Graphs hold names, not weights."""
    partition = partition_model(freeze(Net()), IMAGES)
    other = freeze(Net()).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(partition.bind_suffix(other)(partition.bind_prefix(other)(IMAGES)), other(IMAGES))


def test_cutting_changes_nothing_of_a_model() -> None:
    """Neither its mode nor its tensors, nor what it keeps to itself: levit caches what it computes in eval mode."""
    model = timm.create_model("levit_128s", num_classes=2, img_size=224)
    freeze_layers(model, 2)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    partition_model(model, torch.zeros(3, 3, 224, 224))
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    caches = [cache for module in model.modules() if (cache := getattr(module, "attention_bias_cache", None))]
    assert all(isinstance(value, Tensor) for cache in caches for value in cache.values())


def test_list_prefix_tensors_is_what_the_prefix_computes_with() -> None:
    """Statistics of BatchNorm and buffers included, nothing of the suffix."""
    model = freeze(Net(JOINS["buffer"]))
    names = {name for name, _ in partition_model(model, IMAGES).list_prefix_tensors(model)}
    assert names == {"scale", *(f"stem.{name}" for name in model.stem.state_dict())}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (freeze(Net(), 3), "nothing of it is frozen"),
        (freeze(Net(lambda _, maps: maps if maps.sum() > 0 else -maps)), "cannot be traced"),
        (freeze(Net(lambda _, maps: maps + torch.ones(1))), "makes a tensor that does not follow"),
        (freeze(Net(lambda _, maps: maps.flatten(0, 1)[:, None].repeat(1, 4, 1, 1))), "not one tensor of numbers"),
    ],
)
def test_partition_model_refuses_what_it_cannot_cut(model: nn.Module, message: str) -> None:
    """In one line that says why."""
    with pytest.raises(NotSeparable, match=message):
        partition_model(model, IMAGES)


@pytest.mark.parametrize("has_channels_last", [True, False])
def test_maps_are_unpacked_as_they_were_packed(has_channels_last: bool) -> None:
    """Values, shapes, order in memory and types."""
    first, second = torch.rand(4, 3, 2, 5), torch.rand(4, 7).double()
    if has_channels_last:
        first = first.contiguous(memory_format=torch.channels_last)
    crossings = (
        Crossing(shape=(3, 2, 5), dtype=torch.float32, has_channels_last=has_channels_last),
        Crossing(shape=(7,), dtype=torch.float32, has_channels_last=False),
    )
    packed = pack_maps((first, second.float()), crossings)
    assert packed.shape == (4, 37)
    one, other = unpack_maps(packed, crossings)
    assert torch.equal(one, first)
    alone = unpack_maps(pack_maps((first,), crossings[:1]), crossings[:1])[0]
    assert alone.is_contiguous(memory_format=torch.channels_last) is has_channels_last
    assert torch.equal(other, second.float())
    assert unpack_maps(packed.bfloat16(), crossings)[0].dtype == torch.float32
    assert unpack_maps(packed.double(), crossings)[0].dtype == torch.float64
