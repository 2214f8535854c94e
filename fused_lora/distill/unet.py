"""Models that label pixels: a plain U-Net over timm's encoders, and those of a library.

f_0 .. f_n = encoder(images)                   each half as large as the one before
x = f_n;  x = block_i(up(x) | f_i)             i = n - 1 .. 0
logits = up(conv(x))                           [B, classes, height, width]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
