"""Make the model of a trial: seeded, with its weights, under a fresh head."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tuner.models.backbone import create_backbone, find_classifiers
from tuner.models.weights import apply_state, find_weights, load_state_file, load_weights
from tuner.spec.sections import BackboneSection, StudySpec
from tuner.training.device import seed_everything
from tuner.trial import TrialParams

_CACHE_BYTES = 2 << 30


class WeightsCache:
    """The weights that a process has read, kept in memory for its next trials.

    Owned by whoever prepares many models. Random weights, and those that a user's function loads, are never kept.
    """

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self._states: dict[str, dict[str, Tensor]] = {}
        self._free_bytes = max_bytes

    def get_state(self, key: str) -> dict[str, Tensor] | None:
        """Return what was kept under the key; its tensors must not be written to."""
        return self._states.get(key)

    def keep_state(self, key: str, state: dict[str, Tensor]) -> None:
        """Keep tensors, unless they would fill the cache: those are read again for every trial."""
        n_bytes = sum(tensor.nbytes for tensor in state.values())
        if n_bytes <= self._free_bytes and key not in self._states:
            self._states[key] = state
            self._free_bytes -= n_bytes


def prepare_model(
    params: TrialParams,
    spec: StudySpec,
    n_classes: int,
    pretrained_path: Path | None,
    cache: WeightsCache | None = None,
) -> nn.Module:
    """Create a trial's backbone from its seed, load its weights, and draw its head from its seed.

    Unless the section keeps the head of the weights file, it is drawn last, by the classifier's own
    ``reset_parameters`` and in place of timm's initialisation: so it depends on the seed and its shape alone, whatever
    the backbone drew before, and ``start_heads`` draws the same without a backbone. A classifier without that method
    keeps what the backbone's creation drew from the seed.

    Args:
        params: Names the backbone; its seed draws the head.
        spec: Describes the backbone and the image size.
        n_classes: Outputs of the head.
        pretrained_path: What ``pretrain_backbone`` made for this backbone; None takes the weights of its section.
        cache: Weights that earlier calls read. The model is the same with and without it.

    Raises:
        ModelError: If the backbone or its weights cannot be used.
    """
    section = spec.backbones.get(params.backbone, BackboneSection())
    seed_everything(params.seed)
    model = create_backbone(params.backbone, section, n_classes=n_classes, image_size=spec.data.image_size)
    if pretrained_path is not None:
        _apply_pretraining(model, pretrained_path, cache)
    else:
        _apply_section(model, params.backbone, section, spec.data.image_size, cache)
    if pretrained_path is not None or not section.keep_head:
        draw_head(model, params.seed)
    return model


def keeps_head(spec: StudySpec, backbone: str) -> bool:
    """Whether trials of a backbone start from the classifier of its weights file."""
    return spec.backbones.get(backbone, BackboneSection()).keep_head and spec.pretraining is None


def draw_head(model: nn.Module, seed: int) -> None:
    """Draw a model's classifier from a seed, in place; one without ``reset_parameters`` stays as it is.

    It is drawn on the CPU, wherever the model is: a device draws other numbers.
    """
    seed_everything(seed)
    for name in find_classifiers(model):
        head = model.get_submodule(name)
        devices = {parameter.device for parameter in head.parameters()}
        _reset(head.cpu())
        for device in devices:  # one, or none
            head.to(device)


def start_heads(head: nn.Linear | nn.Conv2d, seeds: Sequence[int], *, keep_head: bool = False) -> tuple[Tensor, Tensor]:
    """Return the first heads of trials, as ``prepare_model`` draws them.

    Args:
        head: The classifier of any model of the same backbone, a convolution only of 1x1; not changed.
        seeds: The trials'.
        keep_head: Whether the section keeps the head of the weights file, which all trials then share.

    Returns:
        Weights ``(n_trials, n_classes, n_features)`` and biases ``(n_trials, n_classes)``, on the CPU, in the head's
        type.
    """
    twin = copy.deepcopy(head).cpu()
    weights, biases = [], []
    for seed in seeds:
        if not keep_head:
            seed_everything(seed)
            _reset(twin)
        weights.append(twin.weight.detach().flatten(1).clone())
        biases.append(twin.get_parameter("bias").detach().clone())
    return torch.stack(weights), torch.stack(biases)


def _reset(head: nn.Module) -> None:
    if callable(reset := getattr(head, "reset_parameters", None)):
        reset()


def strip_head(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's tensors on the CPU, those of its classifier left out."""
    heads = tuple(f"{name}." for name in find_classifiers(model))
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith(heads)
    }


def _apply_pretraining(model: nn.Module, path: Path, cache: WeightsCache | None) -> None:
    state = cache and cache.get_state(str(path))
    if not state:
        state = load_state_file(path)
        if cache is not None:
            cache.keep_state(str(path), state)
    apply_state(model, state, source=str(path))


def _apply_section(
    model: nn.Module, name: str, section: BackboneSection, image_size: int, cache: WeightsCache | None
) -> None:
    """Load the weights of a backbone's section: from the cache, else from where they are, and into the cache."""
    key = f"{name} {image_size} {section.model_dump_json()}"
    if cache is not None and (state := cache.get_state(key)) is not None:
        # Not apply_state: these are the model's own tensors as loading left them, the head kept apart.
        model.load_state_dict(state, strict=False)
        return
    load_weights(model, name, section)
    # A kept head belongs to the file; keep_head is rare, and read again every time.
    if cache is not None and not section.keep_head and find_weights(name, section).kind in {"file", "timm"}:
        cache.keep_state(key, strip_head(model))
