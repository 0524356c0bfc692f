"""What lone trials train on in a worker, if that saves time: maps of the frozen prefix, computed once and kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tuner.data.feature_store import FeatureBank
from tuner.data.image_set import ImageSet
from tuner.data.views import View, find_view
from tuner.models.layers import freeze_layers
from tuner.models.partition import NotSeparable, Partition, partition_model
from tuner.models.weights import draws_weights
from tuner.service.messages import Coordinator
from tuner.service.open_banks import BankRequest, OpenBanks
from tuner.service.outcomes import comes_from_lost_device, first_line
from tuner.service.workbench import Workbench
from tuner.training.batches import build_normaliser, find_dtype, take_batch
from tuner.training.device import MEMORY_FORMAT, release_memory
from tuner.training.head_features import N_TRIED, NotCacheable, agree, take_sample
from tuner.training.prefix_cost import Demand, PrefixCost, measure_cost, predict_seconds
from tuner.training.prefix_maps import (
    CachedPrefix,
    check_precision,
    compute_maps,
    find_map_dtype,
    hash_prefix,
    verify_partition,
)
from tuner.trial import TrialParams, Usage

_MAX_IMAGES = 6
"""Maps of an image take at most the bytes of so many decoded ones: earlier cuts save less and fill the cache."""

_LEAST_GAIN = 0.1
"""Share of the prefix's time that keeping its maps must save: a training batch is a little cheaper than is timed."""


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """A backbone's cut, verified: its prefix is the same in all trials."""

    partition: Partition
    weights_hash: str
    sample: Tensor
    """What it makes of a few images, on the CPU."""


class Spending:
    """What a trial's maps took, and what computing them in every epoch would have taken. Mutable."""

    def __init__(self) -> None:
        self._computed_seconds = 0.0
        self._needed_seconds = 0.0

    def count_opened(self, bank: FeatureBank) -> None:
        """Count what maps took that were not there."""
        if not bank.was_there:
            self._computed_seconds += bank.seconds

    def count_epoch(self, *banks: FeatureBank) -> None:
        """Count what the trial would have spent on an epoch's maps."""
        self._needed_seconds += sum(bank.seconds for bank in banks)

    def describe_usage(self) -> Usage:
        """Return what the trial has used so far."""
        saved = max(0.0, self._needed_seconds - self._computed_seconds)
        return Usage(features="computed" if self._computed_seconds > 0 else "cached", saved_seconds=round(saved, 3))


