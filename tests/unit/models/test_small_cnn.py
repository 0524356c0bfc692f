import pytest
import torch
from torch import nn

from tuner.models.small_cnn import SmallCNN


@pytest.mark.parametrize("image_size", [8, 9, 28, 32])
def test_small_cnn_takes_any_small_image(image_size: int) -> None:
    """Even and odd sizes from the smallest that a study allows."""
    model = SmallCNN(num_classes=5, image_size=image_size)
    assert model(torch.zeros(2, 3, image_size, image_size)).shape == (2, 5)


def test_small_cnn_is_the_classic_network() -> None:
    """Conv 32, conv 64, dropout .25, fc 128, dropout .5, fc classes: its parameter count for 28 px is known."""
    model = SmallCNN(num_classes=10, image_size=28)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert n_parameters == 1_199_882 + 32 * 2 * 9  # Keras' mnist_cnn has 1,199,882 on one channel
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.5]
    assert model.get_classifier() is model.fc
