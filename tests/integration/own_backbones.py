"""Backbones of a user's own for tests: small, with a body that is the same in every trial."""

import random

import torch
from torch import Tensor, nn

SEED = 0
"""Stands for a file of weights, which may be replaced."""
FACTOR = 1.0
"""Stands for the code of ``forward``, which a user may edit."""


class Net(nn.Module):
    """A convolution, BatchNorm with statistics of its own, and a linear head."""

    def __init__(self, num_classes: int, fails_after: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)
        for parameter in self.body.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.norm.running_mean = torch.randn(8, generator=generator)
        self.fails_after = fails_after
        self.shift: Tensor | float = 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        if self.fails_after and len(images) >= self.fails_after:
            raise ValueError("the user's own bug")
        logits: Tensor = self.fc(torch.relu(self.norm(self.body(images)) + self.shift).mean((2, 3)) * FACTOR)
        return logits


def plain(num_classes: int) -> Net:
    """Return a net that heads can be trained on."""
    return Net(num_classes)


def normless(num_classes: int) -> Net:
    """Return a net without BatchNorm, whose statistics here are not those of any images."""
    net = Net(num_classes)
    net.norm = nn.Identity()  # type: ignore[assignment]
    return net


def raising(num_classes: int) -> Net:
    """Return a net that fails on a whole batch of features, but not on the few images that are tried first."""
    return Net(num_classes, fails_after=12)


def shifting(num_classes: int) -> Net:
    """Return a net with a random tensor that is neither a parameter nor a buffer."""
    net = Net(num_classes)
    net.shift = torch.randn(8, 1, 1)
    return net


def dropping(num_classes: int) -> nn.Module:
    """Return a net whose own dropout lies before its classifier."""
    net = Net(num_classes)
    net.norm = nn.Sequential(net.norm, nn.Dropout(0.5))  # type: ignore[assignment]
    net.fc = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, num_classes))  # type: ignore[assignment]
    return net


class Deep(nn.Module):
    """Two frozen-or-not convolutions with BatchNorm under a linear head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.middle = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.fc = nn.Linear(8, num_classes)
        for parameter in (*self.stem.parameters(), *self.middle.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.fc(self.middle(self.stem(images) * FACTOR).mean((2, 3)))
        return logits


class Branching(Deep):
    """A net whose forward looks at its numbers, so that it cannot be traced."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(images if images.mean() < 1e9 else images * 2)


class Drawing(Deep):
    """A net that adds noise to what its frozen stem makes of images while it trains."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        maps = nn.functional.dropout(self.stem(images), 0.001, training=self.training)
        logits: Tensor = self.fc(self.middle(maps).mean((2, 3)))
        return logits


class Skipping(Deep):
    """A net that leaves a frozen layer out now and then while it trains."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        maps = self.stem(images)
        if not (self.training and random.random() < 0.2):  # noqa: S311
            maps = maps * 2
        logits: Tensor = self.fc(self.middle(maps).mean((2, 3)))
        return logits


class Striding(Deep):
    """A net whose upper part relies on how the lower one leaves its numbers in memory."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.middle = nn.Linear(6, 8)  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        rows = self.stem(images).contiguous().flatten(2).transpose(1, 2)  # (n, 49, 6), not in that order in memory
        gated = rows * self.middle.weight.mean()  # type: ignore[operator]
        logits: Tensor = self.fc(self.middle(gated.transpose(1, 2).view(-1, 49).view(-1, 6, 49).mean(2)))
        return logits


class Uncopied(Deep):
    """A net that cannot be copied."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.scale = self.fc.weight.sum() * 0 + 1


def skipping(num_classes: int) -> Deep:
    """Return a net that draws from Python's generator."""
    return Skipping(num_classes)


def striding(num_classes: int) -> Deep:
    """Return a net that its suffix alone cannot run."""
    return Striding(num_classes)


def uncopied(num_classes: int) -> Deep:
    """Return a net with a tensor that no copy may hold."""
    return Uncopied(num_classes)


def deep(num_classes: int) -> Deep:
    """Return a net that is the same in every trial, but for its head."""
    return Deep(num_classes)


def branching(num_classes: int) -> Deep:
    """Return a net that cannot be traced."""
    return Branching(num_classes)


def drawing(num_classes: int) -> Deep:
    """Return a net that draws random numbers below its cut."""
    return Drawing(num_classes)


def redrawn(num_classes: int) -> Deep:
    """Return a net whose stem is drawn anew for every trial."""
    net = Deep(num_classes)
    for parameter in net.stem.parameters():
        nn.init.normal_(parameter)
    return net


class Roomy(nn.Module):
    """Convolutions whose maps take 1 MB for each image of 64 px, with or without BatchNorm."""

    def __init__(self, num_classes: int, *, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        maps = torch.relu(self.norm(self.stem(images)))
        logits: Tensor = self.fc(torch.relu(self.body(maps)).mean((2, 3)))
        return logits


def roomy(num_classes: int) -> Roomy:
    """Return a net whose batches may be split."""
    return Roomy(num_classes, norm=False)


def normed(num_classes: int) -> Roomy:
    """Return a net whose batches must stay whole."""
    return Roomy(num_classes, norm=True)
