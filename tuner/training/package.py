"""The model folder: ``model.safetensors`` and ``model.json``, all that predicting needs. Nothing in it is pickled."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tuner.errors import ExportError, ModelError
from tuner.models.backbone import Preprocessing, create_backbone
from tuner.models.weights import apply_state
from tuner.spec.own_code import check_code, is_users_code
from tuner.spec.sections import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, BackboneSection
from tuner.trial import TrialParams

WEIGHTS_NAME = "model.safetensors"
MANIFEST_NAME = "model.json"
_OWN_NAMES = {
    WEIGHTS_NAME,
    MANIFEST_NAME,
    "metrics.json",
    "params.toml",
    "confusion_matrix.png",
    "scores.png",
    "calibration.png",
    "model_card.md",
    "model_card.json",
}
"""All that a model folder may hold."""
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a model folder says about its model: how to make it again, and where it came from."""

    backbone: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Of the backbone, as in its ``[backbones]`` section."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    """In the order of the model's outputs."""
    image_size: int
    resize: str
    params: TrialParams
    temperature: float = 1.0
    """Divides the logits, so that probabilities are calibrated; > 0."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Study, trial, value, versions and what else a person may ask; plain JSON."""

    @property
    def needs_code(self) -> bool:
        """Whether the backbone is a user's function, so that loading the model runs code from outside the folder."""
        return is_users_code(self.backbone)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as a JSON object."""
        section = {"kwargs": self.kwargs, **asdict(self.preprocessing)}
        values = {name: value for name, value in asdict(self).items() if name not in {"kwargs", "preprocessing"}}
        values["params"] = self.params.to_json()
        return {"format": _FORMAT, **values, "backbone_section": section}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: If it is something else; ``read_package`` says so in a user's words.
        """
        if values["format"] != _FORMAT:
            raise ValueError(f"format must be {_FORMAT}, got {values['format']!r}")
        section = BackboneSection.model_validate(values["backbone_section"])
        if section.mean is None or section.std is None or section.interpolation is None:
            raise ValueError("backbone_section must hold mean, std and interpolation")
        image_size = int(values["image_size"])
        if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must lie in [{MIN_IMAGE_SIZE}, {MAX_IMAGE_SIZE}], got {image_size}")
        temperature = float(values.get("temperature", 1.0))
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be greater than 0, got {temperature}")
        return cls(
            backbone=str(values["backbone"]),
            kwargs=section.kwargs,
            preprocessing=Preprocessing(mean=section.mean, std=section.std, interpolation=section.interpolation),
            classes=tuple(map(str, values["classes"])),
            image_size=image_size,
            resize=str(values["resize"]),
            params=TrialParams.from_json(values["params"]),
            temperature=temperature,
            provenance=dict(values["provenance"]),
        )


def write_package(
    folder: Path, model: nn.Module, manifest: Manifest, add_files: Callable[[Path], None] | None = None
) -> None:
    """Write a model folder. No reader sees half of one, and a failure leaves the folder that was there.

    Args:
        folder: Where; an older model folder or an empty folder in its place is replaced.
        model: As ``create_backbone`` made it for the manifest, trained.
        manifest: Describes it.
        add_files: Writes what else belongs into the folder (metrics, pictures) into the path it is given.

    Raises:
        ExportError: If the place holds something else or cannot be written.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    try:
        with replacing_folder(folder) as temporary:
            write_weights(temporary / WEIGHTS_NAME, model)
            text = json.dumps(manifest.to_json(), indent=1)
            (temporary / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
            if add_files is not None:
                add_files(temporary)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{folder}: must be a folder that can be written, got: {reason}") from error


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a model's weights as safetensors, marked as torch's: transformers reads no others.

    Raises:
        OSError: If the file cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors wraps the system's errors in its own
        raise OSError(str(error)) from error


def read_package(folder: Path, *, allow_code: bool = False) -> tuple[nn.Module, Manifest]:
    """Read a model folder.

    Args:
        folder: What ``write_package`` wrote.
        allow_code: Whether a backbone that is a user's function may be imported and called.

    Returns:
        The model on the CPU in eval mode, and its manifest.

    Raises:
        ExportError: If there is no model folder.
        ModelError: If it is broken, or would run code that was not allowed.
    """
    manifest = read_manifest(folder)
    check_code(manifest.backbone, allow_code=allow_code, where=str(folder), kind="folder")
    path = folder / WEIGHTS_NAME
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: must be a file, got nothing; write the model folder again") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: must hold whole safetensors, got: {error}; write the model folder again") from error
    section = BackboneSection(weights="random", kwargs=manifest.kwargs)
    model = create_backbone(manifest.backbone, section, n_classes=len(manifest.classes), image_size=manifest.image_size)
    apply_state(model, state, source=str(path), keep_head=True)
    return model.eval(), manifest


def read_manifest(folder: Path) -> Manifest:
    """Read what a model folder says about its model, without the weights.

    Raises:
        ExportError: If there is no model folder.
        ModelError: If its manifest is broken.
    """
    path = folder / MANIFEST_NAME
    if not os.path.isfile(path):  # noqa: PTH113  # Path.is_file raises in folders that are closed
        raise ExportError(
            f"{folder}: must be a model folder with a {MANIFEST_NAME}, got none; 'tuner train' writes one"
        )
    try:
        return Manifest.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path}: must be a manifest that 'tuner train' wrote, got {type(error).__name__}: {reason}"
        ) from error


def check_replaceable(folder: Path) -> None:
    """Refuse to replace what is no model folder, or holds anything that is not ours: it would be deleted.

    Raises:
        ExportError: If it must not be replaced.
    """
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ExportError(f"{folder}: must be a folder that can be written, got: {error.strerror}") from error
    if foreign := [name for name in names if name not in _OWN_NAMES]:
        shown = ", ".join(foreign[:3])
        raise ExportError(f"{folder}: must be new, empty or an older model folder, got a folder with {shown}")
    if names:
        read_manifest(folder)
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder}: must be new, empty or an older model folder, got a file")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``; on success it is flushed to disk and takes its place."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        _swap_in(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(temporary: Path, folder: Path) -> None:
    """Give the new folder its name. A full folder cannot be replaced in one step, so an older one steps aside first."""
    older = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if not folder.exists():
        temporary.rename(folder)
        return
    folder.rename(older)
    try:
        temporary.rename(folder)
    except OSError:
        older.rename(folder)
        raise
    shutil.rmtree(older)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
