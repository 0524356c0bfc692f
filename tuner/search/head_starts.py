"""Which head a deeper trial starts from: the one of its backbone that did best in the screen."""

from dataclasses import replace

import optuna
from optuna.trial import FrozenTrial

from tuner.search.screening import rank_backbones
from tuner.search.trial_attrs import PARAMS_ATTR
from tuner.spec.sections import StudySpec
from tuner.trial import HeadStart, TrialParams

_HEAD_ALONE = 1


class HeadStarts:
    """Adds heads' recipes to those of trials. Mutable: it remembers what the screen has shown once that is over."""

    def __init__(self, study: optuna.Study, spec: StudySpec) -> None:
        self._study, self._spec = study, spec
        self._best: dict[str, HeadStart] | None = None

    def add(self, params: TrialParams, *, first_attempt: FrozenTrial | None, is_screening: bool) -> TrialParams:
        """Return a proposed trial's recipe with what its head is to start from, if it is to.

        Args:
            params: Resolved, without a head start.
            first_attempt: At the same trial, whose head this attempt has; None: this is the first.
            is_screening: Whether the screen goes on: what is proposed before its end knows nothing of it.
        """
        if self._spec.training.head_start == "none" or params.unfrozen_layers == _HEAD_ALONE:
            return params
        if first_attempt is not None:
            stored = TrialParams.from_json(first_attempt.user_attrs[PARAMS_ATTR])
            return replace(params, head_start=stored.head_start)
        return params if is_screening else replace(params, head_start=self._list_best().get(params.backbone))

    def _list_best(self) -> dict[str, HeadStart]:
        if self._best is None:
            ranked = rank_backbones(self._study.get_trials(deepcopy=False), self._study.direction)
            recipes = {name: TrialParams.from_json(trial.user_attrs[PARAMS_ATTR]) for name, trial in ranked.items()}
            self._best = {name: HeadStart.take_from(recipe) for name, recipe in recipes.items()}
        return self._best
