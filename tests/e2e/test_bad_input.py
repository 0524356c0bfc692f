"""Wrong study files: each mistake with its exact message and exit code, and no traceback for any.

The other tables of mistakes are ``test_bad_data.py``, ``test_bad_models.py`` and ``test_bad_requests.py``.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.mistakes import Prepare, expect, fail, write, write_study

SPACE = "lr = { low = 1e-4, high = 1e-2, log = true }"
PARSING = [
    ("[study]", "[study]\nnames = 1", "study.names: unknown key; did you mean 'name'?"),
    ('name = "bad"', "", "study.name: is missing"),
    ('name = "bad"', 'name = ""', "study.name: must be 1 to 200 printable characters, got ''"),
    (
        'name = "bad"',
        'name = "bad"\nobjective = "f1"',
        "study.objective: must be one of val_accuracy, val_balanced_accuracy, val_macro_f1, val_loss, got 'f1'",
    ),
    ('name = "bad"', 'name = "bad"\nseed = -1', "study.seed: must lie in [0, 9223372036854775807], got -1"),
    ('name = "bad"', 'name = "bad"\nseed = "0"', "study.seed: must be a whole number, got '0'"),
    (
        '"image_folder"',
        '"csw"',
        "data.source: must be one of digits, image_folder, csv, torchvision, got 'csw'; did you mean 'csv'?",
    ),
    ('path = "images"', "", "data.path: is missing; source = 'image_folder' reads from it"),
    ("image_size = 16", "image_sise = 16", "data.image_sise: unknown key; did you mean 'image_size'?"),
    ("image_size = 16", "image_size = 4", "data.image_size: must lie in [8, 2048], got 4"),
    ("image_size = 16", "image_size = 16.0", "data.image_size: must be a whole number, got 16.0"),
    ("image_size = 16", "val_fraction = 1.0", "data.val_fraction: must lie in (0, 1), got 1.0"),
    ("image_size = 16", "max_bad_fraction = -0.1", "data.max_bad_fraction: must lie in [0, 1), got -0.1"),
    (
        "image_size = 16",
        "val_fraction = 0.5\ntest_fraction = 0.5",
        "data: val_fraction + test_fraction must be less than 1, got 1",
    ),
    (
        "image_size = 16",
        'classes = ["cat"]',
        "data.classes: must name at least two classes, each once, got ['cat']",
    ),
    (SPACE, "rl = { low = 0.1, high = 0.2 }", "space.rl: unknown key"),
    (SPACE, "lr = { low = 0.2, high = 0.1 }", "space.lr: low must not exceed high, got low = 0.2, high = 0.1"),
    (SPACE, "lr = { low = 0.0, high = 0.1, log = true }", "space.lr.low: must be greater than 0, got 0.0"),
    (
        SPACE,
        "weight_decay = { low = 0.0, high = 0.1, log = true }",
        "space.weight_decay.low: must be greater than 0 with log = true, got 0.0",
    ),
    (SPACE, "lr = { low = 0.1, high = 0.4, step = 0.2 }", "space.lr.step: must divide high - low = 0.3, got 0.2"),
    (SPACE, "lr = { low = 0.1, high = 0.4, step = nan }", "space.lr.step: must be greater than 0, got nan"),
    (SPACE, "lr = { choices = [] }", "space.lr.choices: must be a list with at least one entry, got []"),
    (SPACE, "lr = { choices = [0.1, 0.1] }", "space.lr.choices: must hold each entry once, got [0.1, 0.1]"),
    (SPACE, "lr = { low = 0.1 }", "space.lr.high: is missing"),
    (
        SPACE,
        "lr = 0.1",
        "space.lr: must be a distribution such as { low = ..., high = ... }, got 0.1; fixed values go to [training]",
    ),
    (
        SPACE,
        'optimizer = { choices = ["adamx"] }',
        "space.optimizer.choices: must be one of adamw, adam, sgd, got 'adamx'; did you mean 'adam'?",
    ),
    ("epochs = 1", "epochs = 1\nlr = 0.1", "training.lr: must stand in [space] or in [training], not in both"),
    ("epochs = 1", "epochs = 0", "training.epochs: must be at least 1, got 0"),
    ("epochs = 1", "epoch = 1", "training.epoch: unknown key; did you mean 'epochs'?"),
    ("epochs = 1", "horizontal_flip = 1", "training.horizontal_flip: must be true or false, got 1"),
    ("epochs = 1", "dropout = 1.0", "training.dropout: must lie in [0, 1), got 1.0"),
    (
        'backbone = "test_resnet"',
        "",
        'space.backbone: is missing; name backbones such as { choices = ["resnet50.a1_in1k"] }',
    ),
    (
        "[backbones.test_resnet]",
        "[backbones.test_resnt]",
        "backbones.\"test_resnt\": must be one of the study's backbones; did you mean 'test_resnet'?",
    ),
    (
        'weights = "random"',
        "mean = [0.5, 0.5]",
        'backbones."test_resnet".mean: must hold 3 numbers, got [0.5, 0.5]',
    ),
    (
        'weights = "random"',
        'weigths = "random"',
        "backbones.\"test_resnet\".weigths: unknown key; did you mean 'weights'?",
    ),
    ("[search]", "[pretraining]\nepochs = 1\n[search]", "pretraining.data: is missing"),
    ("[search]", "[serch]", "serch: unknown key; did you mean 'search'?"),
    ("n_trials = 1", "n_trial = 1", "search.n_trial: unknown key; did you mean 'n_trials'?"),
    ("n_trials = 1", "n_trials = 0", "search.n_trials: must be at least 1, got 0"),
    (
        "n_trials = 1",
        'sampler = "tpee"',
        "search.sampler: must be one of tpe, gp, random, qmc, grid, got 'tpee'; did you mean 'tpe'?",
    ),
    (
        "n_trials = 1",
        'pruner = "medium"',
        "search.pruner: must be one of median, percentile, asha, hyperband, none, got 'medium'; did you mean 'median'?",
    ),
    (
        "n_trials = 1",
        'timeout = "soon"',
        'search.timeout: must be a duration such as "2h", "90m" or "1h30m", got \'soon\'',
    ),
    (
        "n_trials = 1",
        'sampler = "grid"',
        "space.lr: must have a step or choices with sampler = 'grid', got [0.0001, 0.01] log",
    ),
    (
        'devices = "cpu"',
        'devices = "tpu"',
        'workers.devices: must be "auto", "cpu", "cuda:0" or a list of CUDA devices, got \'tpu\'',
    ),
    (
        'devices = "cpu"',
        'devices = ["cpu", "cuda:0"]',
        "workers.devices: must not mix \"auto\" or \"cpu\" with other devices, got ['cpu', 'cuda:0']",
    ),
    ('devices = "cpu"', "per_device = 0", "workers.per_device: must be at least 1, got 0"),
    (
        "[workers]",
        "[[enqueue]]\nlr = 0.1\n[workers]",
        "enqueue[1].lr: must lie in [0.0001, 0.01] log, got 0.1",
    ),
    ("[workers]", "[[enqueue]]\ndropout = 0.1\n[workers]", "enqueue[1].dropout: must be a param of [space]"),
]


@pytest.mark.parametrize(("old", "new", "problem"), PARSING)
def test_check_refuses_a_wrong_study_file(
    folder: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, problem: str
) -> None:
    """A mistake in the file is one line that says where, what must hold, and what it got."""
    study_file = write_study(folder, (old, new))
    assert fail(capsys, "check", study_file) == (3, expect(folder, problem))


def test_check_lists_all_mistakes_of_a_study_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has its line."""
    study_file = write_study(folder, ("epochs = 1", "epochs = 0"), ("[search]", "[serch]"))
    problems = ["serch: unknown key; did you mean 'search'?", "training.epochs: must be at least 1, got 0"]
    assert fail(capsys, "check", study_file) == (3, expect(folder, *problems))


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda _: None, "study.toml: must be a readable study file, got: No such file or directory"),
        (
            lambda folder: (folder / "study.toml").mkdir(),
            "study.toml: must be a readable study file, got: Is a directory; 'tuner init FOLDER' writes a study file",
        ),
        (
            write("study.toml", "[study]\nname = bad"),
            "study.toml: must be TOML, got: Invalid value (at line 2, column 8)",
        ),
        (write("study.toml", b"\xff\xfe\x00"), "study.toml: must be a readable study file, got: it is not UTF-8 text"),
    ],
)
def test_check_refuses_what_is_no_study_file(
    folder: Path, capsys: pytest.CaptureFixture[str], prepare: Prepare, problem: str
) -> None:
    """A file that cannot be read as TOML is named as it was typed."""
    prepare(folder)
    assert fail(capsys, "check", "study.toml") == (3, f"error: {problem}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("check", "study.toml"), 3, "training.epochs: must be at least 1, got 0"),
        (("check", "folder.toml"), 5, "data.path: must be an existing folder, got 'FOLDER/imagse'"),
        (
            ("delete", "x", "--storage", "x.db"),
            8,
            "storage: must be an SQLite URL such as sqlite:///studies.db, got 'x.db'",
        ),
    ],
)
def test_program_ends_with_the_message_and_the_code(
    folder: Path, arguments: tuple[str, ...], code: int, problem: str
) -> None:
    """As a user starts it: nothing on stdout, the message on stderr, and the exit code for a script."""
    write_study(folder, ('"images"', '"imagse"'))
    (folder / "study.toml").rename("folder.toml")
    write_study(folder, ("epochs = 1", "epochs = 0"))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tuner", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", expect(folder, problem))
