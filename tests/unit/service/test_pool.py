"""Processes of workers: loaded once, forked, heard, and ended with the process that forks them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.service.messages import Note, Reply
from tuner.service.pool import Pool, Worker
from tuner.service.slots import Slot

WORKER = """
import os, signal, sys, time
from tuner.service import worker
from tuner.service.messages import Note

LOADED = []

def preload():
    {preload}
    LOADED.append(os.getpid())

def answer(line):
    shown = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], os.environ["HOME"]
    line.note(" ".join(map(str, (os.getpid(), os.getppid(), os.getpgid(0), LOADED, *shown))))
    print("words on stdout", flush=True)
    print("words on stderr", file=sys.stderr)
    {answer}
    line.receive()

def main():
    worker.main(answer)

if __name__ == "__main__":
    main()
"""
CPU = Slot(device="cpu", n_threads=1)


@pytest.fixture
def make_pool(tmp_path: Path) -> Callable[..., Pool]:
    """Return what makes a pool of workers that say in a note who they are, and do what a test wants."""

    def make(*, preload: str = "", answer: str = "") -> Pool:
        (tmp_path / "stand_in.py").write_text(WORKER.format(preload=preload or "pass", answer=answer))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": "/the/users", "CUDA_VISIBLE_DEVICES": "5,7"}
        return Pool(environment, stall_limit=60.0, worker_module="stand_in")

    return make


def hear(pool: Pool, n_replies: int) -> list[tuple[Worker, Reply | None]]:
    """Wait for replies of workers, and ends."""
    heard: list[tuple[Worker, Reply | None]] = []
    deadline = time.monotonic() + 30
    while len(heard) < n_replies and time.monotonic() < deadline:
        heard += pool.wait(0.1)
    assert len(heard) == n_replies, heard
    return heard


def read_note(pool: Pool) -> list[str]:
    """Return the words of the next note."""
    ((_, reply),) = hear(pool, 1)
    assert isinstance(reply, Note)
    return reply.text.split()


def is_alive(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended."""
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_share_what_was_loaded_once_and_nothing_else(make_pool: Callable[..., Pool]) -> None:
    """Each is a process of its own, in a group of its own, with the environment of its slot."""
    with make_pool() as pool:
        pool.start(CPU)
        first = read_note(pool)
        pool.start(Slot(device="cuda:1", n_threads=3))
        second = read_note(pool)
        pool.start(None)
        third = read_note(pool)
    pids, parents, groups, loaded = zip(first[:4], second[:4], third[:4], strict=True)
    assert len(set(pids)) == 3
    assert groups == pids
    assert len(set(parents)) == 1
    assert set(loaded) == {f"[{parents[0]}]"}
    assert [each[4:] for each in (first, second, third)] == [
        ["1", "/the/users"],  # no device is shown
        ["7", "3", "/the/users"],
        ["5,7", "1", "/the/users"],
    ]
    for pid in (*pids, parents[0]):
        assert not is_alive(int(pid))


def test_worker_that_starts_at_once_waits_for_no_loading(make_pool: Callable[..., Pool]) -> None:
    """The data is looked at meanwhile. What is only asked to start ends with the pool, which waits for nothing."""
    with make_pool(preload="time.sleep(600)") as pool:
        pool.start(CPU)
        pool.start_at_once()
        started = time.monotonic()
        assert read_note(pool)[3] == "[]"
        given_up = pool.start(CPU)
        pool.stop(given_up)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("answer", "end", "was_killed"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9", True),
        ("os._exit(7)", "exit code 7", False),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11", False),
    ],
)
def test_pool_says_how_a_worker_ended(
    make_pool: Callable[..., Pool], answer: str, end: str, *, was_killed: bool
) -> None:
    """With the last words that it printed; its neighbour lives on."""
    with make_pool(answer=f"if os.environ['OMP_NUM_THREADS'] == '2': {answer}") as pool:
        neighbour = pool.start(CPU)
        hear(pool, 1)
        worker = pool.start(Slot(device="cuda:0", n_threads=2))
        (_, (ended, nothing)) = hear(pool, 2)
        assert ended is worker
        assert nothing is None
        assert worker.describe_end() == f"worker 1 ended: {end}; its last words: words on stdout\nwords on stderr"
        assert worker.was_killed == was_killed
        assert list(pool.workers.values()) == [neighbour]
        assert not list(pool.wait(0.1))


def test_workers_end_with_the_process_that_forks_them_and_others_can_start(make_pool: Callable[..., Pool]) -> None:
    """Nobody could wait for such a worker, so it counts as lost, and its end is said."""
    with make_pool() as pool:
        pool.start(CPU)
        pid, server, *_ = read_note(pool)
        os.kill(int(server), signal.SIGKILL)
        ((worker, nothing),) = hear(pool, 1)
        assert nothing is None
        assert "the process that forks workers ended: killed by signal 9" in worker.describe_end()
        assert not worker.was_killed
        wait_for_end(int(pid))
        pool.start(CPU)
        assert read_note(pool)[1] != server


def test_server_that_dies_while_it_loads_is_each_workers_end(make_pool: Callable[..., Pool]) -> None:
    """A library that crashes is named by its words, and nobody waits for it."""
    with make_pool(preload="print('a broken library', flush=True); os.abort()") as pool:
        pool.start(CPU)
        ((worker, nothing),) = hear(pool, 1)
        assert nothing is None
        end = worker.describe_end()
    assert "the process that forks workers ended: killed by signal 6; its last words: a broken library" in end


def test_loading_that_fails_is_left_to_the_workers(make_pool: Callable[..., Pool]) -> None:
    """They meet the same mistake, and say it as their own."""
    with make_pool(preload="raise ImportError('libcudart.so.13')") as pool:
        pool.start(CPU)
        assert read_note(pool)[3] == "[]"


def test_worker_that_is_ended_while_it_waits_to_be_forked_never_works(make_pool: Callable[..., Pool]) -> None:
    """It ends as soon as it is there."""
    with make_pool(preload="time.sleep(0.5)", answer="time.sleep(600)") as pool:
        unwanted = pool.start(CPU)
        assert not unwanted.has_begun
        pool.end(unwanted, "was not wanted")
        pool.start(CPU)
        pid = int(read_note(pool)[0])
        assert is_alive(pid)
        assert unwanted.describe_end() == "worker 0 was not wanted and was ended"


def test_coordinators_death_ends_the_server_and_its_workers(make_pool: Callable[..., Pool], tmp_path: Path) -> None:
    """Also one that is stopped, and can notice nothing."""
    make_pool(answer="time.sleep(600)").__exit__()
    code = """
import os, signal, sys
from tuner.service.pool import Pool
from tuner.service.slots import Slot
pool = Pool({**os.environ}, worker_module="stand_in")
pool.start(Slot(device="cpu", n_threads=1))
while not (heard := list(pool.wait(1))): pass
print(heard[0][1].text, flush=True)
os.kill(int(heard[0][1].text.split()[1]), signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, server, *_ = done.stdout.split()
    wait_for_end(int(server))
    wait_for_end(int(pid))
