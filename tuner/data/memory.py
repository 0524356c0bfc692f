"""How much memory this process may still use: the machine's, or what its control groups leave."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")
_KIBIBYTE = 1024


def available_memory(root: Path = _ROOT) -> int:
    """Return the bytes that may still be allocated before the kernel ends a process.

    That is ``MemAvailable`` of ``/proc/meminfo``, or the least that a control group of this process (version 1 or 2)
    leaves below its limit. Their page cache counts as available, for the kernel gives it back.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Returns:
        0 if the system does not say.
    """
    machine = _read_table(root / "proc/meminfo").get("MemAvailable:", 0) * _KIBIBYTE
    return max(0, min([machine, *_list_group_rooms(root)]))


def _list_group_rooms(root: Path) -> Iterator[int]:
    """Yield what each limited control group leaves."""
    for folder in _list_groups(root):
        for limit_file, usage_file, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            with suppress(OSError, ValueError):  # not this version, or no limit: "max"
                limit = int((folder / limit_file).read_text(encoding="ascii"))
                usage = int((folder / usage_file).read_text(encoding="ascii"))
                cached = _read_table(folder / "memory.stat")
                usage -= cached.get(f"{prefix}active_file", 0) + cached.get(f"{prefix}inactive_file", 0)
                yield limit - usage


def _list_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of those above, as far as they can be seen."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers in {"", "memory"}:
                mount = root / "sys/fs/cgroup" / controllers
                group = Path(place.lstrip("/"))
                yield from (mount / above for above in (group, *group.parents))


def _read_table(path: Path) -> dict[str, int]:
    """Return lines such as ``MemAvailable:  2048 kB``, without their units."""
    with suppress(OSError, ValueError):
        words = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        return {line[0]: int(line[1]) for line in words if len(line) > 1}
    return {}
