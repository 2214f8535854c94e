"""How good the plan's choice is: the chosen plan timed beside the ones it was chosen over."""
