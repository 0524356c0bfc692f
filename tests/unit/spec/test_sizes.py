"""Sizes of memory as users write them, and as they are told back."""

import re

import pytest

from tuner.spec.sizes import format_bytes, parse_size


@pytest.mark.parametrize(
    ("value", "n_bytes"),
    [
        ("4 GB", 4_000_000_000),
        ("512MB", 512_000_000),
        ("1.5 GiB", 1_610_612_736),
        (" 2 tb ", 2_000_000_000_000),
        ("1000 kB", 1_000_000),
        (4_000_000_000, 4_000_000_000),
    ],
)
def test_parse_size_reads_units(value: object, n_bytes: int) -> None:
    """Powers of 1000, and of 1024 with an i; a bare number is bytes, as a checked spec has it."""
    assert parse_size(value) == n_bytes


@pytest.mark.parametrize(
    "value", ["", "4", "GB", "-1 GB", "0 GB", "4 GHz", "1e3 GB", 4, 0, -1, True, None, [1], 10**400]
)
def test_parse_size_refuses_the_rest(value: object) -> None:
    """A bare 4 is a forgotten unit, not four bytes."""
    with pytest.raises(ValueError, match=re.escape('must be a size such as "4 GB" or "512 MB", at least 1 MB')):
        parse_size(value)


@pytest.mark.parametrize(("n_bytes", "text"), [(350_400_000, "350 MB"), (1_500_000_000, "1.50 GB"), (0, "0 MB")])
def test_format_bytes_speaks_as_a_person(n_bytes: int, text: str) -> None:
    """One unit, no more digits than matter."""
    assert format_bytes(n_bytes) == text
