"""Make backbones: timm's models, ``tuner:small_cnn``, and functions of the user's."""

import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import get_arch_pretrained_cfgs, get_deprecated_models, get_pretrained_cfg, split_model_name_tag
from torch import nn

from tuner.errors import ModelError, OwnCodeError
from tuner.models.small_cnn import SmallCNN
from tuner.spec.own_code import SMALL_CNN, is_users_code
from tuner.spec.sections import BackboneSection
from tuner.spec.suggestions import did_you_mean

CREATED_WITH = "created_with"
"""Attribute of a timm model that holds its keyword arguments, so that weights can be loaded through a twin of it."""
_WEIGHTS_ARGUMENTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_SET_BY_STUDY = {"num_classes", "in_chans", *_WEIGHTS_ARGUMENTS}
_PLAIN = (0.5, 0.5, 0.5)
_own_code: dict[str, tuple[ModuleType, str]] = {}
"""A user's modules by name, each with the SHA-256 of its file."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images become a backbone's input: pixels in [0, 1] minus ``mean``, over ``std``."""

    mean: tuple[float, ...]
    """Per channel."""
    std: tuple[float, ...]
    """Per channel, > 0."""
    interpolation: str
    """``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``."""


def create_backbone(name: str, section: BackboneSection, *, n_classes: int, image_size: int) -> nn.Module:
    """Make a backbone with fresh random weights; a user's function may load weights of its own.

    Args:
        name: A timm model name with or without pretrained tag, ``tuner:small_cnn`` or ``package.module:function``.
        section: Its ``[backbones."NAME"]``.
        n_classes: Outputs of the head.
        image_size: Height and width of the images, in px. Fixed-size models (ViT, Swin) are built for it.

    Raises:
        ModelError: If there is no such backbone, or it does not take the keyword arguments or the image size.
    """
    if name == SMALL_CNN:
        if section.kwargs:
            raise ModelError(f'backbones."{name}".kwargs: must be empty, got {section.kwargs!r}')
        return SmallCNN(num_classes=n_classes, image_size=image_size)
    if is_users_code(name):
        return _create_own(name, section, n_classes)
    return _create_timm(name, section, n_classes, image_size)


def first_line(error: BaseException) -> str:
    """Return an exception as a part of one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def find_timm_cfg(name: str) -> Any:
    """Return timm's ``PretrainedCfg`` of a model name, with or without a tag.

    Raises:
        ModelError: If timm has no such model, or the model no such tag.
    """
    architecture, _ = split_model_name_tag(name)
    deprecated = get_deprecated_models()
    if architecture in deprecated or not timm.is_model(architecture):
        current = deprecated.get(architecture)
        known = [*timm.list_models(), SMALL_CNN]  # in order, which takes tens of milliseconds
        hint = f"; its name is now '{current}'" if current else did_you_mean(architecture, known)
        raise ModelError(_unknown(name) + hint)
    tagged = get_arch_pretrained_cfgs(architecture)
    if name != architecture and name not in tagged:
        where = f"space.backbone: must be {architecture} with one of timm's pretrained tags"
        raise ModelError(f"{where}, got '{name}'{did_you_mean(name, tagged)}")
    return get_pretrained_cfg(name)


def _unknown(name: str) -> str:
    return f"space.backbone: must be a timm model, '{SMALL_CNN}' or 'package.module:function', got '{name}'"


def _create_timm(name: str, section: BackboneSection, n_classes: int, image_size: int) -> nn.Module:
    cfg = find_timm_cfg(name)
    where = f'backbones."{name}".kwargs'
    if taken := sorted(_SET_BY_STUDY & section.kwargs.keys()):
        raise ModelError(f"{where}: must leave out what the study sets, got {', '.join(taken)}")
    fixed: dict[str, Any] = {"num_classes": n_classes, "in_chans": 3}
    if cfg.fixed_input_size:
        fixed["img_size"] = image_size
    kwargs = {**fixed, **section.kwargs}
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except Exception as error:
        if section.kwargs and _can_create(name, fixed):
            what = f"must be keyword arguments that timm's {name} takes, got {section.kwargs!r}"
            raise ModelError(f"{where}: {what} ({first_line(error)})") from error
        raise _reject_size(name, image_size, error) from error
    setattr(model, CREATED_WITH, kwargs)
    return model


def read_created_with(model: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments with which timm makes the same model again, besides its name and its classes."""
    arguments: dict[str, Any] = getattr(model, CREATED_WITH)
    return {name: value for name, value in arguments.items() if name not in {"num_classes", "in_chans"}}


