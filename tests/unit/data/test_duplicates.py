"""Copies are found, however they were saved; images that merely look alike are not."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from tuner.data import duplicates
from tuner.data.duplicates import (
    Compared,
    Duplicates,
    describe_exact,
    describe_near,
    find_duplicates,
    pair_exact,
    pair_near,
    shrink,
)

SIZE = 64
N_IMAGES = 40


def draw_pictures(n_images: int = N_IMAGES, seed: int = 0) -> list[Image.Image]:
    """Return made-up photographs of 150 by 120 px: soft coloured patches and some grain."""
    generator = np.random.default_rng(seed)
    pictures = []
    for _ in range(n_images):
        patches = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        picture = np.asarray(patches.resize((150, 120), Image.Resampling.BICUBIC)).astype(np.int64)
        grain = generator.integers(-10, 11, picture.shape)
        pictures.append(Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)))
    return pictures


def decode(pictures: list[Image.Image], size: int = SIZE) -> NDArray[np.uint8]:
    """Return pictures as a store holds them."""
    return np.stack([np.asarray(picture.resize((size, size))).transpose(2, 0, 1) for picture in pictures])


def save_again(picture: Image.Image, image_format: str, **options: int) -> Image.Image:
    """Return what a file of the picture holds."""
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return Image.open(file).convert("RGB")


def halve(picture: Image.Image) -> Image.Image:
    """Return a smaller copy."""
    return picture.resize((picture.width // 2, picture.height // 2))


def mirror(picture: Image.Image) -> Image.Image:
    """Return a mirror image."""
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def crop(picture: Image.Image) -> Image.Image:
    """Return the middle three quarters."""
    return picture.crop((20, 15, 130, 105))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "png": lambda picture: save_again(picture, "PNG"),
    "jpeg 40": lambda picture: save_again(picture, "JPEG", quality=40),
    "webp": lambda picture: save_again(picture, "WEBP", quality=60),
    "half size": halve,
    "half size, jpeg 75": lambda picture: save_again(halve(picture), "JPEG", quality=75),
    "slightly blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(1)),
}
OTHERS = {"mirrored": mirror, "cropped": crop}


@pytest.mark.parametrize("how", COPIES)
def test_pair_near_finds_copies_and_their_origin(how: str) -> None:
    """Every picture is found among the copies, and none is taken for a copy of another."""
    pictures = draw_pictures()
    copies = decode([COPIES[how](picture) for picture in reversed(pictures)])
    assert pair_near(shrink(decode(pictures)), shrink(copies)) == {row: N_IMAGES - 1 - row for row in range(N_IMAGES)}


@pytest.mark.parametrize("how", OTHERS)
def test_pair_near_leaves_what_it_does_not_promise(how: str) -> None:
    """Mirrored and cropped pictures are other pictures, as the README says."""
    pictures = draw_pictures()
    assert pair_near(shrink(decode(pictures)), shrink(decode([OTHERS[how](each) for each in pictures]))) == {}


@pytest.mark.parametrize("size", [8, 16, 20, 96, 130, 224])
def test_pair_near_works_at_every_size(size: int) -> None:
    """Of small stores every pixel counts; of large ones that do not divide a rim is left out."""
    pictures = draw_pictures(6)
    first = shrink(decode(pictures, size))
    copies = shrink(decode([save_again(picture, "JPEG", quality=90) for picture in pictures], size))
    assert first.shape == (6, 3, 16, 16)
    assert pair_near(first, copies) == {row: row for row in range(6)}
    assert pair_near(first, shrink(decode(draw_pictures(6, seed=1), size))) == {}


def test_shrink_averages_each_channel_by_itself() -> None:
    """Red, green and blue do not run into each other."""
    pixels = np.zeros((1, 3, 40, 40), dtype=np.uint8)
    pixels[0, 1] = 200
    assert (shrink(pixels)[0] == np.array([0, 200, 0])[:, None, None]).all()


def test_pair_near_raises_few_false_alarms_over_the_digits() -> None:
    """1,797 digits, which are alike as handwriting is: 1.6 million pairs, of which two may be called copies."""
    digits = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).astype(np.uint8)).convert("RGB") for image in digits.images]
    small = shrink(decode(pictures, 32))
    found = sum(len(pair_near(small[start : start + 200], small[start + 200 :])) for start in range(0, 1600, 200))
    assert found <= 2


def test_pair_near_takes_nothing_without_contrast_for_a_copy() -> None:
    """A grey card is like every other grey card."""
    grey = np.full((2, 3, SIZE, SIZE), 100, dtype=np.uint8)
    assert pair_near(shrink(grey[:1]), shrink(grey)) == {}


def test_pair_near_compares_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by blocks, and the nearest of all blocks is named."""
    pictures = draw_pictures(20)
    rough, fine = (decode([save_again(each, "JPEG", quality=quality) for each in pictures]) for quality in (20, 95))
    monkeypatch.setattr(duplicates, "_N_BLOCK", 7)
    found = pair_near(shrink(decode(pictures)), shrink(np.concatenate([rough, fine])))
    assert found == {row: 20 + row for row in range(20)}


