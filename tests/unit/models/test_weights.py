import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.models.backbone import create_backbone, find_classifiers
from tuner.models.weights import apply_state, find_weights, load_state_file, load_weights
from tuner.spec.own_code import SMALL_CNN
from tuner.spec.sections import BackboneSection

NAME = "test_resnet"
WHERE = r'^backbones\."test_resnet"\.'


def make_model(name: str = NAME, *, n_classes: int = 5, image_size: int = 32, seed: int = 0) -> nn.Module:
    """A seeded model with fresh weights."""
    torch.manual_seed(seed)
    return create_backbone(name, BackboneSection(), n_classes=n_classes, image_size=image_size)


def write(path: Path, state: dict[str, Tensor]) -> Path:
    """Save a state as safetensors."""
    safetensors.torch.save_file(state, path)
    return path


def load(model: nn.Module, path: Path, *, name: str = NAME, **section: Any) -> None:
    """Load a file with keyword overrides of the backbone's section."""
    load_weights(model, name, BackboneSection(weights=str(path), **section))


def differing(model: nn.Module, state: dict[str, Tensor]) -> set[str]:
    """Names of the model's tensors that are not those of a state."""
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])}


def head_names(model: nn.Module) -> set[str]:
    """Names of the classifier's tensors."""
    prefixes = tuple(f"{name}." for name in find_classifiers(model))
    return {key for key in model.state_dict() if key.startswith(prefixes)}


@pytest.mark.parametrize("name", [NAME, SMALL_CNN, "levit_128s", "torchvision.models:squeezenet1_0"])
def test_load_weights_loads_everything_but_the_head(tmp_path: Path, name: str) -> None:
    """Round trip through a file of another number of classes; the head stays new."""
    source = make_model(name, n_classes=7, image_size=64, seed=1)
    path = write(tmp_path / "w.safetensors", source.state_dict())
    model = make_model(name, image_size=64)
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load(model, path, name=name)
    loaded = {key: tensor for key, tensor in source.state_dict().items() if key not in head_names(model)}
    assert differing(model, old | loaded) == set()


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_load_weights_reads_training_checkpoints(tmp_path: Path, wrap: str | None) -> None:
    """A .pth file with wrapped weights whose names start with DistributedDataParallel's ``module.``."""
    source = make_model(seed=1)
    state: Any = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "w.pth")
    model = make_model()
    load(model, tmp_path / "w.pth", keep_head=True)
    assert differing(model, source.state_dict()) == set()


def test_load_weights_needs_no_classifier_and_ignores_other_tensors(tmp_path: Path) -> None:
    """Feature extractors come without a head, and checkpoints with more than the model."""
    source = make_model(seed=1)
    state = {key: tensor for key, tensor in source.state_dict().items() if not key.startswith("fc.")}
    model = make_model()
    load(model, write(tmp_path / "w.safetensors", {**state, "ema.decay": torch.ones(1)}))
    assert differing(model, source.state_dict()) == {"fc.weight", "fc.bias"}


def test_load_weights_does_without_step_counters(tmp_path: Path) -> None:
    """Files older than PyTorch 0.4 have no num_batches_tracked."""
    state = {key: t for key, t in make_model(seed=1).state_dict().items() if not key.endswith("num_batches_tracked")}
    model = make_model()
    load(model, write(tmp_path / "w.safetensors", state))
    assert torch.equal(model.get_parameter("layer1.0.conv1.weight"), state["layer1.0.conv1.weight"])


def test_load_weights_resamples_a_position_embedding(tmp_path: Path) -> None:
    """A ViT of another image size, by timm's own checkpoint_filter_fn."""
    source = make_model("test_vit", image_size=64, seed=1)
    model = make_model("test_vit", image_size=32)
    load(model, write(tmp_path / "w.safetensors", source.state_dict()), name="test_vit")
    assert torch.equal(model.get_parameter("cls_token"), source.get_parameter("cls_token"))
    old, new = source.get_parameter("pos_embed"), model.get_parameter("pos_embed")
    assert new.shape[1] < old.shape[1]
    assert torch.allclose(new.mean(), old.mean(), atol=1e-2)


def test_load_weights_names_missing_tensors(tmp_path: Path) -> None:
    """How many, and the first five; the model is left as it was."""
    state = {key: t for key, t in make_model(seed=1).state_dict().items() if not key.startswith("layer2.")}
    model = make_model()
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    message = (
        rf"{WHERE}weights: must hold the backbone's \d+ tensors .* got \d+ missing \(layer2\.0\.conv1\.weight, .*, …\)$"
    )
    with pytest.raises(ModelError, match=message):
        load(model, write(tmp_path / "w.safetensors", state))
    assert differing(model, old) == set()


def test_load_weights_names_mismatched_tensors(tmp_path: Path) -> None:
    """With both shapes."""
    state = {**make_model(seed=1).state_dict(), "layer1.0.bn1.bias": torch.zeros(3)}
    with pytest.raises(
        ModelError, match=rf"{WHERE}weights: .* got 1 mismatched \(layer1\.0\.bn1\.bias \(3,\) for \(\d+,\)\)$"
    ):
        load(make_model(), write(tmp_path / "w.safetensors", state))


