"""Tests of tuner.spec.sections."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from tuner.spec.sections import BackboneSection, StudySpec, WorkersSection
from tuner.spec.space import Choices, FloatRange, IntRange

from .builders import parse


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        ("auto", ("auto",)),
        ("cpu", ("cpu",)),
        ("cuda", ("cuda:0",)),
        (["cuda:1", "cuda:0"], ("cuda:1", "cuda:0")),
    ],
)
def test_workers_read_devices(value: object, devices: tuple[str, ...]) -> None:
    """One device may stand without a list, and cuda is cuda:0."""
    assert WorkersSection.model_validate({"devices": value}).devices == devices


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("gpu", 'must be "auto", "cpu"'),
        (["cuda:0", 1], 'must be "auto", "cpu"'),
        (["auto", "cpu"], "must not mix"),
        (["cuda", "cuda:0"], "must name each device once"),
    ],
)
def test_workers_refuse_odd_devices(value: object, problem: str) -> None:
    """A device has a known name and stands once."""
    with pytest.raises(ValidationError, match=re.escape(problem)):
        WorkersSection.model_validate({"devices": value})


@pytest.mark.parametrize("value", ["auto", 1, 3])
def test_workers_read_how_many_share_a_device(value: object) -> None:
    """A number, or auto."""
    assert WorkersSection.model_validate({"per_device": value}).per_device == value


@pytest.mark.parametrize("value", [{"a": float("inf")}, {"a": [float("nan")]}, {"a": {"b": 10**400}}, {"a": b"x"}])
def test_backbone_refuses_kwargs_that_json_would_change(value: dict[str, Any]) -> None:
    """Workers read the spec as JSON, where inf would become null."""
    with pytest.raises(ValidationError, match="must hold text, finite numbers"):
        BackboneSection.model_validate({"kwargs": value})


def test_backbone_keeps_nested_kwargs() -> None:
    """Tables, lists, booleans, numbers and text pass unchanged."""
    kwargs = {"a": [1, 2.5, {"b": True}], "c": "same", "d": {}}
    assert BackboneSection.model_validate({"kwargs": kwargs}).kwargs == kwargs


def test_spec_survives_json() -> None:
    """A stored spec is the spec: ranges of whole numbers do not come back as ranges of real numbers."""
    spec = parse(
        """
        lr = { low = 1, high = 3, step = 1 }
        batch_size = { low = 8, high = 64, step = 8 }
        unfrozen_layers = { low = 1, high = "all" }
        dropout = { choices = [0, 0.5] }
        [[enqueue]]
        batch_size = 16
        lr = 2
        [pretraining.data]
        source = "digits"
        classes = ["0", "1"]
        [search]
        timeout = "1h"
        [workers]
        devices = ["cuda:0", "cuda:1"]
        [backbones.test_vit]
        kwargs = { a = [1, 2.0] }
        mean = [0.1, 0.2, 0.3]
        """
    )
    again = StudySpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert {name: type(distribution) for name, distribution in again.space.items()} == {
        "backbone": Choices,
        "lr": FloatRange,
        "batch_size": IntRange,
        "unfrozen_layers": IntRange,
        "dropout": Choices,
    }


def test_spec_tells_fixed_params_and_backbones() -> None:
    """Params that [training] fixes are listed without its other keys, and a fixed backbone is the only one."""
    base = '[study]\nname = "a"\n[data]\nsource = "digits"\n[training]\nbackbone = "test_vit"\nlr = 0.1\nepochs = 3\n'
    spec = parse(base=base)
    assert spec.fixed_params() == {"backbone": "test_vit", "lr": 0.1}
    assert spec.backbone_names() == ("test_vit",)
    assert parse().backbone_names() == ("test_resnet", "test_vit")
