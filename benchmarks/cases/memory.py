"""Does the memory of a run stay flat as its pixels grow?

``tuner run`` trains a model that costs next to nothing on 256 MB and on 1 GB of decoded pixels, with one worker and
fresh augmentation. Measured is the highest sum of Pss_Anon (memory that only swapping could free; the mapped pixels are
not in it) over the run's processes. One more run of the larger data is then tried under a memory limit of half of it,
where systemd can set one.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Case
from benchmarks.material import write_generated
from benchmarks.processes import describe_environment
from benchmarks.study_file import write_study_file

_SIZE = 512
_MEGABYTE = 1e6
_IMAGE_BYTES = 3 * _SIZE**2
_ROOT = Path(__file__).parents[2]


def count_images(scale: int, *, smoke: bool) -> int:
    """Return how many images make ``scale`` times 256 MB."""
    return 20 * scale if smoke else round(scale * 256 * _MEGABYTE / _IMAGE_BYTES)


def write_study(folder: Path, scale: int, *, smoke: bool) -> list[str]:
    """Write images and a study; return the command that runs it."""
    write_generated(folder / "images", n_images=count_images(scale, smoke=smoke), n_classes=2, size=_SIZE, suffix="jpg")
    tables: dict[str, dict[str, Any]] = {
        "study": {"name": "memory"},
        "data": {"source": "image_folder", "path": str(folder / "images"), "image_size": _SIZE},
        "space": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "training": {
            "backbone": "benchmarks.pooled_backbone:make_pooled",
            "epochs": 2,
            "batch_size": 16,
            "augmentation_strength": 0.5,
        },
        "search": {"n_trials": 2, "sampler": "random", "pruner": "none"},
        "workers": {"devices": "cpu"},
    }
    write_study_file(folder / "study.toml", tables)
    url = f"sqlite:///{folder}/studies.db"
    run = ["-m", "tuner", "run", str(folder / "study.toml"), "--workers", "1", "--quiet"]
    return [sys.executable, *run, "--storage", url]


def run_scale(scale: int, smoke: bool) -> float:
    """Return the highest Pss_Anon of a run in MB, all its processes together."""
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        command = write_study(folder, scale, smoke=smoke)
        with (folder / "errors.txt").open("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command,
                cwd=_ROOT,
                env=describe_environment({"TUNER_CACHE_DIR": str(folder / "cache")}),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            peak = 0
            while process.poll() is None:
                peak = max(peak, sum(read_anonymous_bytes(pid) for pid in list_tree(process.pid)))
                time.sleep(0.05)
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"tuner run ended with {process.returncode}: {errors.read()[-2000:]}")
    return peak / _MEGABYTE


def list_tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in list_tree(int(child)))]


def read_anonymous_bytes(pid: int) -> int:
    """Return a process's anonymous memory, with its share of what it has in common with others; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("Pss_Anon:")]
    return 1024 * int(found[0]) if found else 0


def try_limit(_: Mapping[str, list[float]], smoke: bool) -> dict[str, Any]:
    """Run the larger data in a cgroup with half its size, if systemd may make one here; else say why not."""
    limit = count_images(4, smoke=smoke) * _IMAGE_BYTES // 2
    for scope in (["--user", "--scope"], ["--scope"]):
        limits = ["-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        wrapper = ["systemd-run", *scope, "--quiet", *limits]
        refused = _run_quietly([*wrapper, "true"], {})
        if refused:
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
            command = write_study(Path(name), 4, smoke=smoke)
            error = _run_quietly([*wrapper, *command], {"TUNER_CACHE_DIR": f"{name}/cache"})
        return {f"run in a cgroup of {limit / _MEGABYTE:.0f} MB, half the data": error or "passes"}
    return {"run in a cgroup of half the data": f"not measured: this machine allows none ({refused})"}


def _run_quietly(command: list[str], changes: dict[str, str]) -> str:
    """Run a command; return what went wrong, in one line."""
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env=describe_environment(changes),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().splitlines()
    return (said[-1] if said else f"exit code {done.returncode}") if done.returncode else ""


CASE = Case(
    name="memory",
    question="how much memory does a run hold, its mapped pixels aside, as its pixels grow from 256 MB to 1 GB?",
    unit="MB of Pss_Anon",
    baseline="256 MB of pixels",
    regression="more than 1.1x with four times the pixels",
    arms={
        "256 MB of pixels": lambda _, smoke: run_scale(1, smoke),
        "1 GB of pixels": lambda _, smoke: run_scale(4, smoke),
    },
    smoke_arms=("256 MB of pixels",),
    n_repeats=3,
    warms_up=False,
    conclude=lambda numbers, smoke: {} if smoke else try_limit(numbers, smoke),
)
