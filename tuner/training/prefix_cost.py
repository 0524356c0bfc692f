"""Whether keeping what a frozen prefix computes saves time: a model of both ways from times measured here."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.data.feature_store import time_keeping
from tuner.data.image_set import ImageSet
from tuner.models.backbone import Preprocessing
from tuner.models.partition import Partition
from tuner.training.batches import gather_rows, list_eval_batches
from tuner.training.device import wait_for
from tuner.training.head_features import take_sample
from tuner.training.prefix_maps import compute_maps, find_map_dtype
from tuner.trial import Precision

_N_TIMED = 3
_LONG_SECONDS = 0.1
"""What takes longer is timed once."""
_N_TABLE = 256
"""Rows of a table from which some are fetched: they lie apart."""


@dataclass(frozen=True, kw_only=True)
class PrefixCost:
    """What one image costs, in seconds, and one bank."""

    compute_seconds: float
    """Prefix in a batch as large as suits the device without gradients: how maps are computed. In training batches it
    takes a little more or less, which would cost as much again to find out for each batch size."""
    keep_seconds: float
    """Writing its maps to the cache and reading them back once."""
    bank_seconds: float
    """What keeping any bank takes besides, however small: not of one image."""
    take_seconds: float
    """Fetching its maps for a batch."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a trial, and those expected after it, need of the maps."""

    n_train: int
    n_val: int
    epochs: int
    n_missing_views: int
    """Versions of the training images that the trial shows and whose maps are not there."""
    lacks_val: bool
    """Whether the maps of the validation images are not there."""
    n_sharing: float
    """Further trials expected to need the same maps."""


def predict_seconds(cost: PrefixCost, demand: Demand) -> tuple[float, float]:
    """Return what the prefix costs all these trials without and with kept maps, in seconds."""
    n_trials = 1 + demand.n_sharing
    shown = demand.epochs * n_trials
    uncached = shown * (demand.n_train + demand.n_val) * cost.compute_seconds
    n_built = demand.n_missing_views * demand.n_train + demand.lacks_val * demand.n_val
    built = n_built * (cost.compute_seconds + cost.keep_seconds)
    built += (demand.n_missing_views + demand.lacks_val) * cost.bank_seconds
    return uncached, built + shown * (demand.n_train + demand.n_val) * cost.take_seconds


def measure_cost(
    model: nn.Module,
    partition: Partition,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    precision: Precision,
) -> PrefixCost:
    """Time a model's prefix and its maps on some images.

    Args:
        model: Frozen by ``freeze_layers``, on the device; its prefix has been run before.
        partition: Of this model.
        images: Those of the trial.
        preprocessing: The backbone's.
        device: Where the trial trains.
        precision: In what.
    """
    batch = list_eval_batches(images, device)[0]
    few = take_sample(images, len(batch))

    def compute() -> Tensor:
        return compute_maps(model, partition, few, preprocessing, device, precision=precision)

    maps = compute().to("cpu", find_map_dtype(device, precision))
    table = maps.repeat(-(-_N_TABLE // len(maps)), 1)
    rows = torch.randperm(len(table))[: len(batch)]
    bank_seconds, byte_seconds = time_keeping()
    return PrefixCost(
        compute_seconds=_time(compute, device) / len(batch),
        keep_seconds=partition.width * maps.element_size() * byte_seconds,
        bank_seconds=bank_seconds,
        take_seconds=_time(lambda: gather_rows(table, rows, device), device) / len(rows),
    )


def _time(work: Callable[[], Tensor], device: torch.device) -> float:
    """Return the shortest time of a few tries, in seconds."""
    seconds: list[float] = []
    while len(seconds) < _N_TIMED and sum(seconds) < _LONG_SECONDS:
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
