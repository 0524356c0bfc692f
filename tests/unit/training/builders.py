"""Small things to train: a net of three layer groups, and images whose class a net can learn in a second."""

from typing import Any

import torch
from torch import Tensor, nn

from tuner.data.image_set import ImageSet
from tuner.models.backbone import Preprocessing
from tuner.training.loop import TrainingJob
from tuner.trial import TrialParams

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")
SIZE = 8


class TinyNet(nn.Module):
    """Two convolutions and a classifier, with BatchNorm."""

    def __init__(self, n_classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(4 * SIZE * SIZE, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.fc(self.middle(self.stem(images)))
        return logits


def make_net(n_classes: int = 2, seed: int = 0) -> TinyNet:
    """Return a net with weights drawn from a seed."""
    torch.manual_seed(seed)
    return TinyNet(n_classes)


def make_images(n_images: int = 64, seed: int = 0) -> ImageSet:
    """Return noise whose left half (class 0) or right half (class 1) is a little brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_images) % 2
    pixels = torch.randint(0, 160, (n_images, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    pixels[labels == 0, :, :, : SIZE // 2] += 60
    pixels[labels == 1, :, :, SIZE // 2 :] += 60
    return ImageSet(pixels=pixels, labels=labels, n_classes=2, rows=torch.arange(len(labels)))


def make_params(**overrides: Any) -> TrialParams:
    """Return a recipe that learns ``make_images``."""
    values = {
        "backbone": "tiny",
        "lr": 0.01,
        "batch_size": 16,
        "unfrozen_layers": 3,
        "augmentation_strength": 0.0,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "layer_decay": 1.0,
        "label_smoothing": 0.0,
        "dropout": 0.0,
        "warmup_fraction": 0.1,
        "momentum": 0.9,
        "epochs": 4,
        "horizontal_flip": False,
        "class_weights": "none",
        "seed": 7,
    }
    return TrialParams.from_json(values | overrides)


def make_job(model: nn.Module | None = None, *, val: ImageSet | None = None, **overrides: Any) -> TrainingJob:
    """Return a job on the toy problem; the overrides are params."""
    return TrainingJob(
        model=model or make_net(),
        params=make_params(**overrides),
        train=make_images(),
        val=val or make_images(32, seed=1),
        preprocessing=PREPROCESSING,
        device=CPU,
    )


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
