"""Nothing is unpickled, evaluated or imported by a name that comes from data."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tuner"
MODULES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "runpy", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_ENDS = {"pickle.load", "pickle.loads", "Unpickler", "hub.load", "hub.load_state_dict_from_url", "jit.load"}
ALLOWED_IMPORTS = {
    "__init__.py": "the package's own public names",
    "models/backbone.py": "a user's own backbone; the callers ask for --allow-code",
}


def find_doors(path: str, source: str) -> list[str]:
    """Return what in a module could run code that comes from a file."""
    return [
        f"{path}:{getattr(node, 'lineno', '?')}: {found}"
        for node in ast.walk(ast.parse(source))
        if (found := _judge_import(node) or _judge_call(path, node))
    ]


def _judge_import(node: ast.AST) -> str:
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return ""
    names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
    return ", ".join(sorted(names & FORBIDDEN_MODULES))


def _judge_call(path: str, node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    called = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in FORBIDDEN_CALLS or any(called == end or called.endswith(f".{end}") for end in FORBIDDEN_ENDS):
        return called
    if called.endswith("import_module") and path not in ALLOWED_IMPORTS:
        return called
    if called == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if called in {"np.load", "numpy.load"} and keywords.get("allow_pickle", "False") != "False":
        return "np.load with allow_pickle"
    return "shell=True" if keywords.get("shell", "False") != "False" else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_runs_no_code_from_data(path: Path) -> None:
    """Weights are safetensors or weights_only, everything else is JSON or TOML."""
    assert not find_doors(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.hub.load('a', 'b')",
        "import pickle; pickle.load(f)",
        "pickle.Unpickler(f).load()",
        "import joblib",
        "from yaml import load",
        "np.load('x', allow_pickle=True)",
        "eval('1')",
        "importlib.import_module(name)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_check_finds_each_door(source: str) -> None:
    """The check itself can fail."""
    assert find_doors("data/x.py", source)
