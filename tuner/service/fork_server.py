"""The process that forks workers: it loads what they need once, in seconds, and each of them starts in milliseconds.

``python -m tuner.service.fork_server FD MODULE`` with one end of a socket pair and a worker's module, whose ``preload``
is run here, if it has one, and whose ``main`` in each worker. It has one thread, opens no file of a user's and touches
no device: no process that it forks could use a device that it has touched.
"""

import array
import ctypes
import gc
import json
import os
import select
import selectors
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Never

_PR_SET_PDEATHSIG = 1
_MAX_DESCRIPTORS = 8


class Channel:
    """One end of the socket between the coordinator and the fork server: lines of JSON, some with open descriptors."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""
        self._descriptors: deque[int] = deque()

    def send(self, values: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a line.

        Raises:
            OSError: If the other side is gone.
        """
        line = json.dumps({**values, "n_descriptors": len(descriptors)}).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        n_sent = self.connection.sendmsg([line], ancillary)
        self.connection.sendall(line[n_sent:])

    def receive(self) -> list[tuple[dict[str, Any], list[int]]]:
        """Read once from the socket; return the lines that are complete, each with its descriptors.

        Raises:
            EOFError: If the other side is gone.
        """
        try:
            chunk, descriptors, _, _ = socket.recv_fds(self.connection, 1 << 16, _MAX_DESCRIPTORS)
        except ConnectionError as error:
            raise EOFError from error
        if not chunk:
            raise EOFError
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        self._descriptors.extend(descriptors)  # they come with the first byte of their line, or before it
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        received = []
        for line in lines:
            values = json.loads(line)
            received.append((values, [self._descriptors.popleft() for _ in range(values.pop("n_descriptors"))]))
        return received


class _Server:
    """The workers that were forked here, and the channel to who wants them."""

    def __init__(self, channel: Channel, module: ModuleType) -> None:
        self._channel, self._module = channel, module
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel.connection, selectors.EVENT_READ)
        self._workers: dict[int, tuple[int, int]] = {}
        """Number and process of each worker, by the descriptor that shows its end."""

    def serve(self) -> Never:
        """Fork what is asked for and say what has ended, for ever."""
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._workers:
                    self._reap(key.fd)
                    continue
                for request, (connection, log) in self._channel.receive():
                    self._fork(request["number"], request["environment"], connection, log)
                    os.close(connection)
                    os.close(log)

    def _fork(self, number: int, environment: Mapping[str, str], connection: int, log: int) -> None:
        own_pid = os.getpid()
        try:
            process = os.fork()
        except OSError as error:  # no memory, or too many processes
            os.write(log, f"it could not be forked: {error}".encode())
            self._channel.send({"number": number, "code": 1})
            return
        if process == 0:
            self._become_worker(own_pid, environment, connection, log)
        descriptor = os.pidfd_open(process)
        self._workers[descriptor] = number, process
        self._selector.register(descriptor, selectors.EVENT_READ)
        self._channel.send({"number": number, "pid": process}, [descriptor])

    def _become_worker(self, parent: int, environment: Mapping[str, str], connection: int, log: int) -> Never:
        """Be a worker from here on, as if it had been started with the environment."""
        try:
            _end_with_parent()
            if os.getppid() != parent:  # it has ended already
                os._exit(1)
            os.setpgid(0, 0)  # Ctrl-C in a terminal is for the coordinator alone
            self._selector.close()
            self._channel.connection.close()
            for descriptor in self._workers:
                os.close(descriptor)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.close(log)
            os.environ.update(environment)
            sys.argv = [str(self._module.__file__), str(connection)]
            gc.enable()
            self._module.main()
        except BaseException:  # noqa: BLE001 - nothing of this process may go on as the server
            traceback.print_exc()
        finally:
            os._exit(1)

    def _reap(self, descriptor: int) -> None:
        number, process = self._workers.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(process, 0)
        self._channel.send({"number": number, "code": os.waitstatus_to_exitcode(status)})


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _has_hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, 0)  # the end of the other side is told all the same
    return bool(poll.poll(0))


def main() -> Never:
    """Serve the coordinator whose socket is the first argument, with workers of the module that is the second."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, nobody could wait for a worker
    connection = socket.socket(fileno=int(sys.argv[1]))
    if _has_hung_up(connection):  # before this process asked to end with it
        os._exit(0)
    module = import_module(sys.argv[2])
    gc.disable()  # it takes a good quarter of the time of these imports
    if hasattr(module, "preload"):
        module.preload()
    gc.freeze()  # no collection in a worker looks at what was loaded here, nor copies its pages
    try:
        _Server(Channel(connection), module).serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the coordinator is gone


if __name__ == "__main__":
    main()