def test_load_weights_refuses_a_file_of_another_backbone(tmp_path: Path) -> None:
    """Nothing matches: the message says what the file holds instead."""
    path = write(tmp_path / "w.safetensors", make_model().state_dict())
    message = r"weights: must hold .*, got none of them but bn1\..*, …; is it another backbone's file\?$"
    with pytest.raises(ModelError, match=message):
        load(make_model(SMALL_CNN), path, name=SMALL_CNN)


def test_load_weights_keeps_the_head_when_asked(tmp_path: Path) -> None:
    """keep_head = true loads the classifier too."""
    source = make_model(seed=1)
    model = make_model()
    load(model, write(tmp_path / "w.safetensors", source.state_dict()), keep_head=True)
    assert differing(model, source.state_dict()) == set()


@pytest.mark.parametrize("name", [NAME, "levit_128s"])
def test_load_weights_refuses_to_keep_a_head_of_other_classes(tmp_path: Path, name: str) -> None:
    """The message counts the classes of both."""
    path = write(tmp_path / "w.safetensors", make_model(name, n_classes=7, image_size=64).state_dict())
    with pytest.raises(ModelError, match=r"\.keep_head: the file's classifier must have 5 classes, got 7$"):
        load(make_model(name, image_size=64), path, name=name, keep_head=True)


def test_load_weights_refuses_to_keep_a_head_that_is_not_there(tmp_path: Path) -> None:
    """A feature extractor has none to keep."""
    state = {key: tensor for key, tensor in make_model().state_dict().items() if not key.startswith("fc.")}
    with pytest.raises(ModelError, match=rf"{WHERE}keep_head: must be false for a file without a classifier, got true"):
        load(make_model(), write(tmp_path / "w.safetensors", state), keep_head=True)


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("attacked"),))


def test_load_state_file_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that would run code is refused, and the code does not run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"fc.weight": torch.ones(1)}, "extra": _Attack()}, "w.pth")
    with pytest.raises(
        ModelError, match=r"^w\.pth: must hold nothing but tensors, got 'w\.pth', which is broken or holds objects"
    ):
        load_state_file(Path("w.pth"))
    Path("old.pth").write_bytes(pickle.dumps(_Attack(), protocol=2))
    with pytest.raises(ModelError, match=r"^old\.pth: must hold nothing but tensors"):
        load_state_file(Path("old.pth"))
    assert not Path("attacked").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"<html>404: Not Found</html>"])
def test_load_state_file_refuses_what_is_no_weights_file(tmp_path: Path, name: str, content: bytes) -> None:
    """Empty, broken, or an error page of a download."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"must (be a readable weights file|hold nothing but tensors), got "):
        load_state_file(tmp_path / name)


def test_load_state_file_refuses_a_file_without_tensors(tmp_path: Path) -> None:
    """A checkpoint of something else."""
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"must hold named tensors, got .* with none$"):
        load_state_file(tmp_path / "w.pth")


def test_apply_state_names_its_source() -> None:
    """Callers say what the state is called in messages."""
    with pytest.raises(ModelError, match=r"^model/weights: must hold the backbone's \d+ tensors"):
        apply_state(make_model(), {}, source="model/weights")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weights": "absent.pth"}, r"weights: must be a file that exists, got 'absent\.pth'$"),
        ({"weights": "w.onnx"}, r"weights: must be \"random\" or a file ending in \.safetensors, .*, got 'w\.onnx'$"),
        ({"weights": "random", "keep_head": True}, r"keep_head: must be false without pretrained weights, got true$"),
    ],
)
def test_find_weights_refuses(section: dict[str, Any], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ModelError, match=WHERE + message):
        find_weights(NAME, BackboneSection(**section))


def test_find_weights_hashes_the_file(tmp_path: Path) -> None:
    """The fingerprint follows the content, not the name."""
    first = write(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    same = write(tmp_path / "b.safetensors", {"x": torch.zeros(1)})
    other = write(tmp_path / "c.safetensors", {"x": torch.ones(1)})
    infos = [find_weights(NAME, BackboneSection(weights=str(path))) for path in (first, same, other)]
    assert {info.kind for info in infos} == {"file"}
    assert infos[0].fingerprint == infos[1].fingerprint != infos[2].fingerprint


@pytest.mark.parametrize(
    ("name", "section", "kind"),
    [
        (SMALL_CNN, {}, "random"),
        (NAME, {"weights": "random"}, "random"),
        (NAME, {}, "timm"),
        ("torchvision.models:resnet18", {}, "own"),
        ("torchvision.models:resnet18", {"weights": "random"}, "own"),
    ],
)
def test_find_weights_kind(name: str, section: dict[str, Any], kind: str) -> None:
    """Where weights come from without a file."""
    assert find_weights(name, BackboneSection(**section)).kind == kind


def test_load_weights_leaves_a_random_backbone_alone() -> None:
    """Weights = "random" loads nothing."""
    model = make_model()
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load_weights(model, NAME, BackboneSection(weights="random"))
    assert differing(model, old) == set()
