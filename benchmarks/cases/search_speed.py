"""How fast does a whole search get to good recipes, against the script that one would write by hand?

Arms, each a cold start in processes of its own: A the plain script (Optuna in memory, ImageFolder, DataLoader, timm), B
the same as two processes on one SQLite file, D ``python -m tuner run``. D-no-screen, D-fresh and D-plain are D without
the screen, without fixed views, and without both; D-no-prefix computes frozen layers in every epoch. Spaces: S1 head
only, S2 partial unfreezing with fixed views in all arms, S3 full fine-tuning, S4 mixed. S2 has no screen, so that
D-no-screen is D there, and D-plain is D-fresh.

    python -m benchmarks search_speed --pilot --out R.json               one seed of its own: fixes the targets
    python -m benchmarks search_speed --out R.json --seeds 5             the measured runs; the same command resumes
    python -m benchmarks search_speed --out R.json --arms D-no-screen,D-fresh --spaces S4 --seeds 3    ablations
    python -m benchmarks search_speed --out R.json --describe            the table again

``--trials 40`` or ``--trials A=40,B=40,D=1000``: where trials are short, an arm needs many for its rate to show. Clocks
run from process start with empty caches. The target of a space is 99 % of the best value of its pilot. The arms of a
seed run in random order. Each arm's best recipe, and the one that first reached the target, are trained again by the
plain script on a fresh seed, off the clock. A regression: fewer trials an hour than A or B on any space, or a longer
time to target.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arms.job import ArmJob, ArmRun
from benchmarks.arms.plain_run import probe, refit, run_plain
from benchmarks.arms.tuner_run import run_tuner
from benchmarks.harness import describe_provenance, write_json
from benchmarks.material import Material, make_material
from benchmarks.processes import wait_until_idle
from benchmarks.search_settings import NAME, Settings, read_settings
from benchmarks.search_spaces import SEARCH_SPACES
from benchmarks.search_summary import describe_summary, measure_run, pack_lines, summarise

N_PROCESSES_OF_B = 2
_TARGET_FRACTION = 0.99


def _run_d(
    job: ArmJob, settings: Settings, *, screens: bool = True, has_views: bool = True, prefix_cache: str = "auto"
) -> ArmRun:
    screen = job.space.screen if settings.screen is None else settings.screen
    return run_tuner(
        job,
        screen=screen if screens and job.space.screen else 0,
        views=job.epochs if has_views and job.space.fixed_views != "no arm" else "fresh",
        prefix_cache=prefix_cache,
    )


def _run_plain(job: ArmJob, _: Settings, *, n_processes: int) -> ArmRun:
    return run_plain(job, n_processes=n_processes)


ARMS: dict[str, Callable[[ArmJob, Settings], ArmRun]] = {
    "A": partial(_run_plain, n_processes=1),
    "B": partial(_run_plain, n_processes=N_PROCESSES_OF_B),
    "D": _run_d,
    "D-no-screen": partial(_run_d, screens=False),
    "D-fresh": partial(_run_d, has_views=False),
    "D-plain": partial(_run_d, screens=False, has_views=False),
    "D-no-prefix": partial(_run_d, prefix_cache="never"),
}


def run_search_speed(settings: Settings) -> dict[str, Any]:
    """Run what the result file does not hold yet, and keep it after each run.

    Returns:
        The result, as it is on disk.

    Raises:
        ValueError: If the result file comes from other settings.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        material = make_material(
            Path(folder), dataset=settings.dataset, image_size=settings.image_size, smoke=settings.smoke
        )
        result = _open_result(settings, material)
        for space, arm, seed in _order(settings):
            kept = result["pilot_runs" if settings.pilot else "runs"]
            if any((run["space"], run["arm"], run["seed"]) == (space, arm, seed) for run in kept):
                continue
            with tempfile.TemporaryDirectory(prefix="run_", dir=folder) as place:
                run = _run_arm(settings, material, result, space=space, arm=arm, seed=seed, folder=Path(place))
            kept.append(run)
            _keep(settings, result)
            print(describe_run(run, result["targets"].get(space)), flush=True)
    return result


def _order(settings: Settings) -> list[tuple[str, str, int]]:
    """Return what to run: seed by seed, the arms of each in an order of its own."""
    order = []
    for seed in settings.seeds:
        turn = [(space, arm, seed) for space in settings.spaces for arm in settings.arms]
        random.Random(seed).shuffle(turn)
        order += turn
    return order


def _open_result(settings: Settings, material: Material) -> dict[str, Any]:
    facts = {
        "data": material.name,
        "image_size": material.image_size,
        "backbones": list(material.backbones),
        "epochs": settings.epochs,
        "device": settings.device,
    } | ({} if settings.precision == "auto" else {"precision": settings.precision})
    if not settings.out.is_file():
        result: dict[str, Any] = {
            "case": NAME,
            "question": (__doc__ or "").splitlines()[0],
            "settings": facts,
            "provenance": [],
            "targets": {},
            "plain": {},
            "pilot_runs": [],
            "runs": [],
            "summary": [],
        }
    else:
        result = json.loads(settings.out.read_text(encoding="utf-8"))
        if result["settings"] != facts:
            raise ValueError(f"--out: must be a result of the same settings, got {result['settings']} for {facts}")
    result["targets"] |= settings.targets
    result["provenance"].append(describe_provenance())
    return result


