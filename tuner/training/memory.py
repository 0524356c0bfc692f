"""The memory of a training step: measured at two batch sizes, predicted at every other, and kept below a limit."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tuner.data.image_set import ImageSet
from tuner.models.layers import freeze_layers
from tuner.training.batches import list_eval_batches
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.memory_meter import Growth, TensorCount, count_bytes, list_tensors
from tuner.training.prefix_maps import CachedPrefix

_PROBE_SIZES = {"cpu": (2, 4), "cuda": (8, 16)}
"""Images of the two probes by the kind of device: kernels of a GPU are others for very small batches."""
_N_VAL = 64
"""Images of which a probe validates as many as validation takes at once."""
_PROBE_LR = 1e-9


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """Bytes that grow with the images of a batch."""

    fixed_bytes: int
    bytes_per_image: int

    def predict(self, n_images: int) -> int:
        """Return the bytes with some images at a time."""
        return self.fixed_bytes + self.bytes_per_image * n_images


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What training a model takes at its highest, the model itself and its validation included."""

    lines: tuple[MemoryLine, ...]
    """Of the moments of a step that may be its highest: with few images often its end, with many the end of its forward
    pass. The highest line holds."""
    gradient_bytes: int
    """What adding up gradients takes at most besides: in a whole batch's step they are not there when it peaks."""
    scratch_bytes: int
    """What kernels and allocators take besides tensors, as seen in the larger probe."""

    def predict(self, n_images: int, *, adds_up: bool = False) -> int:
        """Return the bytes with some images at a time, whose gradients are added up or are a whole batch's."""
        highest = max(line.predict(n_images) for line in self.lines)
        return highest + self.scratch_bytes + (self.gradient_bytes if adds_up else 0)

    def raised(self, n_images: int, n_bytes: int, *, adds_up: bool = False) -> Self:
        """Return the need that is known after some images at a time took more than was predicted.

        Args:
            n_images: How many.
            n_bytes: What they took at least.
            adds_up: As for ``predict``.
        """
        lacking = n_bytes - self.predict(n_images, adds_up=adds_up)
        if lacking <= 0:
            return self
        old = max(self.lines, key=lambda line: line.predict(n_images))
        steeper = replace(old, bytes_per_image=old.bytes_per_image + -(-lacking // n_images))
        return replace(self, lines=(*self.lines, steeper))

    def to_json(self) -> dict[str, Any]:
        """Return the need as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: If it is something else.
        """
        lines = tuple(
            MemoryLine(fixed_bytes=int(line["fixed_bytes"]), bytes_per_image=int(line["bytes_per_image"]))
            for line in values["lines"]
        )
        if not lines:
            raise ValueError("lines: must hold one at least")
        return cls(
            lines=lines, gradient_bytes=int(values["gradient_bytes"]), scratch_bytes=int(values["scratch_bytes"])
        )


def plan_micro_batch(need: MemoryNeed, batch_size: int, limit: float, *, may_split: bool) -> int | None:
    """Return how many images of a batch to take at a time.

    Args:
        need: Of the trial.
        batch_size: Its recipe's.
        limit: Bytes that it may take.
        may_split: Whether a batch in parts gives the same step.

    Returns:
        The batch size if all fit at once; else the size of as few parts as fit, as even as they can be; None if not
        even one image fits, or the batch must not be split.
    """
    if need.predict(batch_size) <= limit:
        return batch_size
    if not may_split or need.predict(1, adds_up=True) > limit:
        return None
    fits, too_large = 1, batch_size
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        fits, too_large = (middle, too_large) if need.predict(middle, adds_up=True) <= limit else (fits, middle)
    n_parts = -(-batch_size // fits)
    return -(-batch_size // n_parts)


def depends_on_batch(model: nn.Module, unfrozen_layers: int) -> bool:
    """Whether an image's gradients depend on the others of its batch, so that a batch in parts is another recipe.

    So it is with BatchNorm and its like among the layers that train: what keeps running statistics, or is one of
    torch's norms over batches. A user's own layer that mixes images in another way is not recognised.

    Args:
        model: Made for a trial; what is frozen in it is frozen anew.
        unfrozen_layers: Layer groups that train.
    """
    freeze_layers(model, unfrozen_layers)
    was_training = model.training
    model.train()
    depends = any(module.training and _mixes_images(module) for module in model.modules())
    model.train(was_training)
    return depends


def _mixes_images(module: nn.Module) -> bool:
    keeps_statistics = any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))
    return isinstance(module, _NormBase) or keeps_statistics


def measure_need(job: TrainingJob, sizes: tuple[int, int] | None = None) -> MemoryNeed:
    """Measure what training a job takes, by training copies of it for two steps at each of two batch sizes.

    These are steps of the training loop itself, the second with the optimizer's state, and a validation. After each
    operation the tensors are counted; that of one operation grows in a line with the batch, so the step's peak is the
    highest of these lines. Kernels' own memory is what the device saw beyond that in the second probe; the first has
    loaded what is loaded once.

    Args:
        job: Not changed. The seeds of global generators are, as by any training.
        sizes: Of the probes' batches, the smaller first; default: what suits the device.

    Raises:
        Diverged: If its loss is not finite from the first.
    """
    sizes = sizes or _choose_sizes(job)
    counts = []
    for size in sizes:
        probe = _shrink(job, size)
        # A trial on maps has its model on the device already; another's comes there while it is counted.
        held = [tensor for tensor in list_tensors(probe.model) if tensor.device.type == job.device.type]
        growth = Growth(job.device)
        with TensorCount(job.device, held) as count:
            for _ in train_epochs(probe):
                pass
        grown = growth.read()
        counts.append(count)
        n_held = count_bytes(probe.model) if held else 0
        gradient_bytes = sum(each.nbytes for each in probe.model.parameters() if each.requires_grad)
        del probe, held
    return MemoryNeed(
        lines=find_lines([count.trace for count in counts], sizes),
        gradient_bytes=gradient_bytes,
        scratch_bytes=0 if grown is None else max(0, grown + n_held - counts[-1].peak),
    )


def _choose_sizes(job: TrainingJob) -> tuple[int, int]:
    """Return two numbers of images that suit the device, and that a batch of the trial is not much smaller than."""
    small, large = _PROBE_SIZES[job.device.type]
    large = min(large, max(2, job.params.batch_size))
    return min(small, large // 2), large


def _shrink(job: TrainingJob, batch_size: int) -> TrainingJob:
    """Return a job of two steps and a small validation with all that takes memory, on a copy of the model."""
    params = replace(
        job.params, batch_size=batch_size, epochs=1, lr=_PROBE_LR, augmentation_strength=1.0, views="fresh"
    )
    shown = job.val or job.train
    n_val = len(list_eval_batches(_repeat_images(shown, _N_VAL), job.device)[0])
    return replace(
        job,
        model=copy.deepcopy(job.model),
        params=params,
        train=_repeat_images(job.train, 2 * batch_size),
        val=_repeat_images(shown, n_val),
        cached=_shrink_maps(job.cached, 2 * batch_size, n_val),
        micro_batch=None,
        compiler=None,
        graphs=None,
    )


def _shrink_maps(cached: CachedPrefix | None, n_train: int, n_val: int) -> CachedPrefix | None:
    """Return maps of as many images as a probe needs; whose they are does not matter."""
    if cached is None:
        return None
    rows = torch.arange(max(n_train, n_val), device=cached.val.device) % len(cached.val)
    maps = cached.val[rows]
    return replace(cached, train=lambda _: maps[:n_train], val=maps[:n_val], later_bytes=0)


def _repeat_images(images: ImageSet, n_images: int) -> ImageSet:
    """Return as many images as asked for, the first ones, again and again if there are fewer."""
    rows = torch.arange(n_images, device=images.labels.device) % len(images.labels)
    places = rows if images.positions is None else images.positions[rows]
    return ImageSet(
        pixels=images.pixels[places.to(images.pixels.device)],
        labels=images.labels[rows],
        n_classes=images.n_classes,
        rows=images.rows[rows.to(images.rows.device)],
    )


def find_lines(traces: Sequence[Sequence[int]], sizes: tuple[int, int]) -> tuple[MemoryLine, ...]:
    """Return the lines of which the highest is a step's peak, from what two probes held after each operation.

    Args:
        traces: Bytes of the smaller batch and of the larger one.
        sizes: Of the two batches.
    """
    small, large = traces
    if len(small) != len(large):  # a model that works otherwise with other batches: its peaks alone compare
        small, large = [max(small)], [max(large)]
    lines = {_draw_line(pair, sizes) for pair in zip(small, large, strict=True)}
    highest = max(lines, key=lambda line: (line.predict(1), line.bytes_per_image))
    kept = [highest]
    while steeper := [line for line in lines if line.bytes_per_image > highest.bytes_per_image]:
        highest = min(steeper, key=lambda line: (_find_crossing(kept[-1], line), -line.bytes_per_image))
        kept.append(highest)
    return tuple(kept)


def _draw_line(pair: tuple[int, int], sizes: tuple[int, int]) -> MemoryLine:
    """Return the line through two points; one that falls is flat: more images never take less."""
    slope = max(0, -(-(pair[1] - pair[0]) // (sizes[1] - sizes[0])))
    return MemoryLine(fixed_bytes=max(pair[0] - slope * sizes[0], pair[1] - slope * sizes[1]), bytes_per_image=slope)


def _find_crossing(line: MemoryLine, steeper: MemoryLine) -> float:
    return (line.fixed_bytes - steeper.fixed_bytes) / (steeper.bytes_per_image - line.bytes_per_image)
