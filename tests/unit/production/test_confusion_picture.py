"""Tests of tuner.production.confusion_picture."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from tuner.production.confusion_picture import draw_confusion


def draw(path: Path, classes: tuple[str, ...]) -> Image.Image:
    """Return the picture of a perfect model with these classes."""
    draw_confusion(path, np.diag(np.arange(1, len(classes) + 1)), classes, title="test accuracy 100 %")
    with Image.open(path) as picture:
        picture.load()
        return picture


@pytest.mark.parametrize("n_classes", [2, 10, 100, 150])
def test_draw_confusion_grows_with_the_classes(tmp_path: Path, n_classes: int) -> None:
    """A cell has room for its number, and many classes do not make a poster."""
    picture = draw(tmp_path / "picture.png", tuple(f"class {number}" for number in range(n_classes)))
    assert picture.format == "PNG"
    assert max(300, 20 * n_classes) <= min(picture.size) + 400
    assert max(picture.size) < 3500


@pytest.mark.parametrize(
    "name", ["$", "$x^{2$", r"\frac{1}{2}", "a_b", "日本語", "two\nlines\tand a tab", "x" * 500, ""]
)
def test_draw_confusion_takes_any_name(tmp_path: Path, name: str) -> None:
    """Class names are data: never markup, never an error, and never a picture as wide as they are."""
    picture = draw(tmp_path / "picture.png", (name, "other"))
    assert max(picture.size) < 1200


def test_draw_confusion_draws_dollars_as_they_are(tmp_path: Path) -> None:
    """``$a$`` is three characters, and not an italic a."""
    with_dollars = draw(tmp_path / "1.png", ("$a$", "other"))
    without = draw(tmp_path / "2.png", ("a", "other"))
    assert with_dollars.size[0] > without.size[0] or with_dollars.tobytes() != without.tobytes()
    assert (
        draw(tmp_path / "3.png", ("$aaaaaaaaaaaaaaaa$", "other")).size[0]
        > draw(tmp_path / "4.png", ("aaaaaaaaaaaaaaaa", "other")).size[0]
    )


def test_draw_confusion_leaves_matplotlib_alone(tmp_path: Path) -> None:
    """No setting stays behind in a notebook."""
    before = dict(mpl.rcParams)
    draw(tmp_path / "picture.png", ("a", "b"))
    assert dict(mpl.rcParams) == before
