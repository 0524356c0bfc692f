"""Hand a trained model to another program: one folder per format, with its preprocessing beside the model."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from tuner.errors import ExportError
from tuner.production.graphs import INPUT_NAME, OUTPUT_NAME, trace_model, write_onnx, write_program
from tuner.production.hugging_face import write_hub_config
from tuner.production.machine import find_own_code
from tuner.production.timm_recipe import express_recipe, write_args
from tuner.spec.own_code import SMALL_CNN
from tuner.training.batches import find_dtype
from tuner.training.package import WEIGHTS_NAME, Manifest, read_manifest, read_package, replacing_folder, write_weights

PREPROCESSING_NAME = "preprocessing.json"
ARGS_NAME = "args.yaml"
CLASS_MAP_NAME = "class_map.txt"
CONFIG_NAME = "config.json"
ONNX_NAME = "model.onnx"
PROGRAM_NAME = "model.pt2"
_OWN_NAMES = {PREPROCESSING_NAME, ARGS_NAME, CLASS_MAP_NAME, CONFIG_NAME, ONNX_NAME, PROGRAM_NAME, WEIGHTS_NAME}
"""All that an exported folder may hold."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_RESIZES = {"squash": "to size x size px, whatever the shape", "crop": "the shorter side to size px, then the centre"}
_MARK = "written_by"
_WRITER = "tuner export"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder that another program can use."""

    folder: Path
    files: tuple[str, ...]
    """Names in the folder, sorted."""
    loaded_by: str
    """Python that loads the model."""
    notes: tuple[str, ...]
    """What the other program does otherwise than this one, a line each."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is exported."""

    model: nn.Module
    manifest: Manifest
    preprocessing: dict[str, Any]
    """What ``preprocessing.json`` holds."""


def export_model(folder: str | Path, out: str | Path, *, form: str, allow_code: bool = False) -> Exported:
    """Write the model of a model folder for another program.

    Args:
        folder: What ``tuner train`` wrote, or a study kept.
        out: The folder to write; an older exported folder is replaced.
        form: ``timm``, ``hf`` (timm's and transformers' folder), ``onnx`` or ``torch`` (torch.export).
        allow_code: Whether a backbone that is a user's function may be imported and called.

    Raises:
        ExportError: If there is no model folder, its model has no such form, ``out`` holds anything else or cannot be
            written, or a package is missing.
        ModelError: If the model folder is broken, or would run code that was not allowed.
        ValueError: If there is no such form.
    """
    if form not in _WRITERS:
        raise ValueError(f"form: must be one of {', '.join(_WRITERS)}, got {form!r}")
    source, target = Path(folder), Path(out).resolve()
    _check_form(read_manifest(source), form)
    _check_replaceable(target)
    given = _read_source(source, form, allow_code=allow_code)
    try:
        with replacing_folder(target) as temporary:
            notes = _WRITERS[form](temporary, given)
            text = json.dumps(given.preprocessing, indent=1)
            (temporary / PREPROCESSING_NAME).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{target}: must be a folder that can be written, got: {error.strerror or error}") from error
    files = tuple(sorted(path.name for path in target.iterdir()))
    return Exported(folder=target, files=files, loaded_by=_say_how_to_load(target, form, given.manifest), notes=notes)


def _read_source(folder: Path, form: str, *, allow_code: bool) -> _Source:
    if allow_code:
        find_own_code()
    model, manifest = read_package(folder, allow_code=allow_code)
    return _Source(model=model, manifest=manifest, preprocessing=_describe_preprocessing(model, manifest, form))


def _check_form(manifest: Manifest, form: str) -> None:
    """Refuse what cannot be written in this form here, before any weights are read."""
    name = manifest.backbone
    if form in {"timm", "hf"} and (manifest.needs_code or name == SMALL_CNN):
        raise ExportError(
            f"--format {form}: must be given a backbone of timm, got {name!r}; --format onnx or torch takes any"
        )
    missing = [package for package in _ONNX_PACKAGES if form == "onnx" and find_spec(package) is None]
    if missing:
        raise ExportError(f"--format onnx: must have {', '.join(missing)}, got none; pip install 'tuner[export]'")


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what is no exported folder, or holds anything that is not ours: it would be deleted.

    Raises:
        ExportError: If it must not be replaced.
    """
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise ExportError(f"{folder}: must be a folder that can be written, got: {error.strerror}") from error
    foreign = [name for name in names if name not in _OWN_NAMES]
    if foreign or (names and not _is_marked(folder / PREPROCESSING_NAME)):
        shown = ", ".join((foreign or names)[:3])
        raise ExportError(f"{folder}: must be new, empty or an older exported folder, got a folder with {shown}")


def _is_marked(path: Path) -> bool:
    """Whether a file says that an export wrote it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get(_MARK) == _WRITER


