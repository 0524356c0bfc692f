"""Tests of tuner.spec.problems: each mistake and its one line."""

import pytest

from tuner.errors import SpecError

from .builders import MINIMAL, parse

LR = "lr = { low = 0.1, high = 0.4 }\n"
NO_HEADS = "where no trial trains the head alone, got 8"


def list_lines(more: str, base: str = MINIMAL) -> list[str]:
    """Return the problems of a study file."""
    with pytest.raises(SpecError, match=":") as caught:
        parse(more, base=base)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("[training]\nepochs = 0", "training.epochs: must be at least 1, got 0"),
        ("[training]\nepochs = 1.5", "training.epochs: must be a whole number, got 1.5"),
        ('[training]\nhorizontal_flip = "no"', "training.horizontal_flip: must be true or false, got 'no'"),
        (
            '[training]\nclass_weights = "balancd"',
            "training.class_weights: must be one of none, balanced, got 'balancd'; did you mean 'balanced'?",
        ),
        (
            '[training]\nhead_start = "scren"',
            "training.head_start: must be one of none, screen, got 'scren'; did you mean 'screen'?",
        ),
        ("[training]\nlr = -1", "training.lr: must be greater than 0, got -1"),
        ("[training]\nlayer_decay = 0", "training.layer_decay: must lie in (0, 1], got 0"),
        (
            "[training]\nlr = { low = 1, high = 2 }",
            "training.lr: must be one value, got {'low': 1, 'high': 2}; distributions go to [space]",
        ),
        (
            '[training]\nunfrozen_layers = "everything"',
            "training.unfrozen_layers: must be a whole number or \"all\", got 'everything'",
        ),
        ("[training]\nunfrozen_layers = 0", "training.unfrozen_layers: must be at least 1, got 0"),
        (
            '[training]\nbackbone = "a"',
            "training.backbone: must stand in [space] or in [training], not in both",
        ),
        (f"{LR}[training]\nlr = 0.1", "training.lr: must stand in [space] or in [training], not in both"),
        (
            '[backbones.test_resnt]\nweights = "random"',
            "backbones.\"test_resnt\": must be one of the study's backbones; did you mean 'test_resnet'?",
        ),
        ("[backbones]\ntest_vit = 3", 'backbones."test_vit": must be a table, got 3'),
        ("[backbones.test_vit]\nmean = [0.5]", 'backbones."test_vit".mean: must hold 3 numbers, got [0.5]'),
        (
            "[backbones.test_vit]\nstd = [0.5, 0.5, 0.0]",
            'backbones."test_vit".std: must hold numbers greater than 0, got [0.5, 0.5, 0.0]',
        ),
        (
            "[backbones.test_vit]\nmean = [nan, 0.5, 0.5]",
            'backbones."test_vit".mean: must hold finite numbers, got [nan, 0.5, 0.5]',
        ),
        ("[backbones.test_vit]\nkeep_head = 1", 'backbones."test_vit".keep_head: must be true or false, got 1'),
        (
            "[backbones.test_vit]\ninterpolation = 5",
            'backbones."test_vit".interpolation: must be one of nearest, bilinear, bicubic, lanczos, got 5',
        ),
        (
            '[pretraining.data]\nsource = "digits"\nclasses = ["1"]',
            "pretraining.data.classes: must name at least two classes, each once, got ['1']",
        ),
        ("[pretraining]\nepochs = 3", "pretraining.data: is missing"),
        (
            '[pretraining.data]\nsorce = "digits"\nsource = "digits"',
            "pretraining.data.sorce: unknown key; did you mean 'source'?",
        ),
        ("[workers]\nper_device = 0", "workers.per_device: must be at least 1, got 0"),
        (
            '[workers]\nper_device = "some"',
            "workers.per_device: must be \"auto\" or a whole number, at least 1, got 'some'",
        ),
        (
            "[workers]\nper_device = 1.5",
            'workers.per_device: must be "auto" or a whole number, at least 1, got 1.5',
        ),
        ("[workers]\ntorch_compile = 1", "workers.torch_compile: must be true or false, got 1"),
        ("[search]\nn_trials = true", "search.n_trials: must be a whole number, got True"),
        ("[search]\nn_trials = 0", "search.n_trials: must be at least 1, got 0"),
        (
            '[search]\nsampler = "bayes"',
            "search.sampler: must be one of tpe, gp, random, qmc, grid, got 'bayes'",
        ),
        (
            f'{LR}[search]\nsampler = "grid"',
            "space.lr: must have a step or choices with sampler = 'grid', got [0.1, 0.4]",
        ),
        (
            'batch_size = { low = 1, high = 100001 }\n[search]\nsampler = "grid"',
            "search.sampler: a grid must have at most 100000 points, got 200002",
        ),
    ],
)
def test_list_problems_names_key_rule_and_value(more: str, problem: str) -> None:
    """A line says where, what must hold, what it got, and a near name if there is one."""
    assert list_lines(more) == [problem]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ('source = "image_folder"', "data.path: is missing; source = 'image_folder' reads from it"),
        (
            'source = "torchvision"\npath = "x"',
            "data.dataset: is missing; name a class of torchvision.datasets such as FashionMNIST",
        ),
        ('source = "digits"\npath = "x"', "data.path: must be left out with source = 'digits', got 'x'"),
        (
            'source = "digits"\ndataset = "MNIST"',
            "data.dataset: must be left out with source = 'digits', got 'MNIST'",
        ),
        (
            'source = "digits"\nval_fraction = 0.6\ntest_fraction = 0.5',
            "data: val_fraction + test_fraction must be less than 1, got 1.1",
        ),
        (
            'source = "image_folder"\npath = "x"\ngroup = "patient"',
            "data.group: must be left out with source = 'image_folder', got 'patient'; only csv tables name groups",
        ),
        ('source = "digits"\nval_fraction = 1.0', "data.val_fraction: must lie in (0, 1), got 1.0"),
        ('source = "digits"\nval_fraction = nan', "data.val_fraction: must lie in (0, 1), got nan"),
        ('source = "digits"\nmax_bad_fraction = 1', "data.max_bad_fraction: must lie in [0, 1), got 1"),
        ('source = "digits"\nimage_size = 4', "data.image_size: must lie in [8, 2048], got 4"),
        ('source = "digits"\nimage_size = 2049', "data.image_size: must lie in [8, 2048], got 2049"),
        ('source = "digits"\nclasses = "01"', "data.classes: must be a list, got '01'"),
        (
            'source = "digits"\nclasses = ["1", "1"]',
            "data.classes: must name at least two classes, each once, got ['1', '1']",
        ),
    ],
)
def test_find_conflicts_knows_what_a_source_needs(data: str, problem: str) -> None:
    """Keys of [data] that contradict each other are named."""
    assert list_lines("", MINIMAL.replace('source = "digits"', data)) == [problem]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("dropout = 0.1", "enqueue[1].dropout: must be a param of [space]"),
        ('backbon = "a"', "enqueue[1].backbon: must be a param of [space]; did you mean 'backbone'?"),
        ("lr = 0.5", "enqueue[1].lr: must lie in [0.1, 0.4], got 0.5"),
        ("lr = nan", "enqueue[1].lr: must be a number, got nan"),
        ("lr = true", "enqueue[1].lr: must be a number, got True"),
        ('backbone = "vgg16"', "enqueue[1].backbone: must be one of test_resnet, test_vit, got 'vgg16'"),
        ("", "enqueue[1]: must name at least one param of [space]"),
    ],
)
def test_find_conflicts_checks_enqueued_points(entry: str, problem: str) -> None:
    """A queued point lies in the space; Optuna itself would only warn."""
    assert list_lines(f"{LR}[[enqueue]]\n{entry}\n") == [problem]


