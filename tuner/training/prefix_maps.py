"""What a frozen prefix makes of images, computed once: all that a trial needs of them if only its suffix trains."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuner.data.image_set import ImageSet
from tuner.data.views import View
from tuner.models.backbone import Preprocessing
from tuner.models.partition import Bridge, Partition
from tuner.training.batches import build_normaliser, find_dtype, gather_rows, list_eval_batches, take_batch
from tuner.training.device import autocast, computes_in_bfloat16, seed_everything
from tuner.training.head_features import N_TRIED, NotCacheable, keeping_buffers, show_view, spread_sample
from tuner.training.rounding import agree
from tuner.trial import Precision

_N_APART = 3
"""Images of a batch that shows whether an image's maps depend on the others."""


@dataclass(frozen=True, kw_only=True)
class CachedPrefix:
    """What stands for a trial's images where its frozen prefix has seen them."""

    partition: Partition
    train: Callable[[int], Tensor | None]
    """Packed maps of the training images as an epoch, from 1, shows them: shape ``(n_images, width)``, on the device or
    on the host. May compute them. None: they cannot be kept, and the epoch's batches go through the prefix."""
    val: Tensor
    """Of the validation images, as above."""
    later_bytes: int = 0
    """Of maps that later epochs will open."""


def find_map_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Return the type that maps are kept in: that in which most of them are computed."""
    return torch.bfloat16 if computes_in_bfloat16(device, precision) else torch.float32


def compute_maps(
    model: nn.Module,
    partition: Partition,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    precision: Precision,
    view: View | None = None,
    out: Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return what a model's prefix makes of images. The model stays in the mode that it is in.

    Args:
        model: Frozen by ``freeze_layers``, on the device.
        partition: Of this model.
        images: One at least.
        preprocessing: The backbone's.
        device: Where to compute.
        precision: In what.
        view: The version of the images to show; None shows them as they are.
        out: Where to put the maps, for one a mapped file; None makes room on the device.
        on_progress: Told after each batch how many images are done, of how many.

    Returns:
        ``out``, or the model's type, shape ``(n_images, width)``, in the images' order.
    """
    dtype = find_dtype(model)
    if out is None:
        out = torch.empty((len(images.labels), partition.width), dtype=dtype, device=device)
    prefix, normalise = partition.bind_prefix(model), build_normaliser(preprocessing, device, dtype)
    n_done = 0
    for rows in list_eval_batches(images, device):
        pixels, _ = take_batch(images, rows, device, dtype)
        if view is not None:
            pixels = show_view(view, pixels, images.rows[rows.cpu()])
        with torch.no_grad(), autocast(device, precision):
            out[n_done : n_done + len(rows)] = prefix(normalise(pixels))
        n_done += len(rows)
        if on_progress is not None:
            on_progress(n_done, len(images.labels))
    return out


def continue_maps(
    model: nn.Module,
    bridge: Bridge,
    earlier: Tensor,
    images: ImageSet,
    device: torch.device,
    *,
    precision: Precision,
    out: Tensor,
    on_progress: Callable[[int, int], None],
) -> None:
    """Fill ``out`` with what a model's prefix makes of images, from what its part below an earlier cut made of them.

    Args:
        model: Frozen at the later cut or an earlier one, on the device.
        bridge: Of models that are built like this one.
        earlier: The earlier cut's packed maps of all images, on the device or on the host.
        images: In the order of the maps; their pixels are not looked at.
        device: Where to compute.
        precision: In what.
        out: Shape ``(n_images, width)``, for one a mapped file.
        on_progress: As for ``compute_maps``.
    """
    carry_on, n_done = bridge.bind(model), 0
    for rows in list_eval_batches(images, device):
        maps = gather_rows(earlier, rows.to(earlier.device), device)
        with torch.no_grad(), autocast(device, precision):
            out[n_done : n_done + len(rows)] = carry_on(maps)
        n_done += len(rows)
        on_progress(n_done, len(images.labels))


