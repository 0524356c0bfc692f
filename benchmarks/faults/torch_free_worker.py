"""A worker that speaks as tuner's own does, starts in a quarter of a second, and trains by a formula.

Its socket, its pulse and its end are those of ``tuner.service.worker``. What a trial shows depends on its recipe alone,
so that a trial which goes on from a checkpoint shows what the interrupted one would have shown.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Never

from benchmarks.faults.worker_log import watch_line
from tuner.paths import replacing
from tuner.service import worker
from tuner.service.messages import (
    DataRead,
    Describe,
    Description,
    EpochDone,
    Hello,
    Note,
    Prepare,
    Prepared,
    Setup,
    Train,
    TrialDone,
    Verdict,
)
from tuner.service.worker import Line
from tuner.spec.sections import StudySpec
from tuner.trial import ClassReport, EpochResult, Reason, TrialOutcome, TrialParams, TrialState

_N_GROUPS = 4
_DATA_HASH = "f" * 64
_MAX_EPOCH_SECONDS = 0.06
_REPORT = ClassReport(confusion_matrix=((1, 0), (0, 1)), precision=(1.0, 1.0), recall=(1.0, 1.0), f1=(1.0, 1.0))
_PRUNED = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER)
_DIVERGED = TrialOutcome(state=TrialState.PRUNED, reason=Reason.DIVERGED, message="the loss became infinite")
_BROKEN = TrialOutcome(state=TrialState.FAIL, reason=Reason.ERROR, message="ValueError: a bug of the user's")


def answer(line: Line) -> Never:
    """Answer the coordinator's requests for ever."""
    setup = line.receive()
    assert isinstance(setup, Setup)
    spec = StudySpec.model_validate_json(setup.spec)
    line.start_pulse(spec.workers.stall_limit)
    if setup.device == "none":
        line.send(DataRead())
    line.send(Hello(cuda_devices=()))
    while True:
        match line.receive():
            case Describe():
                line.send(_describe(spec))
            case Prepare(backbone=backbone):
                line.send(Prepared(backbone=backbone))
            case Train() as request:
                _train(line, request)
            case unexpected:
                raise TypeError(f"unexpected request: {unexpected}")


def _describe(spec: StudySpec) -> Description:
    names = spec.backbone_names()
    return Description(
        classes=("a", "b"),
        split_counts={"train": 1000, "val": 200, "test": 0},
        splits="-",
        data_hash=_DATA_HASH,
        group_counts=dict.fromkeys(names, _N_GROUPS),
        n_params=dict.fromkeys(names, 1000),
        weights=dict.fromkeys(names, "random"),
        fingerprints=dict.fromkeys(names, "random"),
        preprocessing={name: {"mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"} for name in names},
        versions={},
        store_bytes=0,
        free_bytes=10**12,
        seconds_per_image={},
    )


def _train(line: Line, request: Train) -> None:
    """Train a trial, or a cohort epoch by epoch."""
    running = dict(request.members)
    verdict = Verdict()
    n_epochs = request.members[0][1].epochs
    saved = _read_checkpoint(request)
    if saved:
        line.send(Note(text=f"trial {request.members[0][0]} goes on after epoch {len(saved)} of an earlier attempt"))
    for epoch in range(1, n_epochs + 1):
        if not running:
            return
        if epoch > len(saved):
            time.sleep(max(_draw(params, "seconds", epoch) for params in running.values()) * _MAX_EPOCH_SECONDS)
        for number in [number for number, params in running.items() if epoch == 2 and _draw(params, "trouble") < 0.08]:
            outcome = _DIVERGED if _draw(running.pop(number), "trouble") < 0.06 else _BROKEN
            line.send(TrialDone(number=number, outcome=outcome))
        if not running:
            return
        results = tuple((number, make_result(params, epoch)) for number, params in running.items())
        verdict = line.ask_verdict(EpochDone(results=results))
        if request.checkpoint:
            saved = (*saved[: epoch - 1], results[0][1])
            _write_checkpoint(request, saved)
        for number in verdict.stop:
            del running[number]
            line.send(TrialDone(number=number, outcome=_PRUNED))
    for number in running:
        kept = verdict.keep == number and _keep(verdict)
        line.send(TrialDone(number=number, outcome=TrialOutcome(state=TrialState.COMPLETE, report=_REPORT), kept=kept))


def make_result(params: TrialParams, epoch: int) -> EpochResult:
    """Return what an epoch of a recipe shows."""
    value = round(_draw(params, "level") * epoch / params.epochs + 0.01 * _draw(params, "noise", epoch), 6)
    return EpochResult(
        epoch=epoch,
        train_loss=1.0 - value / 2,
        val_loss=1.0 - value / 2,
        val_accuracy=value,
        val_balanced_accuracy=value,
        val_macro_precision=value,
        val_macro_recall=value,
        val_macro_f1=value,
        seconds=0.01,
        images_per_second=1000.0,
    )


def _draw(params: TrialParams, *about: object) -> float:
    """Return a number in [0, 1) that depends on a recipe and on what it is for."""
    text = json.dumps([params.to_json(), *about], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def _read_checkpoint(request: Train) -> tuple[EpochResult, ...]:
    """Return what an earlier attempt at the same recipe has shown."""
    path = Path(request.checkpoint)
    if not request.checkpoint or not path.exists():
        return ()
    params, results = json.loads(path.read_text(encoding="ascii"))
    is_same = params == request.members[0][1].to_json()
    return tuple(EpochResult(**result) for result in results) if is_same else ()


def _write_checkpoint(request: Train, results: Sequence[EpochResult]) -> None:
    with replacing(Path(request.checkpoint)) as temporary:
        held = [request.members[0][1].to_json(), [asdict(result) for result in results]]
        temporary.write_text(json.dumps(held), encoding="ascii")


def _keep(verdict: Verdict) -> bool:
    """Write a model folder as tuner does: aside first."""
    folder = Path(verdict.folder)
    aside = folder.with_name(f".{folder.name}.tmp")
    aside.mkdir(parents=True, exist_ok=True)
    (aside / "model.json").write_text(json.dumps(verdict.provenance), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    aside.rename(folder)
    return True


def main() -> Never:
    """Run a worker that logs what it sends."""
    watch_line()
    worker.main(answer)


if __name__ == "__main__":
    main()
