"""The input of a model's head, computed once: all that a trial needs if nothing below its head trains."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.data.augment import augment
from tuner.data.image_set import ImageSet
from tuner.data.views import View, draw_view
from tuner.models.backbone import Preprocessing, find_classifiers
from tuner.models.layers import freeze_layers
from tuner.training.batches import build_normaliser, find_dtype, list_eval_batches, take_batch
from tuner.training.device import MEMORY_FORMAT, autocast
from tuner.training.rounding import agree
from tuner.trial import Precision

Head = nn.Linear | nn.Conv2d

N_TRIED = 8
"""Images on which a backbone's parts are compared with the whole."""


class NotCacheable(Exception):  # noqa: N818 - a property of a backbone, no mistake of anyone
    """Heads of this model cannot be trained on features; the text says why in one line."""


class _HeadReached(Exception):  # noqa: N818 - ends a forward pass
    """The head's input is known."""


def find_linear_head(model: nn.Module) -> Head:
    """Return a model's classifier, if it is one linear layer with a bias, or one 1x1 convolution.

    Raises:
        NotCacheable: If it is not.
    """
    names = find_classifiers(model)
    if len(names) > 1:
        raise NotCacheable(f"it has {len(names)} classifiers ({', '.join(names)})")
    head = model.get_submodule(names[0])
    what = f"its classifier '{names[0]}'"
    if not isinstance(head, nn.Linear | nn.Conv2d):
        raise NotCacheable(f"{what} is a {type(head).__name__}, neither linear nor a convolution")
    if isinstance(head, nn.Conv2d) and not _is_pointwise(head):
        raise NotCacheable(f"{what} is a convolution that is not 1x1")
    if {name for name, _ in head.named_parameters()} != {"weight", "bias"}:
        raise NotCacheable(f"{what} has other parameters than a weight and a bias")
    return head


def _is_pointwise(head: nn.Conv2d) -> bool:
    return (head.kernel_size, head.stride, head.groups) == ((1, 1), (1, 1), 1) and head.padding in {(0, 0), "valid"}


