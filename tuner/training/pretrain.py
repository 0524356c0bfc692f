"""Pretrain a backbone on the study's source data set, once for all trials and later studies."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from tuner.data.cache import touch
from tuner.data.content import hash_content
from tuner.data.image_set import ImageSet, load_image_set, move_to
from tuner.data.index import ImageIndex, Split
from tuner.data.sources import read_index
from tuner.data.splits import cut_splits, hash_data, search_rows
from tuner.errors import DataError, DeviceError, ModelError, StorageError
from tuner.models.backbone import Preprocessing, create_backbone, read_preprocessing
from tuner.models.layers import group_layers
from tuner.models.weights import find_weights, load_weights
from tuner.paths import cache_root, replacing
from tuner.spec.own_code import is_users_code
from tuner.spec.sections import BackboneSection, PretrainingSection, StudySpec
from tuner.spec.space import PARAMETERS
from tuner.training.device import is_out_of_memory, seed_everything
from tuner.training.epoch_numbers import Diverged
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.prepare import strip_head
from tuner.trial import EpochResult, Precision, TrialParams

_FORMAT = 1
_verified: set[tuple[int, int, int, str]] = set()
"""Files whose bytes this process has compared with their digest: device, inode, size and digest."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the pretraining of one backbone depends on."""

    name: str
    section: BackboneSection
    pretraining: PretrainingSection
    horizontal_flip: bool
    precision: Precision
    seed: int
    preprocessing: Preprocessing
    index: ImageIndex
    splits: NDArray[np.int8]


