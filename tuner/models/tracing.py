"""Trace a model's forward pass with ``torch.fx``, as timm's own tools do, and run parts of what was traced."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn

from tuner.models.backbone import find_classifiers, first_line


class NotSeparable(Exception):  # noqa: N818 - a property of a model, no mistake of anyone
    """A model has no prefix that can be computed apart; the text says why in one line."""


Part = Callable[..., Any]
"""A traced graph as a function of a model and its inputs. It looks all weights and modules up in the model."""


def write_part(model: nn.Module, graph: fx.Graph) -> Part:
    """Return a graph as a function, which outlives the model that it was traced from."""
    part: Part = type(fx.GraphModule(model, graph)).forward
    return part


@contextmanager
def keeping_state(model: nn.Module) -> Iterator[None]:
    """Put a model's mode and buffers back after a block."""
    was_training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


class _Tracer(fx.Tracer):
    """Traces through a model, but for what timm says cannot be traced, and for its classifiers, which have hooks."""

    proxy_buffer_attributes = True  # else what a forward makes of a buffer is computed here, and becomes a constant

    def __init__(self, model: nn.Module) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))  # type: ignore[no-untyped-call]
        self._leaf_types = tuple(get_notrace_modules())  # type: ignore[no-untyped-call]
        self._leaves = {id(model.get_submodule(name)) for name in find_classifiers(model)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_ours = isinstance(m, self._leaf_types) or id(m) in self._leaves
        return is_ours or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """Trace a copy of a model: some (levit) keep what they compute, which here are stand-ins for tensors."""
    try:
        twin = copy.deepcopy(model)
        graph = _Tracer(twin).trace(twin)
    except Exception as error:  # a user's forward may raise anything when it is called with stand-ins
        raise NotSeparable(f"its forward pass cannot be traced ({first_line(error)})") from error
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        # Perhaps of parameters that train: it would stay what it was before the first step.
        raise NotSeparable("its forward pass makes a tensor that does not follow from its images")
    return graph
