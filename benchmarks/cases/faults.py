"""Does a search lose, repeat or damage anything when its processes are killed, stopped, and its disk fails?

Real studies run: a coordinator on SQLite with two workers. A seeded schedule strikes them with SIGKILL, SIGSTOP,
SIGTERM, locks, full disks and damaged files; after each death the same command is run again. Between runs, and at the
end, an audit that shares no code with the coordinator compares the database with logs that the workers wrote before
each send. Forged databases, such as one in which an end was never told, show that it would see a loss.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.audit import KINDS
from benchmarks.faults.forge import FORGERIES
from benchmarks.faults.strike import Outcome, strike_study
from benchmarks.faults.studies import REAL, TORCH_FREE, Trainer, make_place
from benchmarks.harness import Case

N_KILLS = 950
N_REAL_KILLS = 50
_SMOKE_KILLS = 2
_SMOKE_TRIALS = 12
_FINDINGS = (*KINDS, "used damaged cache", "left process", "wrong end", "never resumed")


def strike_one(number: int, trainer: Trainer, *, seed: int, n_trials: int, n_kills: int, root: Path) -> Outcome:
    """Strike one study; keep its folder only if something is found.

    Args:
        number: Of the study.
        trainer: Who trains.
        seed: Of everything, with the number.
        n_trials: Of the study.
        n_kills: After these it is left alone.
        root: Where its folder is made.
    """
    source = random.Random(f"{trainer.name} {seed} {number}")
    folder = root / f"{trainer.name.replace(' ', '-')}-{seed}-{number}"
    place = make_place(folder, trainer, source, n_trials=n_trials)
    outcome = strike_study(place, source, n_trials=n_trials, max_kills=n_kills, slowness=trainer.slowness)
    if outcome.findings:
        print(f"kept for a look: {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def strike_until(trainer: Trainer, *, seed: int, n_kills: int, n_trials: int, n_study_kills: int) -> Outcome:
    """Strike studies, some side by side, until they have taken enough kills."""
    total, number, begun = Outcome(), 0, time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="faults_"))
    strike = partial(strike_one, trainer=trainer, seed=seed, n_trials=n_trials, n_kills=n_study_kills, root=root)
    with ThreadPoolExecutor(trainer.n_side_by_side) as threads:
        running: set[Future[Outcome]] = set()
        while total.n_kills < n_kills or running:
            expected = total.n_kills + len(running) * n_study_kills
            while len(running) < trainer.n_side_by_side and expected < n_kills:
                running.add(threads.submit(strike, number))
                number, expected = number + 1, expected + n_study_kills
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                total.add(future.result())
            print(f"{trainer.name}: {total.n_kills} of {n_kills} kills, {_count(total)}", flush=True)
    if not total.findings:
        shutil.rmtree(root, ignore_errors=True)
    total.seconds = time.monotonic() - begun
    if trainer.must_resume and total.n_resumed == 0:
        total.kinds["never resumed"] += 1
        total.findings.append(f"{trainer.name}: never resumed: no trial of {total.n_studies} studies went on")
    return total


def _count(outcome: Outcome) -> str:
    found = ", ".join(f"{kind} {outcome.kinds[kind]}" for kind in _FINDINGS)
    return f"{outcome.n_studies} studies, {outcome.n_runs} runs, {outcome.n_trials} trials; {found}"


def run_faults(
    outcomes: dict[str, Outcome], seed: int, smoke: bool, *, trainer: Trainer, n_kills: int, first_seed: int
) -> float:
    """Return how many kills a trainer's studies took.

    Raises:
        RuntimeError: In smoke mode, if the audit found something.
    """
    if smoke:
        outcome = strike_until(trainer, seed=first_seed, n_kills=1, n_trials=_SMOKE_TRIALS, n_study_kills=_SMOKE_KILLS)
    else:
        outcome = strike_until(
            trainer,
            seed=first_seed + seed,
            n_kills=n_kills,
            n_trials=trainer.n_trials,
            n_study_kills=min(n_kills, trainer.n_kills),
        )
    outcomes.setdefault(trainer.name, Outcome()).add(outcome)
    if smoke and outcome.findings:
        raise RuntimeError(f"the audit found {outcome.findings}")
    return float(outcome.n_kills)


def describe_outcomes(outcomes: dict[str, Outcome], _: Mapping[str, Iterable[float]], __: bool) -> dict[str, Any]:
    """Return what was found by kind, and what the audit said of forged databases."""
    return {
        name: {
            "kills": outcome.n_kills,
            "minutes": round(outcome.seconds / 60, 1),
            "kills per minute": round(60 * outcome.n_kills / outcome.seconds, 1),
            "faults": dict(sorted(outcome.struck.items())),
            "studies": outcome.n_studies,
            "runs": outcome.n_runs,
            "trials": outcome.n_trials,
            "trials that went on from a checkpoint": outcome.n_resumed,
            "runs that gave up after too many losses": outcome.n_given_up,
            "killed runs started again with nothing left to run": outcome.n_tidied,
            "ends that a torn WAL took back": outcome.n_undone,
            **{kind: outcome.kinds[kind] for kind in _FINDINGS},
            "findings": outcome.findings,
            "studies in which a forged database was seen": {name: outcome.seen[name] for name in FORGERIES},
        }
        for name, outcome in outcomes.items()
    }


def make_case(*, n_kills: int = N_KILLS, n_real_kills: int = N_REAL_KILLS, seed: int = 0) -> Case:
    """Return the case, with outcomes of its own."""
    outcomes: dict[str, Outcome] = {}
    arms = {
        trainer.name: partial(run_faults, outcomes, trainer=trainer, n_kills=count, first_seed=seed)
        for trainer, count in ((TORCH_FREE, n_kills), (REAL, n_real_kills))
        if count > 0
    }
    return Case(
        name="faults",
        question=(__doc__ or "").splitlines()[0],
        unit="kills survived",
        baseline=next(iter(arms)),
        smoke_arms=tuple(arms)[:1],
        regression="the audit finds anything",
        arms=arms,
        n_repeats=1,
        warms_up=False,
        conclude=partial(describe_outcomes, outcomes),
    )


CASE = make_case()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this case to the command line."""
    options = parser.add_argument_group(CASE.name)
    options.add_argument("--kills", type=int, default=N_KILLS, metavar="N", help="without torch")
    options.add_argument(
        "--real-kills", type=int, default=N_REAL_KILLS, metavar="N", help="with real training; 0: none"
    )
    options.add_argument("--seed", type=int, default=0, metavar="N", help="of the first round")


def read_options(options: argparse.Namespace) -> Case:
    """Return the case that a command line asks for."""
    return make_case(n_kills=options.kills, n_real_kills=options.real_kills, seed=options.seed)
