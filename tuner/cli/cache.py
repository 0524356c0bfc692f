"""The command that lists and clears the cache."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from tuner.cli.options import format_table, json_option, say

if TYPE_CHECKING:
    from tuner.data.cache import CacheEntry, Kind


@click.command()
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(["pixels", "features", "pretrained", "content", "memory"]),
    multiple=True,
    help="Only these; may be repeated.",
)
@click.option("--clear", is_flag=True, help="Remove them. Asks first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def cache(kinds: tuple["Kind", ...], clear: bool, yes: bool, as_json: bool) -> None:
    """List, or clear, what later runs reuse: decoded pixels, features, pretrained weights, hashes, memory needs.

    All of it is made again when it is needed. TUNER_CACHE_DIR says where it lies, TUNER_CACHE_GB how large it may get.

    \b
    Example:
      tuner cache
      tuner cache --clear --kind features
    """
    from tuner.data.cache import clear_cache, list_entries

    if yes and not clear:
        raise click.UsageError("--yes goes with --clear.")
    entries = [entry for entry in list_entries() if not kinds or entry.kind in kinds]
    if not clear:
        say(_list_as_json(entries) if as_json else _describe(entries))
        return
    if not yes:
        what = f"{len(entries)} entries, {_format_bytes(_sum_bytes(entries))}, from {_folder()}"
        click.confirm(f"Clear {what}?", abort=True, err=as_json)
    freed = clear_cache(kinds or None)
    say(json.dumps({"freed_bytes": freed}) if as_json else f"freed {_format_bytes(freed)}")


def _folder() -> str:
    from tuner.paths import cache_root

    return str(cache_root())


def _list_as_json(entries: Sequence["CacheEntry"]) -> str:
    from tuner.data.cache import budget_bytes

    listed = [
        vars(entry) | {"path": str(entry.path), "last_used": entry.last_used.isoformat(timespec="seconds")}
        for entry in entries
    ]
    found = {"folder": _folder(), "budget_bytes": budget_bytes(), "n_bytes": _sum_bytes(entries), "entries": listed}
    return json.dumps(found, indent=2)


def _describe(entries: Sequence["CacheEntry"]) -> str:
    from tuner.data.cache import budget_bytes

    rows = [
        (entry.kind, _format_bytes(entry.n_bytes), f"{entry.last_used:%Y-%m-%d %H:%M} UTC", entry.text)
        for entry in entries
    ]
    budget = _format_bytes(budget_bytes())
    total = f"{_format_bytes(_sum_bytes(entries))} in {_folder()}; pixels and features may take {budget}"
    return f"{format_table(('KIND', 'SIZE', 'LAST USED', 'HOLDS'), rows)}\n{total}" if rows else f"nothing: {total}"


def _sum_bytes(entries: Sequence["CacheEntry"]) -> int:
    return sum(entry.n_bytes for entry in entries)


def _format_bytes(n_bytes: int) -> str:
    """Return a size with its unit, as disks are sold: 1 GB is 1e9 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes} bytes"
