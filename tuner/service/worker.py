"""One worker process: trains what the coordinator sends. Sees torch, never Optuna and never the storage.

Forked where torch is loaded already, or by itself as ``python -m tuner.service.worker FD``, with one end of a socket
pair. A thread reads the socket; when the coordinator is gone it ends the process at once, whatever is being computed.
"""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Never

from tuner.errors import TunerError
from tuner.service.messages import (
    Alive,
    Crashed,
    DataRead,
    Describe,
    EpochDone,
    Hello,
    Message,
    Note,
    Prepare,
    Prepared,
    Probe,
    Refused,
    Reply,
    Setup,
    Train,
    Verdict,
)
from tuner.service.study_data import read_study_data
from tuner.service.wire import Lines, encode
from tuner.spec.sections import StudySpec

PROCESS_NAME = "tuner-worker"
"""What ``ps -o comm`` and ``top`` show."""
_MAX_PULSE_SECONDS = 5.0
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class Line:
    """The worker's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> Never:
        lines = Lines(self._connection)
        while True:
            try:
                for message in lines.receive():
                    self._inbox.put(message)
            except EOFError:
                os._exit(0)  # the coordinator is gone, and with it everyone who wanted a result

    def send(self, reply: Reply) -> None:
        """Send a reply."""
        try:
            with self._sending:
                self._connection.sendall(encode(reply))
        except OSError:
            os._exit(0)

    def start_pulse(self, stall_limit: float) -> None:
        """Say from now on, in a thread, that this process is not stopped and that nothing holds the interpreter.

        Args:
            stall_limit: Seconds of silence that end this process.
        """

        def beat() -> Never:
            while True:
                time.sleep(min(_MAX_PULSE_SECONDS, stall_limit / 4))
                self.send(Alive())

        threading.Thread(target=beat, daemon=True).start()

    def note(self, text: str) -> None:
        """Send one line for the user."""
        self.send(Note(text=text))

    def receive(self) -> Message:
        """Wait for the next message."""
        return self._inbox.get()

    def ask_verdict(self, done: EpochDone) -> Verdict:
        """Report an epoch and wait for what the trials are to do."""
        self.send(done)
        verdict = self.receive()
        if not isinstance(verdict, Verdict):
            raise TypeError(f"expected a verdict, got {verdict}")
        return verdict


def serve(line: Line) -> Never:
    """Answer the coordinator's requests, one after the other, for ever."""
    setup = line.receive()
    if not isinstance(setup, Setup):
        raise TypeError(f"expected the setup, got {setup}")
    spec = StudySpec.model_validate_json(setup.spec)
    line.start_pulse(spec.workers.stall_limit)
    data = read_study_data(spec)
    waiting: list[Message] = []
    if setup.device == "none":
        line.send(DataRead())
        # Who is only to read the data waits here, before torch, which takes seconds to load if it is not there.
        waiting.append(line.receive())
    from tuner.service.describing import describe_study
    from tuner.service.training_session import TrainingSession
    from tuner.service.workbench import Workbench, list_cuda_devices

    bench = Workbench(spec, data, device=setup.device, n_threads=setup.n_threads, note=line.note)
    session = TrainingSession(bench, line)
    # Asking for devices may take memory of a GPU.
    line.send(Hello(cuda_devices=() if spec.workers.devices == ("cpu",) else list_cuda_devices()))
    while True:
        request = waiting.pop() if waiting else line.receive()
        match request:
            case Describe(timed=timed):
                line.send(describe_study(spec, data, timed=timed))
            case Prepare():
                session.check_data(request.data_hash)
                session.prepare(request.backbone)
                line.send(Prepared(backbone=request.backbone))
            case Probe():
                session.check_data(request.data_hash)
                line.send(session.probe(request))
            case Train():
                session.check_data(request.data_hash)
                session.train(request)
            case unexpected:
                raise TypeError(f"unexpected request: {unexpected}")


def preload() -> None:
    """Load what describing and training need, seconds of it, where workers are forked from."""
    import tuner.service.describing
    import tuner.service.training_session  # noqa: F401


def main(answer: Callable[[Line], Never] = serve) -> Never:
    """Run a worker on the socket whose descriptor is the first argument.

    Args:
        answer: Answers the coordinator for ever; another one trains in its own way.
    """
    # The thread that sees the coordinator's end cannot do so while this process is stopped or held up in C.
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(_PR_SET_NAME, PROCESS_NAME.encode())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's
    sys.path.append(str(Path.cwd()))  # a user's own backbone; last, so that it shadows nothing
    line = Line(socket.socket(fileno=int(sys.argv[1])))
    try:
        answer(line)
    except TunerError as error:
        line.send(Refused(error=type(error).__name__, message=str(error)))
    except Exception:  # noqa: BLE001 - whatever it is, the coordinator must hear of it
        line.send(Crashed(traceback=traceback.format_exc()))
    # Not sys.exit: threads of torch may hold that up. The coordinator reads the reply before it sees the end.
    os._exit(1)


if __name__ == "__main__":
    main()
