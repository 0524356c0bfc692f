"""The sections of a study file. Each field's docstring is its documentation."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from tuner.spec.durations import check_budget, parse_duration
from tuner.spec.sizes import parse_size
from tuner.spec.space import PARAMETERS, Choices, Distribution, is_number

MIN_IMAGE_SIZE = 8
MAX_IMAGE_SIZE = 2048
"""Both in px. A batch of larger images would fill any memory."""


class Section(BaseModel):
    """Frozen, checked, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _within(low: float, high: float = math.inf, *, brackets: str = "[]") -> AfterValidator:
    """Check a number and say the whole interval when it lies outside."""

    def check(value: float) -> float:
        above_low = value > low if brackets[0] == "(" else value >= low
        below_high = value < high if brackets[1] == ")" else value <= high
        if above_low and below_high and is_number(value):
            return value
        if high == math.inf:
            raise ValueError(f"must be {'greater than' if brackets[0] == '(' else 'at least'} {low:g}")
        raise ValueError(f"must lie in {brackets[0]}{low}, {high}{brackets[1]}")

    return AfterValidator(check)


def _check_name(value: str) -> str:
    if not value.strip() or len(value) > 200 or any(not character.isprintable() for character in value):
        raise ValueError("must be 1 to 200 printable characters")
    if value.startswith("-"):
        raise ValueError("must not start with '-', which commands take for an option")
    return value


def _check_std(std: tuple[float, ...]) -> tuple[float, ...]:
    if min(std) <= 0:
        raise ValueError("must hold numbers greater than 0")
    return std


def _check_finite(values: tuple[float, ...]) -> tuple[float, ...]:
    if not all(map(math.isfinite, values)):
        raise ValueError("must hold finite numbers")
    return values


def _check_plain(value: Any) -> Any:
    """Let nothing through that JSON would change on the way to a worker."""
    match value:
        case dict():
            parts = list(value.values())
        case list():
            parts = value
        case _:
            if not (isinstance(value, str | bool) or is_number(value)):
                raise ValueError("must hold text, finite numbers, true, false, lists and tables only")
            parts = []
    for part in parts:
        _check_plain(part)
    return value


def _check_views(value: Any) -> Any:
    if value == "fresh" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError('must be "fresh" or a whole number of views, at least 1')


def _check_sharing(value: Any) -> Any:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value == "auto" or (is_whole and value >= 1):
        return value
    raise ValueError("must be at least 1" if is_whole else 'must be "auto" or a whole number, at least 1')


def _as_devices(value: Any) -> tuple[str, ...]:
    devices = (value,) if isinstance(value, str) else value
    good = isinstance(devices, list | tuple) and len(devices) > 0
    if not good or not all(
        isinstance(device, str) and re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", device) for device in devices
    ):
        raise ValueError('must be "auto", "cpu", "cuda:0" or a list of CUDA devices')
    if len(devices) > 1 and ("auto" in devices or "cpu" in devices):
        raise ValueError('must not mix "auto" or "cpu" with other devices')
    devices = tuple("cuda:0" if device == "cuda" else device for device in devices)
    if len(set(devices)) < len(devices):
        raise ValueError("must name each device once; per_device sets how many workers share it")
    return devices


Fraction = Annotated[float, _within(0, 1, brackets="()")]
Channels = Annotated[tuple[float, ...], Field(strict=False, min_length=3, max_length=3), AfterValidator(_check_finite)]


class StudySection(Section):
    """``[study]``: what the study is called, where it is kept, what it seeks."""

    name: Annotated[str, AfterValidator(_check_name)]
    """Name in the storage and in the dashboard."""
    storage: str | None = None
    """SQLite URL, relative to the working directory. Default: TUNER_STORAGE, else sqlite:///studies.db."""
    objective: Literal["val_accuracy", "val_balanced_accuracy", "val_macro_f1", "val_loss"] = "val_accuracy"
    """Value of a trial, taken after its last epoch. val_loss is minimised, the others are maximised."""
    seed: Annotated[int, _within(0, 2**63 - 1)] = 0
    """Seed of the splits, the sampler and every trial."""


