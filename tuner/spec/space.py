"""The search space: which params may be searched, and over which distributions.

``PARAMETERS`` is the single table of the params. A param is searched when ``[space]`` holds a distribution for it,
and fixed when ``[training]`` holds a value for it.
"""

import math
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, Field

from tuner.spec.suggestions import did_you_mean

Value = str | int | float


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What values a param may take."""

    kind: Literal["float", "int", "name"]
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    names: tuple[str, ...] = ()
    """The only names allowed; empty allows all (backbones)."""
    default: Value | None
    """Value when neither ``[space]`` nor ``[training]`` has the param; None: one of them must."""
    doc: str
    """One line for the reference of keys."""

    def describe_bounds(self) -> str:
        """Return what must hold for a number, such as ``must lie in (0, 1]``."""
        if self.high == math.inf:
            return f"must be {'greater than' if self.open_low else 'at least'} {self.low:g}"
        return f"must lie in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"

    def find_problem(self, value: object) -> str:
        """Return what is wrong with one value, or an empty string."""
        if self.kind == "name":
            return self._find_name_problem(value)
        if not is_number(value):
            return f"must be a number, got {value!r}"
        if self.kind == "int" and not isinstance(value, int):
            return f"must be a whole number, got {value!r}"
        below = value <= self.low if self.open_low else value < self.low
        above = value >= self.high if self.open_high else value > self.high
        return f"{self.describe_bounds()}, got {value!r}" if below or above else ""

    def _find_name_problem(self, value: object) -> str:
        if not isinstance(value, str) or not value:
            return f"must be a name, got {value!r}"
        if self.names and value not in self.names:
            return f"must be one of {', '.join(self.names)}, got {value!r}{did_you_mean(value, self.names)}"
        return ""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number; TOML has inf, nan and whole numbers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(ratio: float) -> bool:
    return math.isfinite(ratio) and math.isclose(ratio, round(ratio), abs_tol=1e-8)


PARAMETERS: dict[str, Parameter] = {
    "backbone": Parameter(
        kind="name", default=None, doc="timm model name, 'tuner:small_cnn' or 'package.module:function'"
    ),
    "lr": Parameter(kind="float", low=0, open_low=True, default=1e-3, doc="peak learning rate of the head"),
    "batch_size": Parameter(kind="int", low=1, default=32, doc="images per optimizer step"),
    "unfrozen_layers": Parameter(
        kind="int", low=1, default="all", doc="layer groups that train, counted from the head; 1 is the classifier"
    ),
    "augmentation_strength": Parameter(kind="float", low=0, high=1, default=0.0, doc="0 is no augmentation at all"),
    "optimizer": Parameter(
        kind="name", names=("adamw", "adam", "sgd"), default="adamw", doc="sgd is with Nesterov momentum"
    ),
    "weight_decay": Parameter(kind="float", low=0, default=0.01, doc="never applied to biases and norms"),
    "layer_decay": Parameter(
        kind="float", low=0, high=1, open_low=True, default=1.0, doc="lr factor per layer group away from the head"
    ),
    "label_smoothing": Parameter(kind="float", low=0, high=1, open_high=True, default=0.0, doc="of the training loss"),
    "dropout": Parameter(
        kind="float", low=0, high=1, open_high=True, default=0.0, doc="on the classifier's input, in training"
    ),
    "warmup_fraction": Parameter(
        kind="float", low=0, high=1, open_high=True, default=0.1, doc="share of steps before the cosine"
    ),
    "momentum": Parameter(
        kind="float", low=0, high=1, open_high=True, default=0.9, doc="of sgd; beta1 of adam and adamw"
    ),
}


class _Distribution(BaseModel):
    # strict, so that JSON gives back the same kind: a float is no bound of an IntRange
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Choices(_Distribution):
    """A finite set, tried in no order: ``{ choices = [16, 32] }``."""

    choices: tuple[Value, ...]


class FloatRange(_Distribution):
    """Real numbers: ``{ low = 1e-5, high = 1e-1, log = true }`` or ``{ low = 0.0, high = 1.0, step = 0.25 }``."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


class IntRange(_Distribution):
    """Whole numbers: ``{ low = 1, high = 6 }``; for unfrozen_layers ``high = "all"`` too."""

    low: int
    high: int | Literal["all"]
    log: bool = False
    step: int = 1


