"""What heads train on in a worker: features of the study's images, each computed once and kept in the cache."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tuner.data.feature_store import FeatureBank, open_bank
from tuner.data.image_set import ImageSet
from tuner.data.memory import available_memory
from tuner.data.views import View, find_view
from tuner.service.messages import Coordinator, report_progress
from tuner.service.workbench import Workbench
from tuner.training.head_features import (
    Head,
    NotCacheable,
    agree,
    compute_features,
    find_linear_head,
    hash_body,
    sample_features,
    verify_head,
)
from tuner.trial import TrialParams

_FORMAT = 1
"""Raised when the same key would give other features."""
_MAX_OPEN = 64
_HOST_FRACTION = 0.25
"""Share of the free memory that open banks which the cache does not hold may take together."""
_DEVICE_FRACTION = 0.2
"""Share of a CUDA device's memory that open banks may take together."""
_GIGABYTE = 1e9


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


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A bank in use."""

    bank: FeatureBank
    features: Tensor
    """On the device."""

    @property
    def host_bytes(self) -> int:
        """Memory that only closing it gives back; a mapped file's pages are the kernel's."""
        return 0 if self.bank.is_kept else self.bank.features.nbytes

    @property
    def device_bytes(self) -> int:
        return self.features.nbytes if self.features.is_cuda else 0


def choose_closed(sizes: Sequence[int], limit: float) -> tuple[int, ...]:
    """Return the positions of the banks to close so that the others take no more bytes than a limit.

    Args:
        sizes: Bytes of each, the one used longest ago first. The last is in use and stays, whatever it takes.
        limit: Bytes.
    """
    closed, left = [], sum(sizes)
    for position, size in enumerate(sizes[:-1]):
        if left > limit and size:
            closed.append(position)
            left -= size
    return tuple(closed)


class FeatureBanks:
    """Features by backbone and view. Mutable: it keeps the banks that were used last, and one model."""

    def __init__(self, bench: Workbench, coordinator: Coordinator) -> None:
        self._bench, self._coordinator = bench, coordinator
        self._bodies: dict[str, Body | NotCacheable] = {}
        self._banks: dict[tuple[str, str, View | None], _Opened] = {}
        self._model: tuple[str, nn.Module] | None = None
        self._has_noted = False

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
        twin = self._bench.make_model(replace(params, seed=params.seed ^ 1))
        if hash_body(twin) != weights_hash:
            raise NotCacheable("its weights are drawn anew for every trial")
        # What is neither a parameter nor a buffer shows in the features alone.
        expected = sample_features(twin, train, preprocessing, device)
        del twin  # before the model moves to the device: two may not fit
        found = sample_features(model, train, preprocessing, device)
        if not (torch.equal(found, expected) if device.type == "cpu" else agree(found, expected, device)):
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
        name = (params.backbone, split, view)
        opened = self._banks.pop(name, None)  # put back as the last used
        if opened is None:
            bank = self._open_bank(params, split, images, view)
            opened = _Opened(bank=bank, features=torch.from_numpy(bank.features).to(self._bench.device))
        self._banks[name] = replace(opened, bank=replace(opened.bank, was_there=True))
        self._close_old()
        return opened.bank, opened.features

    def _open_bank(self, params: TrialParams, split: str, images: ImageSet, view: View | None) -> FeatureBank:
        n_images, width = len(images.labels), self.find_body(params).width
        size = f"{n_images * width * 4 / _GIGABYTE:.1f} GB"
        text = f"{params.backbone}: {n_images} {split} images"
        try:
            bank = open_bank(
                self._describe(params, split, images, view),
                shape=(n_images, width),
                fill=lambda out: self._fill(torch.from_numpy(out), params, images, view),
                accept=lambda kept: self._is_current(kept, params, images, view),
                text=text + (f", view {view.number} at strength {view.strength:g}" if view else ""),
            )
        except MemoryError as error:
            reason = f"its features take {size}, more than the cache (TUNER_CACHE_GB) and memory allow"
            raise NotCacheable(reason) from error
        if not bank.is_kept and not self._has_noted:
            self._has_noted = True
            self._bench.note(
                f"features of {params.backbone} are not kept: the cache has no room for their {size} or cannot be "
                "written; TUNER_CACHE_GB sets how much it may hold"
            )
        return bank

    def _close_old(self) -> None:
        """Close the banks used longest ago until the others take no more than their share of memory."""
        names, opened = list(self._banks), list(self._banks.values())
        closed = set(range(len(names) - _MAX_OPEN))
        host = [each.host_bytes for each in opened]
        if any(host):
            closed.update(choose_closed(host, _HOST_FRACTION * (available_memory() + sum(host))))
        if self._bench.device.type == "cuda":
            _, device_bytes = torch.cuda.mem_get_info(self._bench.device)
            closed.update(choose_closed([each.device_bytes for each in opened], _DEVICE_FRACTION * device_bytes))
        for position in closed:
            del self._banks[names[position]]

    def _is_current(self, kept: NDArray[np.float32], params: TrialParams, images: ImageSet, view: View | None) -> bool:
        """Whether kept features are what the backbone computes today: a user may have edited its code."""
        device, preprocessing = self._bench.device, self._bench.preprocess(params.backbone)
        expected = sample_features(self._take_model(params), images, preprocessing, device, view=view).float()
        return agree(torch.from_numpy(kept[: len(expected)]).to(device), expected, device)

    def _fill(self, out: Tensor, params: TrialParams, images: ImageSet, view: View | None) -> None:
        preprocessing = self._bench.preprocess(params.backbone)
        report = report_progress(self._coordinator, f"computing features of {params.backbone}")
        compute_features(
            self._take_model(params), images, preprocessing, self._bench.device, view=view, out=out, on_progress=report
        )

    def _take_model(self, params: TrialParams) -> nn.Module:
        if self._model is None or self._model[0] != params.backbone:
            self._model = None  # before the next one is made: two may not fit
            self._model = params.backbone, self._bench.make_model(params)
        return self._model[1]

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
