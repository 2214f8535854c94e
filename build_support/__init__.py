"""What setup.py needs to know about nvcc and CMake; imports the standard library alone."""
