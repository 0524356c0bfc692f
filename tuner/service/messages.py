"""What crosses the socket between the coordinator and a worker: one JSON object per line, nothing unpickled."""

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tuner.trial import EpochResult, TrialOutcome, TrialParams

# --- coordinator to worker ---


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The first message: the study, and what the worker is to be."""

    spec: str
    """The checked spec as JSON."""
    device: str
    """``cpu`` or ``cuda`` (the one device that the worker sees), or ``none`` for a worker that only describes."""
    n_threads: int
    """Threads for decoding."""


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Look at the data, the backbones and the weights; answered by ``Description``."""

    timed: bool = False
    """Also time a training step of every backbone."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make something ready for every worker, once: decode the images, or fetch or pretrain a backbone's weights."""

    data_hash: str
    """What the data must still be."""
    backbone: str | None
    """None: the images."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one trial; answered by an ``EpochDone`` for each epoch, each waiting for a ``Verdict``."""

    data_hash: str
    """What the data must still be."""
    number: int
    params: TrialParams


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a trial is to do after an epoch. ``keep`` after the last one: write the model folder."""

    action: Literal["go_on", "stop", "keep"]
    folder: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the model folder says of where its model came from."""


# --- worker to coordinator ---


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The worker is up."""

    cuda_devices: tuple[str, ...]
    """Names of the CUDA devices that it sees."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a study means on this machine."""

    classes: tuple[str, ...]
    split_counts: dict[str, int]
    splits: str
    data_hash: str
    group_counts: dict[str, int]
    n_params: dict[str, int]
    """Trainable numbers of each backbone, head included."""
    weights: dict[str, str]
    """Where each backbone's weights come from, for a person."""
    fingerprints: dict[str, str]
    """Identity of each backbone's weights."""
    preprocessing: dict[str, dict[str, Any]]
    """``mean``, ``std`` and ``interpolation`` of each backbone."""
    versions: dict[str, str]
    store_bytes: int
    """Disk that the decoded images take."""
    free_bytes: int
    """Disk that the cache folder has."""
    seconds_per_image: dict[str, float]
    """Full fine-tuning of one image in one epoch, by backbone; empty unless timed."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line for the user."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The images (None) or a backbone's weights are ready."""

    backbone: str | None


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """A trial finished an epoch and waits for its verdict."""

    number: int
    result: EpochResult


@dataclass(frozen=True, kw_only=True)
class TrialDone:
    """A trial ended."""

    number: int
    outcome: TrialOutcome
    kept: bool = False
    """Whether its model folder was written."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The user's mistake; the run ends."""

    error: str
    """Name of the ``TunerError``."""
    message: str


@dataclass(frozen=True, kw_only=True)
class Crashed:
    """A bug; the run ends."""

    traceback: str


Request = Setup | Describe | Prepare | Train | Verdict
Reply = Hello | Description | Note | Prepared | EpochDone | TrialDone | Refused | Crashed
Message = Request | Reply

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Setup,
        Describe,
        Prepare,
        Train,
        Verdict,
        Hello,
        Description,
        Note,
        Prepared,
        EpochDone,
        TrialDone,
        Refused,
        Crashed,
    )
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "params": TrialParams.from_json,
    "result": lambda values: EpochResult(**values),
    "outcome": TrialOutcome.from_json,
    "classes": tuple,
    "cuda_devices": tuple,
    "notes": tuple,
}
"""How a field comes back from JSON, by its name."""


def encode(message: Message) -> bytes:
    """Return a message as one line of JSON."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Read what ``encode`` wrote."""
    values = json.loads(line)
    kind = _KINDS[values.pop("kind")]
    return kind(**{name: _READERS.get(name, _keep)(value) for name, value in values.items()})


def _keep(value: Any) -> Any:
    return value


class Lines:
    """Cuts the bytes of a socket into messages."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    def receive(self) -> Iterator[Message]:
        """Read once from the socket and yield the messages that are complete.

        Raises:
            EOFError: If the other side is gone.
        """
        try:
            chunk = self._connection.recv(1 << 16)
        except ConnectionError as error:
            raise EOFError from error
        if not chunk:
            raise EOFError
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield decode(line)
