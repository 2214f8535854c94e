"""The suites; importing this room registers them all."""

from fused_lora.bench.suites import six_projections as six_projections
from fused_lora.bench.suites import train_step as train_step
