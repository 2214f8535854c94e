"""The suites and jobs; importing this room registers them all."""

from fused_lora.bench.suites import host as host
from fused_lora.bench.suites import plan_choice as plan_choice
from fused_lora.bench.suites import saved_bytes as saved_bytes
from fused_lora.bench.suites import sharing as sharing
from fused_lora.bench.suites import six_projections as six_projections
from fused_lora.bench.suites import train_step as train_step
from fused_lora.bench.suites import wecolora_step as wecolora_step
