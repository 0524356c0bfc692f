"""torch's optimizers for many heads at once, each with its own learning rate, momentum and weight decay."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tuner.trial import TrialParams

_BETA2 = 0.999
_EPSILON = 1e-8


class StackedOptimizer:
    """The optimizer of a cohort's heads. Mutable.

    It does what ``build_optimizer`` does for one head: SGD with Nesterov's momentum, Adam or AdamW as torch has them,
    weights decaying and biases not.

    Args:
        params: Of each trial; they share the kind of optimizer.
        weights: Shape ``(n_trials, n_classes, n_features)``. Moved in place.
        biases: Shape ``(n_trials, n_classes, 1)``. Moved in place.
    """

    def __init__(self, params: Sequence[TrialParams], weights: Tensor, biases: Tensor) -> None:
        self._kind = params[0].optimizer
        self._values = [weights, biases]
        n_moments = 1 if self._kind == "sgd" else 2
        self._moments = [[torch.zeros_like(value) for _ in range(n_moments)] for value in self._values]
        # Double: 1 - 0.999 in single precision is off by 5e-5, which torch's Python numbers are not.
        self._momentum = self._stack([one.momentum for one in params])
        self._decay = self._stack([one.weight_decay for one in params])
        self._n_steps = 0

    def _stack(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self._values[0].device)[:, None, None]

    @property
    def weights(self) -> Tensor:
        """As they are now, shape ``(n_trials, n_classes, n_features)``."""
        return self._values[0]

    @property
    def biases(self) -> Tensor:
        """As they are now, shape ``(n_trials, n_classes, 1)``."""
        return self._values[1]

    def keep(self, positions: Tensor) -> None:
        """Go on with some of the trials alone, int64, on the device."""
        self._values = [value.index_select(0, positions) for value in self._values]
        self._moments = [[one.index_select(0, positions) for one in moments] for moments in self._moments]
        self._momentum = self._momentum.index_select(0, positions)
        self._decay = self._decay.index_select(0, positions)

    def take_step(self, weight_gradients: Tensor, bias_gradients: Tensor, rates: Tensor) -> None:
        """Move all heads once.

        Args:
            weight_gradients: As the weights; overwritten.
            bias_gradients: As the biases; overwritten.
            rates: Learning rates of this step, float64, shape ``(n_trials,)``.
        """
        self._n_steps += 1
        move = self._move_by_sgd if self._kind == "sgd" else self._move_by_adam
        gradients = (weight_gradients, bias_gradients)
        for number, (value, gradient, moments) in enumerate(zip(self._values, gradients, self._moments, strict=True)):
            decay = self._decay if number == 0 else None
            move(value, gradient, moments, rates[:, None, None], decay)

    def _move_by_sgd(
        self, value: Tensor, gradient: Tensor, moments: list[Tensor], rates: Tensor, decay: Tensor | None
    ) -> None:
        """As ``torch.optim.SGD``; with momentum 0, Nesterov's step is the plain one."""
        momentum = self._momentum.to(value.dtype)
        if decay is not None:
            gradient.addcmul_(value, decay.to(value.dtype))
        moments[0].mul_(momentum).add_(gradient)
        gradient.addcmul_(moments[0], momentum)
        value.addcmul_(gradient, -rates.to(value.dtype))

    def _move_by_adam(
        self, value: Tensor, gradient: Tensor, moments: list[Tensor], rates: Tensor, decay: Tensor | None
    ) -> None:
        """As ``torch.optim.Adam``, whose decay is part of the gradient, and ``AdamW``, where it shrinks the weights."""
        first, second = moments
        if decay is not None and self._kind == "adamw":
            value.mul_((1 - rates * decay).to(value.dtype))
        elif decay is not None:
            gradient.addcmul_(value, decay.to(value.dtype))
        first.lerp_(gradient, (1 - self._momentum).to(value.dtype))
        second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        correction = (1 - _BETA2**self._n_steps) ** 0.5
        step_sizes = rates / (1 - self._momentum**self._n_steps)
        torch.sqrt(second, out=gradient)
        gradient.div_(correction).add_(_EPSILON)
        value.addcdiv_(first * -step_sizes.to(value.dtype), gradient)
