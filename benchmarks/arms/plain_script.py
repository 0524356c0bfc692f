"""Arms A and B: the search as one writes it by hand. Nothing of tuner is imported here, and the file stands alone.

Optuna (TPE, median pruner) + ImageFolder + torchvision transforms + DataLoader + timm, written with care: weights are
read once and copied for each trial, the frozen part runs without gradients and keeps its BatchNorm statistics, workers
and pinned memory are persistent, channels lie last, CUDA trains in bfloat16, the validation loader is kept, and the
optimizer is one kernel. config["views"] is "fresh", or the number of fixed versions that every training image has;
config["precision"] is "bfloat16" (on a CPU as well), "float32", or "auto".

    python plain_script.py CONFIG.json search    one JSON line for each finished trial, in config["lines"]
    python plain_script.py CONFIG.json train     train config["recipes"]; one JSON line each: its last val accuracy
    python plain_script.py CONFIG.json probe     time config["recipes"] under each of config["threads"], then under
                                                 each of config["loaders"] (DataLoader workers); one JSON line each
"""

import copy
import fcntl
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

BORN = time.time()  # before the slow imports; config["started"] is earlier still

import optuna  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from optuna.study import MaxTrialsCallback  # noqa: E402
from optuna.trial import TrialState  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.models import group_parameters  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.data import DataLoader, Dataset, Sampler  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import InterpolationMode, v2  # noqa: E402

Recipe = dict[str, Any]
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
DEFAULTS: Recipe = {"augmentation_strength": 0.0, "weight_decay": 0.01, "label_smoothing": 0.0}
WARMUP_FRACTION = 0.1


class Diverged(Exception):  # noqa: N818 - an event of a trial
    """The loss is not finite."""


class FixedViews(Dataset[Any]):
    """Images of which each has a few fixed versions."""

    def __init__(self, images: ImageFolder, *, seed: int, strength: float) -> None:
        self.images, self.seed, self.strength = images, seed, strength

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: tuple[int, int]) -> Any:
        """Return a version of an image, whatever was drawn before and whichever loader process draws it."""
        image, view = which
        with torch.random.fork_rng(devices=()):
            # Not torch.manual_seed, which would seed CUDA's dropout as well.
            torch.default_generator.manual_seed(draw_seed(self.seed, image, view, self.strength))
            return self.images[image]