class PrefixBanks:
    """Maps by backbone, cut and view. Mutable: it knows the cuts that it has tried."""

    def __init__(self, bench: Workbench, coordinator: Coordinator) -> None:
        self._bench = bench
        self._banks = OpenBanks(bench, coordinator)
        self._cuts: dict[tuple[str, int], _Cut | None] = {}
        self._costs: dict[tuple[str, int], PrefixCost] = {}

    def find(
        self, params: TrialParams, model: nn.Module, *, n_sharing: float, must: bool | None = None
    ) -> tuple[CachedPrefix, Spending] | None:
        """Return what stands for a trial's images, if its frozen prefix need not be computed in every epoch.

        Args:
            params: The trial's.
            model: The trial's, before its first step. It may be frozen and moved to the device.
            n_sharing: Further trials that are expected to need the same maps.
            must: Whether an earlier attempt at the same trial was trained on maps; None decides anew.

        Returns:
            None if the prefix sees new images in every epoch, if it is not the same in all trials, or if keeping its
            maps does not pay. A line tells the user where a backbone is at fault.
        """
        if self._bench.spec.workers.prefix_cache == "never" or not params.shows_known_images or must is False:
            return None
        if self._bench.spec.pretraining is None and draws_weights(
            params.backbone, self._bench.section(params.backbone)
        ):
            return None  # by the user's wish nothing is the same in two trials
        try:
            return self._find(params, model, None if must else n_sharing)
        except Exception as error:  # a user's backbone may raise anything when it is taken apart: whole it may do
            if comes_from_lost_device(error):
                raise
            reason = str(error) if isinstance(error, NotCacheable | NotSeparable) else first_line(error)
        self._refuse(params, reason)
        self._banks.release_memory()
        release_memory(self._bench.device)  # out of the except block: its traceback held on to tensors
        return None

    def release_memory(self) -> None:
        """Forget what can be had again."""
        self._banks.release_memory()

    def _find(
        self, params: TrialParams, model: nn.Module, n_sharing: float | None
    ) -> tuple[CachedPrefix, Spending] | None:
        """Return the same; without a number of sharing trials whether it pays or not."""
        if (cut := self._find_cut(params, model)) is None:
            return None
        self._freeze(model, params)
        is_always = self._bench.spec.workers.prefix_cache == "always"
        if n_sharing is not None and not is_always and not self._pays(params, model, cut, n_sharing):
            return None
        train = self._load_images(params)[0]
        preprocessing, device = self._bench.preprocess(params.backbone), self._bench.device
        found = compute_maps(model, cut.partition, take_sample(train), preprocessing, device).cpu()
        if not agree(found, cut.sample, device):
            raise NotCacheable("its frozen layers are not the same in all trials")
        return self._open_maps(params, model, cut)

    def _refuse(self, params: TrialParams, reason: str) -> None:
        self._cuts[params.backbone, params.unfrozen_layers] = None
        self._bench.note(
            f"{params.backbone}, {params.unfrozen_layers} unfrozen layers: its frozen layers are computed in every "
            f"epoch: {reason}"
        )

    # --- the cut ---

    def _find_cut(self, params: TrialParams, model: nn.Module) -> _Cut | None:
        """Return the cut of a recipe, verified against the whole model when it is first used.

        Raises:
            NotSeparable, NotCacheable: If it has no prefix, or not exactly the same in all trials.
        """
        key = params.backbone, params.unfrozen_layers
        if key not in self._cuts:
            freeze_layers(model, params.unfrozen_layers)
            if all(parameter.requires_grad for parameter in model.parameters()):
                self._cuts[key] = None
                return None
            self._cuts[key] = self._verify_cut(params, model)
        return self._cuts[key]

    def _verify_cut(self, params: TrialParams, model: nn.Module) -> _Cut | None:
        train, device = self._load_images(params)[0], self._bench.device
        preprocessing = self._bench.preprocess(params.backbone)
        twin = self._freeze(self._bench.make_model(replace(params, seed=params.seed ^ 1)), params)
        rows = torch.arange(min(N_TRIED, len(train.labels)), device=train.labels.device)
        inputs = build_normaliser(preprocessing, device, find_dtype(twin))(take_batch(train, rows, device)[0])
        partition = partition_model(twin, inputs)
        if not self._is_late(partition):
            return None
        weights_hash = hash_prefix(twin, partition)
        verify_partition(twin, partition, train, preprocessing, device)
        expected = compute_maps(twin, partition, take_sample(train), preprocessing, device).cpu()
        del twin  # before the model moves to the device: two may not fit
        self._freeze(model, params)
        if hash_prefix(model, partition) != weights_hash:
            raise NotCacheable("its frozen layers are drawn anew for every trial")
        return _Cut(partition=partition, weights_hash=weights_hash, sample=expected)

    def _freeze(self, model: nn.Module, params: TrialParams) -> nn.Module:
        model.to(self._bench.device).to(memory_format=MEMORY_FORMAT)
        freeze_layers(model, params.unfrozen_layers)
        return model

    def _is_late(self, partition: Partition) -> bool:
        n_bytes = partition.width * find_map_dtype(self._bench.device).itemsize
        image_bytes = 3 * self._bench.spec.data.image_size**2
        return self._bench.spec.workers.prefix_cache == "always" or n_bytes <= _MAX_IMAGES * image_bytes

    def _load_images(self, params: TrialParams) -> tuple[ImageSet, ImageSet]:
        return self._bench.load_images(self._bench.preprocess(params.backbone).interpolation)

    # --- its maps ---

    def _open_maps(self, params: TrialParams, model: nn.Module, cut: _Cut) -> tuple[CachedPrefix, Spending]:
        spending = Spending()
        requests = {view: self._request(params, model, cut, "train", view) for view in _list_views(params)}
        val_request = self._request(params, model, cut, "val", None)
        for request in (val_request, *requests.values()):
            self._check_precision(request, model, cut)
        val_bank, val = self._banks.open(val_request)
        spending.count_opened(val_bank)

        def open_view(epoch: int) -> tuple[FeatureBank, Tensor]:
            bank, maps = self._banks.open(requests[find_view(params, epoch)])
            spending.count_opened(bank)
            return bank, maps

        def open_train(epoch: int) -> Tensor | None:
            try:
                bank, maps = open_view(epoch)
            except NotCacheable as error:
                self._bench.note(f"{params.backbone}: epoch {epoch} computes its frozen layers: {error}")
                return None
            spending.count_epoch(bank, val_bank)
            return maps

        open_view(1)  # before the trial's time counts: others will need them as well
        later = [request for request in requests.values() if not self._banks.is_open(request)]
        later_bytes = sum(request.n_bytes for request in later)
        cached = CachedPrefix(partition=cut.partition, train=open_train, val=val, later_bytes=later_bytes)
        return cached, spending

    def _check_precision(self, request: BankRequest, model: nn.Module, cut: _Cut) -> None:
        """Compare what is about to be kept in bfloat16 with float32, once for each bank.

        Raises:
            NotCacheable: If it is not good enough.
        """
        if request.dtype != torch.bfloat16 or self._banks.is_at_hand(request):
            return
        preprocessing, device = self._bench.preprocess(request.backbone), self._bench.device
        check_precision(model, cut.partition, request.images, preprocessing, device, view=request.view)

    def _request(self, params: TrialParams, model: nn.Module, cut: _Cut, split: str, view: View | None) -> BankRequest:
        images = self._load_images(params)[split == "val"]
        preprocessing, device = self._bench.preprocess(params.backbone), self._bench.device

        def compute(out: Tensor, on_progress: Callable[[int, int], None]) -> None:
            compute_maps(
                model, cut.partition, images, preprocessing, device, view=view, out=out, on_progress=on_progress
            )

        def sample() -> Tensor:
            return compute_maps(model, cut.partition, take_sample(images), preprocessing, device, view=view)

        return BankRequest(
            what="maps",
            backbone=params.backbone,
            split=split,
            images=images,
            view=view,
            width=cut.partition.width,
            dtype=find_map_dtype(device),
            part={"weights": cut.weights_hash, "unfrozen_layers": params.unfrozen_layers},
            compute=compute,
            sample=sample,
        )

    # --- whether it pays ---

    def _pays(self, params: TrialParams, model: nn.Module, cut: _Cut, n_sharing: float) -> bool:
        requests = [self._request(params, model, cut, "train", view) for view in _list_views(params)]
        val = self._request(params, model, cut, "val", None)
        demand = Demand(
            n_train=len(requests[0].images.labels),
            n_val=len(val.images.labels),
            epochs=params.epochs,
            n_missing_views=sum(not self._banks.is_at_hand(request) for request in requests),
            lacks_val=not self._banks.is_at_hand(val),
            n_sharing=n_sharing,
        )
        uncached, cached = predict_seconds(self._measure(params, model, cut), demand)
        return cached < (1 - _LEAST_GAIN) * uncached

    def _measure(self, params: TrialParams, model: nn.Module, cut: _Cut) -> PrefixCost:
        key = params.backbone, params.unfrozen_layers
        if key not in self._costs:
            train, preprocessing = self._load_images(params)[0], self._bench.preprocess(params.backbone)
            self._costs[key] = measure_cost(model, cut.partition, train, preprocessing, self._bench.device)
        return self._costs[key]


def _list_views(params: TrialParams) -> set[View | None]:
    """Return the versions of the training images that a trial's epochs show; None is the images as they are."""
    return {find_view(params, epoch) for epoch in range(1, params.epochs + 1)}
