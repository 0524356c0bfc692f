from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.models.backbone import create_backbone
from tuner.models.hub import check_reach
from tuner.models.weights import find_weights, load_weights
from tuner.spec.sections import BackboneSection

NAME = "test_resnet.r160_in1k"
COMMIT = "0" * 40


def make_model(*, n_classes: int = 5, seed: int = 0, name: str = NAME) -> nn.Module:
    """A seeded model with fresh weights."""
    torch.manual_seed(seed)
    return create_backbone(name, BackboneSection(), n_classes=n_classes, image_size=32)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and a hub that nobody answers for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    address = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    return tmp_path


@pytest.fixture
def torch_hub(tmp_path: Path) -> Iterator[Path]:
    """An empty cache of files that timm has by address alone."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


def cache(hub: Path, state: dict[str, Tensor]) -> None:
    """Leave a state where an earlier download would have left it."""
    folder = hub / f"models--timm--{NAME}"
    for part in ("refs", f"snapshots/{COMMIT}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    safetensors.torch.save_file(state, folder / f"snapshots/{COMMIT}/model.safetensors")


def test_check_reach_says_which_file_to_put_where(hub: Path) -> None:
    """One line with the address, the place and the key."""
    message = (
        rf'^backbones\."{NAME}"\.weights: must be a local file while '
        rf"http://127\.0\.0\.1:9/timm/{NAME}/resolve/main/model\.safetensors is out of reach, got none \(.*\); "
        rf"save that file as weights/{NAME}\.safetensors beside the study file and set "
        rf'weights = "weights/{NAME}\.safetensors"$'
    )
    with pytest.raises(ModelError, match=message) as caught:
        check_reach(NAME, BackboneSection())
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message):
        load_weights(make_model(), NAME, BackboneSection())


@pytest.mark.parametrize(
    ("name", "weights"), [(NAME, "random"), ("tuner:small_cnn", None), ("torchvision.models:resnet18", None)]
)
def test_check_reach_asks_nobody_without_need(hub: Path, name: str, weights: str | None) -> None:
    """Local, random and the user's own weights need no hub."""
    check_reach(name, BackboneSection(weights=weights))


def test_load_weights_takes_a_cached_download_without_the_hub(hub: Path) -> None:
    """The body comes from the cache; the head and the random state stay."""
    source = make_model(n_classes=1000, seed=1)
    cache(hub, source.state_dict())
    model = make_model()
    head, seed = model.get_parameter("fc.weight").clone(), torch.random.get_rng_state()
    load_weights(model, NAME, BackboneSection())
    assert torch.equal(model.get_parameter("conv1.0.weight"), source.get_parameter("conv1.0.weight"))
    assert torch.equal(model.get_parameter("fc.weight"), head)
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_load_weights_makes_a_new_head_for_as_many_classes_as_pretrained(hub: Path) -> None:
    """A thousand classes are not ImageNet's, unless the study says so."""
    source = make_model(n_classes=1000, seed=1)
    cache(hub, source.state_dict())
    model = make_model(n_classes=1000)
    load_weights(model, NAME, BackboneSection())
    assert not torch.equal(model.get_parameter("fc.weight"), source.get_parameter("fc.weight"))
    load_weights(model, NAME, BackboneSection(keep_head=True))
    assert torch.equal(model.get_parameter("fc.weight"), source.get_parameter("fc.weight"))


def test_load_weights_refuses_to_keep_a_pretrained_head_of_other_classes(hub: Path) -> None:
    """ImageNet's thousand are not the study's five."""
    cache(hub, make_model(n_classes=1000).state_dict())
    with pytest.raises(ModelError, match=r"\.keep_head: the file's classifier must have 5 classes, got 1000$"):
        load_weights(make_model(), NAME, BackboneSection(keep_head=True))


def test_load_weights_takes_a_file_that_timm_has_by_address(torch_hub: Path) -> None:
    """Some models are not on the hub; their cached download is found by name."""
    name = "legacy_seresnet18"
    address = find_weights(name, BackboneSection()).detail
    source = make_model(name=name, n_classes=1000, seed=1)
    torch.save(source.state_dict(), torch_hub / address.rpartition("/")[2])
    model = make_model(name=name)
    load_weights(model, name, BackboneSection())
    assert torch.equal(model.get_parameter("layer0.conv1.weight"), source.get_parameter("layer0.conv1.weight"))


def test_find_weights_refuses_a_timm_model_without_pretrained_weights() -> None:
    """Random weights are a choice that the study file states."""
    with pytest.raises(
        ModelError, match=r'^backbones\."nf_resnet26"\.weights: must be a file or "random" because timm'
    ):
        find_weights("nf_resnet26", BackboneSection())
