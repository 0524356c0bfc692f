"""tuner: hyperparameter optimisation for transfer learning of image classifiers.

The names below load on first use, so that importing the package loads neither torch nor Optuna.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.errors import TunerError
    from tuner.production.best import best_params
    from tuner.production.export import export_model
    from tuner.production.predictor import load
    from tuner.production.retrain import train_best
    from tuner.service.coordinator import run_study
    from tuner.spec.sections import StudySpec
    from tuner.spec.study import load_spec
    from tuner.trial import TrialOutcome, TrialParams

__all__ = [
    "StudySpec",
    "TrialOutcome",
    "TrialParams",
    "TunerError",
    "best_params",
    "export_model",
    "load",
    "load_spec",
    "run_study",
    "train_best",
]

_HOMES = {
    "StudySpec": "tuner.spec.sections",
    "TrialOutcome": "tuner.trial",
    "TrialParams": "tuner.trial",
    "TunerError": "tuner.errors",
    "best_params": "tuner.production.best",
    "export_model": "tuner.production.export",
    "load": "tuner.production.predictor",
    "load_spec": "tuner.spec.study",
    "run_study": "tuner.service.coordinator",
    "train_best": "tuner.production.retrain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
