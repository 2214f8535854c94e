"""What can be wrong with a model to patch."""


class PatchError(ValueError):
    """The model cannot be patched as asked; it was left as it was."""
