"""Small study files, as TOML text and as checked specs."""

import tomllib
from pathlib import Path

from tuner.spec.sections import StudySpec
from tuner.spec.study import parse_spec

MINIMAL = """
[study]
name = "small"
[data]
source = "digits"
[space]
backbone = { choices = ["test_resnet", "test_vit"] }
"""
FOLDER = Path("/studies")


def parse(more: str = "", *, base: str = MINIMAL) -> StudySpec:
    """Check a minimal study file with more lines, the first of which go to [space]."""
    return parse_spec(tomllib.loads(f"{base}{more}"), FOLDER)
