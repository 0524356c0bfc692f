"""One process that decodes image files into a mapped array; started by ``decode_pool``.

``python -m tuner.data.decode_process FD`` with one end of a socket pair: a line says where to and how, each further one
names images, and each is answered by a line with those that failed. It imports little, since it starts per data set.
"""

import json
import os
import select
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Never

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tuner.data.decode import decode_image, explain_bad_image


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where decoded images go, and how they are decoded."""

    path: str
    """A ``.npy`` file of uint8, shape ``(n_images, 3, size, size)``."""
    size: int
    resize: str
    interpolation: str


def decode_into(pixels: NDArray[np.uint8], position: int, open_image: Callable[[], Image.Image], target: Target) -> str:
    """Decode an image to its place in ``pixels``.

    Returns:
        One line on why it failed, or an empty text.
    """
    try:
        with open_image() as image:
            pixels[position] = decode_image(
                image, size=target.size, resize=target.resize, interpolation=target.interpolation
            )
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
        reasons = [(position, _decode_file(pixels, position, path, target)) for position, path in json.loads(line)]
        _answer(connection, [(position, reason) for position, reason in reasons if reason])


def _decode_file(pixels: NDArray[np.uint8], position: int, path: str, target: Target) -> str:
    return decode_into(pixels, position, lambda: Image.open(path), target)


def _answer(connection: socket.socket, bad: list[tuple[int, str]]) -> None:
    connection.sendall(encode_line(bad))


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
