"""The spaces of the search benchmark, in the words of a study file; every arm searches the same."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """A space and what is fixed beside it."""

    question: str
    space: dict[str, dict[str, Any]]
    """Distributions by param, but for ``backbone``, whose choices the data brings."""
    fixed: dict[str, Any]
    first_point: dict[str, Any]
    """Where every arm begins, but for the first backbone: a sane recipe. ``all`` is the highest level."""
    screen: int
    """Head-only trials of each backbone that tuner may add before its search."""
    fixed_views: Literal["no arm", "tuner", "all arms"]
    """Which arms show fixed views in place of fresh ones: one for each epoch, so that no trial shows one twice."""

    def with_backbones(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Return the whole space."""
        return {"backbone": {"choices": names}, **self.space}


_BATCH_SIZE = {"choices": [16, 32, 64]}
_STRENGTH = {"low": 0.0, "high": 1.0, "step": 0.25}

SEARCH_SPACES = {
    "S1": SearchSpace(
        question="head only, no augmentation",
        space={
            "lr": {"low": 1e-4, "high": 1e-1, "log": True},
            "batch_size": _BATCH_SIZE,
            "label_smoothing": {"low": 0.0, "high": 0.2},
        },
        fixed={"unfrozen_layers": 1, "augmentation_strength": 0.0},
        first_point={"lr": 3e-4, "batch_size": 32, "label_smoothing": 0.0},
        screen=0,
        fixed_views="no arm",
    ),
    "S2": SearchSpace(
        question="partial unfreezing: the last one or two layer groups besides the head, fixed views in all arms",
        space={
            "lr": {"low": 1e-4, "high": 3e-2, "log": True},
            "batch_size": _BATCH_SIZE,
            "unfrozen_layers": {"low": 2, "high": 3},
            "augmentation_strength": {"choices": [0.0, 0.5]},
        },
        fixed={},
        first_point={"lr": 3e-4, "batch_size": 32, "unfrozen_layers": 3, "augmentation_strength": 0.0},
        screen=0,
        fixed_views="all arms",
    ),
    "S3": SearchSpace(
        question="full fine-tuning, every epoch augmented anew",
        space={
            "lr": {"low": 1e-4, "high": 3e-2, "log": True},
            "batch_size": _BATCH_SIZE,
            "augmentation_strength": _STRENGTH,
        },
        fixed={"unfrozen_layers": "all"},
        first_point={"lr": 3e-4, "batch_size": 32, "augmentation_strength": 0.25},
        screen=0,
        fixed_views="no arm",
    ),
    "S4": SearchSpace(
        question="mixed: from the head alone to all layers, with and without augmentation",
        space={
            "lr": {"low": 1e-4, "high": 3e-2, "log": True},
            "batch_size": _BATCH_SIZE,
            "unfrozen_layers": {"low": 1, "high": "all"},
            "augmentation_strength": _STRENGTH,
        },
        fixed={},
        first_point={"lr": 3e-4, "batch_size": 32, "unfrozen_layers": "all", "augmentation_strength": 0.25},
        screen=16,
        fixed_views="tuner",
    ),
}
