"""What can be wrong with an adapter's files."""


class AdapterFileError(ValueError):
    """The adapter cannot be saved or loaded as asked; model and files were left as they were."""
