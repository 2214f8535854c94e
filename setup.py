"""Adds the compiled module to what pyproject.toml says; see CMakeLists.txt for how it is built."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.cmake_build import CMakeBuild, native_extensions

setup(ext_modules=native_extensions(), cmdclass={"build_ext": CMakeBuild})
