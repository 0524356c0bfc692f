"""Find and load a backbone's weights: a local file, timm's pretrained tag, or none."""

import hashlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.models.backbone import find_classifiers, find_own_function, first_line
from tuner.models.hub import find_address, find_pretrained_cfg, load_timm_state, reject_head
from tuner.spec.own_code import is_users_code
from tuner.spec.sections import BackboneSection

Kind = Literal["file", "timm", "random", "own"]

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training scripts keep the weights, in timm's order (``timm.models.load_state_dict``)."""


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Where a backbone's weights come from."""

    kind: Kind
    """``own``: a function of the user's, which may load its own."""
    detail: str
    """For a person: the file, the address on the hub, or the function."""
    fingerprint: str
    """Differs when the weights differ; for caches."""


def find_weights(name: str, section: BackboneSection) -> WeightsInfo:
    """Say where a backbone's weights come from, without a download.

    Raises:
        ModelError: If the file does not exist, or timm has no pretrained weights for the backbone.
    """
    match kind := _choose_kind(name, section):
        case "file":
            path = _find_file(name, section)
            with path.open("rb") as file:
                return WeightsInfo(
                    kind=kind, detail=str(path), fingerprint=hashlib.file_digest(file, "sha256").hexdigest()
                )
        case "timm":
            cfg = find_pretrained_cfg(name)
            return WeightsInfo(kind=kind, detail=find_address(cfg), fingerprint=f"timm:{cfg.architecture}.{cfg.tag}")
        case "own":
            return WeightsInfo(kind=kind, detail=name, fingerprint=_hash_function(name))
        case "random":
            return WeightsInfo(kind=kind, detail="random", fingerprint="random")


def draws_weights(name: str, section: BackboneSection) -> bool:
    """Whether a backbone's weights are drawn from each trial's seed; a user's function may still load some."""
    return _choose_kind(name, section) == "random"


def _choose_kind(name: str, section: BackboneSection) -> Kind:
    if section.weights not in {None, "random"}:
        return "file"
    if section.weights is None and ":" not in name:
        return "timm"
    if section.keep_head:
        raise ModelError(f'backbones."{name}".keep_head: must be false without pretrained weights, got true')
    return "own" if is_users_code(name) else "random"


def _find_file(name: str, section: BackboneSection) -> Path:
    where = f'backbones."{name}".weights'
    path = Path(str(section.weights))
    if path.suffix not in _ENDINGS:
        raise ModelError(f"{where}: must be \"random\" or a file ending in {', '.join(_ENDINGS)}, got '{path}'")
    if not os.path.isfile(path):  # noqa: PTH113  # Python 3.11's Path raises for a name that is too long
        raise ModelError(f"{where}: must be a file that exists, got '{path}'")
    if not os.access(path, os.R_OK):
        raise ModelError(f"{where}: must be a file that may be read, got '{path}'")
    return path


def _hash_function(name: str) -> str:
    """Return a hash of the source file of a user's function, or its name where there is no source."""
    try:
        source = inspect.getsourcefile(find_own_function(name))
    except TypeError:
        source = None
    content = Path(source).read_bytes() if source else b""
    return f"own:{name}:{hashlib.sha256(content).hexdigest()}"


def load_weights(model: nn.Module, name: str, section: BackboneSection) -> None:
    """Load a backbone's weights in place; the head stays new unless the section says ``keep_head``.

    Args:
        model: What ``create_backbone`` made for the same name and section.
        name: The backbone.
        section: Its ``[backbones."NAME"]``.

    Raises:
        ModelError: If the weights cannot be had, or do not fit; the tensors at fault are named.
    """
    where = f'backbones."{name}"'
    match _choose_kind(name, section):
        case "file":
            state = load_state_file(_find_file(name, section), where=f"{where}.weights")
        case "timm":
            state = load_timm_state(model, name, section)
        case "random" | "own":
            return
    _copy_state(model, state, where=f"{where}.weights", head_where=f"{where}.keep_head", keep_head=section.keep_head)


