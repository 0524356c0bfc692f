"""Tests of tuner.data.memory."""

from pathlib import Path

import pytest

from tuner.data.memory import available_memory

MEMINFO = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\nHugePages_Total: 0\n"


def make_root(folder: Path, files: dict[str, str], *, meminfo: str = MEMINFO, groups: str = "0::/a/b") -> Path:
    """Write a machine's ``proc`` and ``sys``."""
    written = {"proc/meminfo": meminfo, "proc/self/cgroup": groups}
    written |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def limit(group: str, maximum: str, current: int, stat: str = "anon 5\n") -> dict[str, str]:
    """Return the files of a group of version 2."""
    return {f"{group}memory.max": maximum, f"{group}memory.current": str(current), f"{group}memory.stat": stat}


def test_available_memory_is_the_machines_without_limits(tmp_path: Path) -> None:
    """No control group, or one without a limit, leaves what the machine has."""
    assert available_memory(make_root(tmp_path, {})) == 1_024_000
    assert available_memory(make_root(tmp_path, limit("a/b/", "max\n", 900))) == 1_024_000


@pytest.mark.parametrize("group", ["a/b/", "a/", ""])
def test_available_memory_respects_the_limit_of_every_group_above(tmp_path: Path, group: str) -> None:
    """In a container, the own group's path may be missing and the limit stands at the root."""
    assert available_memory(make_root(tmp_path, limit(group, "700000\n", 200_000))) == 500_000


def test_available_memory_takes_the_least(tmp_path: Path) -> None:
    """The tightest of several limits holds; a group beyond its limit leaves nothing."""
    files = limit("a/b/", "700000\n", 200_000) | limit("a/", "300000\n", 200_000)
    assert available_memory(make_root(tmp_path, files)) == 100_000
    assert available_memory(make_root(tmp_path, limit("a/", "300000\n", 400_000))) == 0


def test_available_memory_counts_the_page_cache_as_available(tmp_path: Path) -> None:
    """Pixels that were just written fill a group's page cache, which the kernel gives back."""
    stat = "anon 5\nactive_file 30000\ninactive_file 150000\n"
    assert available_memory(make_root(tmp_path, limit("a/", "300000\n", 200_000, stat))) == 280_000


def test_available_memory_reads_version_1(tmp_path: Path) -> None:
    """Older systems name the files differently and say a huge number for no limit."""
    files = {
        "memory/box/memory.limit_in_bytes": "600000\n",
        "memory/box/memory.usage_in_bytes": "500000\n",
        "memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 40000\ntotal_active_file 2000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "500000\n",
    }
    groups = "5:cpu:/elsewhere\n4:memory:/box\n0::/"
    assert available_memory(make_root(tmp_path, files, groups=groups)) == 142_000


def test_available_memory_is_none_where_the_system_does_not_say(tmp_path: Path) -> None:
    """Unknown means that nothing is pinned."""
    assert available_memory(tmp_path) == 0


def test_available_memory_of_this_machine() -> None:
    """The real files can be read."""
    assert available_memory() > 0
