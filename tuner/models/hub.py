"""Timm's pretrained weights: on this machine, on the hub, or out of reach."""

from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.models.backbone import CREATED_WITH, find_timm_cfg, first_line
from tuner.spec.sections import BackboneSection

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_REACH_SECONDS = 10


def find_pretrained_cfg(name: str) -> Any:
    """Return timm's ``PretrainedCfg`` of a model that has pretrained weights.

    Raises:
        ModelError: If timm has none for it, or no such model.
    """
    cfg = find_timm_cfg(name)
    if not (cfg.hf_hub_id or cfg.url):
        what = f"must be a file or \"random\" because timm has no pretrained weights for it, got nothing for '{name}'"
        raise ModelError(f'backbones."{name}".weights: {what}')
    return cfg


def find_address(cfg: Any) -> str:
    """Return the address of the file that timm would download."""
    if not cfg.hf_hub_id:
        return str(cfg.url)
    repo, _, revision = cfg.hf_hub_id.partition("@")
    return huggingface_hub.hf_hub_url(repo, cfg.hf_hub_filename or _HUB_FILES[0], revision=revision or None)


def _find_cached(cfg: Any) -> Path | None:
    """Return the file of a pretrained tag if an earlier download left it on this machine."""
    if not cfg.hf_hub_id:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(cfg.url).name
        return path if path.is_file() else None
    repo, _, revision = cfg.hf_hub_id.partition("@")
    for filename in [cfg.hf_hub_filename] if cfg.hf_hub_filename else _HUB_FILES:
        found = huggingface_hub.try_to_load_from_cache(repo, filename, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def check_reach(name: str, section: BackboneSection) -> None:
    """Check that timm's pretrained weights are on this machine or can be downloaded; takes at most seconds.

    Raises:
        ModelError: If not; it says which file to put where.
    """
    if section.weights is not None or ":" in name:
        return
    cfg = find_pretrained_cfg(name)
    if _find_cached(cfg) is not None:
        return
    address = find_address(cfg)
    try:
        # The hub's own client would go on trying for 45 s; this one knows the same proxies and certificates.
        huggingface_hub.get_session().head(address, timeout=_REACH_SECONDS)
    except Exception as error:
        raise _explain_download(name, cfg, error) from error


def _explain_download(name: str, cfg: Any, error: Exception) -> ModelError:
    address = find_address(cfg)
    place = f"weights/{'.'.join(filter(None, [cfg.architecture, cfg.tag]))}{Path(address).suffix}"
    what = f"must be a local file while {address} is out of reach, got none ({first_line(error)})"
    todo = f'save that file as {place} beside the study file and set weights = "{place}"'
    return ModelError(f'backbones."{name}".weights: {what}; {todo}')


def load_timm_state(model: nn.Module, name: str, section: BackboneSection) -> dict[str, Tensor]:
    """Return timm's pretrained weights in the shapes of a model, through a twin that timm itself adapts.

    Raises:
        ModelError: If they cannot be had, or do not fit the backbone with its kwargs, or its head is to be kept and
            has another number of classes.
    """
    check_reach(name, section)
    cfg = find_pretrained_cfg(name)
    kwargs: dict[str, Any] = getattr(model, CREATED_WITH)
    if section.keep_head and kwargs["num_classes"] != cfg.num_classes:
        raise reject_head(f'backbones."{name}".keep_head', kwargs["num_classes"], cfg.num_classes)
    cached = _find_cached(cfg)
    # A file named to timm is read without asking the hub for a newer one, which takes 20 s when offline.
    overlay = {"file": str(cached), "custom_load": False} if cached and cfg.hf_hub_id else None
    try:
        with torch.random.fork_rng(devices=[]):  # the twin's initial weights must not move the trial's seed
            twin = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except OSError as error:
        raise _explain_download(name, cfg, error) from error
    except RuntimeError as error:
        what = f"must fit the backbone with its kwargs, got {first_line(error)}"
        raise ModelError(f'backbones."{name}".weights: {what}') from error
    state: dict[str, Tensor] = twin.state_dict()
    return state


def reject_head(where: str, n_classes: int, n_found: int) -> ModelError:
    """Return the error of a classifier that is to be kept but is not the study's."""
    return ModelError(f"{where}: the file's classifier must have {n_classes} classes, got {n_found}")
