"""Kernels in Triton: base and low-rank products in one fp32 accumulator, rounded once.

Modules of this room that hold kernels import triton when they are imported; import them inside the
function that launches them. This module, ``available``, ``border``, ``identity``, ``launch``,
``launches``, ``tiles`` and ``winners`` do without.
"""
