"""What the coordinator and its workers say to each other: plain data, which ``wire`` sends."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

from tuner.trial import EpochResult, Repeat, TrialOutcome, TrialParams, Usage

PROGRESS_SECONDS = 0.25
"""Least time between two words on how far something is."""

# --- coordinator to worker ---


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The first message: the study, and what the worker is to be."""

    spec: str
    """The checked spec as JSON."""
    device: str
    """``cpu`` or ``cuda`` (the one device that the worker sees), or ``none`` for a worker that only describes,
    or only reads the data if it is asked for nothing more."""
    n_threads: int
    """Threads for decoding."""


@dataclass(frozen=True, kw_only=True)
class Describe:
    """Look at the data, the backbones and the weights; answered by ``Description``."""

    timed: bool = False
    """Also time a training step of every backbone."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make something ready for every worker, once: decode the images, or fetch or pretrain a backbone's weights."""

    data_hash: str
    """What the data must still be."""
    backbone: str | None
    """None: the images."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Take training steps of a recipe and forget what they did; answered by ``Probed``."""

    data_hash: str
    """What the data must still be."""
    params: TrialParams
    seconds: float
    """How long to take steps that count. A recipe that the last probe did not have is made ready first."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train trials; an ``EpochDone`` for each epoch waits for a ``Verdict``, and a ``TrialDone`` ends each trial.

    Several trials are a cohort: they train their heads alone, and share all that their features depend on.
    """

    data_hash: str
    """What the data must still be."""
    members: tuple[tuple[int, TrialParams], ...]
    """Number and recipe of each trial."""
    uses_features: bool
    """Whether the trials train on what the frozen backbone makes of the images, kept in the cache."""
    checkpoint: str = ""
    """File that a trial which trains alone goes on from and saves to; empty: none."""
    repeats: tuple[Repeat, ...] = ()
    """Trainings of a trial that trains alone, one after the other; none: one, by the recipe's own seed."""
    n_sharing: float = 0.0
    """Further trials that are expected to need what the frozen layers make of the images."""
    cuts: tuple[int, ...] = ()
    """Unfrozen layers that trials of the backbone may have: an earlier cut's maps lead to a later one's."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What trials are to do after an epoch: go on, if nothing else is said."""

    stop: tuple[int, ...] = ()
    """Those that the pruner ends."""
    keep: int | None = None
    """After the last epoch: the one whose model folder is to be written."""
    folder: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the model folder says of where its model came from."""


# --- worker to coordinator ---


@dataclass(frozen=True, kw_only=True)
class DataRead:
    """The worker has looked at the data, which can be used; the first thing that one without a device says."""


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The worker is up."""

    cuda_devices: tuple[str, ...]
    """Names of the CUDA devices that it sees."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a study means on this machine."""

    classes: tuple[str, ...]
    split_counts: dict[str, int]
    splits: str
    data_hash: str
    group_counts: dict[str, int]
    n_params: dict[str, int]
    """Trainable numbers of each backbone, head included."""
    weights: dict[str, str]
    """Where each backbone's weights come from, for a person."""
    fingerprints: dict[str, str]
    """Identity of each backbone's weights."""
    preprocessing: dict[str, dict[str, Any]]
    """``mean``, ``std`` and ``interpolation`` of each backbone."""
    versions: dict[str, str]
    store_bytes: int
    """Disk that the decoded images take."""
    free_bytes: int
    """Disk that the cache folder has."""
    seconds_per_image: dict[str, float]
    """Full fine-tuning of one image in one epoch, by backbone; empty unless timed."""
    max_folds: int = 0
    """Folds that train and val can be cut into anew; 0 where the data gives val."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Alive:
    """The worker's process runs Python, whatever it computes."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line for the user."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The images (None) or a backbone's weights are ready."""

    backbone: str | None


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a probe showed."""

    images_per_second: float = 0.0
    memory: tuple[tuple[int, int], ...] = ()
    """Bytes that this worker holds of the host, and of a CUDA device, each with what is free there besides."""
    problem: str | None = None
    """Why the recipe cannot be trained, in one line; nothing else is said then."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a long preparation is."""

    text: str
    """What is being done."""
    n_done: int
    n_total: int


@dataclass(frozen=True, kw_only=True)
class Started:
    """The trials have images, model and features, and begin to train: their time counts from now."""


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """Trials finished an epoch and wait for their verdict."""

    results: tuple[tuple[int, EpochResult], ...]
    """By the trials' numbers."""


@dataclass(frozen=True, kw_only=True)
class TrialDone:
    """A trial ended."""

    number: int
    outcome: TrialOutcome
    kept: bool = False
    """Whether its model folder was written."""
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, kw_only=True)
class GivenBack:
    """Trials that cannot train on kept features, before any of them finished an epoch."""

    numbers: tuple[int, ...]
    backbone: str
    reason: str
    """One line for a person."""
    is_lasting: bool
    """Whether it holds for every trial of the backbone."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The user's mistake; the run ends."""

    error: str
    """Name of the ``TunerError``."""
    message: str


@dataclass(frozen=True, kw_only=True)
class Crashed:
    """A bug; the run ends."""

    traceback: str


Request = Setup | Describe | Prepare | Probe | Train | Verdict
Reply = (
    DataRead
    | Hello
    | Alive
    | Description
    | Note
    | Progress
    | Prepared
    | Probed
    | Started
    | EpochDone
    | TrialDone
    | GivenBack
    | Refused
    | Crashed
)
Message = Request | Reply


class Coordinator(Protocol):
    """Who a worker answers to."""

    def send(self, reply: Reply) -> None:
        """Send a reply."""

    def ask_verdict(self, done: EpochDone) -> Verdict:
        """Report an epoch and wait for what the trials are to do."""


def report_progress(coordinator: Coordinator, text: str) -> Callable[[int, int], None]:
    """Return what tells the coordinator now and then how much of something is done, given done and total."""
    reported = monotonic()

    def report(n_done: int, n_total: int) -> None:
        nonlocal reported
        if monotonic() - reported > PROGRESS_SECONDS:
            reported = monotonic()
            coordinator.send(Progress(text=text, n_done=n_done, n_total=n_total))

    return report
