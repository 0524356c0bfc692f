"""The arms of the search benchmark do the same work, each in its own way."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import ImageFolder

from benchmarks.arms.job import ArmJob
from benchmarks.arms.plain_run import describe_config
from benchmarks.arms.plain_script import FixedViews, Space, Trainer, ViewSampler, list_groups, make_transform
from benchmarks.arms.tuner_run import make_tables
from benchmarks.cases.search_speed import ARMS
from benchmarks.material import Material, make_material
from benchmarks.search_settings import ARM_NAMES
from benchmarks.search_spaces import SEARCH_SPACES
from benchmarks.study_file import write_study_file
from tuner import load_spec
from tuner.models.layers import group_layers
from tuner.search.distributions import check_group_counts, make_distributions, resolve_params
from tuner.trial import Precision


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Return a few digits and tiny models."""
    return make_material(tmp_path_factory.mktemp("material"), dataset="none", image_size=32, smoke=True)


def make_job(material: Material, space: str, *, epochs: int = 3) -> ArmJob:
    """Return a job on them."""
    return ArmJob(
        material=material,
        space=SEARCH_SPACES[space],
        seed=5,
        epochs=epochs,
        n_trials=2,
        minutes=1.0,
        device="cpu",
        folder=material.folder,
    )


def test_arms_are_those_of_the_command_line() -> None:
    """What can be asked for can be run."""
    assert tuple(ARMS) == ARM_NAMES


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_arms_compute_in_the_precision_that_is_asked(
    material: Material, precision: Precision, expected: torch.dtype
) -> None:
    """The plain script by autocast, tuner by its study file; on a CPU both compute in float32 by themselves."""
    job = replace(make_job(material, "S2"), precision=precision)
    with Trainer(describe_config(job)).autocast():
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == expected
    tables = make_tables(job, screen=0, views="fresh", prefix_cache="auto")
    assert tables["training"]["precision"] == precision


@pytest.mark.parametrize("space", ["S2", "S4"])
def test_plain_script_unfreezes_what_tuner_unfreezes(material: Material, tmp_path: Path, space: str) -> None:
    """Both draw the same numbers, begin with the highest, and let the same parameters train."""
    job = make_job(material, space)
    plain = Space(Trainer(describe_config(job)))
    write_study_file(tmp_path / "study.toml", make_tables(job, screen=0, views="fresh", prefix_cache="auto"))
    spec = load_spec(tmp_path / "study.toml")
    check_group_counts(spec, plain.n_groups)
    searched: Any = make_distributions(spec, plain.n_groups)["unfrozen_layers"]
    assert (searched.low, searched.high) == (plain.space["unfrozen_layers"]["low"], plain.highest_level)
    first = plain.first_point(SEARCH_SPACES[space].first_point)["unfrozen_layers"]
    assert first == searched.high
    for name in plain.n_groups:
        model: Any = plain.trainer.read_backbone(name)
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        groups = [{names[id(parameter)] for parameter in group} for group in list_groups(model)]
        assert groups == [set(group) for group in group_layers(model)]
    plain.n_groups = dict(zip(plain.n_groups, (plain.n_levels, 2 * plain.n_levels), strict=True))
    for name in plain.n_groups:  # one twice as deep: levels up to "all" are spread, numbers are numbers
        for level in range(searched.low, searched.high + 1):
            point = {"backbone": name, "unfrozen_layers": level, "lr": 1e-3, "batch_size": 16}
            params = resolve_params(spec, point, plain.n_groups, seed=0)
            assert plain.resolve(point)["unfrozen_layers"] == params.unfrozen_layers


def test_fixed_views_are_for_all_arms_on_s2_alone(material: Material) -> None:
    """There the plain script shows as many as tuner; elsewhere it shows every image anew, as one would by hand."""
    plain = {space: describe_config(make_job(material, space, epochs=4))["views"] for space in SEARCH_SPACES}
    assert plain == {"S1": "fresh", "S2": 4, "S3": "fresh", "S4": "fresh"}
    tuner = {space: SEARCH_SPACES[space].fixed_views != "no arm" for space in SEARCH_SPACES}
    assert tuner == {"S1": False, "S2": True, "S3": False, "S4": True}


def open_views(material: Material, *, seed: int = 5, strength: float = 0.5) -> FixedViews:
    """Return fixed views of a few digits, as the plain script's loader reads them."""
    config = describe_config(make_job(material, "S2"))
    images = ImageFolder(Path(config["images"], "train"), make_transform(config, "test_resnet", strength))
    return FixedViews(images, seed=seed, strength=strength)


def test_plain_views_depend_on_seed_image_view_and_strength_alone(material: Material) -> None:
    """Whatever was drawn before; and nobody else's draws are moved."""
    images = open_views(material)
    shown = images[3, 1][0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(images[3, 1][0], shown)
    assert torch.equal(torch.get_rng_state(), before)
    others = [
        images[3, 0][0],
        images[4, 1][0],
        open_views(material, seed=6)[3, 1][0],
        open_views(material, strength=1.0)[3, 1][0],
    ]
    assert not any(torch.equal(other, shown) for other in others)


def test_plain_loader_shows_every_image_once_an_epoch_in_the_view_that_is_due(material: Material) -> None:
    """Epochs count from 1, and show e mod K, as tuner's do; after K of them the same versions come again."""
    sampler = ViewSampler(4, 3, torch.Generator().manual_seed(0))
    for view in (1, 2, 0, 1):
        assert sorted(sampler) == [(image, view) for image in range(4)]
    trainer = Trainer(describe_config(make_job(material, "S2", epochs=2)))
    recipe = {"backbone": "test_resnet", "batch_size": 16, "augmentation_strength": 0.5}
    loader = trainer.make_loader("train", recipe, torch.Generator().manual_seed(0))
    epochs = [torch.cat([images for images, _ in loader]).flatten(1).sum(dim=1).sort().values for _ in range(3)]
    assert torch.equal(epochs[2], epochs[0])
    assert not torch.equal(epochs[1], epochs[0])
