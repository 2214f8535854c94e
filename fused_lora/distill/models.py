"""Models by name, timm's or U-Nets over its encoders, and weights from files.

A U-Net, of images [B, channels, height, width]:
    f_0 .. f_n = encoder(images)                   each half as large as the one before
    x = f_n;  x = block_i(up(x) | f_i)             i = n - 1 .. 0
    logits = up(conv(x))                           [B, classes, height, width]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.arguments import all_finite
from fused_lora.distill.recipe.tables import Teacher

PLAIN = "unet"  # the name of the U-Net below
LIBRARY = "smp/"  # before the name of a class of segmentation_models_pytorch


class UNet(nn.Module):
    """A U-Net whose encoder is any convolutional model of timm.

    Args:
        encoder: timm's name.
        num_classes: of the logits.
        in_chans: channels of the images.
        stages: how many of the encoder's stages it uses, the stem among them.
        widths: channels of the decoder's blocks, deepest first, one fewer than stages; None for
            those of the skip connections.
        pretrained: timm's weights for the encoder.
        options: of ``timm.create_model``.

    Raises:
        ValueError: fewer than two stages, or widths that are not one for each block.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        num_classes: int = 2,
        in_chans: int = 3,
        stages: int = 5,
        widths: Sequence[int] | None = None,
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        import timm

        if stages < 2:
            raise ValueError(f"a U-Net has two stages or more, got stages = {stages}")
        options |= {"features_only": True, "out_indices": tuple(range(stages))}
        features: Any = timm.create_model(encoder, pretrained, in_chans=in_chans, **options)
        self.encoder, self.num_classes = features, num_classes
        deep, *skips = reversed(features.feature_info.channels())
        widths = list(skips if widths is None else widths)
        if len(widths) != len(skips):
            raise ValueError(f"{stages} stages want {len(skips)} widths, got {widths}")
        takes = [width + skip for width, skip in zip([deep, *widths], skips, strict=False)]
        blocks = (_block(into, out) for into, out in zip(takes, widths, strict=True))
        self.decoder = nn.ModuleList(blocks)
        self.head = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes, height, width] of images [B, channels, height, width]."""
        x, *skips = reversed(self.encoder(images))
        for skip, block in zip(skips, self.decoder, strict=True):
            x = block(torch.cat([_scaled(x, skip), skip], dim=1))
        return _scaled(self.head(x), images)


def is_segmenter(model: str) -> bool:
    """Whether the name is of a model that labels pixels."""
    return model == PLAIN or model.startswith(LIBRARY)


def segmenter(model: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """The U-Net above ("unet"), or a class of segmentation_models_pytorch ("smp/Unet")."""
    if model == PLAIN:
        return UNet(pretrained=pretrained, **options)
    try:
        import segmentation_models_pytorch as library
    except ImportError:
        raise ValueError(
            "it needs segmentation_models_pytorch: pip install fused_lora[segmentation]"
        ) from None
    kind = getattr(library, model.removeprefix(LIBRARY), None)
    if not isinstance(kind, type):
        raise ValueError("segmentation_models_pytorch has no such model")
    _check_depth(options)
    given = dict(options)
    classes = given.pop("num_classes", given.pop("classes", 1))
    made = kind(encoder_weights="imagenet" if pretrained else None, classes=classes, **given)
    made.num_classes = classes
    return made


def _check_depth(options: dict[str, Any]) -> None:
    """The library's own encoders keep the stages below their depth, unused; timm's do not."""
    name, depth = options.get("encoder_name", "resnet34"), options.get("encoder_depth", 5)
    if depth < 5 and not name.startswith("tu-"):
        raise ValueError(
            f"encoder_name = {name!r} keeps stages that encoder_depth = {depth} never runs: give "
            f"'tu-{name}', timm's"
        )


def _block(into: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (into, out):
        layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)


def _scaled(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


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
        if not all_finite(value):
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
