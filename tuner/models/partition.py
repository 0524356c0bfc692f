"""Cut a model where its trained part begins: prefix | suffix, by what depends on parameters that train.

The model's forward pass is traced by ``torch.fx`` with timm's own leaf modules and functions. Everything that depends
on a trained parameter, or on a module that is in train mode when the model is, belongs to the suffix; the rest is the
prefix. A trace fixes the mode, so the suffix is traced in both; the prefix is always in eval mode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor, nn

from tuner.models.backbone import first_line
from tuner.models.crossing import Crossing, pack_maps, unpack_maps
from tuner.models.cut import Cut
from tuner.models.tracing import NotSeparable, Part, keeping_state, write_part


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
    operations: frozenset[str]
    """Names of the traced operations of the prefix."""
    ends: tuple[str, ...]
    """Of them, those whose results cross, in the order of ``crossings``."""

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


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """What leads from the maps of a cut to those of a later one, in all models that are built alike."""

    earlier: Partition
    later: Partition
    part: Part
    """From the crossing tensors of the one to those of the other."""

    def bind(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the bridge of a model, from packed maps to packed maps."""

        def compute(maps: Tensor) -> Tensor:
            return pack_maps(self.part(model, *unpack_maps(maps, self.earlier.crossings)), self.later.crossings)

        return compute


def partition_model(model: nn.Module, images: Tensor) -> Partition:
    """Cut a model below the first layer that trains.

    Args:
        model: Frozen by ``freeze_layers``, on the device. Its mode and its buffers are put back.
        images: Three at least, as the model takes them, on the device.

    Raises:
        NotSeparable: If its forward pass cannot be traced, if nothing is frozen, or if what crosses the cut is not one
            tensor of fixed shape for each image.
    """
    with keeping_state(model):
        in_train, in_eval = Cut(model, trains=True), Cut(model, trains=False)
        with _explaining_errors():
            crossings, crossings_in_train = in_eval.find_crossings(images), in_train.find_crossings(images)
            prefix = in_eval.copy_prefix(list(crossings.tensors))
            suffixes = in_eval.copy_suffix(crossings), in_train.copy_suffix(crossings_in_train)
    if list(crossings.tensors.values()) != list(crossings_in_train.tensors.values()):
        raise NotSeparable("what crosses its cut is not the same in train and in eval mode")
    suffix_in_eval, suffix_in_train = (write_part(model, suffix) for suffix in suffixes)
    return Partition(
        crossings=tuple(crossings.tensors.values()),
        prefix=write_part(model, prefix),
        suffix_in_eval=suffix_in_eval,
        suffix_in_train=suffix_in_train,
        code_hash=sha256(prefix.python_code("self").src.encode()).hexdigest(),
        prefix_names=frozenset(str(node.target) for node in prefix.nodes if node.op in {"call_module", "get_attr"}),
        operations=in_eval.operations,
        ends=tuple(node.name for node in crossings.tensors),
    )


def build_bridge(model: nn.Module, images: Tensor, *, earlier: Partition, later: Partition) -> Bridge:
    """Find what leads from a cut of a model to a later one.

    Args:
        model: Frozen at the earlier cut, on the device. Its mode and its buffers are put back.
        images: Three at least, as the model takes them, on the device.
        earlier: Of this model.
        later: Of the same model with fewer layers that train.

    Raises:
        NotSeparable: If the one's maps do not follow from the other's.
    """
    with keeping_state(model):
        cut = Cut(model, trains=False)
        with _explaining_errors():
            between = cut.copy_between(cut.find_crossings(images), later.operations, later.ends)
    return Bridge(earlier=earlier, later=later, part=write_part(model, between))


@contextmanager
def _explaining_errors() -> Iterator[None]:
    """Turn what a traced graph raises when it runs into one line."""
    try:
        yield
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise NotSeparable(f"its traced forward pass does not run ({first_line(error)})") from error