def pretrain_backbone(
    name: str, spec: StudySpec, device: torch.device, on_epoch: Callable[[EpochResult], None] | None = None
) -> Path:
    """Train a whole backbone on ``[pretraining]``'s data, unless a file in the cache holds just that already.

    It starts from the weights of its ``[backbones]`` section, or from random ones if the section names none.

    Args:
        name: The backbone.
        spec: Has a pretraining section.
        device: Where to train.
        on_epoch: Told every epoch; never called if nothing is trained.

    Returns:
        A safetensors file of the model without its head. A JSON file of the same name beside it holds what it was
        made from, its epochs, and the digest by which damage shows.

    Raises:
        ValueError: If the spec has no pretraining section.
        DataError: If the source data set cannot be used.
        ModelError: If the backbone or its weights cannot be used, or the training diverges.
    """
    plan = _make_plan(name, spec)
    facts = _list_facts(plan)
    path = _place(facts)
    if _is_whole(path):
        touch(path)
        return path
    model = _start_model(plan)
    epochs = _train_model(plan, model, device, on_epoch)
    try:
        with replacing(path) as temporary:
            save_file(strip_head(model), temporary)
            log = {"facts": facts, "epochs": epochs, "sha256": _compute_digest(temporary)}
            with replacing(path.with_suffix(".json")) as sidecar:
                sidecar.write_text(json.dumps(log, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        raise StorageError(f"TUNER_CACHE_DIR: must be a folder that can be written, got '{path}' ({error})") from error
    return path


def find_pretrained(name: str, spec: StudySpec) -> tuple[Path, bool]:
    """Return the file that ``pretrain_backbone`` would return, and whether it is there already.

    Raises:
        DataError: If the source data set cannot be used.
        ModelError: If the backbone cannot be used.
    """
    path = _place(_list_facts(_make_plan(name, spec)))
    return path, _is_whole(path)


def identify_pretraining(name: str, spec: StudySpec) -> str:
    """Return what differs when the pretraining does; unlike the file's name it stays the same under other versions.

    Raises:
        DataError: If the source data set cannot be used.
        ModelError: If the backbone cannot be used.
    """
    facts = _list_facts(_make_plan(name, spec))
    lasting = {key: value for key, value in facts.items() if key not in {"torch", "timm"}}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def _place(facts: dict[str, Any]) -> Path:
    """Return the file for pretrained weights, named by all that decides them."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_root() / "pretrained" / f"{key}.safetensors"


def _make_plan(name: str, spec: StudySpec) -> _Plan:
    if spec.pretraining is None:
        raise ValueError("spec.pretraining: must be given, got None")
    section = spec.backbones.get(name, BackboneSection())
    section = section.model_copy(update={"weights": section.weights or "random", "keep_head": False})
    try:
        index = read_index(spec.pretraining.data)
        splits = cut_splits(index, spec.pretraining.data, spec.study.seed)
    except DataError as error:
        raise DataError(f"pretraining.{error}") from error
    return _Plan(
        name=name,
        section=section,
        pretraining=spec.pretraining,
        horizontal_flip=spec.training.horizontal_flip,
        precision=spec.training.precision,
        seed=spec.study.seed,
        preprocessing=read_preprocessing(name, section),
        index=index,
        splits=splits,
    )


def _list_facts(plan: _Plan) -> dict[str, Any]:
    """Return everything that decides the pretrained weights, by content and not by path."""
    pretraining = plan.pretraining.model_dump(mode="json")
    for irrelevant in ("path", "max_bad_fraction", "group"):  # groups count through the splits that they make
        del pretraining["data"][irrelevant]
    facts = {
        "format": _FORMAT,
        "backbone": plan.name,
        "kwargs": json.loads(json.dumps(plan.section.kwargs, default=str)),
        "preprocessing": asdict(plan.preprocessing),
        "weights": find_weights(plan.name, plan.section).fingerprint,
        "data": [hash_data(plan.index, plan.splits), hash_content(plan.index, search_rows(plan.splits))],
        "pretraining": pretraining,
        "horizontal_flip": plan.horizontal_flip,
        "seed": plan.seed,
        "torch": _minor_version(torch.__version__),
        "timm": _minor_version(timm.__version__),
    }
    # Files and studies from before there was a choice name none.
    return facts if plan.precision == "auto" else facts | {"precision": plan.precision}


def _minor_version(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _is_whole(path: Path) -> bool:
    """Compare the file with the digest that its log keeps, once per process."""
    try:
        digest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]
        status = path.stat()
        identity = (status.st_dev, status.st_ino, status.st_size, digest)
        if identity not in _verified and _compute_digest(path) == digest:
            _verified.add(identity)
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return identity in _verified


def _compute_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start_model(plan: _Plan) -> nn.Module:
    seed_everything(plan.seed)
    image_size = plan.pretraining.data.image_size
    model = create_backbone(plan.name, plan.section, n_classes=len(plan.index.classes), image_size=image_size)
    load_weights(model, plan.name, plan.section)
    return model


def _train_model(
    plan: _Plan, model: nn.Module, device: torch.device, on_epoch: Callable[[EpochResult], None] | None
) -> list[dict[str, Any]]:
    """Train the model in place; return its epochs as JSON."""
    job = TrainingJob(
        model=model,
        params=_choose_params(plan, n_groups=len(group_layers(model))),
        train=_load_images(plan, Split.TRAIN, device),
        val=_load_images(plan, Split.VAL, device),
        preprocessing=plan.preprocessing,
        device=device,
    )
    epochs = []
    try:
        for result, _ in train_epochs(job):
            epochs.append(asdict(result))
            if on_epoch is not None:
                on_epoch(result)
    except Diverged as error:
        lr = plan.pretraining.lr
        raise ModelError(f"pretraining.lr: must let {plan.name} converge, got {lr:g}; {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            batch_size = plan.pretraining.batch_size
            raise DeviceError(f"pretraining.batch_size: must fit the memory, got {batch_size} ({error})") from error
        if is_users_code(plan.name):
            what = f"must train without an error, got {type(error).__name__}: {error}"
            raise ModelError(f"space.backbone: '{plan.name}' {what}") from error
        raise
    return epochs


def _choose_params(plan: _Plan, *, n_groups: int) -> TrialParams:
    """Return the recipe: the section's values, every layer group, and the defaults of the other params."""
    defaults = {name: parameter.default for name, parameter in PARAMETERS.items()}
    chosen = {
        "backbone": plan.name,
        "lr": plan.pretraining.lr,
        "batch_size": plan.pretraining.batch_size,
        "augmentation_strength": plan.pretraining.augmentation_strength,
        "unfrozen_layers": n_groups,
        "optimizer": "adamw",
        "epochs": plan.pretraining.epochs,
        "horizontal_flip": plan.horizontal_flip,
        "class_weights": "none",
        "precision": plan.precision,
        "seed": plan.seed,
    }
    return TrialParams.from_json(defaults | chosen)


def _load_images(plan: _Plan, split: Split, device: torch.device) -> ImageSet:
    data, interpolation = plan.pretraining.data, plan.preprocessing.interpolation
    return move_to(load_image_set(plan.index, plan.splits, data, (split,), interpolation=interpolation), device)
