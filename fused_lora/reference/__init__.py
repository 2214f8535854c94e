"""The equations, in plain torch, in any dtype up to float64."""
