"""The heads that deeper trials start from: trained on features, once for all trials of a worker that share one."""

from torch import Tensor

from tuner.errors import first_line
from tuner.service.feature_banks import FeatureBanks
from tuner.service.outcomes import comes_from_lost_device
from tuner.service.workbench import Workbench
from tuner.training.cohort import CohortJob, train_cohort
from tuner.training.device import release_memory
from tuner.training.epoch_numbers import Diverged
from tuner.training.head_features import NotCacheable, put_head
from tuner.training.head_start import train_head
from tuner.training.loop import TrainingJob
from tuner.training.prepare import keeps_head, start_heads
from tuner.trial import TrialParams

_MAX_KEPT = 64
"""Heads in memory; a study has one for each backbone, unless its screen was enlarged."""

Trained = tuple[Tensor, Tensor]
"""Weight ``(n_classes, n_features)`` and bias ``(n_classes,)``, on the CPU."""


class HeadStarts:
    """Gives models the heads that their recipes start from. Mutable: it keeps the heads that it has trained."""

    def __init__(self, bench: Workbench, banks: FeatureBanks) -> None:
        self._bench, self._banks = bench, banks
        self._heads: dict[TrialParams, Trained] = {}
        self._uncached: set[str] = set()

    def give(self, job: TrainingJob) -> None:
        """Put the head that a job's recipe starts from into its model: trained on features, or else on images.

        Args:
            job: Of the study's own train and val; its model is as it was made.

        Raises:
            Diverged: If the head's loss is not finite.
        """
        recipe = job.params.head_recipe
        if recipe is None:
            return
        head = None if recipe.backbone in self._uncached else self._find_head(recipe)
        if head is None:
            self.train_on_images(job)
        else:
            put_head(job.model, *head)

    def train_on_images(self, job: TrainingJob) -> None:
        """Train the head that a job's recipe starts from on the job's own images, as production does.

        Raises:
            Diverged: If the head's loss is not finite.
        """
        train_head(job, keep_head=keeps_head(self._bench.spec, job.params.backbone))

    def _find_head(self, recipe: TrialParams) -> Trained | None:
        """Return the trained head of a recipe; None if it cannot be trained on features."""
        if recipe in self._heads:
            return self._heads[recipe]
        head, reason = None, ""
        try:
            head = self._train(recipe)
        except Diverged:
            raise
        except Exception as error:  # as for cohorts: images tell whose fault it is
            if comes_from_lost_device(error):
                raise
            reason = first_line(error)
        if head is None:
            self._uncached.add(recipe.backbone)
            self._bench.note(f"{recipe.backbone}: the heads that its trials start from train on images: {reason}")
        else:
            if len(self._heads) >= _MAX_KEPT:
                del self._heads[next(iter(self._heads))]
            self._heads[recipe] = head
        if head is None or self._bench.device.type == "cuda":
            self._banks.release_memory()  # the whole model, which trains next, needs the memory more
            release_memory(self._bench.device)
        return head

    def _train(self, recipe: TrialParams) -> Trained:
        if not recipe.shows_known_images:
            raise NotCacheable("every epoch augments its images anew")
        for epoch in train_cohort(self._make_job(recipe)):
            result = epoch.results[0]
            if isinstance(result, Diverged):
                raise result
        weight, bias = epoch.heads[0]
        return weight.to("cpu", copy=True), bias.to("cpu", copy=True)

    def _make_job(self, recipe: TrialParams) -> CohortJob:
        """Return a cohort of one."""
        body = self._banks.find_body(recipe)
        train, val = self._bench.load_images(self._bench.preprocess(recipe.backbone).interpolation)
        kept = keeps_head(self._bench.spec, recipe.backbone)
        weights, biases = start_heads(body.head, [recipe.seed], keep_head=kept)
        return CohortJob(
            params=(recipe,),
            features=lambda epoch: self._banks.open_train(recipe, epoch)[1],
            labels=train.labels,
            val_features=self._banks.open_val(recipe)[1],
            val_labels=val.labels,
            n_classes=train.n_classes,
            weights=weights,
            biases=biases,
            device=self._bench.device,
        )
