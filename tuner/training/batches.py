"""Batches: which images, in which order, and how their pixels become a backbone's input."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.data.image_set import ImageSet
from tuner.models.backbone import Preprocessing
from tuner.training.device import MEMORY_FORMAT, autocast, send_ahead
from tuner.trial import Precision

_CPU_EVAL_BATCH = 16
"""Images at a time without gradients: two MobileNets at 128 px took 1.4 times as long with 64, 1.7 times with 256."""
_MIN_CUDA_EVAL_BATCH = 64  # without gradients a larger batch than the trial's costs little memory


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which images a batch holds, or a part of one, in their order: int64, shape ``(n,)``."""

    here: Tensor
    """Where the images' labels are."""
    host: Tensor
    """On the CPU: to fetch them from a GPU, one would have to wait for it."""

    def __len__(self) -> int:
        return len(self.host)

    def cut(self, start: int, n_rows: int) -> "Rows":
        """Return some of the rows, as many as there are."""
        return Rows(here=self.here[start : start + n_rows], host=self.host[start : start + n_rows])


def count_batches(n_images: int, batch_size: int) -> int:
    """Return the number of batches of an epoch.

    The last one may be smaller. It is left out if it would hold a single image besides other batches: BatchNorm cannot
    train on one value per channel (torch raises), and which image is left out changes with every permutation.
    """
    n_full, n_rest = divmod(n_images, batch_size)
    return n_full if n_rest == 0 or (n_rest == 1 and n_full > 0) else n_full + 1


def start_order(seed: int) -> torch.Generator:
    """Return the CPU generator of a trial's batch order and fresh augmentation."""
    return torch.Generator().manual_seed(seed)


def draw_order(n_images: int, generator: torch.Generator) -> Tensor:
    """Draw the order in which an epoch takes its images: int64, shape ``(n_images,)``, on the CPU."""
    return torch.randperm(n_images, generator=generator)


def shuffle_batches(images: ImageSet, batch_size: int, generator: torch.Generator) -> tuple[Rows, ...]:
    """Return the rows of each batch of an epoch, in an order drawn from the CPU generator."""
    n_images = len(images.labels)
    order = draw_order(n_images, generator)
    rows = Rows(here=send_ahead(order, images.labels.device), host=order)
    return tuple(rows.cut(number * batch_size, batch_size) for number in range(count_batches(n_images, batch_size)))


def find_dtype(model: nn.Module) -> torch.dtype:
    """Return what a model is fed and its logits are kept in: float64 for a double model, float32 for all others."""
    first = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    return torch.float64 if first == torch.float64 else torch.float32


def take_batch(
    images: ImageSet, rows: Tensor, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return some images and their labels on the device.

    Args:
        images: On the device, or on the host.
        rows: Which ones, int64, shape ``(n,)``, where the images are.
        device: Where the batch is needed.
        dtype: Of the pixels.

    Returns:
        Pixels in [0, 1], shape ``(n, 3, height, width)``, and labels, int64, shape ``(n,)``.
    """
    pixels = gather_rows(images.pixels, rows if images.positions is None else images.positions[rows], device)
    return pixels.to(dtype).div_(255), gather_rows(images.labels, rows, device)


def gather_rows(values: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Return some rows of a tensor on the device.

    Args:
        values: On the device, or on the host.
        rows: Which ones, int64, where the values are.
        device: Where the rows are needed.
    """
    if values.device.type == device.type:
        return values[rows]
    # From the host to CUDA: gathered into pinned memory, so that the copy overlaps with computing. The bytes travel as
    # uint8; torch's pinned allocator keeps the buffer until the copy is done.
    pinned = torch.empty((len(rows), *values.shape[1:]), dtype=values.dtype, pin_memory=True)
    torch.index_select(values, 0, rows, out=pinned)
    return pinned.to(device, non_blocking=True)


def build_normaliser(
    preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """Return the function from pixels in [0, 1] to a backbone's input, in the device's memory format."""
    mean, std = (
        send_ahead(torch.tensor(values, dtype=dtype), device).reshape(1, -1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return lambda pixels: ((pixels - mean) / std).contiguous(memory_format=MEMORY_FORMAT)


def list_eval_batches(images: ImageSet, device: torch.device, batch_size: int = 1) -> tuple[Tensor, ...]:
    """Return the rows of all images in their order, as many at once as suits a device without gradients.

    Args:
        images: Their rows lie where their labels do.
        device: Where the model is.
        batch_size: The trial's; on CUDA at least as many images are taken at once, on the CPU what its caches hold.
    """
    rows = torch.arange(len(images.labels), device=images.labels.device)
    return torch.split(rows, max(batch_size, _MIN_CUDA_EVAL_BATCH) if device.type == "cuda" else _CPU_EVAL_BATCH)


def predict_logits(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    precision: Precision,
    batch_size: int = 1,
) -> Tensor:
    """Run a model over images as they are, and leave it in eval mode.

    Args:
        model: On the device.
        images: One at least, in their order; their labels are not used.
        preprocessing: The backbone's.
        device: Where the model is.
        precision: The trial's.
        batch_size: The trial's; how many images are taken at once depends on it on CUDA.

    Returns:
        Float32, or float64 of a double model, shape ``(n_images, n_classes)``, on the device.
    """
    model.eval()
    dtype = find_dtype(model)
    normalise = build_normaliser(preprocessing, device, dtype)
    # Not inference_mode: a backbone may keep a tensor that it computed in eval mode, and a later backward pass would
    # refuse an inference tensor.
    with torch.no_grad(), autocast(device, precision):
        return torch.cat(
            [
                model(normalise(take_batch(images, rows, device, dtype)[0])).to(dtype)
                for rows in list_eval_batches(images, device, batch_size)
            ]
        )
