"""What a run of distillation is: tables of a TOML file, every key checked."""

from fused_lora.distill.recipe.read import RecipeError, read
from fused_lora.distill.recipe.tables import Recipe

__all__ = ["Recipe", "RecipeError", "read"]
