"""Properties of the study file: a spec that survives JSON, or problems of one line each that name their keys."""

import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuner.errors import SpecError
from tuner.spec.sections import StudySpec
from tuner.spec.space import PARAMETERS, Parameter
from tuner.spec.study import SECTIONS, load_spec, parse_spec

FOLDER = Path("/studies")
BASE = """
[study]
name = "small"
[data]
source = "digits"
[space]
lr = { low = 1e-4, high = 1e-2, log = true }
[training]
backbone = "tuner:small_cnn"
"""
A_DATE = date(1979, 5, 27)
"""No key of a study file takes a date."""

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # TOML holds no lone surrogates
names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=200).filter(
    lambda name: not name.startswith("-")
)
huge = st.sampled_from([2**63, -(2**63) - 1, 10**400])
leaves = st.one_of(
    st.booleans(),
    st.integers(),
    huge,
    st.floats(),
    text,
    st.dates(),
    st.times(),
    st.sampled_from(["all", "fresh", "grid"]),
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(text | st.sampled_from(list(PARAMETERS)), inner, max_size=4)
    ),
    max_leaves=8,
)
section_names = st.sampled_from([*SECTIONS, "space", "backbones", "enqueue", "tuple", "nullable"])


def nest(depth: int) -> Any:
    """Return lists in tables in lists, ``depth`` deep."""
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


def numbers_of(parameter: Parameter) -> st.SearchStrategy[Any]:
    """Return numbers that a param may take."""
    if parameter.kind == "int":
        return st.integers(int(parameter.low), 10**6)
    high = min(parameter.high, 1e6)
    return st.floats(parameter.low, high, exclude_min=parameter.open_low, exclude_max=parameter.open_high)


@st.composite
def distributions(draw: st.DrawFn, parameter: Parameter) -> dict[str, Any]:
    """Return a table of ``[space]``, right by construction."""
    if parameter.kind == "name":
        known = st.sampled_from(parameter.names) if parameter.names else names
        return {"choices": draw(st.lists(known, min_size=1, max_size=3, unique=True))}
    numbers = numbers_of(parameter)
    if draw(st.booleans()):
        return {"choices": draw(st.lists(numbers, min_size=1, max_size=4, unique=True))}
    low, high = sorted((draw(numbers), draw(numbers)))
    table = {"low": low, "high": high}
    if low > 0 and draw(st.booleans()):
        return {**table, "log": True}
    if parameter.kind == "int" and draw(st.booleans()):
        step = draw(st.integers(1, 100))
        return {"low": low, "high": low + step * draw(st.integers(0, 50)), "step": step}
    return table


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    """Return the tables of a study file, right by construction."""
    searched = draw(st.sets(st.sampled_from(list(PARAMETERS)), min_size=1))
    space = {name: draw(distributions(PARAMETERS[name])) for name in PARAMETERS if name in searched}
    training: dict[str, Any] = {
        "epochs": draw(st.integers(1, 1000)),
        "views": draw(st.integers(1, 9) | st.just("fresh")),
    }
    for name, parameter in PARAMETERS.items():
        if name in searched or (name != "backbone" and draw(st.booleans())):
            continue
        known = st.sampled_from(parameter.names) if parameter.names else names
        training[name] = draw(known if parameter.kind == "name" else numbers_of(parameter))
    backbones = space["backbone"]["choices"] if "backbone" in space else [training["backbone"]]
    channels = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)
    section = {"weights": "random", "kwargs": {"a": draw(text)}, "mean": draw(channels), "std": draw(channels)}
    return {
        "study": {"name": draw(names), "seed": draw(st.integers(0, 2**63 - 1))},
        "data": {
            "source": "digits",
            "val_fraction": draw(st.floats(0.01, 0.9)),
            "image_size": draw(st.integers(8, 500)),
        },
        "space": space,
        "backbones": dict.fromkeys(backbones, section),
        "training": training,
        "search": {
            "sampler": draw(st.sampled_from(["tpe", "gp", "random", "qmc"])),
            "n_trials": draw(st.integers(1, 10**9)),
            "timeout": draw(st.floats(1, 1e9) | st.sampled_from(["2h", "90m", "1h30m", "1.5s"])),
        },
        "workers": {"devices": draw(st.sampled_from(["auto", "cpu", "cuda", ["cuda:0", "cuda:1"]]))},
    }


def check_spec(spec: StudySpec) -> None:
    """Check that a spec is the same after it was stored."""
    assert StudySpec.model_validate_json(spec.model_dump_json()) == spec


def read(tables: dict[str, Any]) -> tuple[str, ...]:
    """Read tables; return their problems, each of which must be one line with a place and a reason."""
    problems: tuple[str, ...] = ()
    try:
        check_spec(parse_spec(tables, FOLDER))
    except SpecError as error:
        problems = error.problems or ("",)
    for problem in problems:
        assert problem.isprintable()
        assert len(problem) < 850
        place, _, reason = problem.partition(": ")
        assert place
        assert reason
    return problems


