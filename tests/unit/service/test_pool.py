"""Processes of workers: loaded once, forked, heard, and ended with the process that forks them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Never

import pytest
import torch

from tuner.service.messages import Alive, Note, Reply
from tuner.service.pool import Pool
from tuner.service.processes import ForkedProcess, ForkServer
from tuner.service.slots import Slot
from tuner.service.worker_process import Worker

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

    def make(*, preload: str = "", answer: str = "", stall_limit: float = 60.0, visible: str = "5,7") -> Pool:
        (tmp_path / "stand_in.py").write_text(WORKER.format(preload=preload or "pass", answer=answer))
        changes = {"PYTHONPATH": find_path(tmp_path), "HOME": "/the/users", "CUDA_VISIBLE_DEVICES": visible}
        return Pool({**os.environ, **changes}, stall_limit=stall_limit, worker_module="stand_in")

    return make


def hear(pool: Pool, n_replies: int) -> list[tuple[Worker, Reply | None]]:
    """Wait for replies of workers, and ends."""
    heard: list[tuple[Worker, Reply | None]] = []
    deadline = time.monotonic() + 30
    while len(heard) < n_replies and time.monotonic() < deadline:
        heard += [event for event in pool.wait(0.1) if not isinstance(event[1], Alive)]
    assert len(heard) == n_replies, heard
    return heard


def read_note(pool: Pool) -> list[str]:
    """Return the words of the next note."""
    ((_, reply),) = hear(pool, 1)
    assert isinstance(reply, Note)
    return reply.text.split()


def find_path(folder: Path) -> str:
    """Return a PYTHONPATH with a folder in front."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def count_descriptors(pid: str) -> int:
    """Return how many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


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


def test_worker_that_starts_at_once_waits_for_no_loading(
    make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data is looked at meanwhile. What is only asked to start ends with the pool, which waits for nothing."""
    wait = ForkedProcess.wait

    def look(process: ForkedProcess, timeout: float) -> int:
        assert timeout == 0, "it waits for a process that has not begun"
        return wait(process, timeout)

    monkeypatch.setattr(ForkedProcess, "wait", look)
    with make_pool(preload="time.sleep(600)") as pool:
        pool.start(CPU)
        pool.start_at_once()
        assert read_note(pool)[3] == "[]"
        given_up = pool.start(CPU)
        pool.stop(given_up)


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
        assert worker.cause_of_end is worker
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
        assert worker.cause_of_end is not worker
        wait_for_end(int(pid))
        pool.start(CPU)
        assert read_note(pool)[1] != server


