"""Sizes of memory, from a user's words to bytes and back."""

import math
import re
from typing import Any

from tuner.spec.space import is_number

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[kmgt]i?b)", re.IGNORECASE)
_POWERS = "kmgt"
_LEAST_BYTES = 1_000_000


def parse_size(value: Any) -> int:
    """Return bytes from ``"4 GB"``, ``"512 MB"``, ``"3.5 GiB"`` or a number of bytes.

    Raises:
        ValueError: If it is none of these, or less than a megabyte, which is no size of a program's memory.
    """
    n_bytes = 0.0
    if is_number(value):
        n_bytes = float(value)
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip().replace(" ", ""))):
        unit = match["unit"].lower()
        base = 1024 if "i" in unit else 1000
        n_bytes = float(match["number"]) * base ** (_POWERS.index(unit[0]) + 1)
    if not _LEAST_BYTES <= n_bytes < math.inf:
        raise ValueError('must be a size such as "4 GB" or "512 MB", at least 1 MB')
    return round(n_bytes)


def format_bytes(n_bytes: float) -> str:
    """Return a size as a person says it: ``350 MB``, ``1.50 GB``."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