def draw_seed(*parts: float) -> int:
    """Return 64 bits from a few numbers, the same in every process."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest())


class ViewSampler(Sampler[tuple[int, int]]):
    """Every image once an epoch, in random order, with the number of the view that the epoch shows: e mod K."""

    def __init__(self, n_images: int, n_views: int, generator: torch.Generator | None) -> None:
        self.n_images, self.n_views, self.generator = n_images, n_views, generator
        self.epoch = 0

    def __len__(self) -> int:
        return self.n_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.epoch += 1
        view = self.epoch % self.n_views
        for image in torch.randperm(self.n_images, generator=self.generator).tolist():
            yield image, view


class Trainer:
    """Trains recipes on one data set; keeps what trials share: read weights and the validation loaders."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        wanted = config["device"]
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
        torch.set_num_threads(config["n_threads"])
        self.num_workers: int = config["num_workers"]
        self.n_classes = len(ImageFolder(Path(config["images"], "train")).classes)
        self._templates: dict[str, nn.Module] = {}
        self._val_loaders: dict[str, DataLoader[Any]] = {}

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass."""
        in_bfloat16 = self.config["precision"] == "bfloat16"
        in_bfloat16 |= self.config["precision"] == "auto" and self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if in_bfloat16 else nullcontext()

    def read_backbone(self, name: str) -> nn.Module:
        """Return a backbone with its weights, to be copied; read once."""
        if name not in self._templates:
            backbone = self.config["backbones"][name]
            model: Any = timm.create_model(name, num_classes=self.n_classes, **backbone["kwargs"])
            head = tuple(f"{part}." for part, module in model.named_modules() if module is model.get_classifier())
            state = {key: value for key, value in load_file(backbone["weights"]).items() if not key.startswith(head)}
            missing = [key for key in model.load_state_dict(state, strict=False)[0] if not key.startswith(head)]
            if missing:
                raise ValueError(f"{name}: weights must hold all but the head, got {missing} missing")
            self._templates[name] = model
        return self._templates[name]

    def make_model(self, recipe: Recipe) -> nn.Module:
        """Return a fresh copy with a fresh head, frozen as the recipe says, on the device."""
        model = copy.deepcopy(self.read_backbone(recipe["backbone"]))
        model.reset_classifier(self.n_classes)  # type: ignore[operator]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in chain(*list_groups(model)[: recipe["unfrozen_layers"]]):
            parameter.requires_grad_(True)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def make_loader(self, part: str, recipe: Recipe, generator: torch.Generator | None) -> DataLoader[Any]:
        """Return the loader of ``train`` or ``val``; augmentation for train alone."""
        strength = recipe["augmentation_strength"] if part == "train" else 0.0
        folder = ImageFolder(
            Path(self.config["images"], part), make_transform(self.config, recipe["backbone"], strength)
        )
        images: Dataset[Any] = folder
        sampler: Sampler[Any] | None = None
        if strength > 0 and self.config["views"] != "fresh":
            images = FixedViews(folder, seed=self.config["view_seed"], strength=strength)
            sampler = ViewSampler(len(folder), self.config["views"], generator)
        batch_size = recipe["batch_size"] if part == "train" else max(64, recipe["batch_size"])
        return DataLoader(
            images,
            batch_size=batch_size,
            shuffle=part == "train" and sampler is None,
            sampler=sampler,
            drop_last=part == "train" and len(folder) % batch_size == 1,  # BatchNorm cannot train on one image
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=generator,
        )

    def find_val_loader(self, recipe: Recipe) -> DataLoader[Any]:
        """Return the validation loader of a backbone's normalisation, kept between trials."""
        backbone = self.config["backbones"][recipe["backbone"]]
        key = f"{backbone['mean']} {backbone['std']} {self.num_workers}"
        if key not in self._val_loaders:
            self._val_loaders[key] = self.make_loader("val", recipe | {"batch_size": 64}, None)
        return self._val_loaders[key]

    def train(self, recipe: Recipe, *, seed: int, epochs: int) -> Iterator[float]:
        """Train a recipe and yield the validation accuracy after each epoch."""
        torch.manual_seed(seed)
        model = self.make_model(recipe)
        loader = self.make_loader("train", recipe, torch.Generator().manual_seed(seed))
        optimizer = make_optimizer(model, recipe)
        factor = partial(lr_factor, n_steps=epochs * len(loader))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for _ in range(epochs):
            self.run_epoch(model, loader, recipe, optimizer, schedule)
            yield self.validate(model, recipe)

    def run_epoch(
        self, model: nn.Module, loader: DataLoader[Any], recipe: Recipe, optimizer: Any, schedule: Any
    ) -> None:
        """Train on every image once."""
        set_train(model)
        total = torch.zeros((), device=self.device)
        for images, labels in loader:
            with self.autocast():
                logits = compute_logits(model, self.move(images), head_only=recipe["unfrozen_layers"] == 1)
            targets = labels.to(self.device, non_blocking=True)
            loss = functional.cross_entropy(logits.float(), targets, label_smoothing=recipe["label_smoothing"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.detach()
        if not math.isfinite(total.item()):
            raise Diverged

    def validate(self, model: nn.Module, recipe: Recipe) -> float:
        """Return the accuracy on the validation images."""
        model.eval()
        n_right, n_images = torch.zeros((), device=self.device), 0
        with torch.inference_mode(), self.autocast():
            for images, labels in self.find_val_loader(recipe):
                guesses = model(self.move(images)).argmax(dim=1)
                n_right += (guesses == labels.to(self.device, non_blocking=True)).sum()
                n_images += len(labels)
        return float(n_right.item() / n_images)

    def move(self, images: Tensor) -> Tensor:
        """Return images on the device, channels last: faster for these models on CUDA and on CPU."""
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)


def make_transform(config: dict[str, Any], backbone: str, strength: float) -> v2.Compose:
    """Return what happens to an image between its file and the batch; ranges grow with the strength."""
    size = config["image_size"]
    steps: list[Any] = [v2.Resize((size, size), interpolation=InterpolationMode.BICUBIC)]
    if strength > 0:
        steps.append(
            v2.RandomAffine(
                degrees=40 * strength,
                translate=(0.2 * strength, 0.2 * strength),
                scale=(1 - 0.2 * strength, 1 + 0.2 * strength),
                shear=math.degrees(math.atan(0.2 * strength)),
                interpolation=InterpolationMode.BILINEAR,
                fill=127,
            )
        )
        steps += [v2.RandomHorizontalFlip()] if config["horizontal_flip"] else []
    normalise = v2.Normalize(config["backbones"][backbone]["mean"], config["backbones"][backbone]["std"])
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise])