def _keep(settings: Settings, result: dict[str, Any]) -> None:
    """Write the result with everything that follows from its runs."""
    if settings.pilot:
        for space in settings.spaces:
            best = max((run["best"] or 0.0 for run in result["pilot_runs"] if run["space"] == space), default=0.0)
            if best:
                result["targets"][space] = _TARGET_FRACTION * best
    result["summary"] = summarise(result["runs"], result["targets"])
    write_json(settings.out, result)


def _run_arm(
    settings: Settings,
    material: Material,
    result: dict[str, Any],
    *,
    space: str,
    arm: str,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    places = {name: folder / name for name in ("probe", "run", "refit")}
    for place in places.values():
        place.mkdir()
    job = ArmJob(
        material=material,
        space=SEARCH_SPACES[space],
        seed=seed,
        epochs=settings.epochs,
        n_trials=settings.n_trials(arm),
        minutes=settings.minutes,
        device=settings.device,
        precision=settings.precision,
        folder=places["probe"],
    )
    plain = _find_plain(job, settings, result, space=space, arm=arm)
    job = _change(job, folder=places["run"], num_workers=plain["num_workers"], n_threads=plain["n_threads"])
    busy = 0.0 if settings.smoke else wait_until_idle(settings.patience)
    shown = ARMS[arm](job, settings)
    rows = pack_lines(shown.lines)
    target = result["targets"].get(space)
    return {
        "space": space,
        "arm": arm,
        "seed": seed,
        "seconds": round(shown.seconds, 3),
        "timed_out": shown.timed_out,
        "error": shown.error,
        "busy_cores": busy,
        "best": measure_run(rows, shown.seconds, target)["best"],
        # Smoke mode tries the refit once, since each is a start of torch.
        **({} if settings.smoke and arm != "B" else _confirm(_change(job, folder=places["refit"]), shown, target)),
        "floor": shown.floor,
        "n_trials_asked": job.n_trials,
        "minutes": job.minutes,
        "trials": rows,
    }


def _change(job: ArmJob, **changes: Any) -> ArmJob:
    return ArmJob(**{**vars(job), **changes})


def _find_plain(job: ArmJob, settings: Settings, result: dict[str, Any], *, space: str, arm: str) -> dict[str, Any]:
    """Return the loader processes and threads of the plain script: probed once for each space, then fixed."""
    if settings.plain:
        return {"num_workers": settings.plain[0], "n_threads": settings.plain[1]}
    key = f"{space} {arm if arm in {'A', 'B'} else 'A'}"
    if key not in result["plain"]:
        cores = len(os.sched_getaffinity(0))
        is_alone = key.endswith("A")
        busy = wait_until_idle(settings.patience)
        found = probe(
            job,
            n_processes=1 if is_alone else N_PROCESSES_OF_B,
            loaders=[0, 1, 2] if cores <= 2 else [0, 2, 4, 8],
            threads=sorted({1, min(2, cores)}) if is_alone else [1],
        )
        result["plain"][key] = found | {"busy_cores": busy}
        _keep(settings, result)
    kept: dict[str, Any] = result["plain"][key]
    return kept


def _confirm(job: ArmJob, shown: ArmRun, target: float | None) -> dict[str, Any]:
    """Train an arm's best recipe, and the first that reached the target, on a fresh seed."""
    complete = [line for line in shown.lines if line["value"] is not None]
    if not complete:
        return {"best_recipe": None, "refit_best": None, "refit_first_at_target": None}
    best = max(complete, key=lambda line: line["value"])
    first = next((line for line in complete if target is not None and line["value"] >= target), None)
    recipes = [best["recipe"]] + ([first["recipe"]] if first and first is not best else [])
    values = refit(job, recipes)
    return {
        "best_recipe": best["recipe"],
        "refit_best": values[0],
        "refit_first_at_target": values[-1] if first else None,
    }


def describe_run(run: dict[str, Any], target: float | None) -> str:
    """Return one line on a run."""
    numbers = measure_run(run["trials"], run["seconds"], target)
    parts = [f"{run['space']} {run['arm']} seed {run['seed']}:", f"{numbers['n_trials']} trials"]
    parts += [f"+ {numbers['n_screened']} screened"] if numbers["n_screened"] else []
    parts.append(f"in {run['seconds']:.1f} s, {numbers['trials_per_hour']:.0f} trials/h,")
    parts.append(f"median epochs {numbers['median_epochs']}, best {run['best']}, refit {run.get('refit_best')}")
    if target is not None:
        reached = numbers["seconds_to_target"]
        parts.append(f", {target:.4f} " + ("not reached" if reached is None else f"after {reached:.1f} s"))
    parts += [" timed out"] if run["timed_out"] else []
    parts += [f" others kept {run['busy_cores']} cores busy"] if run["busy_cores"] else []
    parts += [f"\n{run['error']}"] if run["error"] else []
    return " ".join(parts)


def main(arguments: argparse.Namespace) -> int:
    """Run the case as the command line says and print its table."""
    settings = read_settings(arguments)
    if settings.smoke:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(**{**vars(settings), "out": Path(folder) / "smoke.json"})
            print(describe_summary(run_search_speed(settings)))
        return 0
    if arguments.describe:
        print(describe_summary(json.loads(settings.out.read_text(encoding="utf-8"))))
        return 0
    print(describe_summary(run_search_speed(settings)))
    print(f"kept in {settings.out}")
    return 0
