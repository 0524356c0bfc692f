"""What a study would do: ``tuner check``."""

from dataclasses import asdict, dataclass
from typing import Any

from tuner.search.storage import find_database, resolve_url, use_storage
from tuner.search.studies import check_stored
from tuner.search.warm_start import read_warm_recipes
from tuner.service.messages import Description
from tuner.service.pool import open_pool
from tuner.service.scouting import collect_facts, scout_study
from tuner.service.slots import Slot, count_devices
from tuner.spec.durations import format_seconds, parse_budget
from tuner.spec.sections import StudySpec
from tuner.spec.space import describe

_GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study on this machine, before it runs."""

    name: str
    n_trials: int
    n_screen: int
    """Trials of the screen, which count apart; fewer where the space has fewer points."""
    epochs: int
    n_folds: int
    """On which each trial is trained; 0: on train alone."""
    seeds_per_trial: int
    sampler: str
    pruner: str
    space: dict[str, str]
    classes: tuple[str, ...]
    split_counts: dict[str, int]
    group_counts: dict[str, int]
    n_params: dict[str, int]
    weights: dict[str, str]
    devices: tuple[str, ...]
    """One for each worker; with ``probes_sharing`` each once."""
    probes_sharing: bool
    """Whether a probe is to say how many workers share each device."""
    store_bytes: int
    free_bytes: int
    estimated_seconds: float | None
    """Of all trials but the screen's, without pruning, with every layer trained; None on CUDA, which is not timed."""
    budget: str | None
    """As in the study file."""
    budget_seconds: float | None
    """How long the budget lasts on these devices, earlier runs not deducted; None without one."""
    confirm_fraction: float
    notes: tuple[str, ...]
    n_stored: int | None
    """Trials that the storage already holds of this study and that count; None for a new study."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        return asdict(self)


def make_plan(spec: StudySpec, *, storage: str | None = None, n_workers: int | None = None) -> Plan:
    """Look at the data, the backbones and the devices, and say what a run would do. Nothing is stored.

    Raises:
        TunerError: If a run would be refused.
    """
    url = resolve_url(storage, spec.study.storage)
    has_database = find_database(url).is_file()
    if spec.warm_start is not None:
        with use_storage(url) as opened:
            read_warm_recipes(opened, spec)
    with open_pool(spec) as pool:
        scouted = scout_study(pool, spec, n_workers=n_workers, timed=True, starts_workers=False)
    assert scouted is not None  # noqa: S101 - nothing asked it to stop
    description, devices = scouted.description, [slot.device for slot in scouted.slots]
    n_stored = None
    if has_database:
        with use_storage(url) as opened:
            n_stored = check_stored(opened, spec, collect_facts(description))
    return Plan(
        name=spec.study.name,
        n_trials=spec.search.n_trials,
        n_screen=spec.search.screen * len(spec.backbone_names()),
        epochs=spec.training.epochs,
        n_folds=spec.data.folds or 0,
        seeds_per_trial=spec.search.seeds_per_trial,
        sampler=spec.search.sampler,
        pruner=spec.search.pruner,
        space={name: describe(distribution) for name, distribution in spec.space.items()},
        classes=description.classes,
        split_counts=description.split_counts,
        group_counts=description.group_counts,
        n_params=description.n_params,
        weights=description.weights,
        devices=tuple(dict.fromkeys(devices) if scouted.probes_sharing else devices),
        probes_sharing=scouted.probes_sharing,
        store_bytes=description.store_bytes,
        free_bytes=description.free_bytes,
        budget=spec.search.budget,
        budget_seconds=_count_budget(spec, scouted.slots),
        confirm_fraction=spec.search.confirm_fraction,
        estimated_seconds=_estimate_seconds(spec, description, scouted.slots),
        notes=description.notes,
        n_stored=n_stored,
    )


def _count_budget(spec: StudySpec, slots: tuple[Slot, ...]) -> float | None:
    if spec.search.budget is None:
        return None
    return parse_budget(spec.search.budget).wall_seconds(count_devices(slots))


def _estimate_seconds(spec: StudySpec, description: Description, slots: tuple[Slot, ...]) -> float | None:
    """Return an upper bound: all trials, all epochs, all layers, each backbone equally often."""
    timed = description.seconds_per_image.values()
    if not timed or slots[0].device != "cpu":
        return None
    n_trainings = spec.search.n_trials * spec.search.seeds_per_trial * (spec.data.folds or 1)
    n_images = n_trainings * spec.training.epochs * description.split_counts["train"]
    return n_images * sum(timed) / len(timed) / len(slots)


def describe_plan(plan: Plan) -> str:
    """Return a plan for a person."""
    splits = ", ".join(f"{count} {split}" for split, count in plan.split_counts.items())
    trials = f"{plan.n_trials} trials of {plan.epochs} epochs"
    trials += f" on each of {plan.n_folds} folds" if plan.n_folds else ""
    trials += f" with each of {plan.seeds_per_trial} seeds" if plan.seeds_per_trial > 1 else ""
    trials += f", after at most {plan.n_screen} head trials of the screen" if plan.n_screen else ""
    lines = [
        f"study {plan.name}: {trials}; {plan.sampler} and {plan.pruner} pruner",
        f"images: {sum(plan.split_counts.values())} in {len(plan.classes)} classes ({splits})",
        "space:",
        *(f"  {name}: {text}" for name, text in plan.space.items()),
        "backbones:",
        *(
            f"  {name}: {plan.group_counts[name]} layer groups, {plan.n_params[name] / 1e6:.1f} M weights, "
            f"starts from {plan.weights[name]}"
            for name in plan.group_counts
        ),
        f"workers: {_describe_workers(plan)}",
        f"disk: {plan.store_bytes / _GIGABYTE:.2f} GB of decoded images, {plan.free_bytes / _GIGABYTE:.1f} GB free",
        f"time: {_describe_time(plan)}",
        *_describe_budget(plan),
        "storage: a new study" if plan.n_stored is None else f"storage: goes on after {plan.n_stored} trials",
        *plan.notes,
    ]
    return "\n".join(lines)


def _describe_workers(plan: Plan) -> str:
    devices = ", ".join(plan.devices)
    if plan.probes_sharing:
        return f"auto: a probe says how many share each device ({devices})"
    return f"{len(plan.devices)} ({devices})"


def _describe_budget(plan: Plan) -> list[str]:
    if plan.budget is None or plan.budget_seconds is None:
        return []
    lasts = f"budget: {plan.budget}, which is {format_seconds(plan.budget_seconds)} of {len(plan.devices)} workers"
    if not plan.confirm_fraction:
        return [f"{lasts}, all of it to search"]
    search = plan.budget_seconds * (1 - plan.confirm_fraction)
    return [f"{lasts}: {format_seconds(search)} to search, the rest to confirm the best few"]


def _describe_time(plan: Plan) -> str:
    if plan.estimated_seconds is None:
        return "not estimated on CUDA"
    return f"at most about {format_seconds(plan.estimated_seconds)} (nothing pruned, every layer trained)"
