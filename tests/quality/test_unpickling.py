"""Nothing is unpickled, evaluated or imported by a name that comes from data."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tuner"
MODULES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "runpy", "shelve", "yaml"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.popen",
    "os.system",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
FORBIDDEN_ENDS = {"pickle.load", "pickle.loads", "Unpickler", "hub.load", "hub.load_state_dict_from_url", "jit.load"}
TORCH_LOADS = {"torch.load", "torch.serialization.load"}
NUMPY_LOADS = {"numpy.load": 2, "numpy.lib.npyio.load": 2, "numpy.lib.format.read_array": 1}
"""With the number of arguments that may stand before ``allow_pickle``."""
ALLOWED_IMPORTS = {
    "__init__.py": "the package's own public names",
    "models/backbone.py": "a user's own backbone; the callers ask for --allow-code",
    "service/fork_server.py": "what a worker runs, as the code that opens the pool says",
}
ALLOWED_NAMES = {("models/weights.py", "pickle.UnpicklingError"): "what torch.load raises for a file that is refused"}


def find_doors(path: str, source: str) -> list[str]:
    """Return what in a module could run code that comes from a file."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {"np": "numpy"}
    for node in nodes:
        names |= _list_names(node)
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return [
        f"{path}:{getattr(node, 'lineno', '?')}: {found}"
        for node in nodes
        if (
            found := _judge_import(path, node)
            or _judge_call(path, node, names)
            or (_judge_reference(node, names) if id(node) not in called else "")
        )
    ]


def _list_names(node: ast.AST) -> dict[str, str]:
    """Return what an import statement's local names stand for."""
    if isinstance(node, ast.Import):
        return {each.asname: each.name for each in node.names if each.asname}
    if isinstance(node, ast.ImportFrom):
        return {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return {}


def _judge_import(path: str, node: ast.AST) -> str:
    names = _list_names(node).values()
    imported = [each.name for each in node.names] if isinstance(node, ast.Import) else list(names)
    return ", ".join(
        name
        for name in imported
        if (path, name) not in ALLOWED_NAMES
        and (name.split(".")[0] in FORBIDDEN_MODULES or (isinstance(node, ast.ImportFrom) and _is_load(name)))
    )


def _is_load(name: str) -> bool:
    """Whether a name is a function of torch or NumPy that loads: called by its bare name, it would look like ours."""
    parts = name.split(".")
    return parts[0] in {"torch", "numpy"} and parts[-1].startswith("load")


def _resolve(node: ast.AST, names: dict[str, str]) -> str:
    """Return the dotted name that an expression stands for."""
    first, dot, rest = ast.unparse(node).partition(".")
    return f"{names.get(first, first)}{dot}{rest}".removeprefix("builtins.")


def _is_forbidden(name: str) -> bool:
    return name in FORBIDDEN_CALLS or any(name == end or name.endswith(f".{end}") for end in FORBIDDEN_ENDS)


def _judge_call(path: str, node: ast.AST, names: dict[str, str]) -> str:
    if not isinstance(node, ast.Call):
        return ""
    called = _resolve(node.func, names)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if _is_forbidden(called) or (called.endswith("import_module") and path not in ALLOWED_IMPORTS):
        return called
    if called in TORCH_LOADS and keywords.get("weights_only") != "True":
        return f"{called} without weights_only=True"
    if called in NUMPY_LOADS:
        is_plain = len(node.args) <= NUMPY_LOADS[called] and None not in keywords
        if not is_plain or keywords.get("allow_pickle", "False") != "False":
            return f"{called} with allow_pickle"
    return "shell=True" if keywords.get("shell", "False") != "False" else ""


def _judge_reference(node: ast.AST, names: dict[str, str]) -> str:
    """Return a function that is not called where it is named, and so could be called by another name."""
    if not isinstance(node, ast.Attribute | ast.Name):
        return ""
    name = _resolve(node, names)
    return name if _is_forbidden(name) or name in TORCH_LOADS or name in NUMPY_LOADS else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_runs_no_code_from_data(path: Path) -> None:
    """Weights are safetensors or weights_only, everything else is JSON or TOML."""
    assert not find_doors(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x')",
        "torch.load('x', weights_only=False)",
        "import torch as t; t.load('x')",
        "from torch import load",
        "from torch.serialization import load as read",
        "from torch import serialization; serialization.load('x')",
        "torch.serialization.load('x')",
        "read = torch.load; read('x')",
        "torch.hub.load('a', 'b')",
        "from torch import hub; hub.load('a', 'b')",
        "torch.jit.load('x')",
        "import pickle",
        "import pickle as p; p.loads(b'')",
        "from pickle import loads",
        "from pickle import UnpicklingError, loads",
        "from _pickle import Unpickler",
        "pickle.Unpickler(f).load()",
        "import joblib",
        "from yaml import load",
        "np.load('x', allow_pickle=True)",
        "np.load('x', None, True)",
        "np.load('x', **options)",
        "import numpy as n; n.load('x', allow_pickle=flag)",
        "from numpy import load",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "np.lib.format.read_array(file, True)",
        "from numpy.lib import format as form; form.read_array(file, allow_pickle=True)",
        "eval('1')",
        "import builtins; builtins.exec('1')",
        "run = eval",
        "importlib.import_module(name)",
        "from importlib import import_module; import_module(name)",
        "subprocess.run('x', shell=True)",
        "import os; os.system('x')",
        "from os import system as run; run('x')",
    ],
)
def test_check_finds_each_door(source: str) -> None:
    """The check itself can fail."""
    assert find_doors("data/x.py", source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x', map_location='cpu', weights_only=True)",
        "import numpy as np; np.load('x', mmap_mode='r')",
        "from pickle import UnpicklingError",
        "import re; re.compile('x'); model.compile()",
        "from safetensors.torch import load_file; load_file('x')",
    ],
)
def test_check_lets_the_safe_forms_pass(source: str) -> None:
    """What reads data as data is no door."""
    assert not find_doors("models/weights.py", source)
