"""What heads train on in a worker: features of the study's images, each computed once and kept in the cache."""

import copy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.feature_store import FeatureBank, open_bank
from tuner.data.image_set import ImageSet
from tuner.data.views import View, find_view
from tuner.service.workbench import Workbench
from tuner.training.head_features import Head, NotCacheable, compute_features, find_linear_head, hash_body, verify_head
from tuner.trial import TrialParams

_FORMAT = 1
"""Raised when the same key would give other features."""
_MAX_OPEN = 64


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
    """Features by backbone and view. Mutable: it keeps the banks that were used last, and one model."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._bodies: dict[str, Body | NotCacheable] = {}
        self._banks: dict[tuple[str, str, View | None], tuple[FeatureBank, Tensor]] = {}
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
        if hash_body(self._bench.make_model(replace(params, seed=params.seed ^ 1))) != weights_hash:
            raise NotCacheable("its weights are drawn anew for every trial")
        train, _ = self._load_images(params)
        verify_head(model, train, self._bench.preprocess(params.backbone), self._bench.device)
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
        name = (params.backbone, split, view)
        opened = self._banks.pop(name, None)  # put back as the last used
        if opened is None:
            width = self.find_body(params).width
            bank = open_bank(
                self._describe(params, split, images, view),
                shape=(len(images.labels), width),
                fill=lambda out: self._fill(torch.from_numpy(out), params, images, view),
                text=f"{params.backbone}: {len(images.labels)} {split} images"
                + (f", view {view.number} at strength {view.strength:g}" if view else ""),
            )
            opened = bank, torch.from_numpy(bank.features).to(self._bench.device)
        self._banks[name] = replace(opened[0], was_there=True), opened[1]
        if len(self._banks) > _MAX_OPEN:
            del self._banks[next(iter(self._banks))]
        return opened

    def _fill(self, out: Tensor, params: TrialParams, images: ImageSet, view: View | None) -> None:
        if self._model is None or self._model[0] != params.backbone:
            self._model = None  # before the next one is made: two may not fit
            self._model = params.backbone, self._bench.make_model(params)
        preprocessing = self._bench.preprocess(params.backbone)
        compute_features(self._model[1], images, preprocessing, self._bench.device, view=view, out=out)

    def _describe(self, params: TrialParams, split: str, images: ImageSet, view: View | None) -> dict[str, Any]:
        """Return everything that features depend on, as JSON."""
        bench = self._bench
        return {
            "format": _FORMAT,
            "data": bench.data.hash,
            "split": split,
            "rows": sha256(images.rows.numpy().tobytes()).hexdigest(),  # bad images are left out
            "image_size": bench.spec.data.image_size,
            "resize": bench.spec.data.resize,
            "preprocessing": asdict(bench.preprocess(params.backbone)),
            "backbone": params.backbone,
            "kwargs": bench.section(params.backbone).kwargs,
            "weights": self.find_body(params).weights_hash,
            "view": asdict(view) if view else None,
            "dtype": "bfloat16" if bench.device.type == "cuda" else "float32",
            "versions": {name: version(name) for name in ("torch", "timm", "pillow")},
        }

    def release_memory(self) -> None:
        """Forget what can be had again."""
        self._model = None
        self._banks.clear()
