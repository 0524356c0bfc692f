"""A model as a graph that needs none of its code: torch.export's program, and ONNX."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tuner.errors import ExportError
from tuner.models.backbone import first_line
from tuner.training.batches import find_dtype

INPUT_NAME = "pixel_values"
OUTPUT_NAME = "logits"
"""As transformers names them."""
MAX_ONNX_BYTES = 1_900_000_000
"""One ONNX file is one protobuf message, which ends at 2 GB."""
_TOLERANCE = 1e-4
"""Of a logit, or of the largest logit where that is more than 1."""


def trace_model(model: nn.Module, name: str, *, image_size: int) -> ExportedProgram:
    """Trace a model for any number of images.

    Args:
        model: On the CPU in eval mode; takes ``(n, 3, image_size, image_size)``.
        name: The backbone's, for errors.
        image_size: Height and width, in px.

    Raises:
        ExportError: If torch.export cannot trace it, or the program says otherwise than the model.
    """
    images = _draw_images(model, image_size, n_images=2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        what = f"'{name}' must be a model that torch.export can trace for any number of images"
        raise ExportError(f"export: {what}, got {first_line(error)}") from error
    _check_same(program.module(), model, image_size, f"torch.export's program of '{name}'")
    return program


def write_program(path: Path, program: ExportedProgram, files: dict[str, str]) -> None:
    """Write a program, with further files by name inside, as torch.export.load reads it."""
    torch.export.save(program, path, extra_files=files)


def write_onnx(path: Path, program: ExportedProgram, model: nn.Module, metadata: str) -> None:
    """Write a program as ONNX, and run it in onnxruntime once.

    Args:
        path: The file.
        program: Of ``trace_model``.
        model: What was traced.
        metadata: Goes into the file's ``metadata_props`` as ``preprocessing``.

    Raises:
        ExportError: If it is too large for one file, there is no such ONNX graph, or it says otherwise than the model.
    """
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if n_bytes > MAX_ONNX_BYTES:
        limit = f"must have at most {MAX_ONNX_BYTES / 1e9:.1f} GB of weights"
        raise ExportError(f"--format onnx: {limit}, got {n_bytes / 1e9:.1f} GB; --format torch takes more")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: "batch"},),
            )
    except Exception as error:
        raise ExportError(f"--format onnx: must be a model with an ONNX form, got {first_line(error)}") from error
    if found is None:
        raise ExportError("--format onnx: must be a model with an ONNX form, got none")
    found.model.metadata_props["preprocessing"] = metadata
    found.save(path)
    _check_same(_open_session(path), model, program.example_inputs[0][0].shape[-1], "the ONNX graph")


def _open_session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT_NAME: images.numpy()})[0])


def _check_same(run: Callable[[Tensor], Tensor], model: nn.Module, image_size: int, what: str) -> None:
    """Compare with the model, on another number of images than was traced."""
    images = _draw_images(model, image_size, n_images=3)
    with torch.no_grad():
        wanted, found = model(images), run(images)
    largest = max(1.0, float(wanted.abs().max()))
    difference = float((wanted - found).abs().max()) / largest
    if not difference <= _TOLERANCE:
        raise ExportError(f"export: {what} must give the model's logits to {_TOLERANCE}, got {difference:.2g} off")


def _draw_images(model: nn.Module, image_size: int, *, n_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((n_images, 3, image_size, image_size), generator=generator, dtype=find_dtype(model))