def list_groups(model: Any) -> list[list[nn.Parameter]]:
    """Return layer groups, the head first: the classifier, the rest of timm's last coarse group, then down."""
    named = dict(model.named_parameters())
    head = list(model.get_classifier().parameters())
    taken = {id(parameter) for parameter in head}
    grouped = group_parameters(model, model.group_matcher(coarse=True))
    lower = [
        [named[name] for name in grouped[key] if id(named[name]) not in taken] for key in sorted(grouped, reverse=True)
    ]
    return [head, *(group for group in lower if group)]


def set_train(model: nn.Module) -> None:
    """Train mode, but eval mode for everything that is frozen: BatchNorm statistics there stand still."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def compute_logits(model: Any, images: Tensor, *, head_only: bool) -> Tensor:
    """Return logits; where the head alone trains, everything before it runs without gradients and in eval mode."""
    if not head_only:
        return model(images)  # type: ignore[no-any-return]
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
    return model.get_classifier()(features)  # type: ignore[no-any-return]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over what trains; biases and norms do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = [
        {"params": [each for each in trained if each.ndim > 1], "weight_decay": recipe["weight_decay"]},
        {"params": [each for each in trained if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([table for table in tables if table["params"]], lr=recipe["lr"], fused=True)


def lr_factor(step: int, *, n_steps: int) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then half a cosine."""
    n_warmup = min(round(WARMUP_FRACTION * n_steps), n_steps - 1)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - n_warmup) / (n_steps - n_warmup), 1.0)))


class Space:
    """What is searched, and how a suggestion becomes a recipe."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.space: dict[str, dict[str, Any]] = trainer.config["space"]
        self.fixed: Recipe = DEFAULTS | trainer.config["fixed"]
        names = self.space["backbone"]["choices"]
        self.n_groups = {name: len(list_groups(trainer.read_backbone(name))) for name in names}
        self.n_levels = min(self.n_groups.values())
        high = self.space.get("unfrozen_layers", {}).get("high", "all")
        self.spreads_levels = "unfrozen_layers" in self.space and high == "all"
        self.highest_level: int = self.n_levels if high == "all" else high

    def suggest(self, trial: optuna.Trial) -> None:
        """Draw every param of the space."""
        for name, ends in self.space.items():
            if "choices" in ends:
                trial.suggest_categorical(name, ends["choices"])
            elif name == "unfrozen_layers":
                trial.suggest_int(name, ends["low"], self.highest_level)
            else:
                trial.suggest_float(name, ends["low"], ends["high"], log=ends.get("log", False), step=ends.get("step"))

    def resolve(self, params: Recipe) -> Recipe:
        """Return the recipe; levels of unfreezing up to ``all`` are spread over the backbone's layer groups."""
        recipe = self.fixed | params
        n_groups = self.n_groups[recipe["backbone"]]
        if recipe["unfrozen_layers"] == "all":
            recipe["unfrozen_layers"] = n_groups
        elif self.spreads_levels:
            level = recipe["unfrozen_layers"]
            recipe["unfrozen_layers"] = round(1 + (level - 1) * (n_groups - 1) / max(1, self.n_levels - 1))
        return recipe

    def first_point(self, point: Recipe) -> Recipe:
        """Return the recipe to begin with, the same for all arms."""
        return {name: self.highest_level if value == "all" else value for name, value in point.items()}


