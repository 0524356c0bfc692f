"""Banks in use in a worker: found in the cache or computed, checked before they are trusted, the last kept open."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.data.cache import budget_bytes
from tuner.data.feature_store import FeatureBank, Values, holds_bank, open_bank
from tuner.data.image_set import ImageSet
from tuner.data.memory import available_memory
from tuner.data.views import View
from tuner.models.backbone import hash_own_code
from tuner.service.messages import Coordinator, report_progress
from tuner.service.workbench import Workbench
from tuner.spec.own_code import is_users_code
from tuner.training.device import computes_in_bfloat16
from tuner.training.head_features import NotCacheable
from tuner.training.rounding import agree

_FORMAT = 1
"""Raised when the same key would give other features."""
_MAX_OPEN = 64
_HOST_FRACTION = 0.25
"""Share of the free memory that open banks which the cache does not hold may take together."""
_DEVICE_FRACTION = 0.2
"""Share of a CUDA device's memory that open banks may take together."""
_CACHE_FRACTION = 0.125
"""Share of the cache's budget that a worker keeps mapped: what is mapped is never evicted to make room for others."""
_GIGABYTE = 1e9
_KEPT_AS: dict[torch.dtype, type[np.generic]] = {torch.float32: np.float32, torch.bfloat16: np.uint16}


class NoRoom(NotCacheable):
    """Neither the cache nor the memory has room for a bank now; the text says so in one line."""


