"""Backbones of a user's own for tests: small, with a body that is the same in every trial."""

import torch
from torch import Tensor, nn

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
