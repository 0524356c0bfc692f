"""Ctrl-C and SIGTERM as requests to stop between two events."""

import signal
import threading
from types import FrameType
from typing import Literal, Self

Stop = Literal["sigint", "sigterm"]


class StopSignals:
    """Remembers the first signal, so that bookkeeping is never cut in two; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: Stop | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = "sigint" if number == signal.SIGINT else "sigterm"