def _describe_preprocessing(model: nn.Module, manifest: Manifest, form: str) -> dict[str, Any]:
    """Return what another program must know to feed the model and to read its answer, as JSON."""
    side, n_classes = manifest.image_size, len(manifest.classes)
    dtype = str(find_dtype(model)).removeprefix("torch.")
    return {
        _MARK: _WRITER,
        "form": form,
        "backbone": manifest.backbone,
        "image": {
            "mode": "RGB",
            "size": side,
            "resize": manifest.resize,
            "resize_means": _RESIZES[manifest.resize],
            **asdict(manifest.preprocessing),
            "value": "(pixel / 255 - mean) / std, per channel; the caller computes it",
        },
        "input": {"name": INPUT_NAME, "dtype": dtype, "shape": ["batch", 3, side, side]},
        "output": {
            "name": OUTPUT_NAME,
            "dtype": dtype,
            "shape": ["batch", n_classes],
            "value": "logits",
            "temperature": manifest.temperature,
            "probabilities": "softmax(logits / temperature)",
        },
        "classes": list(manifest.classes),
    }


def _write_timm(folder: Path, source: _Source) -> tuple[str, ...]:
    recipe = express_recipe(source.manifest, source.model)
    write_weights(folder / WEIGHTS_NAME, source.model)
    write_args(folder / ARGS_NAME, recipe)
    # In the order of the outputs: timm would sort the class folders its own way, 2 before 10.
    (folder / CLASS_MAP_NAME).write_text("\n".join(source.manifest.classes) + "\n", encoding="utf-8")
    return tuple(f"timm's train.py cannot express {note}" for note in recipe.notes)


def _write_hf(folder: Path, source: _Source) -> tuple[str, ...]:
    write_weights(folder / WEIGHTS_NAME, source.model)
    return write_hub_config(folder / CONFIG_NAME, source.model, source.manifest)


def _write_onnx(folder: Path, source: _Source) -> tuple[str, ...]:
    program = trace_model(source.model, source.manifest.backbone, image_size=source.manifest.image_size)
    write_onnx(folder / ONNX_NAME, program, source.model, json.dumps(source.preprocessing))
    return _note_precision(source.manifest)


def _write_torch(folder: Path, source: _Source) -> tuple[str, ...]:
    program = trace_model(source.model, source.manifest.backbone, image_size=source.manifest.image_size)
    write_program(folder / PROGRAM_NAME, program, {PREPROCESSING_NAME: json.dumps(source.preprocessing)})
    return _note_precision(source.manifest)


def _note_precision(manifest: Manifest) -> tuple[str, ...]:
    where = {"bfloat16": "", "auto": " on CUDA"}.get(manifest.params.precision)
    if where is None or (where and manifest.provenance.get("computed_in") != "bfloat16"):
        return ()
    return (f"the graph computes in float32, 'tuner predict'{where} in bfloat16: probabilities differ by its rounding",)


_WRITERS: dict[str, Callable[[Path, _Source], tuple[str, ...]]] = {
    "timm": _write_timm,
    "hf": _write_hf,
    "onnx": _write_onnx,
    "torch": _write_torch,
}


def _say_how_to_load(folder: Path, form: str, manifest: Manifest) -> str:
    if form == "timm":
        path = str(folder / WEIGHTS_NAME)
        n_classes = len(manifest.classes)
        return f"timm.create_model({manifest.backbone!r}, num_classes={n_classes}, checkpoint_path={path!r})"
    if form == "hf":
        return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"
    if form == "onnx":
        return f"onnxruntime.InferenceSession({str(folder / ONNX_NAME)!r})"
    return f"torch.export.load({str(folder / PROGRAM_NAME)!r}).module()"
