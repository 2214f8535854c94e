"""What sharing a teacher's adapters adds to a joint step, beside autograd's slices."""
