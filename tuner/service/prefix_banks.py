"""What lone trials train on in a worker, if that saves time: maps of the frozen prefix, computed once and kept."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tuner.data.cache import budget_bytes
from tuner.data.feature_store import FeatureBank
from tuner.data.image_set import ImageSet
from tuner.data.views import View, find_view, list_views
from tuner.errors import first_line
from tuner.models.tracing import NotSeparable
from tuner.models.weights import draws_weights
from tuner.service.earlier_cuts import EarlierCut, EarlierCuts, Prefix
from tuner.service.messages import Coordinator
from tuner.service.open_banks import BankRequest, NoRoom, OpenBanks
from tuner.service.outcomes import comes_from_lost_device
from tuner.service.prefix_payoff import Payoff
from tuner.service.spending import Spending
from tuner.service.verified_cuts import Cut, VerifiedCuts, make_ready
from tuner.service.workbench import Workbench
from tuner.training.device import is_out_of_memory, release_memory
from tuner.training.head_features import NotCacheable, take_sample
from tuner.training.prefix_maps import (
    CachedPrefix,
    check_rounded,
    compute_maps,
    continue_maps,
    find_map_dtype,
)
from tuner.training.rounding import agree, repeats
from tuner.trial import TrialParams


class PrefixBanks:
    """Maps by backbone, cut and view. Mutable: it knows which cuts it has refused, and has said so."""

    def __init__(self, bench: Workbench, coordinator: Coordinator) -> None:
        self._bench = bench
        self._banks = OpenBanks(bench, coordinator)
        self._cuts = VerifiedCuts(bench)
        self._payoff = Payoff(bench, self._banks)
        self._refused: set[tuple[str, int]] = set()
        self._earlier = EarlierCuts(bench)
        self._levels: dict[str, tuple[int, ...]] = {}
        """Unfrozen layers that trials of a backbone may have."""

    def find(
        self,
        params: TrialParams,
        model: nn.Module,
        *,
        n_sharing: float,
        must: bool | None = None,
        cuts: tuple[int, ...] = (),
    ) -> tuple[CachedPrefix, Spending] | None:
        """Return what stands for a trial's images, if its frozen prefix need not be computed in every epoch.

        Args:
            params: The trial's.
            model: The trial's, before its first step. It may be frozen and moved to the device.
            n_sharing: Further trials that are expected to need the same maps.
            must: Whether an earlier attempt at the same trial was trained on maps; None decides anew.
            cuts: Unfrozen layers that trials of the backbone may have.

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
        self._levels[params.backbone] = cuts
        try:
            return self._find(params, model, None if must else n_sharing)
        except Exception as error:  # a user's backbone may raise anything when it is taken apart: whole it may do
            if comes_from_lost_device(error):
                raise
            reason = str(error) if isinstance(error, NotCacheable | NotSeparable) else first_line(error)
            may_pass = isinstance(error, NoRoom) or is_out_of_memory(error)
        self._refuse(params, reason, may_pass=may_pass)
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
        if (cut := self._cuts.find(params, model)) is None:
            return None
        make_ready(model, params, self._bench.device)
        is_always = self._bench.spec.workers.prefix_cache == "always"
        if n_sharing is not None and not is_always:
            by_view, val = self._list_requests(params, model, cut)
            requests = (*by_view.values(), val)
            if not self._payoff.pays(params, model, cut.prefix.partition, requests, n_sharing=n_sharing):
                return None
        train = self._load_images(params)[0]
        preprocessing, device = self._bench.preprocess(params.backbone), self._bench.device
        precision, few = params.precision, take_sample(train)
        found = compute_maps(model, cut.prefix.partition, few, preprocessing, device, precision=precision).cpu()
        if not repeats(found, cut.sample, device):
            raise NotCacheable("its frozen layers are not the same in all trials")
        return self._open_maps(params, model, cut)

    def _refuse(self, params: TrialParams, reason: str, *, may_pass: bool) -> None:
        """Say why a trial trains on images: all of its cut do so from now on, but for want of room."""
        key = params.backbone, params.unfrozen_layers
        if not may_pass:
            self._cuts.give_up(params)
        if key not in self._refused:
            self._refused.add(key)
            self._bench.note(
                f"{params.backbone}, {params.unfrozen_layers} unfrozen layers: its frozen layers are computed in every "
                f"epoch: {reason}"
            )

    def _load_images(self, params: TrialParams) -> tuple[ImageSet, ImageSet]:
        return self._bench.load_images(self._bench.preprocess(params.backbone).interpolation)

    def _open_maps(self, params: TrialParams, model: nn.Module, cut: Cut) -> tuple[CachedPrefix, Spending]:
        spending = Spending()
        requests, val_request = self._list_requests(params, model, cut)
        if not all(map(self._banks.is_at_hand, (val_request, *requests.values()))):
            self._find_earlier(params, model, cut.prefix)  # before the model's first step
        for request in (val_request, *requests.values()):
            self._check_rounded(request, model, cut.prefix)
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
        later_bytes = self._banks.count_later(requests.values())
        cached = CachedPrefix(partition=cut.prefix.partition, train=open_train, val=val, later_bytes=later_bytes)
        return cached, spending

    def _list_requests(
        self, params: TrialParams, model: nn.Module, cut: Cut
    ) -> tuple[dict[View | None, BankRequest], BankRequest]:
        """Return the banks of a trial: of its training images by view, and of its validation images."""
        train = {view: self._request(params, model, cut.prefix, "train", view) for view in list_views(params)}
        return train, self._request(params, model, cut.prefix, "val", None)

    def _check_rounded(self, request: BankRequest, model: nn.Module, prefix: Prefix) -> None:
        """Compare what is about to be kept in bfloat16 with float32, once for each bank.

        Raises:
            NotCacheable: If it is not good enough.
        """
        if request.dtype != torch.bfloat16 or self._banks.is_at_hand(request):
            return
        preprocessing, device = self._bench.preprocess(request.backbone), self._bench.device
        check_rounded(model, prefix.partition, request.images, preprocessing, device, view=request.view)

    def _request(
        self, params: TrialParams, model: nn.Module, prefix: Prefix, split: str, view: View | None
    ) -> BankRequest:
        images = self._load_images(params)[split == "val"]
        preprocessing, device = self._bench.preprocess(params.backbone), self._bench.device

        def compute(out: Tensor, on_progress: Callable[[int, int], None]) -> None:
            if (earlier := self._find_earlier(params, model, prefix)) is not None:
                theirs = replace(params, unfrozen_layers=earlier.unfrozen_layers)
                request = self._request(theirs, model, earlier.prefix, split, view)
                if self._carry_on(earlier, request, model, sample=sample, out=out, on_progress=on_progress):
                    return
                self._earlier.give_up(params)
            compute_maps(
                model,
                prefix.partition,
                images,
                preprocessing,
                device,
                precision=params.precision,
                view=view,
                out=out,
                on_progress=on_progress,
            )

        def sample() -> Tensor:
            few, precision = take_sample(images), params.precision
            return compute_maps(model, prefix.partition, few, preprocessing, device, precision=precision, view=view)

        return BankRequest(
            what="maps",
            backbone=params.backbone,
            split=split,
            images=images,
            view=view,
            width=prefix.partition.width,
            dtype=find_map_dtype(device, params.precision),
            part={"weights": prefix.weights_hash, "unfrozen_layers": params.unfrozen_layers},
            compute=compute,
            sample=sample,
        )

    def _find_earlier(self, params: TrialParams, model: nn.Module, prefix: Prefix) -> EarlierCut | None:
        """Return the cut whose maps lead to a trial's, if the cache can hold those of both."""
        earlier = self._earlier.find(params, model, prefix.partition, self._levels[params.backbone])
        if earlier is None:
            return None
        train, val = self._load_images(params)
        n_rows = len(list_views(params)) * len(train.labels) + len(val.labels)
        width = prefix.partition.width + earlier.prefix.partition.width
        n_bytes = n_rows * width * find_map_dtype(self._bench.device, params.precision).itemsize
        return earlier if n_bytes <= budget_bytes() else None

    def _carry_on(
        self,
        earlier: EarlierCut,
        request: BankRequest,
        model: nn.Module,
        *,
        sample: Callable[[], Tensor],
        out: Tensor,
        on_progress: Callable[[int, int], None],
    ) -> bool:
        """Fill a bank on from an earlier cut's, which is computed if it is not there; return whether that worked.

        Args:
            earlier: The cut.
            request: Its bank.
            model: The trial's.
            sample: Computes the first rows from images.
            out: The bank to fill.
            on_progress: Told how many images are done, of how many.
        """
        device, precision = self._bench.device, self._bench.spec.training.precision
        try:
            self._check_rounded(request, model, earlier.prefix)
            bank, maps = self._banks.open(request)
            if not bank.is_kept:
                return False  # it would be computed again for the next view's sake
            continue_maps(
                model,
                earlier.bridge,
                maps,
                request.images,
                device,
                precision=precision,
                out=out,
                on_progress=on_progress,
            )
            expected = sample()
            return agree(out[: len(expected)].to(device, expected.dtype), expected, device, precision)
        except Exception as error:  # a user's backbone may raise anything between two cuts, and images serve as well
            if comes_from_lost_device(error):
                raise
            return False
