"""Stored studies made by hand: tiny images, one finished trial each, no search."""

import dataclasses
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuner.data.splits import pack_splits
from tuner.models.backbone import create_backbone, read_preprocessing
from tuner.models.layers import group_layers
from tuner.models.weights import find_weights
from tuner.production.reading import open_stored
from tuner.search.storage import open_storage
from tuner.search.studies import open_study
from tuner.search.study_facts import StudyFacts
from tuner.search.trial_book import TrialBook
from tuner.service.study_data import read_study_data
from tuner.spec.sections import BackboneSection, StudySpec
from tuner.spec.study import parse_spec
from tuner.training.pretrain import identify_pretraining
from tuner.trial import EpochResult, Reason, TrialOutcome, TrialState

SMALL_CNN = "tuner:small_cnn"
CLASSES = ("bright_$left", "bright_ríght")


def write_images(root: Path, n_per_class: int = 20, size: int = 12, seed: int = 0) -> None:
    """Write two class folders of noise that is brighter on one side."""
    generator = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(n_per_class):
            pixels = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
            half = slice(0, size // 2) if label == 0 else slice(size // 2, size)
            pixels[:, half] += 100
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")


def make_spec(
    folder: Path, *, backbone: str = SMALL_CNN, test_fraction: float | None = 0.25, **tables: Any
) -> StudySpec:
    """Return a study of the images of ``write_images`` in ``folder``; further tables replace the defaults."""
    data: dict[str, Any] = {"source": "image_folder", "path": "images", "image_size": 12}
    if test_fraction is not None:
        data["test_fraction"] = test_fraction
    defaults: dict[str, Any] = {
        "study": {"name": "sides"},
        "data": data,
        "space": {"lr": {"low": 1e-3, "high": 1e-2, "log": True}},
        "training": {
            "backbone": backbone,
            "batch_size": 8,
            "unfrozen_layers": 2,
            "augmentation_strength": 0.0,
            "epochs": 3,
            "optimizer": "adamw",
            "horizontal_flip": False,
        },
    }
    return parse_spec(defaults | tables, folder)


def make_facts(spec: StudySpec) -> StudyFacts:
    """Return what a worker would find out about a study."""
    data = read_study_data(spec)
    names = spec.backbone_names()
    sections = {name: spec.backbones.get(name, BackboneSection()) for name in names}
    n_classes, size = len(data.index.classes), spec.data.image_size
    models = {name: create_backbone(name, sections[name], n_classes=n_classes, image_size=size) for name in names}
    counts = np.bincount(data.splits, minlength=3).tolist()
    return StudyFacts(
        data_hash=data.hash,
        classes=data.index.classes,
        splits=pack_splits(data.splits),
        split_counts=dict(zip(("train", "val", "test"), counts, strict=True)),
        group_counts={name: len(group_layers(model)) for name, model in models.items()},
        weights={
            name: identify_pretraining(name, spec) if spec.pretraining else find_weights(name, section).fingerprint
            for name, section in sections.items()
        },
        preprocessing={name: asdict(read_preprocessing(name, section)) for name, section in sections.items()},
        versions={"python": "3", "torch": torch.__version__},
    )


def store_study(folder: Path, spec: StudySpec, *, accuracies: tuple[float, ...] = (0.75,)) -> str:
    """Store a study with one completed trial for each accuracy and one pruned trial; return its URL."""
    url = f"sqlite:///{folder}/studies.db"
    storage = open_storage(url, create=True)
    try:
        book = TrialBook(open_study(storage, spec, make_facts(spec)))
        book.prepare()
        for accuracy in accuracies:
            number, n_epochs = _ask(book)
            for epoch in range(1, n_epochs + 1):
                book.report(number, make_epoch(epoch, accuracy))
            book.tell(number, TrialOutcome(state=TrialState.COMPLETE))
        number, _ = _ask(book)
        book.tell(number, TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER))
        book.flush()
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return url


def _ask(book: TrialBook) -> tuple[int, int]:
    """Return the number of the next trial and its epochs."""
    asked = book.ask()
    assert asked is not None
    return asked[0], asked[1].epochs


def make_epoch(epoch: int, accuracy: float) -> EpochResult:
    """Return an epoch that reached an accuracy."""
    values = dict.fromkeys((field.name for field in dataclasses.fields(EpochResult)), 0.5)
    return EpochResult(**values | {"epoch": epoch, "val_accuracy": accuracy, "repeat": 0})  # type: ignore[arg-type]


def store_example(folder: Path, *, accuracies: tuple[float, ...] = (0.75,), **overrides: Any) -> str:
    """Write images and store a study of them; return its URL."""
    write_images(folder / "images")
    return store_study(folder, make_spec(folder, **overrides), accuracies=accuracies)


def read_attrs(url: str, study: str = "sides") -> dict[str, Any]:
    """Return the user attributes of a stored study."""
    with open_stored(study, url) as (stored, _):
        return dict(stored.study.user_attrs)


def set_trial_attr(url: str, name: str, value: Any, *, number: int = 0) -> None:
    """Store a user attribute of a finished trial, which Optuna itself refuses to change."""
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        (trial,) = database.execute("SELECT trial_id FROM trials WHERE number = ?", (number,)).fetchone()
        database.execute("DELETE FROM trial_user_attributes WHERE trial_id = ? AND key = ?", (trial, name))
        row = (trial, name, json.dumps(value))
        database.execute("INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)", row)
    database.close()
