"""The images of a run: where they come from, which are chosen, in what order they are seen."""
