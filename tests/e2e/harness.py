"""Start the ``tuner`` command as a user does, kill it, and read what it left."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_OWN_BACKBONES = """
import ctypes
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, trouble=None):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, num_classes)
        self.trouble = trouble

    def forward(self, images):
        if self.trouble and images.shape[0] > 8:
            self.trouble()
        return self.fc(self.body(images).mean((2, 3)))


def breaks():
    raise ValueError("the user's own bug")


def fills_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")


def good(num_classes):
    return Net(num_classes)


def fixed(num_classes, width=4, seed=0):
    model = Net(num_classes)
    generator = torch.Generator().manual_seed(seed)
    model.body = nn.Conv2d(3, width, 3)
    model.fc = nn.Linear(width, num_classes)
    for parameter in model.body.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def wide(num_classes):
    return fixed(num_classes, width=16, seed=1)


def die_once():
    if not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), 9)


def mortal(num_classes):
    model = fixed(num_classes, seed=2)
    model.trouble = die_once
    return model


def slow(num_classes, seconds=0.02):
    return Net(num_classes, lambda: time.sleep(seconds))


def hold_once():
    if not os.path.exists("held"):
        open("held", "w").close()
        ctypes.PyDLL(None).sleep(600)  # with the interpreter's lock


def holding(num_classes):
    return Net(num_classes, hold_once)


def lose_a_file_once():
    if not os.path.exists("missed"):
        open("missed", "w").close()
        open("gone.txt")


def break_the_device_once():
    if not os.path.exists("broken"):
        open("broken", "w").close()
        raise RuntimeError("CUDA error: device-side assert triggered")


def cursed(num_classes):
    return Net(num_classes, break_the_device_once)


def forgetful(num_classes):
    return Net(num_classes, lose_a_file_once)


def raising(num_classes):
    return Net(num_classes, breaks)


def hungry(num_classes):
    return Net(num_classes, fills_memory)
"""

_DIGITS_STUDY = """
[study]
name = "{name}"
seed = {seed}
[data]
source = "digits"
classes = ["7", "8", "9"]
image_size = 16
test_fraction = 0.2
[space]
backbone = {{ choices = {backbones} }}
lr = {{ low = 1e-4, high = 1e-2, log = true }}
augmentation_strength = {{ low = 0.0, high = 1.0 }}
[training]
batch_size = 64
epochs = {epochs}
horizontal_flip = false
[search]
sampler = "{sampler}"
pruner = "{pruner}"
n_trials = {n_trials}
[workers]
devices = "cpu"
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder with a study file, a database and a cache of its own."""

    folder: Path
    study_file: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment of every command; its cache folder marks our processes."""
        return {**os.environ, "TUNER_CACHE_DIR": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a ``tuner`` command."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "tuner", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *arguments: str, timeout: float = 240) -> tuple[int, str]:
        """Run a ``tuner`` command; return its exit code and all that it printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run ``tuner run`` with two workers."""
        return self.call("run", str(self.study_file), "--workers", "2", *arguments)

    def start_run(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``tuner run`` with two workers."""
        return self.start("run", str(self.study_file), "--workers", "2", *arguments)

    def count_trials(self, *states: str) -> int:
        """Return how many trials are in some states, read while others write."""
        return sum(state in states for state in self._query("SELECT state FROM trials"))

    def list_reporting(self) -> list[str]:
        """Return the ids of the trials that have finished an epoch."""
        return self._query("SELECT DISTINCT trial_id FROM trial_intermediate_values")

    def _query(self, sql: str) -> list[str]:
        """Return a column, by SQL."""
        database = self.folder / "studies.db"
        if not database.exists():
            return []
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)
        try:
            return [value for (value,) in connection.execute(sql)]
        except sqlite3.OperationalError:  # the schema is being made
            return []
        finally:
            connection.close()

    def list_workers(self) -> list[int]:
        """Return the pids of this place's living workers."""
        mark = f"TUNER_CACHE_DIR={self.folder / 'cache'}".encode()
        return [
            pid for pid in _list_pids() if _read(pid, "comm") == b"tuner-worker\n" and mark in _read(pid, "environ")
        ]


def make_place(
    folder: Path,
    *,
    name: str = "digits",
    seed: int = 0,
    backbones: tuple[str, ...] = ("own:good",),
    epochs: int = 3,
    n_trials: int = 6,
    sampler: str = "random",
    pruner: str = "median",
) -> Place:
    """Write a small study of three digits, over backbones of the user's own, into a folder."""
    (folder / "own.py").write_text(_OWN_BACKBONES)
    study_file = folder / f"{name}.toml"
    study_file.write_text(
        _DIGITS_STUDY.format(
            name=name,
            seed=seed,
            backbones=list(backbones),
            epochs=epochs,
            n_trials=n_trials,
            sampler=sampler,
            pruner=pruner,
        )
    )
    return Place(folder=folder, study_file=study_file)


def wait_until(is_true: Callable[[], bool], *, timeout: float = 90) -> None:
    """Wait for something to become true.

    Raises:
        TimeoutError: If it does not.
    """
    deadline = time.monotonic() + timeout
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not become true in time")
        time.sleep(0.05)


def kill(pid: int) -> None:
    """Kill a process as the kernel's out-of-memory killer does."""
    os.kill(pid, signal.SIGKILL)


def read_parent(pid: int) -> int:
    """Return the pid of a process's parent."""
    return int(_read(pid, "stat").rpartition(b")")[2].split()[1])


def _list_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""
