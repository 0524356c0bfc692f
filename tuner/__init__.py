"""tuner: hyperparameter optimisation for transfer learning of image classifiers.

The names below load on first use, so that importing the package loads neither torch nor Optuna.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.errors import TunerError
    from tuner.production.best import best_params
    from tuner.production.evaluation import evaluate_folder
    from tuner.production.export import export_model
    from tuner.production.predictor import load
    from tuner.production.report import write_report
    from tuner.production.retrain import train_best
    from tuner.production.verifying import verify_folder
    from tuner.service.coordinator import confirm_study, run_study
    from tuner.spec.sections import StudySpec
    from tuner.spec.study import load_spec
    from tuner.trial import TrialOutcome, TrialParams

__all__ = [
    "StudySpec",
    "TrialOutcome",
    "TrialParams",
    "TunerError",
    "best_params",
    "confirm_study",
    "evaluate_folder",
    "export_model",
    "load",
    "load_spec",
    "run_study",
    "train_best",
    "verify_folder",
    "write_report",
]

_HOMES = {
    "StudySpec": "tuner.spec.sections",
    "TrialOutcome": "tuner.trial",
    "TrialParams": "tuner.trial",
    "TunerError": "tuner.errors",
    "best_params": "tuner.production.best",
    "confirm_study": "tuner.service.coordinator",
    "evaluate_folder": "tuner.production.evaluation",
    "export_model": "tuner.production.export",
    "load": "tuner.production.predictor",
    "load_spec": "tuner.spec.study",
    "run_study": "tuner.service.coordinator",
    "train_best": "tuner.production.retrain",
    "verify_folder": "tuner.production.verifying",
    "write_report": "tuner.production.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
