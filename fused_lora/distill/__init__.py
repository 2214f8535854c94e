"""Teacher and student: what the one hands to the other."""

from fused_lora.distill.student import load_student
from fused_lora.distill.wecolora import copy_layers

__all__ = ["copy_layers", "load_student"]
