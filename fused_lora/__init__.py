"""Low-rank adaptation of vision transformers at the cost of the frozen network."""

from fused_lora.version import __version__ as __version__
