"""The operations: schema, autograd and dispatch."""
