"""The classic MNIST network, for images of a few dozen pixels; it has no pretrained weights."""

import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers, as in the MNIST examples of Keras and PyTorch.

    Its layer groups, from the head, are ``fc``, ``fc1``, ``conv2`` and ``conv1``.

    Args:
        num_classes: Classes of the head.
        image_size: Height and width of the images, in px; at least 6.
    """

    def __init__(self, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        side = (image_size - 4) // 2
        # Registered in the order of the forward pass: freeze_layers reads a dropout's place from it.
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(64 * side * side, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.fc = nn.Linear(128, num_classes)

    def get_classifier(self) -> nn.Linear:
        """Return the head, as timm's models do."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``(n, num_classes)``, of images, ``(n, 3, image_size, image_size)``."""
        maps = F.relu(self.conv1(images))  # (n, 32, size - 2, size - 2)
        maps = F.max_pool2d(F.relu(self.conv2(maps)), 2)  # (n, 64, side, side)
        features = F.relu(self.fc1(self.dropout1(maps).flatten(1)))  # (n, 128)
        logits: Tensor = self.fc(self.dropout2(features))
        return logits
