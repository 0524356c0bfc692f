"""What a worker says, in a log of its own before it says it; and the fault that strikes at one of its messages.

A log line is one ``write()`` to a file opened for appending: what was written before a SIGKILL is there after it.
"""

import os
import resource
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from tuner.service.messages import Alive, DataRead, EpochDone, Hello, Message, Reply, Train, TrialDone
from tuner.service.worker import Line
from tuner.trial import TrialState

LOGS_VARIABLE = "FAULTS_LOGS"
"""The folder of the logs. It also marks the processes of a study."""
RUN_VARIABLE = "FAULTS_RUN"
TICKETS_VARIABLE = "FAULTS_TICKETS"
COORDINATOR_VARIABLE = "FAULTS_COORDINATOR"
OBJECTIVE = "val_accuracy"

Moment = Literal["before", "after"]
Victim = Literal["worker", "coordinator", "both", "stall"]


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A fault at a message of the worker that draws the ticket."""

    at: int
    """Which of its messages, from 1."""
    moment: Moment
    victim: Victim
    delay_ms: float = 0.0
    """After the message, so that its receiver is in the middle of something."""

    def to_text(self) -> str:
        """Return the ticket as one line."""
        return f"{self.at} {self.moment} {self.victim} {self.delay_ms}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what ``to_text`` wrote."""
        at, moment, victim, delay_ms = text.split()
        return cls(at=int(at), moment=moment, victim=victim, delay_ms=float(delay_ms))  # type: ignore[arg-type]


@dataclass(kw_only=True)
class WorkerLog:
    """The log of this process. Mutable: it remembers each trial's last value."""

    path: Path
    ticket: Ticket | None = None
    n_sent: int = 0
    values: dict[int, float] = field(default_factory=dict)

    def write(self, text: str) -> None:
        """Append a line."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.write(descriptor, f"{text}\n".encode())
        os.close(descriptor)

    def note_reply(self, reply: Reply) -> None:
        """Log what is about to be sent."""
        match reply:
            case EpochDone():
                for number, result in reply.results:
                    self.values[number] = result.objective_value(OBJECTIVE)
                    self.write(f"trial {number} epoch {result.epoch} value {self.values[number]!r}")
            case TrialDone():
                self.write(describe_end(reply.number, reply.outcome.state, self.values.get(reply.number)))

    def note_request(self, message: Message) -> None:
        """Log what has been received: new trials say that the ends of the older ones have been stored."""
        if isinstance(message, Train):
            self.write(f"received {' '.join(str(number) for number, _ in message.members)}")

    def strike(self, moment: Moment) -> None:
        """Let the fault happen, if its moment is now."""
        ticket = self.ticket
        if ticket is None or (ticket.at, ticket.moment) != (self.n_sent, moment):
            return
        time.sleep(ticket.delay_ms / 1000)
        coordinator = int(os.environ[COORDINATOR_VARIABLE])
        if _find_parent(os.getppid()) != coordinator:  # it is dead already, and its number may be another's
            return
        self.write(f"strike {ticket.victim} {moment}")
        if ticket.victim in {"coordinator", "both"}:
            os.kill(coordinator, signal.SIGKILL)
        if ticket.victim in {"worker", "both"}:
            os.kill(os.getpid(), signal.SIGKILL)
        if ticket.victim == "stall":
            os.kill(os.getpid(), signal.SIGSTOP)


def describe_end(number: int, state: TrialState, value: float | None) -> str:
    """Return the line for a trial's end; only a completed one has a value."""
    shown = repr(value) if state is TrialState.COMPLETE else "-"
    return f"trial {number} ended {state.value} {shown}"


def _find_parent(pid: int) -> int:
    """Return a process's parent: a worker's is the process that forks them, and that one's is the coordinator."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def watch_line() -> None:
    """Log what this worker process sends and receives, and draw a ticket for it when it is up."""
    # A disk that is full for the coordinator is not full for our logs.
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    logs, run = Path(os.environ[LOGS_VARIABLE]), os.environ[RUN_VARIABLE]
    log = WorkerLog(path=logs / f"{run}-worker-{os.getpid()}.log")
    send, receive = Line.send, Line.receive

    def logged_send(line: Line, /, reply: Reply) -> None:
        if isinstance(reply, Alive | DataRead):
            send(line, reply)
            return
        if isinstance(reply, Hello):
            log.ticket = _draw_ticket()
        log.n_sent += 1
        log.note_reply(reply)
        log.strike("before")
        send(line, reply)
        log.strike("after")

    def logged_receive(line: Line, /) -> Message:
        message = receive(line)
        log.note_request(message)
        return message

    Line.send, Line.receive = logged_send, logged_receive  # type: ignore[assignment, method-assign]


def _draw_ticket() -> Ticket | None:
    """Return the first ticket that no other worker has drawn."""
    folder = Path(os.environ[TICKETS_VARIABLE])
    for path in sorted(folder.glob("ticket-*")):
        mine = folder / f"drawn-{path.name}"
        try:
            path.rename(mine)
        except FileNotFoundError:  # another one was faster
            continue
        return Ticket.from_text(mine.read_text(encoding="ascii"))
    return None