def show_few(images: ImageSet, preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the first images, eight at most, as a model in a type takes them, on the device."""
    rows = torch.arange(min(N_TRIED, len(images.labels)), device=images.labels.device)
    return build_normaliser(preprocessing, device, dtype)(take_batch(images, rows, device, dtype)[0])


def check_rounded(
    model: nn.Module,
    partition: Partition,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    view: View | None,
) -> None:
    """Compare the maps of a few images as they are computed and kept in bfloat16 with those in float32.

    Raises:
        NotCacheable: If they differ by more than that type's rounding.
    """
    few = spread_sample(images)
    exact = compute_maps(model, partition, few, preprocessing, device, precision="float32", view=view)
    rounded = compute_maps(model, partition, few, preprocessing, device, precision="bfloat16", view=view)
    if not agree(rounded.to(torch.bfloat16), exact, device, "bfloat16"):
        raise NotCacheable("what its frozen part computes is not kept well enough in bfloat16")


def verify_partition(
    model: nn.Module, partition: Partition, images: ImageSet, preprocessing: Preprocessing, device: torch.device
) -> None:
    """Check on a few images that training the suffix on maps is training the whole model.

    Args:
        model: Frozen by ``freeze_layers``, on the device; its tensors and its mode are put back, gradients are None.
        partition: Of this model.
        images: The first eight are tried.
        preprocessing: The backbone's.
        device: Where to compute.

    Raises:
        NotCacheable: If logits, gradients or draws of random numbers are not those of the whole model, in eval and in
            train mode, or if an image's maps depend on its batch.
    """
    inputs = show_few(images, preprocessing, device, find_dtype(model))
    prefix, suffix = partition.bind_prefix(model), partition.bind_suffix(model)
    was_training = model.training
    with torch.no_grad(), keeping_buffers(model):
        maps = prefix(inputs)
        parts = torch.cat([prefix(part) for part in torch.split(inputs, _N_APART)])
    if not agree(parts, maps, device, "float32"):
        raise NotCacheable("what its frozen part makes of an image depends on the batch it is in")
    try:
        for mode in ("eval", "train"):
            model.train(mode == "train")
            whole = _try_step(model, inputs, model, device)
            apart = _try_step(suffix, maps, model, device)
            _compare(apart, whole, device, mode)
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What one forward and backward pass showed."""

    logits: Tensor
    gradients: Tensor
    """All of them, one after the other."""
    drawn: tuple[Any, ...]
    """States of all generators afterwards that a backbone may draw from."""


def _try_step(forward: Callable[[Tensor], Tensor], inputs: Tensor, model: nn.Module, device: torch.device) -> _Step:
    """Run one step of a model, in its own type, and leave its tensors as they were."""
    seed_everything(0)
    model.zero_grad(set_to_none=True)
    with keeping_buffers(model):
        logits = forward(inputs.clone())  # activations may write into it
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
    gradients = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
    return _Step(logits=logits.detach(), gradients=torch.cat(gradients), drawn=_list_generators(device))


def _list_generators(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state that a user's backbone may draw from
    states = tuple(state.cpu().numpy().tobytes() for state in (torch.get_rng_state(), on_device))
    return *states, random.getstate(), name, np.asarray(keys).tobytes(), *rest


def _compare(apart: _Step, whole: _Step, device: torch.device, mode: str) -> None:
    if apart.drawn != whole.drawn:
        raise NotCacheable(f"its frozen part draws random numbers in {mode} mode")
    if not agree(apart.logits, whole.logits, device, "float32"):
        raise NotCacheable(f"its logits in {mode} mode are not those of its two parts")
    if not agree(apart.gradients, whole.gradients, device, "float32"):
        raise NotCacheable(f"its gradients in {mode} mode are not those of its trained part alone")


def hash_prefix(model: nn.Module, partition: Partition) -> str:
    """Return the SHA-256 of a model's prefix: its code, and the names, shapes, types and values of its tensors."""
    digest = hashlib.sha256(partition.code_hash.encode())
    for name, tensor in partition.list_prefix_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