def test_server_that_is_stopped_is_ended(make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody waits for a worker, or for word of how one ended."""
    monkeypatch.setattr("tuner.service.worker_process.GRACE_SECONDS", 0.5)
    monkeypatch.setattr("tuner.service.processes._WORD_SECONDS", 0.5)
    with make_pool(answer="line.start_pulse(2)") as pool:
        pool.start(CPU)
        pid, server, *_ = read_note(pool)
        os.kill(int(server), signal.SIGSTOP)
        os.kill(int(pid), signal.SIGKILL)
        ((worker, nothing),) = hear(pool, 1)
        assert nothing is None
        assert "it did not say that a worker had ended" in worker.describe_end()
        wait_for_end(int(server))
        pool.start(CPU)
        other = read_note(pool)[1]
        monkeypatch.setattr("tuner.service.pool._LOADING_SECONDS", 5.0)  # not before: a busy machine starts slowly
        monkeypatch.setattr(pool, "_stall_limit", 5.0)
        os.kill(int(other), signal.SIGSTOP)
        pool.start(CPU)
        heard = hear(pool, 2)
        assert {reply for _, reply in heard} == {None}
        assert all("it forked no worker for 5 s" in worker.describe_end() for worker, _ in heard)


def test_burial_that_is_cut_short_leaves_nothing_to_wait_for(
    make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come in the midst of it: the workers' ends are known all the same."""

    def interrupt(_: ForkServer) -> Never:
        raise KeyboardInterrupt

    with make_pool() as pool:
        worker = pool.start(CPU)
        pid, server, *_ = read_note(pool)
        monkeypatch.setattr(ForkServer, "_describe_end", interrupt)
        os.kill(int(server), signal.SIGKILL)
        with pytest.raises(KeyboardInterrupt):
            hear(pool, 1)
        worker.reap(time.monotonic() + 1)
        wait_for_end(int(pid))


def test_server_may_say_late_that_a_worker_has_ended(make_pool: Callable[..., Pool]) -> None:
    """Between the end of a process and the word of it lies a moment, and on a busy machine more."""
    with make_pool() as pool:
        worker = pool.start(CPU)
        pid, server, *_ = read_note(pool)
        os.kill(int(server), signal.SIGSTOP)
        os.kill(int(pid), signal.SIGKILL)
        wait_for_end(int(pid))
        threading.Timer(0.5, os.kill, (int(server), signal.SIGCONT)).start()
        pool.stop(worker)
        pool.start(CPU)
        assert read_note(pool)[1] == server


def test_server_that_dies_while_it_loads_is_each_workers_end(make_pool: Callable[..., Pool]) -> None:
    """A library that crashes is named by its words, and nobody waits for it."""
    with make_pool(preload="print('a broken library', flush=True); os.abort()") as pool:
        pool.start(CPU)
        ((worker, nothing),) = hear(pool, 1)
        assert nothing is None
        end = worker.describe_end()
    assert "the process that forks workers ended: killed by signal 6; its last words: a broken library" in end


def test_loading_that_fails_is_each_workers_end(make_pool: Callable[..., Pool]) -> None:
    """With its traceback: a second try in the worker could fail in another way, as half-loaded libraries do."""
    with make_pool(preload="raise ImportError('libcudart.so.13')") as pool:
        pool.start(CPU)
        ((worker, nothing),) = hear(pool, 1)
        assert nothing is None
        assert "ended: exit code 1; its last words: Traceback" in (end := worker.describe_end())
        assert end.endswith("ImportError: libcudart.so.13")


def test_nobody_keeps_descriptors_of_workers_that_have_ended(make_pool: Callable[..., Pool]) -> None:
    """Not this process, nor the one that forks, nor later workers: each has its own socket and no other."""
    with make_pool(answer="line.note(str(len(os.listdir('/proc/self/fd'))))") as pool:
        counts = []
        for _ in range(4):
            workers = [pool.start(CPU) for _ in range(3)]
            heard = [reply.text.split() for _, reply in hear(pool, 6) if isinstance(reply, Note)]
            (server,) = {words[1] for words in heard if len(words) > 1}
            in_worker = {words[0] for words in heard if len(words) == 1}
            counts.append((in_worker, count_descriptors("self"), count_descriptors(server)))
            for worker in workers:
                pool.stop(worker)
    assert len(counts[0][0]) == 1
    assert counts == counts[:1] * 4


def test_send_to_a_server_that_has_died_leaves_the_rest_to_be_heard(make_pool: Callable[..., Pool]) -> None:
    """Also where it had said more than has been read."""
    with make_pool() as pool:
        pool.start(CPU)
        server = read_note(pool)[1]
        pool.start(CPU)
        time.sleep(0.3)  # its beginning is said, and not heard
        os.kill(int(server), signal.SIGKILL)
        wait_for_end(int(server))
        pool.start(CPU)
        heard = [event for event in hear(pool, 4) if event[1] is None]
        assert len(heard) == 3
        assert all("the process that forks workers ended" in worker.describe_end() for worker, _ in heard)


def test_worker_that_is_ended_while_it_waits_to_be_forked_never_works(make_pool: Callable[..., Pool]) -> None:
    """It ends as soon as it is there, even if it cannot see by itself that it is not wanted."""
    hold_first = "after_in_child=lambda: len(forked) > 1 or os.kill(os.getpid(), signal.SIGSTOP)"
    hooks = f"forked = []; os.register_at_fork(before=lambda: forked.append(1), {hold_first})"
    with make_pool(preload=f"time.sleep(0.5); {hooks}") as pool:
        unwanted = pool.start(CPU)
        assert not unwanted.has_begun
        pool.end(unwanted, "was not wanted")
        pool.start(CPU)
        pid, server, *_ = read_note(pool)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{server}/task/{server}/children").read_text().split() != [pid]:
            assert not list(pool.wait(0.05))
            assert time.monotonic() < deadline
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
        "PYTHONPATH": find_path(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, server, *_ = done.stdout.split()
    try:
        wait_for_end(int(server))
        wait_for_end(int(pid))
    finally:
        for each in (int(server), int(pid)):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)


def test_pool_ends_a_server_that_loads_when_its_coordinator_dies(
    tmp_path: Path, make_pool: Callable[..., Pool]
) -> None:
    """Also one that had not asked the kernel for that: it looks before it loads."""
    make_pool(preload=f"open({str(tmp_path / 'loads')!r}, 'w').close()").__exit__()
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        done = subprocess.run(
            [sys.executable, "-m", "tuner.service.fork_server", str(theirs.fileno()), "stand_in"],
            env={**os.environ, "PYTHONPATH": find_path(tmp_path)},
            pass_fds=[theirs.fileno()],
            timeout=60,
            check=False,
        )
    assert done.returncode == 0
    assert not (tmp_path / "loads").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forked_worker_uses_its_device(make_pool: Callable[..., Pool]) -> None:
    """What was loaded before the fork had touched none."""
    answer = "import torch; line.note(str(torch.ones(2, device='cuda').sum().item()))"
    with make_pool(
        preload="from tuner.service.worker import preload as load; load()", answer=answer, visible="0"
    ) as pool:
        pool.start(Slot(device="cuda:0", n_threads=1))
        assert len(read_note(pool)) > 1
        assert read_note(pool) == ["2.0"]
