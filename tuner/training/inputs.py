"""What a trial's model is fed, by the batch: images as an epoch shows them, or what its frozen prefix made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tuner.data.augment import augment, draw_fresh
from tuner.data.image_set import ImageSet
from tuner.data.views import draw_view, find_view
from tuner.models.backbone import Preprocessing
from tuner.training.batches import (
    Rows,
    build_normaliser,
    find_dtype,
    gather_rows,
    list_eval_batches,
    predict_logits,
    take_batch,
)
from tuner.training.device import autocast, send_ahead
from tuner.training.prefix_maps import CachedPrefix
from tuner.trial import TrialParams


class Inputs(Protocol):
    """Where the inputs of a trial's steps come from. Mutable: it knows the epoch."""

    forward: Callable[[Tensor], Tensor]
    """From what ``take`` returns to logits, in the mode that the model is in; autocast is the caller's."""

    def start_epoch(self, epoch: int) -> None:
        """Show the training images as an epoch, from 1, does."""

    def draw(self, rows: Rows) -> Tensor | None:
        """Return what the augmentation of a batch needs, one row for each image; None if there is none."""

    def take(self, rows: Rows, draws: Tensor | None) -> Tensor:
        """Return what some training images are fed as, on the device.

        Args:
            rows: Which ones.
            draws: Theirs, of ``draw`` for the whole batch.
        """

    def predict(self, val: ImageSet) -> Tensor:
        """Return the logits of the validation images, in their order, and leave the model in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What both kinds of inputs are made from."""

    model: nn.Module
    """On the device, frozen as the trial asks."""
    params: TrialParams
    train: ImageSet
    preprocessing: Preprocessing
    device: torch.device
    order: torch.Generator
    """Draws fresh augmentation."""
    eval_batch_size: int
    """Images that validation takes at a time, at least, on CUDA."""


class ImageInputs:
    """Images through the whole model."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.forward: Callable[[Tensor], Tensor] = source.model
        self._dtype = find_dtype(source.model)
        self._normalise = build_normaliser(source.preprocessing, source.device, self._dtype)
        self._known_draws: Tensor | None = None

    def start_epoch(self, epoch: int) -> None:
        """Draw the epoch's view for all training images, if the trial knows views."""
        params, train = self._source.params, self._source.train
        self._known_draws = None
        if params.shows_known_images and (view := find_view(params, epoch)) is not None:
            draws = draw_view(view.seed, train.rows, view=view.number, strength=view.strength)
            self._known_draws = send_ahead(draws, train.labels.device)

    def draw(self, rows: Rows) -> Tensor | None:
        """Draw a batch's augmentation, or look it up."""
        if self._source.params.augmentation_strength == 0:
            return None
        if self._known_draws is None:
            return draw_fresh(len(rows), self._source.order)
        return self._known_draws[rows.here]

    def take(self, rows: Rows, draws: Tensor | None) -> Tensor:
        """Return normalised images, augmented as the epoch asks: shape ``(n, 3, height, width)``."""
        source, params = self._source, self._source.params
        pixels, _ = take_batch(source.train, rows.here, source.device, self._dtype)
        if draws is not None:
            pixels = augment(
                pixels, draws, strength=params.augmentation_strength, horizontal_flip=params.horizontal_flip
            )
        return self._normalise(pixels)

    def predict(self, val: ImageSet) -> Tensor:
        """Return the logits of the validation images."""
        source = self._source
        return predict_logits(
            source.model,
            val,
            source.preprocessing,
            source.device,
            precision=source.params.precision,
            batch_size=source.eval_batch_size,
        )


class MapInputs:
    """Kept maps through the suffix alone."""

    def __init__(self, source: Source, cached: CachedPrefix) -> None:
        self._source, self._cached = source, cached
        self._dtype = find_dtype(source.model)
        self.forward = cached.partition.bind_suffix(source.model)
        self._images = ImageInputs(source)
        self._maps: Tensor | None = None

    def start_epoch(self, epoch: int) -> None:
        """Find the maps of the epoch's view, or have them computed."""
        self._maps = self._cached.train(epoch)
        if self._maps is None:
            self._images.start_epoch(epoch)

    def draw(self, rows: Rows) -> Tensor | None:
        """Look up a batch's view if its maps are not kept."""
        return self._images.draw(rows) if self._maps is None else None

    def take(self, rows: Rows, draws: Tensor | None) -> Tensor:
        """Return packed maps: shape ``(n, width)``."""
        if self._maps is None:
            images = self._images.take(rows, draws)  # not under autocast, which would move them in bfloat16
            with torch.no_grad(), autocast(self._source.device, self._source.params.precision):
                return self._cached.partition.bind_prefix(self._source.model)(images)
        on_host = self._maps.device.type == "cpu"
        where_they_lie = rows.host if on_host else send_ahead(rows.here, self._maps.device)
        return gather_rows(self._maps, where_they_lie, self._source.device)

    def predict(self, val: ImageSet) -> Tensor:
        """Return the logits of the validation images."""
        source = self._source
        source.model.eval()
        with torch.no_grad(), autocast(source.device, source.params.precision):
            batches = list_eval_batches(val, source.device, source.eval_batch_size)
            taken = (gather_rows(self._cached.val, rows.to(self._cached.val.device), source.device) for rows in batches)
            return torch.cat([self.forward(maps).to(self._dtype) for maps in taken])


def find_inputs(source: Source, cached: CachedPrefix | None) -> Inputs:
    """Return the inputs of a trial: of its kept maps if it has any, else of its images."""
    return ImageInputs(source) if cached is None else MapInputs(source, cached)