def put_head(model: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Copy a trained head into a model, in place.

    Args:
        model: Has a linear head.
        weight: Shape ``(n_classes, n_features)``.
        bias: Shape ``(n_classes,)``.
    """
    head = find_linear_head(model)
    with torch.no_grad():
        head.weight.copy_(weight.view_as(head.weight))
        head.get_parameter("bias").copy_(bias)


def compute_features(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    precision: Precision,
    view: View | None = None,
    out: Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the input of a model's head for images, and leave the model in eval mode.

    Args:
        model: Has a linear head. Moved to the device.
        images: One at least.
        preprocessing: The backbone's.
        device: Where to compute.
        precision: The study's.
        view: The version of the images to show; None shows them as they are.
        out: Where to put the features, for one a mapped file; None makes room on the device.
        on_progress: Told after each batch how many images are done, of how many.

    Returns:
        ``out``, or float32 (float64 of a double model), shape ``(n_images, n_features)``, in the images' order.

    Raises:
        NotCacheable: If the model has no linear head, or its input is not one vector per image.
    """
    head = find_linear_head(model)
    model.to(device).to(memory_format=MEMORY_FORMAT)
    model.eval()
    dtype = find_dtype(model)
    if out is None:
        out = torch.empty((len(images.labels), head.weight.shape[1]), dtype=dtype, device=device)
    normalise = build_normaliser(preprocessing, device, dtype)
    n_done = 0
    for rows in list_eval_batches(images, device):
        pixels, _ = take_batch(images, rows, device, dtype)
        if view is not None:
            pixels = show_view(view, pixels, images.rows[rows.cpu()])
        out[n_done : n_done + len(rows)] = _compute_batch(model, head, normalise(pixels), device, precision)
        n_done += len(rows)
        if on_progress is not None:
            on_progress(n_done, len(images.labels))
    return out


def sample_features(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    precision: Precision,
    view: View | None = None,
) -> Tensor:
    """Return the features of the first eight images, as ``compute_features`` does."""
    return compute_features(model, take_sample(images), preprocessing, device, precision=precision, view=view)


def take_sample(images: ImageSet, n_images: int = N_TRIED) -> ImageSet:
    """Return the first images."""
    few = slice(n_images)
    return replace(images, pixels=images.pixels[few], labels=images.labels[few], rows=images.rows[few])


def spread_sample(images: ImageSet) -> ImageSet:
    """Return eight images from all over the set: neighbours may look alike, as those of a film do."""
    few = torch.linspace(0, len(images.labels) - 1, min(N_TRIED, len(images.labels))).long()
    at_labels = few.to(images.labels.device)
    places = at_labels if images.positions is None else images.positions[at_labels]
    pixels = images.pixels[places.to(images.pixels.device)]
    return replace(images, pixels=pixels, labels=images.labels[at_labels], rows=images.rows[few], positions=None)


def show_view(view: View, pixels: Tensor, rows: Tensor) -> Tensor:
    """Return images as a view shows them.

    Args:
        view: Which version.
        pixels: In [0, 1], shape ``(n, 3, height, width)``.
        rows: The images' rows in the data index, int64, shape ``(n,)``.
    """
    draws = draw_view(view.seed, rows, view=view.number, strength=view.strength)
    return augment(pixels, draws, strength=view.strength, horizontal_flip=view.horizontal_flip)


def _compute_batch(model: nn.Module, head: Head, inputs: Tensor, device: torch.device, precision: Precision) -> Tensor:
    """Return the head's input for a batch, in the mode the model is in."""
    reached: list[Any] = []

    def stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        reached.extend(arguments[:1])
        raise _HeadReached

    handle = head.register_forward_pre_hook(stop)
    try:
        # Not inference_mode, as in predict_logits.
        with torch.no_grad(), autocast(device, precision):
            model(inputs)
    except _HeadReached:
        pass
    finally:
        handle.remove()
    shape = tuple(reached[0].shape) if reached and isinstance(reached[0], Tensor) else ()
    width = (len(inputs), head.weight.shape[1])
    if shape not in {width, (*width, 1, 1)}:
        raise NotCacheable(f"its classifier takes {shape or 'nothing'} for {len(inputs)} images, not one vector each")
    features: Tensor = reached[0].flatten(1).to(find_dtype(model))
    return features


def verify_head(model: nn.Module, images: ImageSet, preprocessing: Preprocessing, device: torch.device) -> None:
    """Check on a few images that training a head on features is training the model with all but the head frozen.

    In float32, whatever the study's precision: the noise of bfloat16 would hide what is to be found.

    Args:
        model: Moved to the device, frozen below its head, and left in eval mode; its tensors keep their values.
        images: The first eight are tried.
        preprocessing: The backbone's.
        device: Where to compute.

    Raises:
        NotCacheable: If the head's weight and bias are not exactly what trains; if the logits are not those of the
            head on its features, in eval and in train mode; if something below the head is random or batch-dependent
            in train mode; or if an image's features depend on its batch.
    """
    head = find_linear_head(model)
    model.to(device).to(memory_format=MEMORY_FORMAT)
    freeze_layers(model, 1)
    _check_trained(model, head)
    normalise = build_normaliser(preprocessing, device, find_dtype(model))
    rows = torch.arange(min(N_TRIED, len(images.labels)), device=images.labels.device)
    inputs = normalise(take_batch(images, rows, device, find_dtype(model))[0])
    with keeping_buffers(model):
        model.eval()
        features = _compute_batch(model, head, inputs, device, "float32")
        parts = [_compute_batch(model, head, part, device, "float32") for part in torch.split(inputs, 3)]
        reason = "an image's features depend on the batch it is in"
        _check_same(torch.cat(parts), features, device, reason)
        for mode in ("eval", "train"):
            model.train(mode == "train")
            _check_mode(model, head, inputs, features)
    model.eval()


def _check_trained(model: nn.Module, head: Head) -> None:
    """Check that the head's two parameters train, nowhere else in the model, and nothing besides."""
    owners = [
        module
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
    if owners != [head, head]:
        raise NotCacheable("its classifier's weight or bias is fixed, or shared with another layer")


def _check_mode(model: nn.Module, head: Head, inputs: Tensor, features: Tensor) -> None:
    """Check that in the mode that the model is in, features and logits are those of eval mode's features."""
    mode = "train" if model.training else "eval"
    _check_dropout(model)
    device = inputs.device
    reason = f"its classifier's input in {mode} mode is not that of eval mode; something before it trains"
    _check_same(_compute_batch(model, head, inputs, device, "float32"), features, device, reason)
    with torch.no_grad():
        logits = model(inputs)
        expected = functional.linear(features, head.weight.flatten(1), head.bias)
    reason = f"its logits in {mode} mode are not those of its classifier alone"
    _check_same(logits, expected, device, reason)


def _check_dropout(model: nn.Module) -> None:
    """Refuse a dropout that trains: at a small rate a few images may not show it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:  # noqa: SLF001
            raise NotCacheable(f"its own dropout '{name}' of {module.p:g} lies before its classifier")


def _check_same(found: object, expected: Tensor, device: torch.device, reason: str) -> None:
    if not isinstance(found, Tensor) or not agree(found, expected, device, "float32"):
        raise NotCacheable(reason)


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers back as they were: a BatchNorm that is not frozen moves its statistics in train mode."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def hash_body(model: nn.Module) -> str:
    """Return the SHA-256 of everything below a model's head: names, shapes, types and values, buffers included."""
    heads = tuple(f"{name}." for name in find_classifiers(model))
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith(heads):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
