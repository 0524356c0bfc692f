"""Run the plain script: arm A as one process in memory, arm B as several processes on one SQLite file."""

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.arms.job import ArmJob, ArmRun, Line
from benchmarks.processes import Watched, watch

SCRIPT = Path(__file__).with_name("plain_script.py")
_LONG_SECONDS = 3600.0


def run_plain(job: ArmJob, *, n_processes: int) -> ArmRun:
    """Search with the plain script.

    Args:
        job: What to search.
        n_processes: One keeps its study in memory; more share one SQLite file, and have one thread each.
    """
    started = time.time()
    storage = None if n_processes == 1 else f"sqlite:///{job.folder}/plain.db"
    configs = [
        describe_config(job)
        | {
            "started": started,
            "rank": rank,
            "storage": storage,
            "storage_lock": str(job.folder / "storage.lock"),
            "lines": str(job.folder / f"lines_{rank}.jsonl"),
        }
        for rank in range(n_processes)
    ]
    watched = start_script(job.folder, "search", configs, seconds=60 * job.minutes, started=started)
    lines = [line for config in configs for line in read_lines(Path(config["lines"]))]
    lines.sort(key=lambda line: line["seconds"])
    return ArmRun(
        lines=[line for line in lines if line["seconds"] <= 60 * job.minutes],
        seconds=watched.seconds,
        timed_out=watched.timed_out or len(lines) < job.n_trials,
        error=watched.error,
        floor={},
    )


def describe_config(job: ArmJob) -> dict[str, Any]:
    """Return what the script is told in all its modes."""
    material = job.material
    names = list(material.backbones)
    return {
        "images": str(material.folder),
        "image_size": material.image_size,
        "horizontal_flip": material.horizontal_flip,
        "backbones": material.backbones,
        "space": job.space.with_backbones(names),
        "fixed": job.space.fixed,
        "first_point": {"backbone": names[0], **job.space.first_point},
        "seed": job.seed,
        "epochs": job.epochs,
        "views": job.epochs if job.space.fixed_views == "all arms" else "fresh",
        "view_seed": job.seed,
        "n_trials": job.n_trials,
        "minutes": job.minutes,
        "device": job.device,
        "precision": job.precision,
        "n_threads": job.n_threads,
        "num_workers": job.num_workers,
    }


def start_script(folder: Path, mode: str, configs: list[dict[str, Any]], *, seconds: float, started: float) -> Watched:
    """Run the script in a mode, one process for each config."""
    commands = []
    for rank, config in enumerate(configs):
        path = folder / f"{mode}_{rank}.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        commands.append([str(SCRIPT), str(path), mode])
    threads = {"OMP_NUM_THREADS": str(configs[0]["n_threads"])}
    return watch(commands, environment=threads, seconds=seconds, started=started)


def read_lines(path: Path) -> list[Line]:
    """Return what the script has written; a last half line of a killed process is left out."""
    if not path.is_file():
        return []
    complete = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in complete]


def refit(job: ArmJob, recipes: list[dict[str, Any]]) -> list[float]:
    """Train recipes alone, uncached, with a fresh seed and fresh views, whichever arm found them.

    Returns:
        The validation accuracy of each.

    Raises:
        RuntimeError: If the script fails.
    """
    config = describe_config(job) | {"recipes": recipes, "lines": str(job.folder / "refit.jsonl")}
    config |= {"seed": 7_777_777 + job.seed, "views": "fresh"}
    watched = start_script(job.folder, "train", [config], seconds=_LONG_SECONDS, started=time.time())
    values = [float(line["value"]) for line in read_lines(Path(config["lines"]))]
    if len(values) != len(recipes):
        raise RuntimeError(f"the refit trained {len(values)} of {len(recipes)} recipes: {watched.tail}")
    return values


def probe(job: ArmJob, *, n_processes: int, loaders: list[int], threads: list[int]) -> dict[str, Any]:
    """Find the fastest numbers of threads and loader processes on a space's first recipe.

    Args:
        job: Gives data, space, epochs and device.
        n_processes: Scripts that run side by side, as they will in the arm; of several, each has one thread.
        loaders: Numbers of loader processes to try, with the best number of threads.
        threads: Numbers of threads to try, without loaders.

    Returns:
        ``num_workers``, ``n_threads``, ``device``, and the seconds of all that was tried.

    Raises:
        RuntimeError: If the script fails.
    """
    config = describe_config(job)
    config |= {
        "fixed": {"unfrozen_layers": "all"} | config["fixed"],
        "space": {name: ends for name, ends in config["space"].items() if name != "unfrozen_layers"},
        "recipes": [config["first_point"]],
        "loaders": loaders,
        "threads": threads,
    }
    configs = [config | {"lines": str(job.folder / f"probe_{rank}.jsonl")} for rank in range(n_processes)]
    watched = start_script(job.folder, "probe", configs, seconds=_LONG_SECONDS, started=time.time())
    heard = [read_lines(Path(config["lines"])) for config in configs]
    if any("device" not in lines[-1] for lines in heard if lines) or not all(heard):
        raise RuntimeError(f"the probe of the plain script failed: {watched.tail}")
    *tried, last = heard[0]
    for number, line in enumerate(tried):  # the arm waits for the slowest of its processes
        line["seconds"] = max(lines[number]["seconds"] for lines in heard)
    best = min(tried, key=lambda line: line["seconds"])
    return {"num_workers": best["num_workers"], "n_threads": best["n_threads"], "tried": tried, **last}
