"""What is stored with a study besides its spec: what was found out about data, backbones and weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tuner.errors import StudyError

_FORMAT = 1
"""Raised when what is stored with a study changes."""


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """What a worker found out before the first trial; stored with the study, so that nothing needs the study file."""

    data_hash: str
    """Of names, labels and splits of all images, and of the content of train and val."""
    classes: tuple[str, ...]
    splits: str
    """Packed split of every image, in the order of the data index."""
    split_counts: dict[str, int]
    """Images in train, val and test."""
    group_counts: dict[str, int]
    """Layer groups of each backbone."""
    weights: dict[str, str]
    """Fingerprint of each backbone's starting weights."""
    preprocessing: dict[str, dict[str, Any]]
    """``mean``, ``std`` and ``interpolation`` of each backbone."""
    versions: dict[str, str]
    max_folds: int = 0
    """Folds that train and val can be cut into anew; 0 where the data gives val, and in studies of older versions."""

    def to_json(self) -> str:
        """Return the facts as JSON text."""
        return json.dumps({"format": _FORMAT, **vars(self)})

    @classmethod
    def from_json(cls, text: str) -> "StudyFacts":
        """Read what ``to_json`` wrote.

        Raises:
            StudyError: If another version of the program wrote it.
            AttributeError, KeyError, RecursionError, TypeError, ValueError: If nothing of ours wrote it.
        """
        values = json.loads(text)
        if (found := values.pop("format", None)) != _FORMAT:
            shown = found if isinstance(found, int) else "another"
            raise StudyError(f"study: must be in format {_FORMAT}, got {shown}; another version of tuner made it")
        _check_facts(values)
        return cls(**values | {"classes": tuple(values["classes"])})


def _check_facts(values: dict[str, Any]) -> None:
    """Check what every reader of facts relies on.

    Raises:
        AttributeError, KeyError, TypeError: If a value is of another kind.
    """
    kinds = {"split_counts": int, "group_counts": int, "weights": str, "preprocessing": dict, "versions": str}
    leaves = [(each, kind) for name, kind in kinds.items() for each in values[name].values()]
    leaves.append((values.get("max_folds", 0), int))
    leaves += [(each, str) for each in (*values["classes"], values["data_hash"], values["splits"])]
    if not all(isinstance(value, kind) for value, kind in leaves):
        raise TypeError("facts of another kind")


@contextmanager
def explain_damage(what: str) -> Iterator[None]:
    """Turn what a block raises over stored values that nothing of ours wrote into one line, which repeats none of them.

    Raises:
        StudyError: In place of it.
    """
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise StudyError(
            f"{what}: must be as 'tuner run' stored it, got something that cannot be read ({type(error).__name__}); "
            "go on with a copy that 'tuner backup' made"
        ) from error


def find_changed_facts(stored: StudyFacts, new: StudyFacts) -> list[str]:
    """Return one line for each thing outside the study file that changed: the data or a weights file."""
    changes = []
    if stored.data_hash != new.data_hash:
        changes.append(
            f"data: other images, labels or splits than in the study ({_count(stored)} then, {_count(new)} now)"
        )
    changes += [
        f'backbones."{name}".weights: other weights than in the study'
        for name, fingerprint in stored.weights.items()
        if new.weights.get(name) != fingerprint
    ]
    return changes


def _count(facts: StudyFacts) -> str:
    return f"{sum(facts.split_counts.values())} images of {len(facts.classes)} classes"
