"""Which GPU architectures to compile for: TORCH_CUDA_ARCH_LIST read as torch reads it."""

from __future__ import annotations

import re

DEFAULT = "8.0;8.6;8.9;9.0a;10.0a;12.0"
EXACT = ("90", "100")  # whose own instructions (wgmma, tcgen05) need the suffix a in machine code

# Marketing names, as torch spells them.
NAMES: dict[str, str] = {
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}

_ONE = re.compile(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?")


def cmake_archs(torch_list: str) -> list[str]:
    """``TORCH_CUDA_ARCH_LIST`` syntax to ``CMAKE_CUDA_ARCHITECTURES`` entries.

    Args:
        torch_list: versions or names split by semicolons, commas or spaces, such as
            ``"8.0;8.6+PTX;Hopper"``.

    Returns:
        Entries such as ``["80-real", "86-real", "86-virtual"]``, without repeats, in order. Machine
        code for 9.0 is for 9.0a, and for 10.0 for 10.0a; PTX stays what later chips can run.

    Raises:
        ValueError: an entry is neither a version nor a name, or is older than 8.0.
    """
    entries: list[str] = []
    for word in re.split(r"[;,\s]+", torch_list.strip()):
        for version in NAMES.get(word, word).split(";"):
            entries += _entries(version, word)
    return list(dict.fromkeys(entries))


def _entries(version: str, word: str) -> list[str]:
    """CMake entries of one version; ``word`` is what the user wrote."""
    match = _ONE.fullmatch(version)
    if match is None:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST: {word!r} is neither a version such as '8.6', '9.0a' or "
            f"'8.6+PTX' nor one of {', '.join(NAMES)}"
        )
    major, minor, suffix, ptx = match.groups()
    if int(major) < 8:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: {word!r} is older than 8.0, the oldest served")
    plain = f"{major}{minor}"
    real = plain + (suffix or ("a" if plain in EXACT else ""))
    return [f"{real}-real", f"{plain}{suffix}-virtual"] if ptx else [f"{real}-real"]


def known_to(listed_by_nvcc: str, entries: list[str]) -> list[str]:
    """The entries a compiler can emit, given the text of ``nvcc --list-gpu-arch``."""
    known = set(re.findall(r"compute_(\d+)", listed_by_nvcc))
    return [entry for entry in entries if re.match(r"\d+", entry).group() in known]  # type: ignore[union-attr]
