"""Kernels of the compiled module: CUDA C++ behind raw device pointers."""
