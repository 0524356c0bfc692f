"""Which weights an optimizer moves, and how fast."""

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from tuner.models.layers import freeze_layers, group_layers
from tuner.training.optimizer import build_optimizer, group_parameters

from .builders import TinyNet, make_net, make_params


def group_tiny_net(**overrides: Any) -> tuple[TinyNet, list[dict[str, Any]]]:
    """Return a net and its param groups."""
    net, params = make_net(), make_params(**overrides)
    freeze_layers(net, params.unfrozen_layers)
    return net, group_parameters(net, group_layers(net), params)


def test_group_parameters_gives_the_head_the_full_lr_and_decays_from_there() -> None:
    """Group k from the head trains at lr * layer_decay**k, the head at lr."""
    net, tables = group_tiny_net(lr=1.0, layer_decay=0.5)
    lrs = {id(parameter): table["lr"] for table in tables for parameter in table["params"]}
    assert (lrs[id(net.fc.weight)], lrs[id(net.fc.bias)]) == (1.0, 1.0)
    assert lrs[id(net.middle[0].weight)] == 0.5
    assert lrs[id(net.stem[0].weight)] == 0.25


def test_group_parameters_never_decays_biases_and_norms() -> None:
    """Weights of convolutions and linear layers decay, all others do not."""
    net, tables = group_tiny_net(weight_decay=0.3)
    decays = {id(parameter): table["weight_decay"] for table in tables for parameter in table["params"]}
    for name, parameter in net.named_parameters():
        assert decays[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0), name


def test_group_parameters_leaves_frozen_parameters_out() -> None:
    """With one unfrozen layer only the classifier is there."""
    net, tables = group_tiny_net(unfrozen_layers=1)
    assert {id(p) for table in tables for p in table["params"]} == {id(net.fc.weight), id(net.fc.bias)}


def test_group_parameters_refuses_to_forget_a_parameter() -> None:
    """A parameter that trains but is in no group would silently stay as it is."""
    with pytest.raises(ValueError, match=r"^groups: must hold every parameter that trains.*fc\.bias"):
        group_parameters(make_net(), [["fc.weight"]], make_params())


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("adam", Adam), ("sgd", SGD)])
def test_build_optimizer_makes_what_was_asked(name: str, kind: type) -> None:
    """Each name of the space is an optimizer of torch, with the trial's momentum."""
    net = make_net()
    optimizer = build_optimizer(net, group_layers(net), make_params(optimizer=name, momentum=0.8))
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["nesterov"] and group["momentum"] == 0.8 if name == "sgd" else group["betas"] == (0.8, 0.999)


def test_build_optimizer_sgd_without_momentum_is_plain() -> None:
    """Torch refuses Nesterov without momentum; 0 lies in the space."""
    net = make_net()
    optimizer = build_optimizer(net, group_layers(net), make_params(optimizer="sgd", momentum=0.0))
    assert not optimizer.param_groups[0]["nesterov"]


def test_build_optimizer_refuses_an_unknown_name() -> None:
    """The spec checks names; a name that passed it unknown is a bug."""
    net = make_net()
    with pytest.raises(ValueError, match=r"^optimizer: must be adamw, adam or sgd, got 'lion'$"):
        build_optimizer(net, group_layers(net), make_params(optimizer="lion"))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_build_optimizer_steps_like_torchs_plain_loop(name: str) -> None:
    """The fused kernels compute what the unfused ones do."""
    nets = [make_net(), make_net()]
    plain = {"adamw": AdamW, "adam": Adam, "sgd": SGD}[name]
    params = make_params(optimizer=name, weight_decay=0.1)
    momentum = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {"betas": (0.9, 0.999)}
    optimizers = [
        build_optimizer(nets[0], group_layers(nets[0]), params),
        plain(group_parameters(nets[1], group_layers(nets[1]), params), lr=params.lr, fused=False, **momentum),
    ]
    for _ in range(3):
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
