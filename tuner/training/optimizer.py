"""The optimizer of a trial: which weights it moves, how fast, and which of them decay."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tuner.trial import TrialParams


def build_optimizer(model: nn.Module, groups: Sequence[Sequence[str]], params: TrialParams) -> Optimizer:
    """Return the optimizer of the parameters that train.

    Args:
        model: Frozen as the trial asks; parameters without ``requires_grad`` are left out.
        groups: Parameter names per layer group, the head first (``tuner.models.layers.group_layers``).
        params: The recipe.

    Returns:
        With one param group for each layer group and for decay or not.

    Raises:
        ValueError: If a parameter that trains is in no layer group, or if none trains.
    """
    tables = group_parameters(model, groups, params)
    # One kernel for all weights, on CUDA and on CPU: a step of a small net on a CPU takes a quarter of the loop's time.
    match params.optimizer:
        case "sgd":
            return SGD(tables, lr=params.lr, momentum=params.momentum, nesterov=params.momentum > 0, fused=True)
        case "adam":
            return Adam(tables, lr=params.lr, betas=(params.momentum, 0.999), fused=True)
        case "adamw":
            return AdamW(tables, lr=params.lr, betas=(params.momentum, 0.999), fused=True)
        case name:
            raise ValueError(f"optimizer: must be adamw, adam or sgd, got {name!r}")


def group_parameters(model: nn.Module, groups: Sequence[Sequence[str]], params: TrialParams) -> list[dict[str, Any]]:
    """Return torch's param groups: ``lr`` falls by ``layer_decay`` per layer group away from the head.

    Biases, norms and other parameters of at most one dimension never decay, as in timm's
    ``timm.optim.param_groups_layer_decay``, which this follows (layer decay: Clark et al. 2020, ELECTRA).
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tables = []
    for depth, names in enumerate(groups):
        trained = [parameters.pop(name) for name in names if name in parameters]
        lr = params.lr * params.layer_decay**depth
        for decays in (True, False):
            chosen = [parameter for parameter in trained if (parameter.ndim > 1) is decays]
            if chosen:
                tables.append({"params": chosen, "lr": lr, "weight_decay": params.weight_decay if decays else 0.0})
    if parameters or not tables:
        raise ValueError(f"groups: must hold every parameter that trains, and one at least, got {sorted(parameters)}")
    return tables