def test_pair_exact_names_the_first_and_knows_no_empty_digests() -> None:
    """What cannot be read, or hashed, is nobody's copy."""
    assert pair_exact(("x", "", "z"), ("", "z", "a", "z")) == {2: 1}


def make_side(name: str, pictures: list[Image.Image], digests: tuple[str, ...]) -> Compared:
    """Return one side of a comparison."""
    names = tuple(f"{name}/{row}" for row in range(len(pictures)))
    return Compared(names=names, digests=digests, pixels=decode(pictures))


def test_find_duplicates_counts_exact_ones_once() -> None:
    """What has the same bytes is not a near duplicate as well; without pixels only bytes are compared."""
    pictures = draw_pictures(6)
    train = make_side("train", pictures[:4], ("a", "b", "c", "d"))
    val = make_side("val", [pictures[4], pictures[0], save_again(pictures[2], "JPEG", quality=80)], ("e", "a", "f"))
    found = find_duplicates(val, train)
    assert found == Duplicates(exact=(("val/1", "train/0"),), near=(("val/2", "train/2"),))
    assert find_duplicates(replace(val, pixels=None), train) == replace(found, near=())
    assert found.to_json() == {"exact": [["val/1", "train/0"]], "near": [["val/2", "train/2"]]}
    assert find_duplicates(Compared(names=(), digests=()), train) == Duplicates(exact=(), near=())


def test_find_duplicates_says_when_there_are_too_many_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact ones are found in any case."""
    pictures = draw_pictures(3)
    side = make_side("train", pictures, ("a", "b", "c"))
    monkeypatch.setattr(duplicates, "MAX_COMPARISONS", 5)
    found = find_duplicates(make_side("val", pictures, ("a", "x", "y")), side)
    assert found == Duplicates(exact=(("val/0", "train/0"),), near=(), is_complete=False)
    assert describe_near(found, held_out="val", others="train") == (
        "near duplicates were not looked for: val times train are over 5 pairs",
    )


def test_describe_names_the_first_few() -> None:
    """One line for each kind, none where there is nothing to say."""
    found = Duplicates(exact=(("v", "t"),), near=tuple((f"v{row}", f"t{row}") for row in range(7)))
    assert describe_exact(found, held_out="val", others="train") == (
        "exact duplicates: 1 image of val in train too, which makes val too easy: 'v' is 't'",
    )
    (line,) = describe_near(found, held_out="test", others="train + val")
    assert line == (
        "near duplicates (the same picture saved again): 7 images of test in train + val too, which makes test too "
        "easy: 'v0' is 't0', 'v1' is 't1', 'v2' is 't2', 'v3' is 't3', 'v4' is 't4' and 2 more"
    )
    assert describe_exact(Duplicates(exact=(), near=()), held_out="val", others="train") == ()
    assert describe_near(Duplicates(exact=(), near=()), held_out="val", others="train") == ()