@dataclass(frozen=True, kw_only=True)
class BankRequest:
    """What a bank holds, and how it is computed."""

    what: str
    """``features``, or what else a person calls it."""
    backbone: str
    split: str
    images: ImageSet
    view: View | None
    width: int
    """Numbers per image."""
    dtype: torch.dtype
    part: dict[str, Any]
    """JSON; tells the part of the backbone that computes it from all others, weights included."""
    compute: Callable[[Tensor, Callable[[int, int], None]], None]
    """Writes all rows; told how many are done, of how many."""
    sample: Callable[[], Tensor]
    """Computes the rows of ``take_sample``."""

    @property
    def name(self) -> Hashable:
        """What tells it from the other banks of a study."""
        return self.backbone, self.split, self.view, self.what, self.part.get("unfrozen_layers")

    @property
    def n_bytes(self) -> int:
        """Return how much it takes."""
        return len(self.images.labels) * self.width * self.dtype.itemsize

    @property
    def text(self) -> str:
        """What it holds, for a person who lists the cache."""
        shown = f", view {self.view.number} at strength {self.view.strength:g}" if self.view else ""
        return f"{self.backbone}: {len(self.images.labels)} {self.split} images{shown}"


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A bank in use."""

    bank: FeatureBank
    values: Tensor

    @property
    def host_bytes(self) -> int:
        """Memory that only closing it gives back; a mapped file's pages are the kernel's."""
        return 0 if self.bank.is_kept else self.bank.features.nbytes

    @property
    def mapped_bytes(self) -> int:
        """Of the cache, which only closing it lets go of."""
        return self.bank.features.nbytes if self.bank.is_kept else 0

    @property
    def device_bytes(self) -> int:
        return self.values.nbytes if self.values.is_cuda else 0


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


class OpenBanks:
    """Banks by what they hold. Mutable: it keeps those that were used last."""

    def __init__(self, bench: Workbench, coordinator: Coordinator) -> None:
        self._bench, self._coordinator = bench, coordinator
        self._opened: dict[Hashable, _Opened] = {}
        self._has_noted = False

    def open(self, request: BankRequest) -> tuple[FeatureBank, Tensor]:
        """Return a bank and its values, shape ``(n_images, width)``: on the device, or on the host if they are many.

        Raises:
            NoRoom: If neither the cache nor the memory has room for it.
        """
        opened = self._opened.pop(request.name, None)  # put back as the last used
        if opened is None:
            try:
                bank = self._open_bank(request)
            except NoRoom:
                if not self._opened:
                    raise
                self._opened.clear()  # what is mapped is never evicted, and may be what fills the cache
                bank = self._open_bank(request)
            opened = _Opened(bank=bank, values=self._place(_as_tensor(bank.features, request.dtype)))
        self._opened[request.name] = replace(opened, bank=replace(opened.bank, was_there=True))
        self._close_old()
        return opened.bank, opened.values

    def is_at_hand(self, request: BankRequest) -> bool:
        """Whether a bank need not be computed, unless it turns out to be stale."""
        return self.is_open(request) or holds_bank(self._describe(request))

    def is_open(self, request: BankRequest) -> bool:
        """Whether opening a bank takes no more memory."""
        return request.name in self._opened

    def has_room(self, n_bytes: int) -> bool:
        """Whether the cache or the memory can hold so many bytes at once, whatever must go for them."""
        return n_bytes <= max(budget_bytes(), _HOST_FRACTION * available_memory())

    def count_later(self, requests: Iterable[BankRequest]) -> int:
        """Return the bytes of the device's memory that opening some banks takes at most; on the CPU, the process's."""
        sizes = [request.n_bytes for request in requests if not self.is_open(request)]
        if self._bench.device.type != "cuda":
            return sum(sizes)
        _, total = torch.cuda.mem_get_info(self._bench.device)
        room = self._find_device_room()
        return min(sum(size for size in sizes if size <= room), int(_DEVICE_FRACTION * total))

    def release_memory(self) -> None:
        """Forget what can be had again."""
        self._opened.clear()

    def _open_bank(self, request: BankRequest) -> FeatureBank:
        size = f"{request.n_bytes / _GIGABYTE:.1f} GB"
        report = report_progress(self._coordinator, f"computing {request.what} of {request.backbone}")
        try:
            bank = open_bank(
                self._describe(request),
                shape=(len(request.images.labels), request.width),
                fill=lambda out: request.compute(_as_tensor(out, request.dtype), report),
                accept=lambda kept: self._is_current(kept, request),
                text=request.text,
                dtype=_KEPT_AS[request.dtype],
            )
        except MemoryError as error:
            reason = f"its {request.what} take {size}, more than the cache (TUNER_CACHE_GB) and memory allow"
            raise NoRoom(reason) from error
        if not bank.is_kept and not self._has_noted:
            self._has_noted = True
            self._bench.note(
                f"{request.what} of {request.backbone} are not kept: the cache has no room for their {size} or cannot "
                "be written; TUNER_CACHE_GB sets how much it may hold"
            )
        return bank

    def _is_current(self, kept: Values, request: BankRequest) -> bool:
        """Whether kept values are what the backbone computes today: a user may have edited what its code imports."""
        expected = request.sample()
        found = _as_tensor(kept[: len(expected)], request.dtype).to(self._bench.device, expected.dtype)
        return agree(found, expected, self._bench.device, self._bench.spec.training.precision)

    def _place(self, values: Tensor) -> Tensor:
        """Move values to the device, unless they would take much of it: those are fetched batch by batch."""
        if self._bench.device.type == "cuda" and values.nbytes > self._find_device_room():
            return values
        return values.to(self._bench.device)

    def _find_device_room(self) -> float:
        """Return the bytes of a bank that is placed on a CUDA device at most."""
        free, total = torch.cuda.mem_get_info(self._bench.device)
        return min(_DEVICE_FRACTION * total, free / 2)

    def _close_old(self) -> None:
        """Close the banks used longest ago until the others take no more than their share of memory."""
        names, opened = list(self._opened), list(self._opened.values())
        closed = set(range(len(names) - _MAX_OPEN))
        host = [each.host_bytes for each in opened]
        closed.update(choose_closed([each.mapped_bytes for each in opened], _CACHE_FRACTION * budget_bytes()))
        if any(host):
            closed.update(choose_closed(host, _HOST_FRACTION * (available_memory() + sum(host))))
        if self._bench.device.type == "cuda":
            _, device_bytes = torch.cuda.mem_get_info(self._bench.device)
            closed.update(choose_closed([each.device_bytes for each in opened], _DEVICE_FRACTION * device_bytes))
        for position in closed:
            del self._opened[names[position]]

    def _describe(self, request: BankRequest) -> dict[str, Any]:
        """Return everything that a bank depends on, as JSON."""
        bench = self._bench
        code = {"code": hash_own_code(request.backbone)} if is_users_code(request.backbone) else {}
        return {
            "format": _FORMAT,
            "data": bench.data.hash,
            "split": request.split,
            "rows": sha256(request.images.rows.numpy().tobytes()).hexdigest(),  # bad images are left out
            "image_size": bench.spec.data.image_size,
            "resize": bench.spec.data.resize,
            "preprocessing": asdict(bench.preprocess(request.backbone)),
            "backbone": request.backbone,
            "kwargs": bench.section(request.backbone).kwargs,
            **request.part,
            **code,
            "view": asdict(request.view) if request.view else None,
            "device": bench.device.type,
            "dtype": "bfloat16" if computes_in_bfloat16(bench.device, bench.spec.training.precision) else "float32",
            "versions": {name: version(name) for name in ("torch", "timm", "pillow")},
        }


def _as_tensor(values: Values, dtype: torch.dtype) -> Tensor:
    """Return an array as a tensor that shares its memory."""
    return torch.from_numpy(values).view(dtype)
