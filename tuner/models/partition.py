"""Cut a model where its trained part begins: prefix | suffix, by what depends on parameters that train.

The model's forward pass is traced by ``torch.fx`` with timm's own leaf modules and functions. Everything that depends
on a trained parameter, or on a module that is in train mode when the model is, belongs to the suffix; the rest is the
prefix. A trace fixes the mode, so the suffix is traced in both; the prefix is always in eval mode.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from tuner.models.backbone import find_classifiers, first_line
from tuner.models.crossing import Crossing, pack_maps, unpack_maps

_N_TRIED = (2, 3)
"""Two numbers of images: what differs between them is one per image, what does not is a constant."""


class NotSeparable(Exception):  # noqa: N818 - a property of a model, no mistake of anyone
    """A model has no prefix that can be computed apart; the text says why in one line."""


Part = Callable[..., Any]
"""A traced graph as a function of a model and its inputs. It looks all weights and modules up in the model."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The two parts of all models that are built and frozen alike; ``bind_…`` joins them with a model's own weights."""

    crossings: tuple[Crossing, ...]
    prefix: Part
    """From images, shape ``(n, 3, height, width)``, to the tuple of crossing tensors."""
    suffix_in_eval: Part
    """From the crossing tensors to logits."""
    suffix_in_train: Part
    code_hash: str
    """Identity of what the prefix computes, but for its weights."""
    prefix_names: frozenset[str]
    """Of the modules and tensors that the prefix uses."""

    @property
    def width(self) -> int:
        """Numbers per image that cross the cut."""
        return sum(crossing.width for crossing in self.crossings)

    def bind_prefix(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the prefix of a model: from images to what ``pack_maps`` makes of the crossing tensors."""

        def compute(images: Tensor) -> Tensor:
            return pack_maps(self.prefix(model, images), self.crossings)

        return compute

    def bind_suffix(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the suffix of a model: from packed maps to logits, in the mode that the model is in."""

        def compute(maps: Tensor) -> Tensor:
            part = self.suffix_in_train if model.training else self.suffix_in_eval
            logits: Tensor = part(model, *unpack_maps(maps, self.crossings))
            return logits

        return compute

    def list_prefix_tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of a model that the prefix computes with, buffers included."""
        state = model.state_dict(keep_vars=True) | dict(model.named_buffers())
        for name, tensor in state.items():
            parts = name.split(".")
            if any(".".join(parts[:length]) in self.prefix_names for length in range(1, len(parts) + 1)):
                yield name, tensor


def _write_part(model: nn.Module, graph: fx.Graph) -> Part:
    """Return a graph as a function, which outlives the model that it was traced from."""
    part: Part = type(fx.GraphModule(model, graph)).forward
    return part


def partition_model(model: nn.Module, images: Tensor) -> Partition:
    """Cut a model below the first layer that trains.

    Args:
        model: Frozen by ``freeze_layers``, on the device. Its mode and its buffers are put back.
        images: Three at least, as the model takes them, on the device.

    Raises:
        NotSeparable: If its forward pass cannot be traced, if nothing is frozen, or if what crosses the cut is not one
            tensor of fixed shape for each image.
    """
    with _keeping_state(model):
        graphs = {}
        for mode in ("train", "eval"):
            model.train()
            in_train = {name for name, module in model.named_modules() if module.training}
            model.train(mode == "train")
            graphs[mode] = _Cut(model, _trace(model), in_train)
        try:
            crossings, prefix, suffix_in_eval = graphs["eval"].split(images)
            crossings_in_train, _, suffix_in_train = graphs["train"].split(images)
        except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise NotSeparable(f"its traced forward pass does not run ({first_line(error)})") from error
    if crossings != crossings_in_train:
        raise NotSeparable("what crosses its cut is not the same in train and in eval mode")
    return Partition(
        crossings=crossings,
        prefix=_write_part(model, prefix),
        suffix_in_eval=_write_part(model, suffix_in_eval),
        suffix_in_train=_write_part(model, suffix_in_train),
        code_hash=sha256(prefix.python_code("self").src.encode()).hexdigest(),
        prefix_names=frozenset(str(node.target) for node in prefix.nodes if node.op in {"call_module", "get_attr"}),
    )


@contextmanager
def _keeping_state(model: nn.Module) -> Iterator[None]:
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


def _trace(model: nn.Module) -> fx.Graph:
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


class _Cut:
    """A traced forward pass with its cut."""

    def __init__(self, model: nn.Module, graph: fx.Graph, in_train: set[str]) -> None:
        self._model, self._nodes = model, list(graph.nodes)
        self._in_train = in_train
        """Modules that are in train mode when the model is."""
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

    def split(self, images: Tensor) -> tuple[tuple[Crossing, ...], fx.Graph, fx.Graph]:
        """Return what crosses, the prefix and the suffix."""
        handed = [
            node
            for node in self._nodes
            if node in self._shown - self._upper and any(user in self._upper for user in node.users)
        ]
        seen = [self._show(handed, images[:n_images]) for n_images in _N_TRIED]
        crossings: dict[fx.Node, Crossing] = {}
        constants: dict[fx.Node, tuple[Any, Any]] = {}
        for node, few, more in zip(handed, *seen, strict=True):
            if isinstance(few, Tensor):
                crossings[node] = self._describe(node, few, more)
            else:
                constants[node] = few, more
        if not crossings:
            raise NotSeparable("nothing of it is frozen")
        return tuple(crossings.values()), self._copy_prefix(list(crossings)), self._copy_suffix(crossings, constants)

    def _show(self, handed: list[fx.Node], images: Tensor) -> tuple[Any, ...]:
        """Return the values of nodes of the prefix for images."""
        part = _write_part(self._model, self._copy_prefix(handed))
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

    def _copy_prefix(self, handed: list[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        for node in self._nodes:
            if node.op == "placeholder" or node not in self._upper:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in handed))
        return graph

    def _copy_suffix(self, crossings: dict[fx.Node, Crossing], constants: dict[fx.Node, tuple[Any, Any]]) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {node: graph.placeholder(f"map_{node.name}") for node in crossings}
        n_images = graph.call_method("size", (next(iter(copies.values())), 0))
        for node, (few, more) in constants.items():
            copies[node] = _generalise(few, more, n_images, node.name)
        needed = self._list_tables()
        for node in self._nodes:
            if node in self._upper or node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return graph

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
