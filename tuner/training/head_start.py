"""Train the head of a deeper trial alone before all else: linear probing, then fine-tuning.

Kumar et al., "Fine-tuning can distort pretrained features and underperform out-of-distribution", ICLR 2022
(arXiv 2202.10054): under a new head the first gradients are large and move what the backbone has learnt.
"""

from collections.abc import Callable
from dataclasses import replace

from tuner.training.loop import TrainingJob, train_only
from tuner.training.prepare import draw_head


def train_head(
    job: TrainingJob, *, keep_head: bool = False, on_epoch: Callable[[int, float], None] | None = None
) -> None:
    """Train the head that a job's recipe starts from, on the job's training images, and leave it in the job's model.

    Nothing below the head moves. What the job trains afterwards is drawn as it would be without. Nothing is done for a
    recipe that starts from the head as it is drawn.

    Args:
        job: Its model is as it was made.
        keep_head: Whether the head starts from what the model holds, the one of a weights file, and is not drawn.
        on_epoch: Told each epoch, from 1, and its mean training loss.

    Raises:
        Diverged: If a training loss is not finite.
    """
    recipe = job.params.head_recipe
    if recipe is None:
        return
    if not keep_head:
        draw_head(job.model, recipe.seed)
    # Maps are of other layers and views. Where the trial is taken in parts, so is its head, which gives the same.
    micro_batch = None if job.micro_batch is None else min(job.micro_batch, recipe.batch_size)
    train_only(replace(job, params=recipe, cached=None, graphs=None, micro_batch=micro_batch), on_epoch)
