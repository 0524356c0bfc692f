"""The gradients of a trial's batches: of whole ones, or added up from parts where memory is short."""

import torch
from torch import Tensor
from torch.nn import functional

from tuner.training.batches import Rows, find_dtype, gather_rows
from tuner.training.device import autocast
from tuner.training.inputs import Inputs, Source
from tuner.training.step_forward import StepForward
from tuner.training.step_graphs import Step, StepGraphs


class Gradients:
    """Makes the gradients of a trial's model, batch by batch. Mutable: the first batch says which size is usual."""

    def __init__(
        self,
        source: Source,
        inputs: Inputs,
        forward: StepForward,
        *,
        class_weights: Tensor | None,
        micro_batch: int | None,
        graphs: StepGraphs | None,
        n_steps: int,
    ) -> None:
        """Take what a step is made of.

        Args:
            source: The trial, its model and its training images.
            inputs: What the model is fed.
            forward: From that to logits.
            class_weights: Of the loss, on the device; None weighs all images alike.
            micro_batch: Images at a time; None takes a batch at once.
            graphs: Records the steps of whole batches; None launches each kernel.
            n_steps: Of the trial.
        """
        self._source, self._inputs, self._forward = source, inputs, forward
        self._class_weights, self._micro_batch = class_weights, micro_batch
        self._dtype = find_dtype(source.model)
        self._trained = [parameter for parameter in source.model.parameters() if parameter.requires_grad]
        self._graphs, self._n_steps = graphs, n_steps
        self._usual: tuple[torch.Size, torch.dtype] | None = None
        self._recorded: Step | None = None

    def make(self, rows: Rows) -> Tensor:
        """Put a batch's gradients in place of those before; return its mean loss, on the device."""
        for parameter in self._trained:  # first: what is taken may need the memory
            parameter.grad = None
        draws = self._inputs.draw(rows)  # for the whole batch, also where it is taken in parts
        labels = gather_rows(self._source.train.labels, rows.here, self._source.device)
        if self._micro_batch is None or self._micro_batch >= len(rows):
            inputs = self._inputs.take(rows, draws)
            return self._find_step(inputs, labels)(inputs, labels)
        return self._add_parts(rows, draws, labels, self._micro_batch)

    def _find_step(self, inputs: Tensor, labels: Tensor) -> Step:
        """Return the step of a whole batch: the recorded one, if there is one for such inputs."""
        source = self._source
        usual = inputs.shape, inputs.dtype  # maps that are kept may be of another type than those that are not
        if self._usual is None:
            self._usual = usual
            if self._graphs is not None:
                self._recorded = self._graphs.find(
                    source.model, self._make_whole, inputs, labels, source.params, n_steps=self._n_steps
                )
        return self._make_whole if self._recorded is None or usual != self._usual else self._recorded

    def _make_whole(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = self._compute_loss(inputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _add_parts(self, rows: Rows, draws: Tensor | None, labels: Tensor, n_images: int) -> Tensor:
        """Add up the gradients of parts: the loss is a mean, weighted by classes, so a part counts by its weights."""
        weights = torch.ones(len(rows), device=self._source.device, dtype=self._dtype)
        if self._class_weights is not None:
            weights = self._class_weights[labels]
        total = torch.zeros((), device=self._source.device, dtype=self._dtype)
        for start in range(0, len(rows), n_images):
            part = slice(start, start + n_images)
            inputs = self._inputs.take(rows.cut(start, n_images), None if draws is None else draws[part])
            loss = self._compute_loss(inputs, labels[part]) * (weights[part].sum() / weights.sum())
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _compute_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        params = self._source.params
        with autocast(self._source.device, params.precision):
            logits = self._forward(inputs)
        return functional.cross_entropy(
            logits.to(self._dtype), labels, weight=self._class_weights, label_smoothing=params.label_smoothing
        )