def _can_create(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a model can be made; tells a wrong keyword argument from a wrong image size."""
    try:
        timm.create_model(name, **kwargs)
    except Exception:  # noqa: BLE001 - timm's models check their arguments with every kind of exception
        return False
    return True


def _reject_size(name: str, image_size: int, error: Exception) -> ModelError:
    return ModelError(f"data.image_size: must be a size that {name} accepts, got {image_size} ({first_line(error)})")


def _create_own(name: str, section: BackboneSection, n_classes: int) -> nn.Module:
    function = find_own_function(name)
    where = f'backbones."{name}".kwargs'
    if "num_classes" in section.kwargs:
        raise ModelError(f"{where}: must leave out what the study sets, got num_classes")
    try:
        inspect.signature(function).bind(num_classes=n_classes, **section.kwargs)
    except TypeError as error:
        given = f"num_classes = {n_classes} and {section.kwargs!r}"
        raise ModelError(f"{where}: must fit the function's parameters, got {given} ({error})") from error
    except ValueError:
        pass  # a callable without a signature says itself what it misses
    try:
        model = function(num_classes=n_classes, **section.kwargs)
    except Exception as error:
        raise OwnCodeError(f"space.backbone: '{name}' must return a model, got {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"space.backbone: '{name}' must return a torch.nn.Module, got {type(model).__name__}")
    _check_own_classifier(name, model, n_classes)
    return model


def find_own_function(name: str) -> Callable[..., Any]:
    """Import the function that ``package.module:function`` names.

    Raises:
        ModelError: If it cannot be imported, or is not callable.
    """
    module_name, _, attribute = name.partition(":")
    hint = did_you_mean(name, [SMALL_CNN])
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise ModelError(_unknown(name) + hint)
    try:
        module = importlib.import_module(module_name)
        _remember_code(module_name, module)
    except Exception as error:
        what = f"must name a module that can be imported, got '{name}' ({first_line(error)})"
        raise ModelError(f"space.backbone: {what}") from error
    if not hasattr(module, attribute):
        raise ModelError(f"space.backbone: must name a function of {module_name}, got '{attribute}'{hint}")
    function = getattr(module, attribute)
    if not callable(function):
        raise ModelError(f"space.backbone: '{name}' must be a function, got {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def hash_own_code(name: str) -> str:
    """Return the SHA-256 of the file of a user's module as it was when it was imported; empty if there is none.

    Raises:
        ModelError: If the function cannot be imported.
    """
    find_own_function(name)
    return _own_code[name.partition(":")[0]][1]


def _remember_code(name: str, module: ModuleType) -> None:
    """Read a module's file when it is imported: it may be edited while this process runs."""
    if name not in _own_code or _own_code[name][0] is not module:
        file = Path(getattr(module, "__file__", None) or "")
        _own_code[name] = module, sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _check_own_classifier(name: str, model: nn.Module, n_classes: int) -> None:
    """Refuse a model whose classifier was guessed wrong: training it alone would train something else."""
    for part in find_classifiers(model):
        module = model.get_submodule(part)
        width = getattr(module, "out_features", getattr(module, "out_channels", n_classes))
        if width != n_classes:
            what = f"'{name}' must return a model with {n_classes} outputs, got '{part}' with {width}"
            raise ModelError(f"space.backbone: {what}; a method get_classifier() tells which module is the classifier")


def find_classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the module names of a model's classifiers; distilled models have two.

    Those are what ``get_classifier()`` returns; without that method the last ``nn.Linear``, else the last
    ``nn.Conv2d``.

    Raises:
        ModelError: If there is none, or it has no parameters.
    """
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        found = get_classifier()
        wanted = list(found) if isinstance(found, tuple | list) else [found]
    else:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        wanted = (linears or convolutions)[-1:]
    names = tuple(
        name
        for name, module in model.named_modules()
        if any(module is one for one in wanted) and any(True for _ in module.parameters())
    )
    if not names or "" in names:
        what = f"{type(model).__name__} must have a classifier with parameters, got none"
        raise ModelError(f"space.backbone: {what}; a method get_classifier() tells which module it is")
    return names


def check_forward(model: nn.Module, *, image_size: int, n_classes: int, name: str) -> None:
    """Run black images through a copy of a model, in eval and in train mode.

    Raises:
        ModelError: If the model does not take this image size, or does not return one tensor of logits.
    """
    _check_patches(model, image_size, name)
    device = next(model.parameters()).device
    tried = copy.deepcopy(model)  # train mode moves BatchNorm statistics, and eval mode fills levit's caches
    for mode, n_images in (("eval", 1), ("train", 2)):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                logits = tried.train(mode == "train")(torch.zeros(n_images, 3, image_size, image_size, device=device))
        except Exception as error:
            if is_users_code(name):
                what = f"must return logits for {image_size} px images in {mode} mode"
                raise ModelError(f"space.backbone: '{name}' {what}, got {first_line(error)}") from error
            raise _reject_size(name, image_size, error) from error
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if shape != (n_images, n_classes):
            what = f"must return logits of shape ({n_images}, {n_classes}) in {mode} mode, got {shape}"
            raise ModelError(f"space.backbone: '{name}' {what}")


def _check_patches(model: nn.Module, image_size: int, name: str) -> None:
    """Refuse an image size that is no multiple of the patch: timm would cut off the right and lower edge unsaid."""
    for stem in (getattr(model, "patch_embed", None), getattr(model, "stem", None)):
        if isinstance(stem, PatchEmbed) and not stem.dynamic_img_pad and image_size % max(stem.patch_size):
            what = f"must be a multiple of {max(stem.patch_size)}, the patch of {name}, got {image_size}"
            raise ModelError(f"data.image_size: {what}")


def read_preprocessing(name: str, section: BackboneSection) -> Preprocessing:
    """Return what the section says, else timm's ``pretrained_cfg``, else 0.5, 0.5 and bilinear.

    Raises:
        ModelError: If timm has no such model or tag.
    """
    mean, std, interpolation = _PLAIN, _PLAIN, "bilinear"
    if ":" not in name:
        cfg = find_timm_cfg(name)
        mean, std, interpolation = tuple(cfg.mean), tuple(cfg.std), cfg.interpolation
    return Preprocessing(
        mean=section.mean or mean, std=section.std or std, interpolation=section.interpolation or interpolation
    )
