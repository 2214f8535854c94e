"""The equations, forward and backward, in plain torch, in any dtype up to float64."""
