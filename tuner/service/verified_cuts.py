"""Where trials of a backbone are cut, each cut checked against the whole model when it is first used."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tuner.models.layers import freeze_layers
from tuner.models.partition import partition_model
from tuner.service.earlier_cuts import Prefix, is_late
from tuner.service.workbench import Workbench
from tuner.training.batches import find_dtype
from tuner.training.device import MEMORY_FORMAT
from tuner.training.head_features import NotCacheable, take_sample
from tuner.training.prefix_maps import compute_maps, hash_prefix, show_few, verify_partition
from tuner.trial import TrialParams


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A backbone's cut, verified: its prefix is the same in all trials."""

    prefix: Prefix
    sample: Tensor
    """What it makes of a few images, on the CPU."""


class VerifiedCuts:
    """The cuts of a study's backbones. Mutable: it remembers what it has tried."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._found: dict[tuple[str, int], Cut | None] = {}

    def find(self, params: TrialParams, model: nn.Module) -> Cut | None:
        """Return the cut of a recipe; None if it has none that is worth keeping maps of, or was given up.

        Args:
            params: The trial's.
            model: The trial's, before its first step. It may be frozen and moved to the device.

        Raises:
            NotSeparable, NotCacheable: If it has no prefix, or not exactly the same in all trials.
        """
        key = params.backbone, params.unfrozen_layers
        if key not in self._found:
            freeze_layers(model, params.unfrozen_layers)
            has_prefix = not all(parameter.requires_grad for parameter in model.parameters())
            self._found[key] = self._verify(params, model) if has_prefix else None
        return self._found[key]

    def give_up(self, params: TrialParams) -> None:
        """Have trials of a recipe's cut train on images from now on."""
        self._found[params.backbone, params.unfrozen_layers] = None

    def _verify(self, params: TrialParams, model: nn.Module) -> Cut | None:
        bench, device = self._bench, self._bench.device
        preprocessing = bench.preprocess(params.backbone)
        train, _ = bench.load_images(preprocessing.interpolation)
        twin = make_ready(bench.make_model(replace(params, seed=params.seed ^ 1)), params, device)
        partition = partition_model(twin, show_few(train, preprocessing, device, find_dtype(twin)))
        if bench.spec.workers.prefix_cache != "always" and not is_late(bench, partition):
            return None
        weights_hash = hash_prefix(twin, partition)
        verify_partition(twin, partition, train, preprocessing, device)
        few = take_sample(train)
        expected = compute_maps(twin, partition, few, preprocessing, device, precision=params.precision).cpu()
        del twin  # before the model moves to the device: two may not fit
        if hash_prefix(make_ready(model, params, device), partition) != weights_hash:
            raise NotCacheable("its frozen layers are drawn anew for every trial")
        return Cut(prefix=Prefix(partition=partition, weights_hash=weights_hash), sample=expected)


def make_ready(model: nn.Module, params: TrialParams, device: torch.device) -> nn.Module:
    """Return a trial's model on the device, frozen as the trial asks."""
    model.to(device).to(memory_format=MEMORY_FORMAT)
    freeze_layers(model, params.unfrozen_layers)
    return model
