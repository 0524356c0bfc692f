"""What share of the bare model step's images a second does an uncached trial reach, with fresh augmentation?

Both arms train the same model on the same resident images with the same optimizer, in this process, on one thread: the
bare step on one constant batch (in its fastest layout, and with tuner's faster layers), and tuner's training loop on
shuffled, augmented batches. Validation is not counted. The goal is 0.90.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Case

if TYPE_CHECKING:
    from tuner.training.loop import TrainingJob

BATCH_SIZE = 32
GOAL = 0.9


@contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread for a block: two on shared cores measure the neighbours."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_job(seed: int, *, smoke: bool) -> "TrainingJob":
    """Return a full fine-tuning of one epoch on resident random images."""
    name, size, n_batches = ("test_resnet", 32, 2) if smoke else ("mobilenetv2_100", 96, 20)
    return make_random_job(name, seed=seed, size=size, n_images=n_batches * BATCH_SIZE, n_val=10)


def make_random_job(
    backbone: str, *, seed: int, size: int, n_images: int, n_val: int, batch_size: int = BATCH_SIZE, **kwargs: Any
) -> "TrainingJob":
    """Return the same for any backbone and sizes.

    Args:
        backbone: A model of timm, with random weights.
        seed: Of weights and images.
        size: Of the images, in px.
        n_images: To train on.
        n_val: To validate on.
        batch_size: Of the recipe.
        **kwargs: For ``timm.create_model``.
    """
    import timm
    import torch

    from tuner.data.image_set import ImageSet
    from tuner.models.backbone import Preprocessing
    from tuner.models.layers import group_layers
    from tuner.training.loop import TrainingJob
    from tuner.trial import TrialParams

    torch.manual_seed(seed)
    model = timm.create_model(backbone, num_classes=10, **kwargs)

    def make_images(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        return ImageSet(pixels=pixels, labels=torch.arange(count) % 10, n_classes=10, rows=torch.arange(count))

    params = TrialParams(
        backbone=backbone,
        lr=1e-3,
        batch_size=batch_size,
        unfrozen_layers=len(group_layers(model)),
        augmentation_strength=0.5,
        optimizer="adamw",
        weight_decay=0.01,
        layer_decay=1.0,
        label_smoothing=0.0,
        dropout=0.0,
        warmup_fraction=0.1,
        momentum=0.9,
        epochs=1,
        horizontal_flip=True,
        class_weights="none",
        seed=seed,
    )
    return TrainingJob(
        model=model,
        params=params,
        train=make_images(n_images),
        val=make_images(n_val),
        preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic"),
        device=torch.device("cpu"),
    )


def run_bare(seed: int, smoke: bool) -> float:
    """Return images a second of forward, loss, backward and optimizer step on one batch."""
    import torch
    from torch.nn import functional

    from tuner.models.layers import group_layers
    from tuner.training.cpu_layers import faster_layers
    from tuner.training.optimizer import build_optimizer

    job = make_job(seed, smoke=smoke)
    with one_thread(), faster_layers(job.model, job.device, "float32"):
        model = job.model.train().to(memory_format=torch.channels_last)
        optimizer = build_optimizer(model, group_layers(model), job.params)
        images = torch.randn(BATCH_SIZE, *job.train.pixels.shape[1:]).to(memory_format=torch.channels_last)
        labels = job.train.labels[:BATCH_SIZE]
        n_steps = len(job.train.labels) // BATCH_SIZE
        started = time.perf_counter()
        for _ in range(n_steps):
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return n_steps * BATCH_SIZE / (time.perf_counter() - started)


def run_trial(seed: int, smoke: bool) -> float:
    """Return images a second of tuner's training loop, as it reports them."""
    from tuner.training.loop import train_epochs

    with one_thread():
        results = [result for result, _ in train_epochs(make_job(seed, smoke=smoke))]
    return results[-1].images_per_second


CASE = Case(
    name="step_overhead",
    question="how many images a second does an uncached trial train, against the bare model step?",
    unit="images/s",
    baseline="bare model step",
    regression=f"less than {GOAL} of the bare step",
    arms={"bare model step": run_bare, "tuner trial": run_trial},
)
