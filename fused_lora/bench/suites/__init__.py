"""The suites and jobs; importing this room registers them all."""

import fused_lora.bench.plan_choice.command
import fused_lora.bench.saved_bytes.command
import fused_lora.bench.sharing.command  # noqa: F401
from fused_lora.bench.suites import host as host
from fused_lora.bench.suites import six_projections as six_projections
from fused_lora.bench.suites import train_step as train_step
from fused_lora.bench.suites import wecolora_step as wecolora_step
