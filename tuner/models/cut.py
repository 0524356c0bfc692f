"""A traced forward pass, cut where its trained part begins, by what depends on parameters that train."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tuner.models.crossing import Crossing
from tuner.models.tracing import NotSeparable, trace, write_part

_N_TRIED = (2, 3)
"""Two numbers of images: what differs between them is one per image, what does not is a constant."""


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """What the prefix hands to the suffix, by the operation that makes it."""

    tensors: dict[fx.Node, Crossing]
    """One row for each image."""
    constants: dict[fx.Node, tuple[Any, Any]]
    """What is no tensor, as it was for two and for three images."""


class Cut:
    """A traced forward pass with its cut."""

    def __init__(self, model: nn.Module, *, trains: bool) -> None:
        """Trace a model and find what trains of it.

        Args:
            model: Frozen by ``freeze_layers``. Its mode changes.
            trains: Whether the pass is one of training or of validation.

        Raises:
            NotSeparable: If it cannot be traced.
        """
        model.train()
        self._in_train = {name for name, module in model.named_modules() if module.training}
        """Modules that are in train mode when the model is."""
        model.train(trains)
        self._model, self._nodes = model, list(trace(model).nodes)
        self._upper: set[fx.Node] = set()
        """What depends on trained parameters, and the output."""
        self._shown: set[fx.Node] = set()
        """What depends on the images."""
        for node in self._nodes:
            inputs = node.all_input_nodes
            if node.op == "output" or self._trains(node) or any(each in self._upper for each in inputs):
                self._upper.add(node)
            if node.op == "placeholder" or any(each in self._shown for each in inputs):
                self._shown.add(node)

    def _trains(self, node: fx.Node) -> bool:
        match node.op:
            case "call_module":
                name = str(node.target)
                module = self._model.get_submodule(name)
                inside = (f"{name}.{inner}" if inner else name for inner, _ in module.named_modules())
                is_trained = any(parameter.requires_grad for parameter in module.parameters())
                return is_trained or any(each in self._in_train for each in inside)
            case "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                value = getattr(self._model.get_submodule(owner), name)
                return isinstance(value, Tensor) and value.requires_grad
            case _:
                return False

    @property
    def operations(self) -> frozenset[str]:
        """Names of the operations of the prefix; they are the same for every cut of one model in one mode."""
        return frozenset(node.name for node in self._nodes if node not in self._upper)

    def find_crossings(self, images: Tensor) -> Crossings:
        """Return what crosses the cut, as some images show.

        Args:
            images: Three at least, as the model takes them, on its device.

        Raises:
            NotSeparable: If nothing is frozen, or what crosses is not one tensor of fixed shape for each image.
        """
        handed = [
            node
            for node in self._nodes
            if node in self._shown - self._upper and any(user in self._upper for user in node.users)
        ]
        seen = [self._show(handed, images[:n_images]) for n_images in _N_TRIED]
        found = Crossings(tensors={}, constants={})
        for node, few, more in zip(handed, *seen, strict=True):
            if isinstance(few, Tensor):
                found.tensors[node] = self._describe(node, few, more)
            else:
                found.constants[node] = few, more
        if not found.tensors:
            raise NotSeparable("nothing of it is frozen")
        return found

    def _show(self, handed: list[fx.Node], images: Tensor) -> tuple[Any, ...]:
        """Return the values of nodes of the prefix for images."""
        part = write_part(self._model, self.copy_prefix(handed))
        with torch.no_grad():
            values: tuple[Any, ...] = part(self._model, images)
        return values

    def _describe(self, node: fx.Node, few: Tensor, more: Any) -> Crossing:
        if node.op == "placeholder":
            raise NotSeparable("nothing of it is frozen")
        expected = [(n_images, *few.shape[1:]) for n_images in _N_TRIED]
        if not few.is_floating_point() or [tuple(few.shape), tuple(more.shape)] != expected:
            raise NotSeparable(f"'{node.name}', which crosses its cut, is not one tensor of numbers for each image")
        is_map = few.ndim == 4 and min(few.shape[1:]) > 1
        has_channels_last = is_map and few.is_contiguous(memory_format=torch.channels_last)
        return Crossing(shape=tuple(few.shape[1:]), dtype=few.dtype, has_channels_last=has_channels_last)

    def copy_prefix(self, handed: list[fx.Node]) -> fx.Graph:
        """Return the prefix as a graph of its own, from images to the tuple of some of its results."""
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in self._nodes:
            if node.op == "placeholder" or node not in self._upper:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in handed))
        return graph

    def copy_suffix(self, crossings: Crossings) -> fx.Graph:
        """Return the suffix as a graph of its own, from the crossing tensors to the model's output."""
        return self._copy_upper(crossings, lambda _: True)[0]

    def copy_between(self, crossings: Crossings, operations: frozenset[str], ends: tuple[str, ...]) -> fx.Graph:
        """Return what a later cut's prefix computes beyond this one's, from this cut's crossing tensors to its own.

        Args:
            crossings: Of this cut.
            operations: Of the later cut's prefix.
            ends: Names of those whose results cross the later cut.

        Raises:
            NotSeparable: If the other cut is not a later one of the same model.
        """
        graph, copies = self._copy_upper(crossings, lambda node: node.name in operations)
        by_name = {node.name: copy for node, copy in copies.items()}
        if missing := [name for name in ends if name not in by_name]:
            raise NotSeparable(f"'{missing[0]}' does not follow from what crosses an earlier cut")
        graph.output(tuple(by_name[name] for name in ends))
        return graph

    def _copy_upper(
        self, crossings: Crossings, keeps: Callable[[fx.Node], bool]
    ) -> tuple[fx.Graph, dict[fx.Node, Any]]:
        """Return some of the suffix as a graph without an output of its own, and the copies of its nodes."""
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {node: graph.placeholder(f"map_{node.name}") for node in crossings.tensors}
        n_images = graph.call_method("size", (next(iter(copies.values())), 0))
        for node, (few, more) in crossings.constants.items():
            copies[node] = _generalise(few, more, n_images, node.name)
        needed = self._list_tables()
        for node in self._nodes:
            if (node in self._upper or node in needed) and keeps(node):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return graph, copies

    def _list_tables(self) -> set[fx.Node]:
        """Return what the suffix needs of what depends on no image: it is computed on both sides of the cut."""
        needed: set[fx.Node] = set()
        for node in reversed(self._nodes):
            if any(user in self._upper or user in needed for user in node.users):
                needed |= {node} - self._shown - self._upper
        return needed


def _generalise(few: Any, more: Any, n_images: fx.Node, name: str) -> Any:
    """Return a value that is no tensor, with the number of images where it holds that.

    Args:
        few: The value for two images.
        more: The value for three.
        n_images: The suffix's own number of images.
        name: Of the node, for the message.
    """
    if isinstance(few, tuple | list) and isinstance(more, tuple | list) and len(few) == len(more):
        parts = [_generalise(one, other, n_images, name) for one, other in zip(few, more, strict=True)]
        return parts if isinstance(few, list) else tuple(parts)  # a torch.Size becomes a tuple
    if few == more:
        return few
    if (few, more) == _N_TRIED:
        return n_images
    raise NotSeparable(f"'{name}', which crosses its cut, depends on the number of images")
