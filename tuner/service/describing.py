"""What a study means on this machine: its images, its backbones, their weights, and the disk that they need."""

import math
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from time import perf_counter

import numpy as np
import torch
from torch import nn

from tuner.data.duplicates import describe_exact, describe_near
from tuner.data.folds import check_folds, count_max_folds
from tuner.data.index import Split
from tuner.data.splits import cuts_val, has_test, pack_splits, search_rows
from tuner.data.store import check_room, find_store
from tuner.errors import DataError
from tuner.models.backbone import check_forward, create_backbone, read_preprocessing
from tuner.models.hub import check_reach
from tuner.models.layers import group_layers
from tuner.models.weights import find_weights, load_weights
from tuner.paths import cache_root
from tuner.service.messages import Description
from tuner.service.study_data import StudyData, compare_search_splits
from tuner.spec.sections import BackboneSection, StudySpec
from tuner.spec.space import PARAMETERS, Choices, FloatRange, IntRange
from tuner.training.device import autocast, lacks_bfloat16, multiplies_in_bfloat16
from tuner.training.pretrain import find_pretrained, identify_pretraining
from tuner.trial import Precision

_LARGE_IMAGE_SIZE = 96
"""In pixels. The speed of bfloat16 on a CPU was measured at 128; steps of tiny images are mostly overhead."""
_TIMED_IMAGES = 8
_TIMING_SECONDS = 8.0
"""Backbones whose turn comes after this are not timed: a check is to answer within seconds."""


def describe_study(spec: StudySpec, data: StudyData, *, timed: bool) -> Description:
    """Look at everything that a study needs, without decoding an image or downloading a weight.

    Raises:
        DataError, ModelError, StorageError: If something cannot be used.
    """
    started = perf_counter()
    if spec.data.folds:
        if not cuts_val(data.index):  # the user's reason to keep the two apart is not ours to judge
            got = f"got {spec.data.folds}; the images stand in val already"
            raise DataError(f"data.folds: must be left out where the data brings its own val split, {got}")
        check_folds(data.index, data.splits, spec.data.folds)
    names = spec.backbone_names()
    preprocessing = {
        name: asdict(read_preprocessing(name, spec.backbones.get(name, BackboneSection()))) for name in names
    }
    interpolations = {each["interpolation"] for each in preprocessing.values()}
    store_bytes = check_room(data.index, search_rows(data.splits), spec.data, interpolations=interpolations)
    group_counts, n_params, weights, fingerprints = {}, {}, {}, {}
    seconds_per_image: dict[str, float] = {}
    for name in names:
        model = _make_checked(name, spec, n_classes=len(data.index.classes))
        group_counts[name] = len(group_layers(model))
        n_params[name] = sum(parameter.numel() for parameter in model.parameters())
        weights[name], fingerprints[name] = _identify_weights(name, spec)
        if timed and perf_counter() - started < _TIMING_SECONDS:
            seconds_per_image[name] = _time_image(model, spec.data.image_size, spec.training.precision)
    return Description(
        classes=data.index.classes,
        split_counts=_count_splits(data),
        splits=pack_splits(data.splits),
        data_hash=data.hash,
        group_counts=group_counts,
        n_params=n_params,
        weights=weights,
        fingerprints=fingerprints,
        preprocessing=preprocessing,
        versions=_list_versions(),
        store_bytes=store_bytes,
        free_bytes=shutil.disk_usage(cache_root()).free,
        seconds_per_image=seconds_per_image,
        max_folds=count_max_folds(data.index, data.splits),
        notes=(*_list_duplicates(spec, data, interpolations if timed else ()), *_list_notes(spec, data)),
    )


def _make_checked(name: str, spec: StudySpec, *, n_classes: int) -> nn.Module:
    """Return a backbone that takes the study's images, with its local weights if it has a file."""
    section = spec.backbones.get(name, BackboneSection())
    model = create_backbone(name, section, n_classes=n_classes, image_size=spec.data.image_size)
    check_forward(model, image_size=spec.data.image_size, n_classes=n_classes, name=name)
    if spec.pretraining is None:
        if find_weights(name, section).kind == "file":
            load_weights(model, name, section)
        check_reach(name, section)
    return model


