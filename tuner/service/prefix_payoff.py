"""Whether keeping maps saves a trial time, foreseen before it begins."""

from collections.abc import Collection

from torch import nn

from tuner.models.partition import Partition
from tuner.service.open_banks import BankRequest, OpenBanks
from tuner.service.workbench import Workbench
from tuner.training.prefix_cost import Demand, PrefixCost, measure_cost, predict_seconds
from tuner.trial import TrialParams

_LEAST_GAIN = 0.1
"""Share of the prefix's time that keeping its maps must save: a training batch is a little cheaper than is timed."""


class Payoff:
    """Says whether keeping maps saves time. Mutable: it has timed what it was asked about."""

    def __init__(self, bench: Workbench, banks: OpenBanks) -> None:
        self._bench, self._banks = bench, banks
        self._costs: dict[tuple[str, int], PrefixCost] = {}

    def pays(
        self,
        params: TrialParams,
        model: nn.Module,
        partition: Partition,
        requests: Collection[BankRequest],
        *,
        n_sharing: float,
    ) -> bool:
        """Whether computing the maps of a trial once is faster than in every epoch, and there is room for them.

        Args:
            params: The trial's.
            model: The trial's, frozen, on the device.
            partition: Of the model.
            requests: The banks of the trial, all of its views.
            n_sharing: Further trials that are expected to need the same.
        """
        if not self._banks.has_room(sum(request.n_bytes for request in requests)):
            return False
        missing = [request.split for request in requests if not self._banks.is_at_hand(request)]
        if not missing:
            return True  # it paid for another trial
        sizes = {request.split: len(request.images.labels) for request in requests}
        demand = Demand(
            n_train=sizes["train"],
            n_val=sizes["val"],
            epochs=params.epochs,
            n_missing_views=missing.count("train"),
            lacks_val="val" in missing,
            n_sharing=n_sharing,
        )
        images = next(request.images for request in requests if request.split == "train")
        key = params.backbone, params.unfrozen_layers
        if key not in self._costs:
            preprocessing = self._bench.preprocess(params.backbone)
            self._costs[key] = measure_cost(
                model, partition, images, preprocessing, self._bench.device, precision=params.precision
            )
        uncached, cached = predict_seconds(self._costs[key], demand)
        return cached < (1 - _LEAST_GAIN) * uncached
