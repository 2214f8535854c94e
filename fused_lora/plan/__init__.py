"""Integers in, a decision out: which strategy computes one problem on one device."""
