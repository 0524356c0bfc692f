"""The config.json of a folder that timm's local-dir and transformers' TimmWrapper load."""

import json
from pathlib import Path
from typing import Any

from timm.models import split_model_name_tag
from torch import nn

from tuner.models.backbone import read_created_with
from tuner.training.package import Manifest

CROP_NOTE = (
    'resize = "crop": timm resizes the shorter side to whole pixels before it cuts out the centre, so it sees images '
    "whose sides do not divide evenly up to half a pixel shifted"
)
_STRUCTURE = ("license", "fixed_input_size", "min_input_size", "first_conv", "classifier")
"""Of timm's pretrained_cfg, what still holds after fine-tuning at another size."""


def write_hub_config(path: Path, model: nn.Module, manifest: Manifest) -> tuple[str, ...]:
    """Write what timm and transformers need to make the model again and to prepare its images.

    Not with timm's ``save_for_hf``: it keeps the original weights' sizes and crops for testing, and its safetensors
    lack the mark that older transformers ask for.

    Args:
        path: The file.
        model: As ``create_backbone`` made it from timm.
        manifest: Of its model folder.

    Returns:
        What they do otherwise, a line each.
    """
    config = _describe(model, manifest)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (CROP_NOTE,) if manifest.resize == "crop" else ()


def _describe(model: nn.Module, manifest: Manifest) -> dict[str, Any]:
    architecture, tag = split_model_name_tag(manifest.backbone)
    origin: Any = model.pretrained_cfg
    given, n_classes = manifest.preprocessing, len(manifest.classes)
    return {
        "architecture": architecture,
        "num_classes": n_classes,
        "num_features": model.num_features,
        "label_names": list(manifest.classes),
        "model_args": read_created_with(model),
        "pretrained_cfg": {
            **{name: origin[name] for name in _STRUCTURE if origin.get(name) is not None},
            "tag": tag,
            "num_classes": n_classes,
            "input_size": [3, manifest.image_size, manifest.image_size],
            "mean": given.mean,
            "std": given.std,
            "interpolation": given.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash" if manifest.resize == "squash" else "center",
        },
    }
