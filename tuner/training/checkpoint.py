"""What an interrupted trial goes on from: all that its next epochs depend on, in one file.

The file is written under a temporary name, flushed, and moved into place, so the last good one stays until the next is
whole. Reading unpickles nothing (``weights_only=True``) and looks at the checksums, which torch's own reader skips.
What a user's backbone keeps besides its parameters and buffers, in plain attributes, is not held.
"""

import json
import os
import random
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tuner.errors import first_line
from tuner.paths import replacing
from tuner.trial import EpochResult, TrialParams

_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class MovingParts:
    """What changes while a trial trains: the objects themselves, from which a state is taken and put back."""

    model: nn.Module
    """Frozen as the trial asks."""
    optimizer: Optimizer
    schedule: LRScheduler
    generators: Mapping[str, torch.Generator]
    """The trial's own, by name. Besides, those of torch, Python and NumPy are held: backbones may draw from them."""
    device: torch.device

    @cached_property
    def frozen_hash(self) -> str:
        """Identity of the weights that do not train; they are made anew, not held."""
        return _hash_others(self.model, {name for name, each in self.model.named_parameters() if each.requires_grad})

    def take_state(self) -> dict[str, Any]:
        """Return all that the next epochs depend on. Its tensors are the training's own: write it before they move."""
        parameters = self.model.named_parameters()
        return {
            "parameters": {name: parameter.detach() for name, parameter in parameters if parameter.requires_grad},
            "buffers": dict(self.model.named_buffers()),
            "frozen_hash": self.frozen_hash,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "global_generators": _take_global_generators(self.device),
        }

    def put_state(self, state: dict[str, Any]) -> None:
        """Make everything as it was, and empty the state, whose memory is not needed any more.

        Args:
            state: Fits, since ``CheckpointFile.read`` has looked.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["parameters"][name])
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        _put_global_generators(state["global_generators"], self.device)
        state.clear()


def _take_global_generators(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state that a user's backbone may draw from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def _put_global_generators(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - as above


def _hash_others(model: nn.Module, names: Iterable[str]) -> str:
    """Return the SHA-256 of a model's parameters but for some: names, types and values."""
    left_out, digest = set(names), sha256()
    for name, parameter in model.named_parameters():
        if name not in left_out:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trial after an epoch."""

    number: int
    """Trial that wrote it: an earlier attempt at the same."""
    results: tuple[EpochResult, ...]
    """What each epoch showed, from the first."""
    state: dict[str, Any]
    """Of ``MovingParts.take_state``, on the CPU."""


class CheckpointFile:
    """The place of a trial's checkpoint. Mutable: it knows when it was last written."""

    def __init__(
        self,
        path: Path,
        *,
        number: int,
        identity: dict[str, Any],
        every_seconds: float,
        note: Callable[[str], None],
    ) -> None:
        """Say where it is; nothing is read or written yet.

        Args:
            path: The file; its folder need not exist.
            number: Of the trial that trains now.
            identity: Of ``identify_trial``.
            every_seconds: Least time between two writes, and before the first.
            note: Told in one line what the user should know.
        """
        self._path, self._number, self._identity = path, number, identity
        self._every_seconds, self._note = every_seconds, note
        self._written = monotonic()
        self._has_failed = False

    def read(self, model: nn.Module) -> Checkpoint | None:
        """Return the checkpoint, unless there is none, or none of this trial that is whole and fits.

        Args:
            model: The trial's, as it is before its first step.
        """
        try:
            content = _load(self._path)
            _check_identity(content, self._identity)
            _check_fit(model, content["state"])
            results = tuple(EpochResult(**result) for result in content["results"])
            return Checkpoint(number=content["number"], results=results, state=content["state"])
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - there is no end to what a torn or foreign file may raise
            reason = first_line(error)
            self._note(f"trial {self._number} starts at epoch 1, its checkpoint cannot be used: {reason}")
            return None

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since the last write."""
        return monotonic() - self._written >= self._every_seconds

    def write(self, results: Sequence[EpochResult], state: dict[str, Any]) -> None:
        """Replace the checkpoint. If that fails the older one stays, the user is told once, and the trial goes on.

        Args:
            results: What each epoch showed, from the first.
            state: Of ``MovingParts.take_state``.
        """
        content = {
            "identity": self._identity,
            "number": self._number,
            "results": [asdict(result) for result in results],
            "state": state,
        }
        try:
            with replacing(self._path) as temporary, temporary.open("wb") as file:
                torch.save(content, file)
            _flush_folder(self._path.parent)
        except (OSError, RuntimeError) as error:
            if not self._has_failed:
                self._note(f"trial {self._number} goes on without a new checkpoint: {_find_reason(error)}")
            self._has_failed = True
        self._written = monotonic()  # from its end, so that slow disks do not spend the time on nothing else


def identify_trial(params: TrialParams, device: torch.device, *, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be of the same trial, on the same kind of device.

    Args:
        params: The trial's.
        device: Where it trains.
        made_from: What else decides its images and its model, as for JSON.
    """
    return {
        "format": _FORMAT,
        "torch": torch.__version__.split("+")[0],
        "params": params.to_json(),
        "made_from": json.dumps(made_from, sort_keys=True, default=str),
        "device": device.type,
    }


def read_made_from(path: Path) -> dict[str, Any]:
    """Return what else than its recipe a checkpoint's trial was made from; empty if there is no whole checkpoint."""
    try:
        made_from: dict[str, Any] = json.loads(_load(path)["identity"]["made_from"])
    except Exception:  # noqa: BLE001 - as in ``CheckpointFile.read``, which tells it
        return {}
    return made_from


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_identity(content: dict[str, Any], identity: dict[str, Any]) -> None:
    if _complete(content["identity"]) != _complete(identity):
        raise ValueError("it is of another recipe, other images, another kind of device or another version")


def _complete(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity whose recipe names a precision: one from before there was a choice does not."""
    return identity | {"params": {"precision": "auto", **identity.get("params", {})}}


def _check_fit(model: nn.Module, state: dict[str, Any]) -> None:
    """Raise ValueError unless the state's tensors are the model's, and all other weights are what they were."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    trained = {name: parameter for name, parameter in parameters.items() if name in state["parameters"]}
    if _describe(trained) != _describe(state["parameters"]) or _describe(buffers) != _describe(state["buffers"]):
        raise ValueError("its weights are of another model")
    if _hash_others(model, trained) != state["frozen_hash"]:
        raise ValueError("the weights that do not train have changed")


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _find_reason(error: OSError | RuntimeError) -> str:
    """Return why writing failed; torch's writer raises its own error while it handles the system's."""
    cause = error if isinstance(error, OSError) else error.__context__
    return (isinstance(cause, OSError) and cause.strerror) or str(error).partition("\n")[0]


def _flush_folder(folder: Path) -> None:
    """Have the file's new name survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
