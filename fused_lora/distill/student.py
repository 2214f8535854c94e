"""A student on disk: merged weights, and how to build the model that they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.models import WeightsError, build, load, read
from fused_lora.distill.recipe.tables import Teacher
from fused_lora.distill.train.checkpoint import write
from fused_lora.distill.wecolora import copy_layers

WEIGHTS = "student.safetensors"
EXPORT = "timm"  # folder of a run that timm and transformers load by themselves
ABOUT = "student.json"


def save_student(student: nn.Module, folder: Path, about: dict[str, Any]) -> None:
    """Write the weights, and ``about``: timm's model, options, reduction (1: not a student)."""
    tensors = {name: value.detach().cpu() for name, value in student.state_dict().items()}
    once: dict[int, str] = {}
    for name, value in tensors.items():
        if once.setdefault(value.data_ptr(), name) != name and value.numel():
            tensors[name] = value.clone()  # safetensors refuses two names for one storage
    described = {"format": "fused_lora.student 1", **about}
    write(folder / WEIGHTS, {k: v.contiguous() for k, v in tensors.items()}, {})
    (folder / ABOUT).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def load_student(folder: str | Path) -> nn.Module:
    """The model of a finished run, an ordinary timm model of fewer blocks, in eval mode.

    Raises:
        WeightsError: the folder holds no finished run, or the weights do not fit.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        raise WeightsError(f"{folder} holds no finished run: no {ABOUT} in it")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = build(Teacher(model=about["model"], options=about["options"]))
        if about["reduction"] > 1:
            model = copy_layers(model, about["reduction"], share=False)
    dtypes: set[torch.dtype] = {t.dtype for t in read(folder / WEIGHTS).values() if _float(t)}
    model = model.to_empty(device="cpu")
    model = model.to(dtypes.pop()) if len(dtypes) == 1 else model
    load(model, folder / WEIGHTS)
    return model.eval()


def export_student(
    student: nn.Module, folder: Path, about: dict[str, Any], classes: list[str]
) -> str:
    """Put the student where timm and transformers find it without this library.

    ``folder/timm`` holds timm's ``config.json`` and ``model.safetensors``. Nothing is written
    where timm cannot build so few blocks from its own arguments.

    Args:
        student: merged.
        folder: of the run.
        about: as ``save_student`` takes it.
        classes: their names, where the head is of these classes.

    Returns:
        One sentence: how to load it, or why there is no export.
    """
    import timm
    from timm.models import save_for_hf

    options = dict(about["options"])
    if about["reduction"] > 1:
        options["depth"] = len(list(getattr(student, "blocks", [])))
    try:
        plain = timm.create_model(about["model"], pretrained=False, **options)
        plain.load_state_dict(student.state_dict())
    except Exception as error:  # each architecture has its own
        reason = str(error).splitlines()[0][:200]
        return f"no plain export: timm does not build this student ({reason}); use load_student"
    options.pop("pretrained_cfg_overlay", None)  # what it changed stands in the configuration
    config = {"label_names": classes} if len(classes) == plain.num_classes else {}
    home = folder / EXPORT
    plain = plain.to(next(student.parameters()).dtype)
    save_for_hf(plain.cpu(), str(home), config, model_args=options, safe_serialization=True)
    written = json.loads((home / "config.json").read_text(encoding="utf-8"))
    written.get("model_args", {}).pop("num_classes", None)  # transformers gives it a second time
    (home / "config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return (
        f'timm.create_model("local-dir:{home}", pretrained=True), or '
        f'transformers.AutoModelForImageClassification.from_pretrained("{home}")'
    )


def _float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
