"""What a worker keeps between trials: its device, the images, weights that were read before."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tuner.data.folds import cut_fold
from tuner.data.image_set import ImageSet, load_image_set, move_to
from tuner.data.index import Split
from tuner.data.locks import locked
from tuner.errors import DeviceError, ExportError
from tuner.models.backbone import Preprocessing, read_preprocessing
from tuner.service.messages import Verdict
from tuner.service.study_data import StudyData
from tuner.spec.sections import BackboneSection, StudySpec
from tuner.training.compiling import Compiler
from tuner.training.device import describe_computing
from tuner.training.package import Manifest, write_package
from tuner.training.prepare import WeightsCache, prepare_model
from tuner.training.pretrain import find_pretrained, pretrain_backbone
from tuner.training.step_graphs import StepGraphs
from tuner.trial import Repeat, TrialParams


class Workbench:
    """The study in a worker. Mutable: it keeps what it has read."""

    def __init__(
        self, spec: StudySpec, data: StudyData, *, device: str, n_threads: int, note: Callable[[str], None]
    ) -> None:
        self.spec, self.data, self.n_threads, self.note = spec, data, n_threads, note
        self.device = _take_device(device, n_threads)
        self.compiler = Compiler(note) if spec.workers.torch_compile else None
        """Of all trials that train on images."""
        self.graphs = StepGraphs(note) if spec.workers.cuda_graphs and self.device.type == "cuda" else None
        """Of those that train on kept maps."""
        self._image_sets: dict[str, tuple[ImageSet, ImageSet]] = {}
        self._whole: tuple[str, ImageSet] | None = None
        self._weights = WeightsCache()
        self._pretrained: dict[str, Path] = {}

    def section(self, backbone: str) -> BackboneSection:
        """Return what the study file says of a backbone."""
        return self.spec.backbones.get(backbone, BackboneSection())

    def preprocess(self, backbone: str) -> Preprocessing:
        """Return how images become a backbone's input."""
        return read_preprocessing(backbone, self.section(backbone))

    def load_images(self, interpolation: str) -> tuple[ImageSet, ImageSet]:
        """Return the images of train and of val, where training finds them fastest."""
        if interpolation not in self._image_sets:
            self._whole = None  # a device may not have the room for both
            train, val = (self._load(interpolation, split) for split in (Split.TRAIN, Split.VAL))
            self._image_sets[interpolation] = train, val
        return self._image_sets[interpolation]

    def load_repeat(self, interpolation: str, repeat: Repeat | None) -> tuple[ImageSet, ImageSet]:
        """Return the images that train and those that validate in one training of a trial.

        Raises:
            DataError: If a fold lacks a class.
        """
        if repeat is None or not repeat.n_folds:
            return self.load_images(interpolation)
        if self._whole is None or self._whole[0] != interpolation:
            self._whole = None
            self._image_sets.clear()
            self._whole = interpolation, self._load(interpolation, Split.TRAIN, Split.VAL)
        return cut_fold(self._whole[1], repeat, self.data.index)

    def _load(self, interpolation: str, *which: Split) -> ImageSet:
        images = load_image_set(
            self.data.index,
            self.data.splits,
            self.spec.data,
            which,
            interpolation=interpolation,
            n_threads=self.n_threads,
            verify=False,  # whoever prepared the images has
        )
        return move_to(images, self.device)

    def make_model(self, params: TrialParams) -> nn.Module:
        """Return a trial's model before its first step, on the CPU."""
        pretrained = self._find_pretrained(params.backbone)
        return prepare_model(params, self.spec, len(self.data.index.classes), pretrained, self._weights)

    def _find_pretrained(self, backbone: str) -> Path | None:
        if self.spec.pretraining is None:
            return None
        if backbone not in self._pretrained:
            self._pretrained[backbone] = find_pretrained(backbone, self.spec)[0]
        path = self._pretrained[backbone]
        if not path.is_file() and self._weights.get_state(str(path)) is None:  # somebody has cleared the cache
            self.note(f"the pretrained weights of {backbone} have gone from the cache; it is pretrained again")
            with locked(path):  # by one worker, while the others wait
                pretrain_backbone(backbone, self.spec, self.device)
        return path

    def keep_model(self, model: nn.Module, params: TrialParams, verdict: Verdict) -> bool:
        """Write the model folder that a verdict asks for; a full disk costs the folder, not the trial."""
        manifest = Manifest(
            backbone=params.backbone,
            kwargs=self.section(params.backbone).kwargs,
            preprocessing=self.preprocess(params.backbone),
            classes=self.data.index.classes,
            image_size=self.spec.data.image_size,
            resize=self.spec.data.resize,
            params=params,
            provenance=verdict.provenance | describe_computing(self.device, params.precision),
        )
        try:
            write_package(Path(verdict.folder), model, manifest)
        except ExportError as error:
            self.note(f"the model of the best trial could not be kept: {error}")
            return False
        return True


def list_cuda_devices() -> tuple[str, ...]:
    """Return the names of the CUDA devices that this process sees."""
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))


def _take_device(kind: str, n_threads: int) -> torch.device:
    """Return the worker's device; on CUDA the one that it was bound to, and the only one that it may see.

    Raises:
        DeviceError: If the binding failed.
    """
    if kind != "cuda":
        torch.set_num_threads(1)
        return torch.device("cpu")
    if (n_visible := torch.cuda.device_count()) != 1:
        raise DeviceError(f"workers.devices: a worker must see its own CUDA device alone, got {n_visible} devices")
    torch.set_num_threads(n_threads)
    return torch.device("cuda", 0)