def _identify_weights(name: str, spec: StudySpec) -> tuple[str, str]:
    """Return where a backbone's weights come from, for a person, and what identifies them."""
    if spec.pretraining is not None:
        _, is_there = find_pretrained(name, spec)
        return f"pretraining ({'cached' if is_there else 'to do'})", identify_pretraining(name, spec)
    info = find_weights(name, spec.backbones.get(name, BackboneSection()))
    return f"{info.kind}: {info.detail}" if info.detail != info.kind else info.kind, info.fingerprint


def _time_image(model: nn.Module, image_size: int, precision: Precision) -> float:
    """Return the seconds that one image of full fine-tuning takes on the CPU, after a warm-up."""
    images = torch.zeros(_TIMED_IMAGES, 3, image_size, image_size)
    model.train()
    for _ in range(2):
        started = perf_counter()
        with autocast(torch.device("cpu"), precision):
            logits = model(images)
        logits.float().square().mean().backward()
        seconds = perf_counter() - started
    return seconds / _TIMED_IMAGES


def _count_splits(data: StudyData) -> dict[str, int]:
    return {split.name.lower(): int(np.count_nonzero(data.splits == split)) for split in Split}


def _list_versions() -> dict[str, str]:
    versions = {name: version(name) for name in ("tuner", "torch", "torchvision", "timm", "numpy", "pillow")}
    return {"python": sys.version.split()[0], **versions}


def _list_duplicates(spec: StudySpec, data: StudyData, interpolations: Iterable[str]) -> tuple[str, ...]:
    """Return lines on exact duplicates, and on near ones where images have been decoded already; a run decodes them."""
    rows = search_rows(data.splits)
    stores = (find_store(data.index, rows, spec.data, interpolation=each) for each in sorted(interpolations))
    store = next((store for store in stores if store is not None), None)
    duplicates = compare_search_splits(data, store)
    return tuple(
        line
        for describe in (describe_exact, describe_near)
        for line in describe(duplicates, held_out="val", others="train")
    )


def _list_notes(spec: StudySpec, data: StudyData) -> tuple[str, ...]:
    notes = []
    if not has_test(data.index, data.splits):
        notes.append(
            "no test split: 'tuner train' will have no unbiased number; data.test_fraction = 0.2 keeps one back"
        )
    is_large = spec.data.image_size >= _LARGE_IMAGE_SIZE
    uses_cpu = "cpu" in spec.workers.devices or not torch.cuda.is_available()
    if spec.training.precision == "bfloat16" and uses_cpu and lacks_bfloat16():
        notes.append(
            'training.precision = "bfloat16": this CPU has no instructions for it; float32 is several times as fast'
        )
    if spec.training.precision == "auto" and uses_cpu and is_large and multiplies_in_bfloat16():
        notes.append(
            'this CPU has matrix units for bfloat16: with training.precision = "bfloat16" CNNs have trained 1.1 to 2.1 '
            "times as fast, with that type's rounding"
        )
    may_augment = max(_bounds(spec, "augmentation_strength")) > 0
    if min(_bounds(spec, "unfrozen_layers")) == 1 and may_augment and spec.training.views == "fresh":
        notes.append(
            "heads with augmentation_strength > 0 train on images, not on kept features: with training.views = "
            '"fresh" no two epochs show the same; views = 8 shows eight fixed versions of each image'
        )
    strength = spec.space.get("augmentation_strength")
    is_continuous = isinstance(strength, FloatRange) and strength.step is None
    if min(_bounds(spec, "unfrozen_layers")) == 1 and is_continuous and spec.training.views != "fresh":
        notes.append(
            f"every augmentation_strength needs features of its own for {spec.training.views} views of each image, "
            "which hardly two head trials share; a step in space.augmentation_strength, or choices, lets them"
        )
    return tuple(notes)


def _bounds(spec: StudySpec, name: str) -> tuple[float, float]:
    """Return the least and the largest value that a param of numbers may take; "all" is infinity."""
    match spec.space.get(name):
        case Choices(choices=choices):
            values = [float(choice) for choice in choices]
        case FloatRange(low=low, high=high) | IntRange(low=low, high=high):
            values = [float(low), math.inf if high == "all" else float(high)]
        case None:
            fixed = spec.fixed_params().get(name, PARAMETERS[name].default)
            values = [math.inf if fixed == "all" else float(fixed or 0)]
    return min(values), max(values)