def load_state_file(path: Path, *, where: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a weights file; nothing in it is executed.

    Args:
        path: A ``.safetensors`` file, or what ``torch.save`` wrote. A state dict inside a training checkpoint
            (``state_dict``, ``model``) is unwrapped, and ``module.`` in front of names is cut off.
        where: How error messages call the file. Default: its path.

    Raises:
        ModelError: If the file cannot be read, or holds anything but tensors and plain values.
    """
    where = where or str(path)
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        what = f"must hold nothing but tensors, got '{path}', which is broken or holds objects that could run code"
        raise ModelError(f"{where}: {what}; save its state_dict() as .safetensors") from error
    except Exception as error:  # a broken file can raise anything
        raise ModelError(f"{where}: must be a readable weights file, got '{path}' ({first_line(error)})") from error
    state = _unwrap(content)
    if not state:
        raise ModelError(f"{where}: must hold named tensors, got '{path}' with none")
    return state


def _unwrap(content: Any) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        return {}
    return {str(name).removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def apply_state(model: nn.Module, state: dict[str, Tensor], *, source: str, keep_head: bool = False) -> None:
    """Copy tensors into a model, in place.

    A state that does not fit as it is goes through the ``checkpoint_filter_fn`` of the model's own module first, as in
    timm: it renames tensors and resamples a ViT's position embedding to another image size. Tensors that the model
    does not have are ignored.

    Args:
        model: Changed in place, and only if everything fits.
        state: Tensors by name.
        source: How error messages call the state.
        keep_head: Copy the classifier too, instead of leaving the model's own.

    Raises:
        ModelError: If tensors are missing or have another shape; the first five are named.
    """
    _copy_state(model, state, where=source, head_where=source, keep_head=keep_head)


def _copy_state(model: nn.Module, state: dict[str, Tensor], *, where: str, head_where: str, keep_head: bool) -> None:
    own: dict[str, Tensor] = model.state_dict()
    head = tuple(f"{classifier}." for classifier in find_classifiers(model))
    body = {name: tensor for name, tensor in own.items() if not name.startswith(head)}
    if _find_misfits(body, state):
        state = _filter_state(model, state)
    if misfits := _find_misfits(body, state):
        raise ModelError(f"{where}: {_describe_misfits(misfits, body, state)}")
    wanted = own if keep_head else body
    if keep_head:
        _check_head({name: tensor for name, tensor in own.items() if name not in body}, state, head_where)
    model.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)


def _find_misfits(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that the state lacks or has in another shape."""
    return [
        name
        for name, tensor in wanted.items()
        # Old files lack BatchNorm's step counter, which only its momentum = None mode reads.
        if not name.endswith("num_batches_tracked") and (name not in state or state[name].shape != tensor.shape)
    ]


def _filter_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapt a state as the model's timm module adapts pretrained files; unchanged where it cannot."""
    module = sys.modules[type(model).__module__]
    if not module.__name__.startswith("timm."):
        return state
    # VGG and RegNet call theirs _filter_fn; it takes torchvision's names to timm's.
    adapt = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if adapt is None:
        return state
    arguments = (dict(state), model)[: len(inspect.signature(adapt).parameters)]
    try:
        filtered: dict[str, Tensor] = adapt(*arguments)
    except Exception:  # noqa: BLE001 - written for timm's own files; the caller then names what does not fit
        return state
    return filtered


def _describe_misfits(misfits: list[str], body: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    must = f"must hold the backbone's {len(body)} tensors in their shapes"
    if not body.keys() & state.keys():
        return f"{must}, got none of them but {_list_first(list(state))}; is it another backbone's file?"
    missing = [name for name in misfits if name not in state]
    mismatched = [
        f"{name} {tuple(state[name].shape)} for {tuple(body[name].shape)}" for name in misfits if name in state
    ]
    parts = [f"{len(missing)} missing ({_list_first(missing)})"] if missing else []
    parts += [f"{len(mismatched)} mismatched ({_list_first(mismatched)})"] if mismatched else []
    return f"{must}, got {' and '.join(parts)}"


def _list_first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _check_head(head: dict[str, Tensor], state: dict[str, Tensor], where: str) -> None:
    for name in _find_misfits(head, state):
        if name not in state:
            raise ModelError(f"{where}: must be false for a file without a classifier, got true ({name} is missing)")
        if head[name].shape[0] != state[name].shape[0]:
            raise reject_head(where, head[name].shape[0], state[name].shape[0])
        shapes = f"{tuple(head[name].shape)}, got {tuple(state[name].shape)}"
        raise ModelError(f"{where}: the file's {name} must have the shape {shapes}")