Distribution = Annotated[Choices | IntRange | FloatRange, Field(union_mode="left_to_right")]
"""In this order, because a FloatRange takes whole numbers too."""


def parse_distribution(name: str, table: Any) -> tuple[Distribution | None, list[str]]:
    """Read one entry of ``[space]``.

    Args:
        name: The param, a key of ``PARAMETERS``.
        table: What TOML gave for it.

    Returns:
        The distribution and no problems, or None and the problems, each ``space.<name>…: …``.
    """
    where = f"space.{name}"
    example = "{ choices = [...] }" if PARAMETERS[name].kind == "name" else "{ low = ..., high = ... }"
    if not isinstance(table, dict):
        return None, [
            f"{where}: must be a distribution such as {example}, got {table!r}; fixed values go to [training]"
        ]
    known = ("choices",) if "choices" in table else ("low", "high", "log", "step")
    problems = [
        f"{where}.{key}: unknown key{did_you_mean(key, (*known, 'choices'))}" for key in table if key not in known
    ]
    if "choices" in table:
        problems += _find_choice_problems(where, PARAMETERS[name], table["choices"])
        return (None, problems) if problems else (Choices(choices=tuple(table["choices"])), [])
    if PARAMETERS[name].kind == "name":
        return None, problems or [f"{where}: must be a distribution such as {example}, got {table!r}"]
    problems += [f"{where}.{key}: is missing" for key in ("low", "high") if key not in table]
    problems = problems or _find_range_problems(where, name, table)
    if problems:
        return None, problems
    return (IntRange if PARAMETERS[name].kind == "int" else FloatRange)(**table), []


def _find_choice_problems(where: str, parameter: Parameter, choices: Any) -> list[str]:
    if not isinstance(choices, list) or not choices:
        return [f"{where}.choices: must be a list with at least one entry, got {choices!r}"]
    problems = [
        f"{where}.choices: {problem}" for problem in (parameter.find_problem(choice) for choice in choices) if problem
    ]
    if not problems and len(set(choices)) < len(choices):
        problems.append(f"{where}.choices: must hold each entry once, got {choices!r}")
    return problems


def _find_range_problems(where: str, name: str, table: dict[str, Any]) -> list[str]:
    parameter = PARAMETERS[name]
    low, high, log, step = table["low"], table["high"], table.get("log", False), table.get("step")
    reaches_all = name == "unfrozen_layers" and high == "all"
    problems = [
        f"{where}.{key}: {problem}"
        for key, value in (("low", low), ("high", high))
        if not (key == "high" and reaches_all) and (problem := parameter.find_problem(value))
    ]
    if not isinstance(log, bool):
        problems.append(f"{where}.log: must be true or false, got {log!r}")
    if step is not None and not (is_number(step) and step > 0):
        problems.append(f"{where}.step: must be greater than 0, got {step!r}")
    elif parameter.kind == "int" and isinstance(step, float):
        problems.append(f"{where}.step: must be a whole number, got {step!r}")
    if problems:
        return problems
    if not reaches_all and low > high:
        problems.append(f"{where}: low must not exceed high, got low = {low!r}, high = {high!r}")
    if log and low <= 0:
        problems.append(f"{where}.low: must be greater than 0 with log = true, got {low!r}")
    if log and step is not None:
        problems.append(f"{where}.step: must be left out with log = true, got {step!r}")
    elif step is not None and not reaches_all and not _is_whole((high - low) / step):
        problems.append(f"{where}.step: must divide high - low = {high - low:g}, got {step!r}")
    return problems


def contains(distribution: Distribution, value: object) -> bool:
    """Whether a value is a point of the distribution; ``"all"`` bounds are not known yet and hold nothing back."""
    match distribution:
        case Choices():
            return not isinstance(value, bool) and value in distribution.choices
        case FloatRange() | IntRange():
            if not is_number(value):
                return False
            if value < distribution.low or (distribution.high != "all" and value > distribution.high):
                return False
            return distribution.step is None or _is_whole((value - distribution.low) / distribution.step)


def describe(distribution: Distribution) -> str:
    """Return the distribution as a person writes it: ``[1e-05, 0.1] log``."""
    match distribution:
        case Choices():
            return f"one of {', '.join(map(str, distribution.choices))}"
        case FloatRange() | IntRange():
            text = f"[{distribution.low}, {distribution.high}]"
            text += " log" if distribution.log else ""
            return text + (f" step {distribution.step:g}" if distribution.step not in {None, 1} else "")
