"""How messages cross the socket between the coordinator and a worker: one JSON object per line, nothing unpickled."""

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from tuner.service.messages import (
    Alive,
    Crashed,
    DataRead,
    Describe,
    Description,
    EpochDone,
    GivenBack,
    Hello,
    Message,
    Note,
    Prepare,
    Prepared,
    Probe,
    Probed,
    Progress,
    Refused,
    Setup,
    Started,
    Train,
    TrialDone,
    Verdict,
)
from tuner.trial import EpochResult, Repeat, TrialOutcome, TrialParams, Usage

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Setup,
        Describe,
        Prepare,
        Probe,
        Train,
        Verdict,
        DataRead,
        Hello,
        Alive,
        Description,
        Note,
        Progress,
        Prepared,
        Probed,
        Started,
        EpochDone,
        TrialDone,
        GivenBack,
        Refused,
        Crashed,
    )
}
_READERS: dict[str, Callable[[Any], Any]] = {
    "members": lambda pairs: tuple((number, TrialParams.from_json(params)) for number, params in pairs),
    "params": TrialParams.from_json,
    "memory": lambda pairs: tuple((held, free) for held, free in pairs),
    "results": lambda pairs: tuple((number, EpochResult(**result)) for number, result in pairs),
    "outcome": TrialOutcome.from_json,
    "usage": lambda values: Usage(**values),
    "repeats": lambda values: tuple(Repeat(**each) for each in values),
    "cuts": tuple,
    "stop": tuple,
    "numbers": tuple,
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
