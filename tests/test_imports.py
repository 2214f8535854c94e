"""What works where nothing but torch is installed: fresh processes with the rest blocked."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = ["triton", "fused_lora._native", "timm", "peft", "safetensors", "transformers"]
BLOCKED += ["sklearn", "torchvision", "tqdm", "datasets", "tomli"]

# torch itself may try triton and must be let fail; numpy is torch's own affair.
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {BLOCKED}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, before: str = "") -> str:
    """What ``code`` prints in a process that has torch alone, but for what comes ``before``."""
    done = subprocess.run(
        [sys.executable, "-c", before + BLOCKER + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_blocker_blocks() -> None:
    code = f"""
import importlib
for name in {BLOCKED}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print(name)
"""
    assert run(code).split() == BLOCKED


def test_import_brings_in_torch_alone() -> None:
    code = f"import fused_lora\nprint([name for name in {BLOCKED} if name in sys.modules])"
    assert run(code) == "[]"


def test_import_starts_no_device() -> None:
    assert run("import fused_lora, torch; print(torch.cuda.is_initialized())") == "False"


def test_the_compiled_module_says_why_not() -> None:
    code = "from fused_lora.kernels.cuda import native; print(native.why_not())"
    assert "the compiled module was not built" in run(code)


def test_the_triton_room_opens_and_says_why_not() -> None:
    code = """
from fused_lora.kernels.triton import available, launch, tiles
print(available.why_not())
"""
    assert run(code) == "triton is not installed"


def test_env_works() -> None:
    code = "from fused_lora import cli; print(cli.main(['env']))"
    printed = run(code)
    assert printed.endswith("0")
    assert "triton is not installed" in printed


def test_the_operation_works() -> None:
    code = """
import torch, fused_lora
for impl in ("auto", "aten", "reference"):
    linear = fused_lora.FusedLoRALinear(8, 6, rank=2, impl=impl)
    linear(torch.randn(3, 8)).sum().backward()
    print(impl, *linear.lora_B.grad.shape)
"""
    # torch's own fake tensors bring in dynamo, which looks for several of the blocked
    printed = run(code, before="import torch._dynamo\n")
    assert printed.splitlines() == ["auto 6 2", "aten 6 2", "reference 6 2"]
