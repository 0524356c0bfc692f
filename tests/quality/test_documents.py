"""The README and the study files say what is there."""

import re
from pathlib import Path

import pytest

import tuner
from benchmarks.__main__ import CASES
from benchmarks.tables import BEGIN, END, make_tables
from tuner.cli.main import cli
from tuner.spec import sections
from tuner.spec.space import PARAMETERS
from tuner.spec.study import load_spec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDIES = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_study_file_loads_and_its_header_says_what_it_is_for(path: Path) -> None:
    """Every study file in the repository can be run, and says its question, command and expected result."""
    assert load_spec(path).study.name
    header = path.read_text(encoding="utf-8").partition("[study]")[0]
    for word in ("# Question:", "# Command:", "# Expected:"):
        assert word in header


def test_readme_lists_every_module_of_the_file_tree() -> None:
    """The tree in the README is the tree on disk."""
    listed = set(re.findall(r"^\s+(\w+)\.py  ", README, flags=re.MULTILINE))
    there = {path.stem for path in (ROOT / "tuner").rglob("*.py")} - {"__init__", "__main__"}
    assert listed >= there, f"missing: {sorted(there - listed)}"
    assert listed - there <= {"harness"}, f"gone: {sorted(listed - there)}"


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_tables_of_measurements_are_those_of_the_result_files(name: str) -> None:
    """Nobody types a number there: ``python -m benchmarks --readme`` writes them."""
    written = (ROOT / name).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == make_tables(CASES)[name]


def test_ci_is_the_test_command_of_the_readme() -> None:
    """What CI runs is what a newcomer types, and nothing else."""
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1:]
    assert commands == [line for line in README.splitlines() if line.endswith("python -m pytest")]


def test_readme_names_every_command() -> None:
    """A newcomer finds every command."""
    for command in cli.commands:
        assert f"tuner {command}" in README


def test_readme_documents_every_key_of_the_study_file() -> None:
    """Keys are documented in one place."""
    reference = README.partition("## The study file")[2].partition("\n## ")[0]
    keys = {*PARAMETERS}
    for section in (
        sections.StudySection,
        sections.DataSection,
        sections.BackboneSection,
        sections.PretrainingSection,
        sections.SearchSection,
        sections.WorkersSection,
        sections.WarmStartSection,
        sections.TrainingSection,
    ):
        keys |= set(section.model_fields)
    missing = sorted(key for key in keys if f"`{key}`" not in reference)
    assert not missing


def test_every_command_has_an_example() -> None:
    """``--help`` of each command shows how to type it."""
    for name, command in cli.commands.items():
        assert f"tuner {name}" in (command.help or ""), name


def test_public_names_are_pinned() -> None:
    """Adding or removing a public name is a decision."""
    assert tuner.__all__ == [
        "StudySpec",
        "TrialOutcome",
        "TrialParams",
        "TunerError",
        "best_params",
        "confirm_study",
        "evaluate_folder",
        "export_model",
        "load",
        "load_spec",
        "run_study",
        "train_best",
        "verify_folder",
        "write_report",
    ]
    assert all(getattr(tuner, name) is not None for name in tuner.__all__)
