"""Cut a model into layer groups, counted from the head, and freeze the lower ones for good."""

from functools import partial
from itertools import chain

from timm.models import group_parameters
from torch import nn

from tuner.errors import ModelError
from tuner.models.backbone import find_classifiers, first_line

_BORN_FIXED = "born_fixed"


def group_layers(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the parameter names of each layer group, from the head to the stem.

    The first group is exactly the classifier. Then comes what else timm's last ``group_matcher(coarse=True)`` group
    holds (VGG's ``pre_logits``, MobileNetV3's ``conv_head``, a final norm), if anything, and then timm's other groups.
    A model without a matcher is cut into its direct children; parameters of the model itself belong to the stem.

    Returns:
        Groups that are disjoint and together hold every parameter.

    Raises:
        ModelError: If the model has no classifier, or its own ``group_matcher`` fails.
    """
    names = [name for name, _ in model.named_parameters()]
    prefixes = tuple(f"{classifier}." for classifier in find_classifiers(model))
    head = tuple(name for name in names if name.startswith(prefixes))
    taken = set(head)
    lower = (tuple(name for name in group if name not in taken) for group in reversed(_list_coarse_groups(model)))
    return (head, *(group for group in lower if group))


def _list_coarse_groups(model: nn.Module) -> list[list[str]]:
    """Return parameter names by group, from the stem to the head."""
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        return _list_children(model)
    try:
        grouped: dict[int, list[str]] = group_parameters(model, matcher(coarse=True))
    except (AssertionError, NotImplementedError):
        return _list_children(model)  # timm's way to say that an architecture (RDNet) has no coarse groups
    except Exception as error:
        what = f"the group_matcher of {type(model).__name__} must give every parameter a group, got {first_line(error)}"
        raise ModelError(f"space.backbone: {what}") from error
    return [grouped[number] for number in sorted(grouped)]


def _list_children(model: nn.Module) -> list[list[str]]:
    children: dict[str, list[str]] = {}
    bare: list[str] = []
    for name, _ in model.named_parameters():
        child, dot, _ = name.partition(".")
        (children.setdefault(child, []) if dot else bare).append(name)
    groups = list(children.values())
    return [bare + groups[0], *groups[1:]] if groups else [bare]


def freeze_layers(model: nn.Module, unfrozen_layers: int) -> None:
    """Let the layer groups next to the head train and freeze the others, whatever was frozen before.

    A frozen module stays in eval mode even when ``model.train()`` is called, so that BatchNorm statistics, dropout
    and drop-path below the cut never move. Between two groups a module without parameters belongs to the upper one,
    in the order of registration. Parameters that were made with ``requires_grad=False`` never train. Load the weights
    first: some models (levit) cache what they derive from their weights while in eval mode.

    Args:
        model: Changed in place.
        unfrozen_layers: Groups of ``group_layers`` that train, from the head; 1 is the classifier alone.

    Raises:
        ModelError: If the model has fewer groups.
    """
    groups = group_layers(model)
    if not 1 <= unfrozen_layers <= len(groups):
        what = f"must lie in [1, {len(groups)}] for {type(model).__name__}, got {unfrozen_layers}"
        raise ModelError(f"space.unfrozen_layers: {what}")
    was_training = model.training
    _release(model)
    trainable = set(chain(*groups[:unfrozen_layers]))
    fixed = _find_born_fixed(model)
    frozen = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable and name not in fixed)
        if name not in trainable:
            parameter.grad = None
            frozen.add(id(parameter))
    for module in _find_frozen_modules(model, frozen):
        _keep_in_eval(module)
    model.train(was_training)


def _find_born_fixed(model: nn.Module) -> frozenset[str]:
    """Return what the model's author made untrainable (sin-cos embeddings), as seen before the first freezing."""
    if not hasattr(model, _BORN_FIXED):
        fixed = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
        setattr(model, _BORN_FIXED, fixed)
    names: frozenset[str] = getattr(model, _BORN_FIXED)
    return names


def _find_frozen_modules(model: nn.Module, frozen: set[int]) -> list[nn.Module]:
    """Return the modules below the cut, those without parameters among them.

    Args:
        model: The model.
        frozen: ``id`` of each frozen parameter.
    """
    is_frozen: dict[nn.Module, bool] = {}
    next_is_frozen = False  # of the module with parameters that comes next in the order of registration
    for module in reversed(list(model.modules())):
        own = [id(parameter) in frozen for parameter in module.parameters(recurse=False)]
        whole = [id(parameter) in frozen for parameter in module.parameters()]
        if whole and len(set(whole)) == 1:
            # Wholly on one side of the cut: so are the dropouts inside, whatever comes after them.
            is_frozen.update(dict.fromkeys(module.modules(), whole[0]))
        else:
            is_frozen[module] = not whole and next_is_frozen
        if own:
            next_is_frozen = all(own)
    return [module for module, below in is_frozen.items() if below]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 - the signature of Module.train
    return module


def _keep_in_eval(module: nn.Module) -> None:
    module.eval()
    # A partial of a module-level function, so that copy.deepcopy and pickle of the model bind it to the copy.
    module.__dict__["train"] = partial(_stay_in_eval, module)


def _release(model: nn.Module) -> None:
    """Undo ``_keep_in_eval`` everywhere; leaves the model in train mode."""
    for module in model.modules():
        pinned = module.__dict__.get("train")
        if isinstance(pinned, partial) and pinned.func is _stay_in_eval:
            del module.__dict__["train"]
    model.train()