@given(studies())
def test_parse_spec_keeps_what_is_right(tables: dict[str, Any]) -> None:
    """A right study file has no problems, and nothing of it is lost on the way to the storage and back."""
    spec = parse_spec(tables, FOLDER)
    check_spec(spec)
    assert list(spec.space) == list(tables["space"])
    assert spec.study.name == tables["study"]["name"]
    assert {**spec.fixed_params()} == {key: value for key, value in tables["training"].items() if key in PARAMETERS}


@given(studies(), section_names, text | st.sampled_from(["tuple", "nullable", "function-x", "literal["]), values)
def test_parse_spec_never_breaks_on_a_strange_value(tables: dict[str, Any], section: str, key: str, value: Any) -> None:
    """Any value at any place gives a spec or problems, never another exception."""
    inner = tables.get(section)
    read({**tables, section: {**inner, key: value} if isinstance(inner, dict) else {key: value}})


@pytest.mark.parametrize("value", [16**6000, nest(3000), [[16**6000]]], ids=["endless", "deep", "both"])
@pytest.mark.parametrize("section", [*SECTIONS, "space", "backbones", "enqueue", "tuple"])
def test_parse_spec_never_breaks_on_what_python_cannot_print(section: str, value: Any) -> None:
    """Numbers too long and tables too deep for ``repr`` are refused before they reach a message."""
    assert read({section: {"a": value}})


@given(st.dictionaries(section_names | text, values, max_size=5))
@example({"": []})
@example({"": 2**63})
def test_parse_spec_never_breaks_on_strange_tables(tables: dict[str, Any]) -> None:
    """Neither do tables that look nothing like a study."""
    read(tables)


@given(studies(), st.data())
def test_parse_spec_names_the_key_of_a_wrong_value(tables: dict[str, Any], data: st.DataObject) -> None:
    """Of a value that nothing takes, some problem names the section and the key."""
    section = data.draw(st.sampled_from(list(SECTIONS)))
    key = data.draw(st.sampled_from(list(SECTIONS[section].model_fields)))
    problems = read({**tables, section: {**tables.get(section, {}), key: A_DATE}})
    assert any(problem.startswith(f"{section}.{key}: ") for problem in problems)


@given(studies(), st.sampled_from(list(SECTIONS)), text.filter(str.isprintable))
@example(tables={}, section="workers", key="tuple")
@example(tables={}, section="study", key="nullable")
@example(tables={}, section="data", key="function-after")
def test_parse_spec_names_an_unknown_key(tables: dict[str, Any], section: str, key: str) -> None:
    """Keys that are words of the checker's own are keys like others."""
    if key in SECTIONS[section].model_fields:
        return
    problems = read({**tables, section: {**tables.get(section, {}), key: 1}})
    assert any(problem.startswith(f"{section}.{key}: unknown key") for problem in problems)


def write(content: bytes) -> tuple[str, ...]:
    """Write a study file and load it; return the problems."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "study.toml")
        path.write_bytes(content)
        try:
            check_spec(load_spec(path))
        except SpecError as error:
            return tuple(problem.replace(f"{path}", "FILE") for problem in error.problems)
    return ()


@given(st.binary(max_size=300) | text.map(str.encode) | text.map(lambda more: (BASE + more).encode()))
def test_load_spec_never_breaks_on_a_strange_file(content: bytes) -> None:
    """Any bytes give a spec or problems of one line each."""
    assert all(problem.isprintable() for problem in write(content))


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("epochs = " + "1" * 5000, "FILE: must be TOML, got: tables, lists or numbers without end"),
        ("epochs = " + "[" * 5000, "FILE: must be TOML, got: tables, lists or numbers without end"),
        ("lr = 0x" + "f" * 6000, "training.lr: must be a whole number of at most 64 bits, got a larger one"),
        (".".join("a" * 30) + " = 1", "training.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a: must not be nested deeper than"),
        ("tuple = 1", "training.tuple: unknown key"),
        ('"a\\nerror: b" = 1', "training.a\\nerror: b: unknown key"),
        (
            '[workers]\ndevices = "cuda:\u0663"',
            'workers.devices: must be "auto", "cpu", "cuda:0" or a list of CUDA dev',
        ),
        ("x" * 5000 + " = 1", "training.xxx"),
        (f'class_weights = "{"x" * 5000}"', "training.class_weights: must be one of none, balanced, got 'xxx"),
    ],
)
def test_load_spec_says_what_fuzzing_found(more: str, problem: str) -> None:
    """What once ended in a traceback, in several lines or in an endless one is one problem."""
    (found,) = write((BASE + more).encode())
    assert found.startswith(problem)
    assert ": " in found
    assert len(found) < 850
