"""Folders are layers: imports point down only, and each outside library has its rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tuner"
FLOORS = {
    "errors": 1,
    "paths": 1,
    "spec": 2,
    "trial": 2,
    "data": 3,
    "models": 3,
    "search": 3,
    "training": 4,
    "service": 5,
    "production": 6,
    "cli": 7,
    "__main__": 8,
}
WORKER_SIDE = {
    "worker",
    "admission",
    "describing",
    "training_session",
    "head_training",
    "head_starts",
    "feature_banks",
    "open_banks",
    "earlier_cuts",
    "prefix_banks",
    "prefix_payoff",
    "spending",
    "workbench",
    "outcomes",
    "step_probe",
    "study_data",
    "verified_cuts",
}
TORCH_ROOMS = {"data", "models", "training", "production"} | {f"service.{name}" for name in WORKER_SIDE}
OUTSIDE = {
    "click": {"cli"},
    "rich": {"service.progress"},
    "pydantic": {"spec"},
    "torch": TORCH_ROOMS,
    "torchvision": TORCH_ROOMS,
    "timm": TORCH_ROOMS,
    "safetensors": {"models", "training"},
    "huggingface_hub": {"models"},
    "optuna": {"search", "service.coordinator", "service.result", "production"},
    "sqlalchemy": {"search"},
    "optuna_dashboard": {"service.dashboard"},
    "matplotlib": {"production"},
    "onnxruntime": {"production"},
    "sklearn": {"data"},
    "PIL": {"data", "production"},
    "tomli_w": {"production", "service.initial_study"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_module(path: Path) -> str:
    """Return a module's name below the package: ``spec.study``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def list_imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere, but for those under TYPE_CHECKING in the package's own root."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name_module)
def test_module_imports_lower_floors_only(path: Path) -> None:
    """A room imports itself and the floors below, never a neighbour or a floor above."""
    room = name_module(path).split(".")[0]
    for imported in list_imports(path):
        if imported.startswith("tuner."):
            target = imported.split(".")[1]
            assert target == room or FLOORS[target] < FLOORS[room], f"{path.name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_module_imports_only_the_libraries_of_its_room(path: Path) -> None:
    """Searching never imports torch, training never imports Optuna."""
    name = name_module(path)
    for imported in list_imports(path):
        library = imported.split(".")[0]
        if library in OUTSIDE:
            rooms = OUTSIDE[library]
            assert name in rooms or name.split(".")[0] in rooms, f"{name} imports {library}"


@pytest.mark.parametrize("path", MODULES, ids=name_module)
def test_coordinator_side_of_the_service_never_imports_the_worker_side(path: Path) -> None:
    """What runs beside the storage loads no data, models or training; what trains loads no search."""
    room, _, module = name_module(path).partition(".")
    if room != "service":
        return
    rooms = {imported.split(".")[1] for imported in list_imports(path) if imported.startswith("tuner.")}
    if module in WORKER_SIDE:
        assert "search" not in rooms
    elif module != "initial_study":  # `tuner init` looks at files, without torch
        assert not rooms & {"data", "models", "training"}


@pytest.mark.parametrize("statement", ["import tuner", "from tuner import load_spec, TrialParams"])
def test_package_import_loads_neither_torch_nor_optuna(statement: str) -> None:
    """The light public names stay light."""
    assert find_heavy(statement) == "[]"


def test_help_loads_neither_torch_nor_optuna() -> None:
    """``tuner --help`` answers at once."""
    assert find_heavy("from tuner.cli.main import run_command; assert run_command(['--help']) == 0").endswith("[]")


def find_heavy(statement: str) -> str:
    """Run a statement in a new process; return what it prints and which heavy modules it loaded."""
    heavy = ("torch", "optuna", "timm", "torchvision", "rich", "sqlalchemy", "sklearn", "matplotlib")
    code = f"{statement}\nimport sys\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()