def test_find_conflicts_numbers_enqueued_points() -> None:
    """The entry at fault is found by its number."""
    assert list_lines(f"{LR}[[enqueue]]\nlr = 0.1\n[[enqueue]]\nlr = 1.0\n") == [
        "enqueue[2].lr: must lie in [0.1, 0.4], got 1.0"
    ]


def test_find_conflicts_wants_a_backbone() -> None:
    """A study without a backbone shows how to name one."""
    base = '[study]\nname = "a"\n[data]\nsource = "digits"\n'
    assert list_lines("", base) == [
        'space.backbone: is missing; name backbones such as { choices = ["resnet50.a1_in1k"] }'
    ]


def test_find_conflicts_stays_quiet_about_broken_parts() -> None:
    """A distribution that is wrong by itself causes no second line about what refers to it."""
    assert list_lines("lr = { low = 2, high = 1 }\n[[enqueue]]\nlr = 1.5") == [
        "space.lr: low must not exceed high, got low = 2, high = 1"
    ]


def test_find_conflicts_refuses_to_queue_into_a_grid() -> None:
    """A grid has an order of its own; queued points would be left out unsaid."""
    more = 'dropout = { choices = [0.0, 0.1] }\n[[enqueue]]\ndropout = 0.1\n[search]\nsampler = "grid"'
    assert list_lines(more) == [
        "enqueue: must be left out with sampler = 'grid', which tries every point in its own order"
    ]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (
            "",
            f"{NO_HEADS}; let space.unfrozen_layers start at 1, or set training.unfrozen_layers = 1",
        ),
        (
            "[training]\nunfrozen_layers = 2\n",
            f"{NO_HEADS}; let space.unfrozen_layers start at 1, or set training.unfrozen_layers = 1",
        ),
        (
            'unfrozen_layers = { low = 2, high = "all" }\n',
            f"{NO_HEADS}; let space.unfrozen_layers reach 1, which is the classifier",
        ),
        (
            "unfrozen_layers = { choices = [2, 3] }\n",
            f"{NO_HEADS}; let space.unfrozen_layers reach 1, which is the classifier",
        ),
        (
            'unfrozen_layers = { low = 1, high = "all" }\n[search]\nsampler = "grid"\n',
            "with sampler = 'grid', which tries every point in its own order, got 8",
        ),
    ],
)
def test_find_conflicts_refuses_a_screen_without_heads(more: str, what: str) -> None:
    """A screen trains heads alone, so the study must have such trials; a grid has an order of its own."""
    table = "screen = 8" if "[search]" in more else "[search]\nscreen = 8"
    assert list_lines(f"{more}{table}") == [f"search.screen: must be 0 {what}"]


