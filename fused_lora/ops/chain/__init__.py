"""Stages run one after another under one autograd node that rebuilds what it does not keep."""