class DataSection(Section):
    """``[data]``: the images, and how they are cut into train, val and test."""

    source: Literal["digits", "image_folder", "csv", "torchvision"]
    """Where images come from."""
    path: str | None = None
    """Relative to the study file. image_folder: the folder; csv: the file; torchvision: where its data lie."""
    dataset: str | None = None
    """torchvision only: the class in torchvision.datasets, such as FashionMNIST."""
    classes: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Keep only these classes, in this order. Default: all, sorted by name."""
    group: str | None = None
    """csv only: a column such as patient or scene; images with the same text in it stay in one split. Default: none."""
    image_size: Annotated[int, _within(MIN_IMAGE_SIZE, MAX_IMAGE_SIZE)] = 224
    """Height and width that every image is resized to, in px."""
    resize: Literal["squash", "crop"] = "squash"
    """squash: to the square, whatever the shape; crop: shorter side to the size, then the centre."""
    val_fraction: Fraction = 0.2
    """Share of the images for validation, per class, where the data has no val split."""
    test_fraction: Fraction | None = None
    """Share kept back for one look by ``tuner train``, where the data has no test split. Default: no test split."""
    folds: Annotated[int, _within(2)] | None = None
    """Score each trial on this many stratified folds of train and val together. Default: on val, once."""
    max_bad_fraction: Annotated[float, _within(0, 1, brackets="[)")] = 0.01
    """Share of images that may fail to decode; they are listed and left out. More is an error."""


class BackboneSection(Section):
    """``[backbones."NAME"]``: how one backbone is made, where the default does not do."""

    weights: str | None = None
    """A .safetensors or .pth file, relative to the study file, or "random". Default: timm's pretrained tag."""
    kwargs: Annotated[dict[str, Any], AfterValidator(_check_plain)] = {}
    """Keyword arguments for timm.create_model or for the user's function."""
    mean: Channels | None = None
    """Per channel, of pixels in [0, 1]. Default: the backbone's pretrained_cfg."""
    std: Annotated[Channels, AfterValidator(_check_std)] | None = None
    """Per channel, > 0. Default: the backbone's pretrained_cfg."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """How images are resized for it. Default: the backbone's pretrained_cfg."""
    keep_head: bool = False
    """Keep the classifier of the weights file; its classes must then be the study's, in the study's order."""


class TrainingSection(Section):
    """``[training]``: what is the same in every trial. Params that are not in [space] may stand here too."""

    epochs: Annotated[int, _within(1)] = 12
    """Epochs of a trial, and the horizon of its learning rate schedule."""
    horizontal_flip: bool = True
    """Whether augmentation may mirror images. False for digits, text and other things with a handedness."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs the same in the training loss."""
    views: Annotated[Literal["fresh"] | int, BeforeValidator(_check_views)] = "fresh"
    """fresh: each epoch augments every image anew; K: K fixed versions of each image, and epoch e shows e mod K."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What forward passes compute in. auto: bfloat16 on CUDA devices with kernels for it, float32 elsewhere."""
    head_start: Literal["none", "screen"] = "none"
    """screen: deeper trials first train their head alone, by the screen's best recipe of the backbone; none: not."""
    backbone: Any = None
    lr: Any = None
    batch_size: Any = None
    unfrozen_layers: Any = None
    augmentation_strength: Any = None
    optimizer: Any = None
    weight_decay: Any = None
    layer_decay: Any = None
    label_smoothing: Any = None
    dropout: Any = None
    warmup_fraction: Any = None
    momentum: Any = None


class PretrainingSection(Section):
    """``[pretraining]``: train every backbone once on a source data set before the search."""

    data: DataSection
    """The source data set: the keys of [data]. Its val split shows in the log only."""
    epochs: Annotated[int, _within(1)] = 10
    """Epochs of pretraining."""
    lr: Annotated[float, _within(0, brackets="()")] = 1e-3
    """Peak learning rate (adamw, cosine)."""
    batch_size: Annotated[int, _within(1)] = 64
    """Images per step."""
    augmentation_strength: Annotated[float, _within(0, 1)] = 0.0
    """As the param of the same name."""


