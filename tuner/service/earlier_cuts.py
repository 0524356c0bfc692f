"""The shorter way to a cut's maps: on from those of an earlier cut, where trials of a study have both."""

import copy
from dataclasses import dataclass

from torch import nn

from tuner.models.layers import freeze_layers
from tuner.models.partition import Bridge, Partition, build_bridge, partition_model
from tuner.service.outcomes import comes_from_lost_device
from tuner.service.workbench import Workbench
from tuner.training.batches import find_dtype
from tuner.training.prefix_maps import find_map_dtype, hash_prefix, show_few
from tuner.trial import TrialParams

_MAX_IMAGES = 6
"""Maps of an image take at most the bytes of so many decoded ones: earlier cuts save less and fill the cache."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What makes the maps of a backbone's cut."""

    partition: Partition
    weights_hash: str


@dataclass(frozen=True, kw_only=True)
class EarlierCut:
    """A cut below another one, and the way from its maps to those of the other."""

    unfrozen_layers: int
    prefix: Prefix
    bridge: Bridge


def is_late(bench: Workbench, partition: Partition) -> bool:
    """Whether a cut's maps are no larger than a few images."""
    n_bytes = partition.width * find_map_dtype(bench.device, bench.spec.training.precision).itemsize
    return n_bytes <= _MAX_IMAGES * 3 * bench.spec.data.image_size**2


class EarlierCuts:
    """The next earlier cut of each cut. Mutable: it remembers what it found."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._found: dict[tuple[str, int], EarlierCut | None] = {}

    def find(self, params: TrialParams, model: nn.Module, later: Partition, cuts: tuple[int, ...]) -> EarlierCut | None:
        """Return the next earlier cut of a trial's, if its maps may be kept and the trial's follow from them.

        Args:
            params: The trial's.
            model: The trial's, frozen, before its first step.
            later: Of the trial's own cut.
            cuts: Unfrozen layers that trials of the backbone may have.
        """
        key = params.backbone, params.unfrozen_layers
        if key not in self._found:
            unfrozen = min((each for each in cuts if each > params.unfrozen_layers), default=None)
            self._found[key] = None if unfrozen is None else self._look(params, model, later, unfrozen)
        return self._found[key]

    def give_up(self, params: TrialParams) -> None:
        """Compute the maps of a cut from images from now on."""
        self._found[params.backbone, params.unfrozen_layers] = None

    def _look(self, params: TrialParams, model: nn.Module, later: Partition, unfrozen: int) -> EarlierCut | None:
        bench = self._bench
        preprocessing = bench.preprocess(params.backbone)
        train, _ = bench.load_images(preprocessing.interpolation)
        images = show_few(train, preprocessing, bench.device, find_dtype(model))
        try:
            twin = copy.deepcopy(model)  # the trial's own stays frozen as it is
            freeze_layers(twin, unfrozen)
            partition = partition_model(twin, images)
            if not is_late(bench, partition):
                return None
            bridge = build_bridge(twin, images, earlier=partition, later=later)
            prefix = Prefix(partition=partition, weights_hash=hash_prefix(twin, partition))
        except Exception as error:  # a user's backbone may raise anything when it is taken apart: images serve as well
            if comes_from_lost_device(error):
                raise
            return None
        return EarlierCut(unfrozen_layers=unfrozen, prefix=prefix, bridge=bridge)
