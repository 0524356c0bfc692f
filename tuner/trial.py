"""The words that travel between the coordinator and its workers: frozen, keyword-only, plain data."""

from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any, Literal, Self

Precision = Literal["auto", "float32", "bfloat16"]
"""What forward passes compute in. auto: bfloat16 on a CUDA device whose kernels have it, float32 on all others."""


@dataclass(frozen=True, kw_only=True)
class HeadStart:
    """How the head of a deeper trial is trained before all else, alone: linear probing, then fine-tuning (2202.10054).

    Each field is the one of ``TrialParams``; what is not here, as the backbone and the views, is the trial's own.
    """

    lr: float
    batch_size: int
    augmentation_strength: float
    optimizer: str
    weight_decay: float
    label_smoothing: float
    dropout: float
    warmup_fraction: float
    momentum: float
    epochs: int
    seed: int

    @classmethod
    def take_from(cls, params: "TrialParams") -> Self:
        """Return what another trial, which trains the head alone, is trained with."""
        return cls(**{field.name: getattr(params, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class TrialParams:
    """The resolved recipe of one trial: everything that training needs besides the data and the weights."""

    backbone: str
    """A timm model name, ``tuner:small_cnn`` or ``package.module:function``."""
    lr: float
    """Peak learning rate of the head, > 0."""
    batch_size: int
    """Images per optimizer step, >= 1."""
    unfrozen_layers: int
    """Layer groups that train, counted from the head. 1 is the classifier alone."""
    augmentation_strength: float
    """In [0, 1]; 0 is no augmentation at all."""
    optimizer: str
    """``adamw``, ``adam`` or ``sgd``."""
    weight_decay: float
    """Decoupled for adamw, L2 for adam and sgd; never applied to biases and norms. >= 0."""
    layer_decay: float
    """Factor on the learning rate per layer group away from the head. In (0, 1]; 1 is no decay."""
    label_smoothing: float
    """In [0, 1)."""
    dropout: float
    """Share of the classifier's inputs dropped in training, besides what the backbone itself drops. In [0, 1)."""
    warmup_fraction: float
    """Share of all steps with a linearly rising learning rate, before the cosine. In [0, 1)."""
    momentum: float
    """Momentum of sgd, beta1 of adam and adamw. In [0, 1)."""
    epochs: int
    """Horizon of the learning rate schedule, >= 1."""
    horizontal_flip: bool
    """Whether augmentation may mirror images."""
    class_weights: str
    """``none`` or ``balanced``."""
    seed: int
    """Seed of everything random in the trial, but for fixed views. In [0, 2**63)."""
    views: int | Literal["fresh"] = "fresh"
    """``fresh``: every epoch augments each image anew; K >= 1: epoch e shows view e mod K of each image."""
    view_seed: int = 0
    """Seed of fixed views, the same in all trials of a study. In [0, 2**63)."""
    precision: Precision = "auto"
    """Of forward passes; weights, losses and optimizers are float32 whatever it is."""
    head_start: HeadStart | None = None
    """How the head is trained before the first epoch; None: the trial starts from the head as it is drawn."""

    @property
    def head_recipe(self) -> Self | None:
        """The recipe of the training that makes the head which this trial starts from; None if there is none."""
        if self.head_start is None:
            return None
        own = {field.name: getattr(self.head_start, field.name) for field in fields(self.head_start)}
        return replace(self, unfrozen_layers=1, layer_decay=1.0, head_start=None, **own)

    def with_seed(self, seed: int) -> Self:
        """Return the recipe for a training by another seed, of which the head that it starts from is drawn as well."""
        if seed == self.seed:
            return self
        head_start = self.head_start and replace(self.head_start, seed=seed)
        return replace(self, seed=seed, head_start=head_start)

    @property
    def shows_known_images(self) -> bool:
        """Whether what each epoch shows is known beforehand, so that what frozen layers make of it can be kept."""
        return self.augmentation_strength == 0 or self.views != "fresh"

    def to_json(self) -> dict[str, Any]:
        """Return the params as a JSON object; a head start that there is not is left out, since TOML has no null."""
        values = asdict(self)
        if self.head_start is None:
            del values["head_start"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_json`` or ``dataclasses.asdict`` wrote."""
        values = {"head_start": None, **values}
        if (head_start := values["head_start"]) is not None:
            values["head_start"] = HeadStart(**head_start)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """One training of a trial that is trained more than once, or elsewhere than on the study's own train and val."""

    seed: int
    """In place of the recipe's."""
    n_folds: int = 0
    """Stratified folds that train and val are cut into anew, together; 0: the study's own train and val."""
    fold: int = 0
    """The one that validates, from 0; the others train."""
    cut_seed: int = 0
    """Of the folds. In [0, 2**32)."""

    @property
    def split(self) -> tuple[int, int, int]:
        """What says which images train and which validate."""
        return (self.n_folds, self.fold, self.cut_seed) if self.n_folds else (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch of training showed."""

    epoch: int
    """From 1."""
    train_loss: float
    """Mean training loss over the epoch's images, label smoothing and class weights included."""
    val_loss: float
    """Mean cross entropy over the validation images, without smoothing or weights."""
    val_accuracy: float
    val_balanced_accuracy: float
    """Mean of the classes' recalls."""
    val_macro_precision: float
    val_macro_recall: float
    val_macro_f1: float
    seconds: float
    """Wall time of training and validation."""
    images_per_second: float
    """Training images over the seconds that training them took."""
    val_seconds: float = 0.0
    """Of the seconds, those of validation."""
    repeat: int = 0
    """Which of the trial's trainings, from 0."""

    def objective_value(self, objective: str) -> float:
        """Return the value of a study's objective, such as ``val_accuracy``."""
        return float(getattr(self, objective))


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a trial was trained with besides its recipe, and what that saved."""

    features: Literal["none", "computed", "cached"] = "none"
    """Whether what frozen layers make of the images was computed for the trial or found; none: it trained on images."""
    cohort_size: int = 1
    """Trials that were trained as one when its training began."""
    saved_seconds: float = 0.0
    """Of the frozen backbone's work: what all its epochs would have taken, less its share of what was computed."""
    micro_batch: int | None = None
    """Images at a time, where a batch did not fit into memory; None: the whole batch."""
    predicted_bytes: int | None = None
    """Of the device's memory (the process's on a CPU) at the highest, model included; None: it was not foreseen."""
    peak_bytes: int | None = None
    """What it took; None: it was not foreseen, or did not end an epoch."""


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """Validation of one trained model, class by class."""

    confusion_matrix: tuple[tuple[int, ...], ...]
    """Rows are true classes, columns are predicted ones; counts."""
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` and JSON made of a report."""
        return cls(
            confusion_matrix=tuple(tuple(row) for row in values["confusion_matrix"]),
            precision=tuple(values["precision"]),
            recall=tuple(values["recall"]),
            f1=tuple(values["f1"]),
        )


class TrialState(StrEnum):
    """How a trial ended. The names are Optuna's."""

    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"


class Reason(StrEnum):
    """Why a trial did not complete."""

    PRUNER = "pruner"
    """Its curve was worse than the others'."""
    OUT_OF_MEMORY = "out_of_memory"
    """Infeasible: the sampler learns to avoid it."""
    DIVERGED = "diverged"
    """The loss became NaN or infinite. Infeasible."""
    ERROR = "error"
    """An exception while training; the traceback is kept with the trial."""
    TIME_LIMIT = "time_limit"
    """It took longer than ``search.trial_timeout``. Infeasible."""
    UNREADABLE = "unreadable"
    """Images or weights could not be read; the trial is queued again."""
    WORKER_LOST = "worker_lost"
    """Its process died; the trial is queued again."""
    STALLED = "stalled"
    """Its process hung and was ended; the trial is queued again."""
    COHORT_LOST = "cohort_lost"
    """An error ended the cohort that it was trained in; the trial is queued again, to be trained alone."""
    INTERRUPTED = "interrupted"
    """The run was stopped; the trial is queued again."""

    @property
    def infeasible(self) -> bool:
        """Whether the point itself is at fault, so that the sampler should avoid it."""
        return self in {Reason.OUT_OF_MEMORY, Reason.DIVERGED, Reason.TIME_LIMIT}

    @property
    def may_pass(self) -> bool:
        """Whether what went wrong may be gone at the next attempt; such trials are queued again, twice at most."""
        return self in {Reason.UNREADABLE, Reason.WORKER_LOST, Reason.STALLED, Reason.COHORT_LOST}


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """How a trial ended, and why if it did not complete."""

    state: TrialState
    reason: Reason | None = None
    message: str = ""
    """One line for a person."""
    traceback: str = ""
    report: ClassReport | None = None
    """Of the last epoch; only for completed trials."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` and JSON made of an outcome."""
        return cls(
            state=TrialState(values["state"]),
            reason=values["reason"] and Reason(values["reason"]),
            message=values["message"],
            traceback=values["traceback"],
            report=values["report"] and ClassReport.from_json(values["report"]),
        )