class SearchSection(Section):
    """``[search]``: how points are proposed and when trials are pruned."""

    sampler: Literal["tpe", "gp", "random", "qmc", "grid"] = "tpe"
    """Optuna's samplers; grid tries every point of a finite space once, in a seeded order."""
    pruner: Literal["median", "percentile", "asha", "hyperband", "none"] = "median"
    """Optuna's pruners, with resources counted in epochs."""
    n_trials: Annotated[int, _within(1)] = 60
    """COMPLETE and PRUNED trials of the whole study, whatever the number of runs, workers and failures."""
    screen: Annotated[int, _within(0)] = 0
    """Head-only trials of each backbone before the search, besides n_trials; 0: none."""
    seeds_per_trial: Annotated[int, _within(1)] = 1
    """Trainings of each trial with seeds of their own (on every fold); its value is their mean."""
    confirm_fraction: Annotated[float, _within(0, 1, brackets="[)")] = 0.0
    """Share of the time kept back to train the best few again on fresh seeds when the search ends; 0: none."""
    budget: Annotated[str, AfterValidator(check_budget)] | None = None
    """Of the whole study, all runs together: "2 gpu-hours" of devices (CPU cores count as devices), or a wall time."""
    timeout: Annotated[float, BeforeValidator(parse_duration)] | None = None
    """Of one run: after it no trial starts, and the running ones finish. Default: none."""
    trial_timeout: Annotated[float, BeforeValidator(parse_duration)] | None = None
    """Of one trial, from its first step. One that takes longer is ended, and samplers avoid its like. Default: none."""


class WorkersSection(Section):
    """``[workers]``: which devices train."""

    devices: Annotated[tuple[str, ...], BeforeValidator(_as_devices)] = ("auto",)
    """auto: every CUDA device, else CPU; or ["cuda:0", "cuda:1"], "cuda:0", "cpu"."""
    per_device: Annotated[Literal["auto"] | int, BeforeValidator(_check_sharing)] = 1
    """Workers that share one CUDA device. auto: before the first trial a probe tries up to 4 and takes what pays."""
    prefix_cache: Literal["auto", "always", "never"] = "auto"
    """What frozen layers make of known images is kept: auto where it saves time, always where it is exact, or never."""
    torch_compile: bool = False
    """Compile each trial's model for its training steps; the first trial of each shape takes minutes longer."""
    cuda_graphs: bool = False
    """On CUDA, record the steps of trials on kept maps and launch each as one, where that is measured to save time."""
    stall_limit: Annotated[float, BeforeValidator(parse_duration)] = 300.0
    """Silence after which a worker counts as hanging: it is ended, replaced, and its trial queued again."""
    checkpoint_every: Annotated[float, BeforeValidator(parse_duration)] = 60.0
    """Least time between two checkpoints of a trial; a killed run goes on from the last one."""
    memory_limit: Annotated[int, BeforeValidator(parse_size)] | None = None
    """Memory that training a trial may take: of its GPU, images there included, or on a CPU of the machine besides the
    program and its images. Default: what there is."""


class WarmStartSection(Section):
    """``[warm_start]``: what earlier studies of the same storage have found."""

    studies: Annotated[tuple[Annotated[str, AfterValidator(_check_name)], ...], Field(strict=False)]
    """Names; the confirmed best recipe of each, else its best, is tried first, as near as the space allows."""


class StudySpec(Section):
    """A study file, checked, with its paths made absolute."""

    study: StudySection
    data: DataSection
    space: dict[str, Distribution]
    backbones: dict[str, BackboneSection] = {}
    training: TrainingSection = TrainingSection()
    pretraining: PretrainingSection | None = None
    search: SearchSection = SearchSection()
    workers: WorkersSection = WorkersSection()
    warm_start: WarmStartSection | None = None
    enqueue: Annotated[tuple[dict[str, str | int | float], ...], Field(strict=False)] = ()

    def fixed_params(self) -> dict[str, str | int | float]:
        """Return the params that ``[training]`` fixes, by name."""
        return {name: value for name in PARAMETERS if (value := getattr(self.training, name)) is not None}

    def backbone_names(self) -> tuple[str, ...]:
        """Return the backbones that the study may try, in the order of the file."""
        distribution = self.space.get("backbone")
        names = distribution.choices if isinstance(distribution, Choices) else (self.training.backbone,)
        return tuple(str(name) for name in names)
