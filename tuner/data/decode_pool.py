"""Many images decoded at a time: files in processes, since threads share one interpreter lock, and arrays in threads.

No fork of a process that holds torch, and no import of the caller's main module: see ``decode_process``. A process that
dies or hangs costs nothing: the images that it had begun are decoded once more, one at a time with nothing beside them,
and only one that ends its process again is a bad image. Large images are decoded so too, to bound the memory.
"""

import os
import selectors
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from json import loads
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tuner.data.decode_process import Opener, Target, decode_into, encode_line

_MODULE = "tuner.data.decode_process"
_LARGEST_CHUNK = 16
_N_IN_HAND = 2
"""Chunks that a process has: it decodes one while the next is on its way."""
_N_FAILED_STARTS = 3
_GRACE_SECONDS = 5.0
_SILENCE_SECONDS = 60.0
"""Silence after which a process counts as hanging. It starts in 0.2 s, and shows life between images."""


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Images that are decoded together. None of them: the start of a process, which it answers like a chunk."""

    positions: tuple[int, ...] = ()
    is_alone: bool = False
    """Whether it is one image that has to be decoded with nothing beside it."""
    is_suspect: bool = False
    """Whether a process died or hung when it had this one image, among others."""


class _DecodeProcess:
    """A decoding process, the socket to it and what it has been told to do."""

    def __init__(self, target: Target) -> None:
        self.connection, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    # -P: a file of the working directory must not shadow a module of ours
                    [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # codecs complain there about files that are then bad images
                    process_group=0,  # Ctrl-C in a terminal is for the caller alone
                )
        except OSError:
            self.connection.close()
            raise
        self.in_hand: deque[_Chunk] = deque()
        self._heard = time.monotonic()
        self._rest = b""
        self._send(_Chunk(), asdict(target))

    def give(self, chunk: _Chunk, files: Sequence[Path]) -> None:
        """Hand over images; a process that is gone shows when it is next heard."""
        images = [(position, str(files[position])) for position in chunk.positions]
        self._send(chunk, {"is_alone": chunk.is_alone, "images": images})

    def _send(self, chunk: _Chunk, message: object) -> None:
        if not self.in_hand:
            self._heard = time.monotonic()
        self.in_hand.append(chunk)
        try:
            self.connection.sendall(encode_line(message))
        except OSError:
            return

    def receive(self) -> Iterator[tuple[_Chunk, dict[int, str | None]]]:
        """Yield the chunks that are done, with the images that failed, or None for those to be decoded alone.

        Raises:
            EOFError: If the process is gone.
        """
        try:
            received = self.connection.recv(1 << 16)
        except ConnectionError as error:
            raise EOFError from error
        if not received:
            raise EOFError
        self._heard = time.monotonic()
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in filter(None, lines):
            yield self.in_hand.popleft(), dict(loads(line))

    def is_silent(self, limit: float) -> bool:
        """Whether the process has work and has shown no life for so many seconds; a start may take a minute."""
        if not self.in_hand:
            return False
        allowed = limit if self.in_hand[0].positions else max(limit, _SILENCE_SECONDS)
        return time.monotonic() - self._heard > allowed

    def describe_end(self) -> str:
        """Return how the process ended. Waits for its end."""
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """End the process, whatever it is doing; one that waits for a dead disk ends when the disk lets it."""
        self.connection.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)


class _Pool:
    """Processes, and what they have yet to do."""

    def __init__(
        self,
        target: Target,
        files: Sequence[Path],
        n_processes: int,
        on_image: Callable[[int, str], None],
        silence_limit: float,
    ) -> None:
        self._target = target
        self._files = files
        self._n_processes = n_processes
        self._on_image = on_image
        self._silence_limit = silence_limit
        self._first = 0
        """Images from here on have not been given to a process."""
        self._returned: deque[_Chunk] = deque()
        self._alone: deque[_Chunk] = deque()
        self._processes: list[_DecodeProcess] = []
        self._selector = selectors.DefaultSelector()
        self._n_failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()
        self._selector.close()

    def run(self) -> None:
        """Decode until all is done, or no process can be started."""
        while self._hand_out():
            for key, _ in self._selector.select(self._silence_limit / 4):
                self._hear(key.data)
            self._end_silent()

    def _hand_out(self) -> bool:
        """Start processes and give them work; return whether any has some."""
        self._start_processes()
        for process in self._processes:
            while len(process.in_hand) < _N_IN_HAND and (chunk := self._take_chunk()):
                process.give(chunk, self._files)
        if self._alone and self._processes and not self._is_busy():
            self._processes[0].give(self._alone.popleft(), self._files)
        return self._is_busy()

    def _is_busy(self) -> bool:
        return any(chunk.positions for process in self._processes for chunk in process.in_hand)

    def _start_processes(self) -> None:
        has_chunks = self._returned or self._first < len(self._files)
        n_wanted = self._n_processes if has_chunks else min(1, len(self._alone))
        while len(self._processes) < n_wanted and self._n_failed_starts < _N_FAILED_STARTS:
            try:
                process = _DecodeProcess(self._target)
            except OSError:
                self._n_failed_starts += 1
                continue
            self._processes.append(process)
            self._selector.register(process.connection, selectors.EVENT_READ, process)

    def _take_chunk(self) -> _Chunk | None:
        """Return images that may have others beside them. Chunks get smaller: all processes finish at the same time."""
        if self._returned:
            return self._returned.popleft()
        n_left = len(self._files) - self._first
        if not n_left:
            return None
        first, length = self._first, min(_LARGEST_CHUNK, 1 + n_left // (4 * self._n_processes))
        self._first += length
        return _Chunk(positions=tuple(range(first, first + length)))

    def _hear(self, process: _DecodeProcess) -> None:
        try:
            for chunk, reasons in process.receive():
                if not chunk.positions:
                    self._n_failed_starts = 0
                for position in chunk.positions:
                    if (reason := reasons.get(position, "")) is None:
                        self._alone.append(_Chunk(positions=(position,), is_alone=True))
                    else:
                        self._on_image(position, reason)
        except EOFError:
            self._bury(process, f"killed the process that decoded it: {process.describe_end()}")

    def _end_silent(self) -> None:
        """End the processes that hang; not one that has answered while this process was held up itself."""
        silent = [process for process in self._processes if process.is_silent(self._silence_limit)]
        answered = [key.data for key, _ in self._selector.select(0)] if silent else []
        for process in silent:
            if process not in answered:
                self._bury(process, f"took longer than {self._silence_limit:g} s")

    def _bury(self, process: _DecodeProcess, reason: str) -> None:
        """Take back what a process had that is dead or to be ended; it had begun at most the first of its chunks."""
        self._processes.remove(process)
        self._selector.unregister(process.connection)
        process.end()
        begun, *others = process.in_hand or [_Chunk()]
        for chunk in others:
            (self._alone if chunk.is_alone else self._returned).append(chunk)
        if process.in_hand and not begun.positions:
            self._n_failed_starts += 1
        for position in begun.positions:
            if begun.is_suspect:
                self._on_image(position, reason)
            else:
                self._alone.append(_Chunk(positions=(position,), is_alone=True, is_suspect=True))


def decode_files(
    target: Target,
    files: Sequence[Path],
    *,
    n_processes: int,
    on_image: Callable[[int, str], None],
    silence_limit: float = _SILENCE_SECONDS,
) -> None:
    """Decode image files into a mapped array.

    Args:
        target: Where to and how. The file exists and is written in place.
        files: One per place in the array.
        n_processes: Images decoded at a time.
        on_image: Called once per image, in any order, with its position and why it failed, or an empty text; not for
            images that are left because no process can be started.
        silence_limit: Seconds without a sign of life after which a process is ended and its work done again.
    """
    with _Pool(target, files, n_processes, on_image, silence_limit) as pool:
        pool.run()


def decode_in_threads(
    target: Target,
    pixels: NDArray[np.uint8],
    openers: Mapping[int, Opener],
    *,
    n_threads: int,
    on_image: Callable[[int, str], None],
) -> None:
    """Decode images of any kind.

    Args:
        target: How; its file is not touched.
        pixels: Where to, shape ``(n_images, 3, size, size)``.
        openers: Return an image as stored, by its position in ``pixels``. Called from threads.
        n_threads: Images decoded at a time.
        on_image: Called once per image, in order, with its position and why it failed, or an empty text.
    """

    def decode(position: int) -> str:
        return decode_into(pixels, position, openers[position], target)

    with warnings.catch_warnings(), ThreadPoolExecutor(n_threads) as pool:
        # Pillow warns about odd metadata and large images, which are no reason to refuse an image.
        warnings.simplefilter("ignore")
        for position, reason in zip(openers, pool.map(decode, openers), strict=True):
            on_image(position, reason)
