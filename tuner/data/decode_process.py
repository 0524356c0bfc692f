"""One process that decodes image files into a mapped array; started by ``decode_pool``.

``python -m tuner.data.decode_process FD`` with one end of a socket pair: a line says where to and how, each further one
names images, and each is answered by a line with those that failed. Empty lines in between are signs of life. It
imports little, since it starts per data set.
"""

import json
import os
import select
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Never

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tuner.data.decode import LargeImageError, decode_image, explain_bad_image, open_image

_PULSE_SECONDS = 1.0

Opener = Callable[[], AbstractContextManager[Image.Image]]
"""Opens one image as stored."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where decoded images go, and how they are decoded."""

    path: str
    """A ``.npy`` file of uint8, shape ``(n_images, 3, size, size)``."""
    size: int
    resize: str
    interpolation: str


def decode_into(
    pixels: NDArray[np.uint8], position: int, opener: Opener, target: Target, *, takes_turns: bool = True
) -> str:
    """Decode an image to its place in ``pixels``.

    Returns:
        One line on why it failed, or an empty text.

    Raises:
        LargeImageError: If the image is large and takes no turns, see ``decode_image``.
    """
    try:
        with opener() as image:
            pixels[position] = decode_image(
                image,
                size=target.size,
                resize=target.resize,
                interpolation=target.interpolation,
                takes_turns=takes_turns,
            )
    except LargeImageError:
        raise
    except Exception as error:  # noqa: BLE001  # Pillow's formats raise nearly everything for broken files
        return explain_bad_image(error)
    return ""


def main(descriptor: int) -> None:
    """Decode what the socket names, until it ends."""
    connection = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    lines = connection.makefile("rb")
    target = Target(**json.loads(next(lines)))
    pixels = np.lib.format.open_memmap(target.path, mode="r+")
    warnings.simplefilter("ignore")
    _answer(connection, [])
    for line in lines:
        _decode_chunk(connection, pixels, target, json.loads(line))


def _decode_chunk(connection: socket.socket, pixels: NDArray[np.uint8], target: Target, chunk: dict[str, Any]) -> None:
    told, failed = time.monotonic(), []
    for position, path in chunk["images"]:
        reason = _decode_file(pixels, position, path, target, takes_turns=chunk["is_alone"])
        if reason != "":
            failed.append((position, reason))
        if time.monotonic() - told > _PULSE_SECONDS:
            connection.sendall(b"\n")
            told = time.monotonic()
    _answer(connection, failed)


def _decode_file(
    pixels: NDArray[np.uint8], position: int, path: str, target: Target, *, takes_turns: bool
) -> str | None:
    """Return why the image failed, an empty text, or None for a large image that has to be decoded alone."""
    try:
        return decode_into(pixels, position, lambda: open_image(path), target, takes_turns=takes_turns)
    except LargeImageError:
        return None


def _answer(connection: socket.socket, failed: list[tuple[int, str | None]]) -> None:
    connection.sendall(encode_line(failed))


def encode_line(message: Any) -> bytes:
    """Return a message as one line; ASCII, so that a file name of any bytes survives."""
    return json.dumps(message).encode("ascii") + b"\n"


def _end_with(connection: socket.socket) -> Never:
    """End this process when the other end of the socket is gone, whatever is being decoded."""
    hang_up = select.poll()
    hang_up.register(connection, 0)
    hang_up.poll()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
