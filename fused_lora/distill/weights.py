"""Models by timm's name, and weights from files, each with an error that names what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.recipe.tables import Teacher
from fused_lora.distill.unet import is_segmenter, segmenter


class WeightsError(ValueError):
    """A model that cannot be built, or weights that do not fit it."""


def build(about: Teacher, classes: int | None = None) -> nn.Module:
    """The model of ``[teacher]``, with its weights unless it has none to take.

    Args:
        about: the table.
        classes: of the head, where neither weights nor options say.
    """
    options = dict(about.options)
    fresh = not (about.pretrained or about.checkpoint)
    if fresh and classes is not None and "num_classes" not in options:
        options["num_classes"] = classes
    make = segmenter if is_segmenter(about.model) else _classifier
    try:
        model = make(about.model, about.pretrained, options)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise WeightsError(f"teacher.model = {about.model!r}: {error}") from None
    if about.checkpoint:
        load(model, Path(about.checkpoint))
    return model


def _classifier(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=pretrained, **options)


def load(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into ``model``; raises WeightsError where they do not fit."""
    wanted = model.state_dict()
    found = _unwrapped(read(path), wanted.keys())
    missing = sorted(wanted.keys() - found.keys())
    beyond = sorted(found.keys() - wanted.keys())
    if missing or beyond:
        raise WeightsError(f"{path}: missing {missing[:3]}, unknown {beyond[:3]}")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            shapes = tuple(value.shape), tuple(wanted[name].shape)
            raise WeightsError(f"{path}: {name} is {shapes[0]}, the model's {shapes[1]}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{path}: {name} holds non-finite values")
    model.load_state_dict(found)


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or in one of torch's, without running its pickles."""
    if not path.is_file():
        raise WeightsError(f"no weights {str(path)!r}")
    try:
        found: Any = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except Exception as error:  # each library has its own
        raise WeightsError(f"{path}: {type(error).__name__}: {str(error)[:200]}") from None
    for key in ("state_dict", "model", "model_ema", "teacher"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path} holds a {type(found).__name__}, not a state dict")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _unwrapped(found: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The keys without what a wrapper put before them, as far as the model has none of it."""
    for prefix in ("module.", "backbone.", "encoder."):
        if not any(name.startswith(prefix) for name in wanted):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


def _torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