def search(trainer: Trainer) -> None:
    """Search to ``n_trials`` complete or pruned trials."""
    config = trainer.config
    space = Space(trainer)
    study = open_study(config, space)

    def objective(trial: optuna.Trial) -> float:
        space.suggest(trial)
        recipe = space.resolve(trial.params)
        value = math.nan
        try:
            epochs = trainer.train(recipe, seed=100_003 * config["seed"] + trial.number, epochs=config["epochs"])
            for epoch, value in enumerate(epochs, start=1):
                trial.report(value, epoch)
                if epoch < config["epochs"] and trial.should_prune():
                    raise optuna.TrialPruned
        except Diverged:
            raise optuna.TrialPruned from None
        return value

    study.optimize(
        objective,
        timeout=60 * config["minutes"],
        callbacks=[make_recorder(config, space), MaxTrialsCallback(config["n_trials"], states=COUNTED)],
    )


def open_study(config: dict[str, Any], space: Space) -> optuna.Study:
    """Return the study: in memory, or in a database that other processes write to as well."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # As many trials and epochs before the first pruning as in the other arms.
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1 + max(1, round(0.2 * config["epochs"])))
    sampler = optuna.samplers.TPESampler(seed=1000 * config["seed"] + config["rank"])
    with Path(config["lines"]).with_suffix(".lock").open("w") as own_lock:
        lock = own_lock if config["storage"] is None else Path(config["storage_lock"]).open("w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        study = optuna.create_study(
            storage=config["storage"],
            study_name="plain",
            direction="maximize",
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        if config["rank"] == 0:
            study.enqueue_trial(space.first_point(config["first_point"]))
        lock.close()
    return study


def make_recorder(config: dict[str, Any], space: Space) -> Callable[[optuna.Study, optuna.trial.FrozenTrial], None]:
    """Return the callback that writes a line for each finished trial."""
    started = config.get("started", BORN)

    def record(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        assert trial.datetime_complete is not None
        reported = trial.intermediate_values
        line = {
            "seconds": trial.datetime_complete.timestamp() - started,
            "number": trial.number,
            "state": trial.state.name,
            "value": trial.value if trial.state is TrialState.COMPLETE else None,
            "epochs": len(reported),
            "screen": False,
            "recipe": space.resolve(trial.params),
        }
        write_line(config, line)

    return record


def write_line(config: dict[str, Any], line: dict[str, Any]) -> None:
    """Append a JSON line."""
    with Path(config["lines"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def train_recipes(trainer: Trainer) -> None:
    """Train each recipe alone."""
    for recipe in trainer.config["recipes"]:
        try:
            value = list(trainer.train(recipe, seed=trainer.config["seed"], epochs=trainer.config["epochs"]))[-1]
        except Diverged:
            value = 0.0
        write_line(trainer.config, {"value": value})


def probe(trainer: Trainer) -> None:
    """Time short trials: under each number of threads, and under the best of them with each number of loaders."""
    config = trainer.config
    recipes = [Space(trainer).resolve(recipe) for recipe in config["recipes"]]
    for recipe in recipes:  # the first is slow: allocators, kernels, files
        list(trainer.train(recipe, seed=0, epochs=1))

    def time_trials(num_workers: int, n_threads: int) -> float:
        trainer.num_workers = num_workers
        torch.set_num_threads(n_threads)
        began = time.perf_counter()
        for recipe in recipes:
            list(trainer.train(recipe, seed=0, epochs=config["epochs"]))
        seconds = time.perf_counter() - began
        write_line(config, {"num_workers": num_workers, "n_threads": n_threads, "seconds": seconds})
        return seconds

    first, *others = config["loaders"]
    best_threads = min(config["threads"], key=lambda n_threads: time_trials(first, n_threads))
    for num_workers in others:
        time_trials(num_workers, best_threads)
    name = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu"
    write_line(config, {"device": name})


MODES: dict[str, Callable[[Trainer], None]] = {"search": search, "train": train_recipes, "probe": probe}

if __name__ == "__main__":
    MODES[sys.argv[2]](Trainer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