@pytest.mark.parametrize(
    "more",
    [
        'unfrozen_layers = { low = 1, high = "all" }\n',
        "unfrozen_layers = { choices = [1, 3] }\n",
        "[training]\nunfrozen_layers = 1\n",
    ],
)
def test_find_conflicts_accepts_a_screen_of_heads(more: str) -> None:
    """Heads are screened wherever the head alone is a level, searched or fixed."""
    assert parse(f"{more}[search]\nscreen = 8").search.screen == 8


def test_find_conflicts_says_one_thing_of_a_screen_over_a_broken_distribution() -> None:
    """What is wrong with the unfrozen layers by itself causes no second line about the screen."""
    assert list_lines("unfrozen_layers = { low = 3, high = 2 }\n[search]\nscreen = 8") == [
        "space.unfrozen_layers: low must not exceed high, got low = 3, high = 2"
    ]


def test_find_conflicts_accepts_a_small_grid() -> None:
    """Choices, steps and "all" make a grid."""
    spec = parse(
        'dropout = { low = 0.0, high = 0.3, step = 0.1 }\nunfrozen_layers = { low = 1, high = "all" }\n'
        '[search]\nsampler = "grid"'
    )
    assert spec.search.sampler == "grid"


URL = "postgresql://u:secret@h/db"


@pytest.mark.parametrize(
    ("study", "problem"),
    [
        (f'[[study]]\nname = "a"\nstorage = "{URL}"', "study: must be a table, got a list"),
        (f'[study]\nname = "a"\nstorage = ["{URL}"]', "study.storage: must be text in quotes, got a list"),
        (
            f'[study]\nname = "a"\n[study.storage]\nurl = "{URL}"',
            "study.storage: must be text in quotes, got a table",
        ),
        ('[study]\nname = "a"\nstorage = 7', "study.storage: must be text in quotes, got a number"),
        ('[study]\nname = "a"\nstorage = 2026-01-01', "study.storage: must be text in quotes, got something else"),
        (f'[study]\nname = "a"\nurl = "{URL}"', "study.url: unknown key"),
    ],
)
def test_storage_in_the_wrong_form_is_not_repeated(study: str, problem: str) -> None:
    """A password may stand in it; whatever else is wrong shows what was found."""
    base = MINIMAL.replace('[study]\nname = "small"', study)
    assert list_lines("", base) == [problem]


def test_study_that_is_text_is_not_repeated() -> None:
    """Nor where the URL has become the study itself."""
    base = f'study = "{URL}"\n' + MINIMAL.replace('[study]\nname = "small"', "")
    assert list_lines("", base) == ["study: must be a table, got text"]


NO_SCREEN = (
    'training.head_start: must be "none" without a screen, got "screen"; set search.screen = 8, say, for eight heads '
    "of each backbone to choose from"
)
HEADS = "unfrozen_layers = { low = 1, high = 3 }\n"


@pytest.mark.parametrize("search", ["", "[search]\nn_trials = 3", "[search]\nscreen = 0"])
def test_find_conflicts_refuses_a_head_start_without_a_screen(search: str) -> None:
    """There would be no head to start from."""
    assert list_lines(f'{HEADS}[training]\nhead_start = "screen"\n{search}') == [NO_SCREEN]


def test_find_conflicts_says_one_thing_of_a_head_start_over_a_broken_search() -> None:
    """Whether there is a screen is not known then."""
    lines = list_lines(f'{HEADS}[training]\nhead_start = "screen"\n[search]\nscreen = -1')
    assert lines == ["search.screen: must be at least 0, got -1"]


def test_find_conflicts_accepts_a_head_start_with_a_screen() -> None:
    """And none where the file says nothing."""
    spec = parse(f'{HEADS}[training]\nhead_start = "screen"\n[search]\nscreen = 8')
    assert spec.training.head_start == "screen"
    assert parse(HEADS).training.head_start == "none"
