"""What heads train on in a worker: features of the study's images, each computed once and kept in the cache."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tuner.data.feature_store import FeatureBank
from tuner.data.image_set import ImageSet
from tuner.data.views import View, find_view
from tuner.service.messages import Coordinator
from tuner.service.open_banks import BankRequest, OpenBanks
from tuner.service.workbench import Workbench
from tuner.training.head_features import (
    Head,
    NotCacheable,
    compute_features,
    find_linear_head,
    hash_body,
    sample_features,
    verify_head,
)
from tuner.training.rounding import repeats
from tuner.trial import TrialParams


@dataclass(frozen=True, kw_only=True)
class Body:
    """A backbone below its head, verified: the same in all trials, and all that a head sees of its images."""

    head: Head
    """Of one of its models, on the CPU; what trials' first heads are drawn like."""
    weights_hash: str

    @property
    def width(self) -> int:
        """Numbers per image that the head takes."""
        return self.head.weight.shape[1]


class FeatureBanks:
    """Features by backbone and view. Mutable: it keeps one model."""

    def __init__(self, bench: Workbench, coordinator: Coordinator) -> None:
        self._bench = bench
        self._bodies: dict[str, Body | NotCacheable] = {}
        self._banks = OpenBanks(bench, coordinator)
        self._model: tuple[str, nn.Module] | None = None

    def find_body(self, params: TrialParams) -> Body:
        """Return the body of a recipe's backbone, verified against the whole model when it is first used.

        Raises:
            NotCacheable: If its heads cannot be trained on features.
        """
        if params.backbone not in self._bodies:
            try:
                self._bodies[params.backbone] = self._verify_body(params)
            except NotCacheable as error:
                self._bodies[params.backbone] = NotCacheable(str(error))  # without a traceback that holds the model
        body = self._bodies[params.backbone]
        if isinstance(body, NotCacheable):
            raise body
        return body

    def _verify_body(self, params: TrialParams) -> Body:
        model = self._bench.make_model(params)
        head = copy.deepcopy(find_linear_head(model))
        weights_hash = hash_body(model)
        train, _ = self._load_images(params)
        preprocessing, device = self._bench.preprocess(params.backbone), self._bench.device
        precision = params.precision
        twin = self._bench.make_model(replace(params, seed=params.seed ^ 1))
        if hash_body(twin) != weights_hash:
            raise NotCacheable("its weights are drawn anew for every trial")
        # What is neither a parameter nor a buffer shows in the features alone.
        expected = sample_features(twin, train, preprocessing, device, precision=precision)
        del twin  # before the model moves to the device: two may not fit
        found = sample_features(model, train, preprocessing, device, precision=precision)
        if not repeats(found, expected, device):
            raise NotCacheable("its weights are drawn anew for every trial")
        verify_head(model, train, preprocessing, device)
        self._model = params.backbone, model
        return Body(head=head, weights_hash=weights_hash)

    def _load_images(self, params: TrialParams) -> tuple[ImageSet, ImageSet]:
        return self._bench.load_images(self._bench.preprocess(params.backbone).interpolation)

    def open_train(self, params: TrialParams, epoch: int) -> tuple[FeatureBank, Tensor]:
        """Return the features of the training images as an epoch of a recipe shows them.

        Raises:
            NotCacheable: If the heads of the recipe's backbone cannot be trained on features.
        """
        return self._open(params, "train", self._load_images(params)[0], find_view(params, epoch))

    def open_val(self, params: TrialParams) -> tuple[FeatureBank, Tensor]:
        """Return the features of the validation images as they are.

        Raises:
            NotCacheable: As above.
        """
        return self._open(params, "val", self._load_images(params)[1], None)

    def _open(self, params: TrialParams, split: str, images: ImageSet, view: View | None) -> tuple[FeatureBank, Tensor]:
        """Return a bank, and its features on the device, shape ``(n_images, width)``."""
        body = self.find_body(params)
        preprocessing, device = self._bench.preprocess(params.backbone), self._bench.device

        def compute(out: Tensor, on_progress: Callable[[int, int], None]) -> None:
            model = self._take_model(params)
            compute_features(
                model,
                images,
                preprocessing,
                device,
                precision=params.precision,
                view=view,
                out=out,
                on_progress=on_progress,
            )

        def sample() -> Tensor:
            model = self._take_model(params)
            return sample_features(model, images, preprocessing, device, precision=params.precision, view=view).float()

        request = BankRequest(
            what="features",
            backbone=params.backbone,
            split=split,
            images=images,
            view=view,
            width=body.width,
            dtype=torch.float32,
            part={"weights": body.weights_hash},
            compute=compute,
            sample=sample,
        )
        bank, features = self._banks.open(request)
        return bank, features.to(device)

    def _take_model(self, params: TrialParams) -> nn.Module:
        if self._model is None or self._model[0] != params.backbone:
            self._model = None  # before the next one is made: two may not fit
            self._model = params.backbone, self._bench.make_model(params)
        return self._model[1]

    def release_memory(self) -> None:
        """Forget what can be had again."""
        self._model = None
        self._banks.release_memory()
