"""A recipe in the words of timm's train.py, as a file for its --config, and what it has no words for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tuner.models.backbone import read_created_with
from tuner.models.layers import group_layers
from tuner.production.timm_options import check_options
from tuner.spec.printable import as_printable
from tuner.training.package import Manifest
from tuner.trial import TrialParams

_OWN_OPTIONS = {
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "drop_block_rate": "drop_block",
    "global_pool": "gp",
    "bn_momentum": "bn_momentum",
    "bn_eps": "bn_eps",
}
"""Keyword arguments of a model for which train.py has options; it would pass the others' values twice."""
_SEEDS = 2**32
"""So many NumPy takes, which train.py seeds too."""


@dataclass(frozen=True, kw_only=True)
class TimmRecipe:
    """What train.py can be told, and what it cannot."""

    values: dict[str, Any]
    """By the names of its options."""
    notes: tuple[str, ...]
    """What it cannot express, a line each."""


def express_recipe(manifest: Manifest, model: nn.Module) -> TimmRecipe:
    """Translate a recipe for timm's train.py.

    Args:
        manifest: Of a model folder with a backbone of timm.
        model: Its model.
    """
    params = manifest.params
    values = {
        **_express_model(manifest, model),
        **_express_optimizer(params),
        **_express_schedule(params),
        **_express_augmentation(params),
        "smoothing": params.label_smoothing,
        "channels_last": True,
        "seed": params.seed % _SEEDS,
    }
    if _find_precision(manifest) == "bfloat16":
        values |= {"amp": True, "amp_dtype": "bfloat16"}
    check_options(values)
    return TimmRecipe(values=values, notes=(*_note_model(manifest, model), *_note_training(params)))


def _find_precision(manifest: Manifest) -> str:
    """Return what the model was trained in: older folders tell the device alone, or nothing."""
    was_on_cuda = str(manifest.provenance.get("device", "")).startswith("cuda")
    told = manifest.provenance.get("computed_in", "bfloat16" if was_on_cuda else "float32")
    return str(told) if manifest.params.precision == "auto" else manifest.params.precision


def _express_model(manifest: Manifest, model: nn.Module) -> dict[str, Any]:
    given = manifest.preprocessing
    arguments = read_created_with(model)
    own = {option: arguments.pop(name) for name, option in _OWN_OPTIONS.items() if name in arguments}
    values: dict[str, Any] = {
        "model": manifest.backbone,
        "num_classes": len(manifest.classes),
        "img_size": manifest.image_size,
        "mean": given.mean,
        "std": given.std,
        "interpolation": given.interpolation,
        "train_interpolation": given.interpolation,
        "crop_pct": 1.0,
        **own,
    }
    if manifest.params.dropout > 0:
        values["drop"] = manifest.params.dropout
    return values | ({"model_kwargs": arguments} if arguments else {})


def _express_optimizer(params: TrialParams) -> dict[str, Any]:
    values: dict[str, Any] = {
        "batch_size": params.batch_size,
        "opt": params.optimizer,
        "lr": params.lr,
        "weight_decay": params.weight_decay,
    }
    if params.layer_decay < 1:
        values["layer_decay"] = params.layer_decay
    if params.optimizer != "sgd":
        return values | {"opt_betas": (params.momentum, 0.999)}
    # timm's sgd has Nesterov's momentum, which must not be 0; what it calls momentum is plain SGD then.
    return values | {"momentum": params.momentum, "opt": "sgd" if params.momentum > 0 else "momentum"}


def _express_schedule(params: TrialParams) -> dict[str, Any]:
    """Half a cosine down to 0, step by step; with ``warmup_prefix`` it starts after the warm-up."""
    n_warmup = _count_warmup_epochs(params)
    values: dict[str, Any] = {
        "epochs": params.epochs - n_warmup,
        "sched": "cosine",
        "sched_on_updates": True,
        "min_lr": 0.0,
        "warmup_epochs": n_warmup,
        "cooldown_epochs": 0,
    }
    return values | ({"warmup_lr": 0.0, "warmup_prefix": True} if n_warmup else {})


def _count_warmup_epochs(params: TrialParams) -> int:
    return min(round(params.warmup_fraction * params.epochs), params.epochs - 1)


def _express_augmentation(params: TrialParams) -> dict[str, Any]:
    if params.augmentation_strength == 0:
        return {"no_aug": True}
    return {
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.5 if params.horizontal_flip else 0.0,
        "color_jitter": 0.0,
    }


def _note_model(manifest: Manifest, model: nn.Module) -> list[str]:
    params, n_groups = manifest.params, len(group_layers(model))
    notes = ["the weights that training starts from: add pretrained: true or initial_checkpoint: FILE"]
    if params.unfrozen_layers < n_groups:
        notes.append(f"unfrozen_layers = {params.unfrozen_layers} of {n_groups}: it trains all of them")
    if manifest.resize == "squash":
        notes.append('resize = "squash": it takes the centre of images that are not square')
    if params.dropout > 0 and "drop_rate" in read_created_with(model):
        notes.append("dropout besides the backbone's own drop_rate: drop is the dropout alone")
    elif params.dropout > 0:
        notes.append("dropout in front of the head alone: drop may act elsewhere in the backbone too")
    if params.weight_decay > 0 and callable(exempt := getattr(model, "no_weight_decay", None)) and exempt():
        notes.append("weight decay of the backbone's embeddings: it leaves them out")
    return notes


def _note_training(params: TrialParams) -> list[str]:
    notes = ["an epoch's last, smaller batch: it leaves that out"]
    if params.head_start is not None:
        notes.append("head_start: it trains all layers from a new head, not from one that was trained alone first")
    if params.augmentation_strength > 0:
        notes.append(
            f"augmentation_strength = {params.augmentation_strength}: its rotation, shift, shear and zoom are left out"
        )
        if params.views != "fresh":
            notes.append(f"views = {params.views}: every epoch is augmented anew")
    if params.layer_decay < 1:
        notes.append("layer_decay by layer groups: it counts finer ones, so that early layers learn more slowly")
    if (n_epochs := params.warmup_fraction * params.epochs) > 0:
        whole = _count_warmup_epochs(params)
        notes.append(f"a warm-up of {n_epochs:g} epochs that starts above 0: it warms up for {whole} from 0")
    if params.class_weights != "none":
        notes.append(f"class_weights = {params.class_weights}: every image weighs the same")
    return notes


def write_args(path: Path, recipe: TimmRecipe) -> None:
    """Write a recipe as YAML that train.py takes with ``--config``; its notes are comments."""
    lines = [
        "# For timm's train.py: python train.py --config args.yaml --data-dir IMAGES --class-map FOLDER/class_map.txt",
        "# Its random numbers are others than those of the search, whatever the seed. What it cannot express:",
        *(f"# - {as_printable(note)}" for note in recipe.notes),
        *(f"{name}: {_write_value(value)}" for name, value in recipe.values.items()),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_value(value: Any) -> str:
    """Return a JSON value as YAML. JSON is nearly that, but YAML 1.1 takes 1e-05 for text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {_write_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_write_value, value)) + "]"
    text = json.dumps(value)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")
    return text
