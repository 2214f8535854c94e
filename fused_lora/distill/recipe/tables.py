"""The tables of a recipe and their defaults, which are the paper's where it has any.

Each field's type and range stand beside its default, and are checked.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar


class RecipeError(ValueError):
    """A recipe that cannot be run, with the key and the value seen."""


def number(default: float, least: float = -math.inf, most: float = math.inf) -> Any:
    """A number between ``least`` and ``most``, both allowed; whole where the default is."""
    return field(default=default, metadata={"least": least, "most": most})


def word(default: str, *of: str) -> Any:
    """One of the words ``of``."""
    return field(default=default, metadata={"of": of})


def names() -> Any:
    """A list of strings, empty if not given."""
    return field(default=())


@dataclass(frozen=True)
class Table:
    """One table of a recipe."""

    TITLE: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            where = f"{self.TITLE}.{each.name}" if self.TITLE else each.name
            object.__setattr__(self, each.name, _checked(where, value, each))

    @classmethod
    def of(cls, given: Any) -> Any:
        """The table of a parsed dict; raises RecipeError for a key that is none of its own."""
        if not isinstance(given, dict):
            raise RecipeError(f"{cls.TITLE} must be a table, got {given!r}")
        known = [each.name for each in fields(cls)]
        for key in given:
            if key not in known:
                raise RecipeError(unknown(f"[{cls.TITLE}]", key, known))
        return cls(**given)


def unknown(where: str, key: str, known: list[str]) -> str:
    """The sentence on a key that does not exist."""
    near = get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"its keys are {known}"
    return f"{where} has no key {key!r}; {hint}"


def _checked(where: str, value: Any, about: Field[Any]) -> Any:
    default = about.default
    if isinstance(default, tuple):
        return _strings(where, value)
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise RecipeError(f"{where} must be a {_called(default)}, got {value!r}")
    elif isinstance(default, int | float):
        value = _number(where, value, default)
        _check_range(where, value, about.metadata)
    if (of := about.metadata.get("of")) and value not in of:
        raise RecipeError(f"{where} must be one of {list(of)}, got {value!r}")
    return value


def _strings(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise RecipeError(f"{where} must be a list of strings, got {value!r}")
    return tuple(value)


def _number(where: str, value: Any, default: float) -> float:
    kinds = (int,) if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise RecipeError(f"{where} must be a {_called(default)}, got {value!r}")
    return type(default)(value)


def _check_range(where: str, value: float, limits: Any) -> None:
    least, most = limits.get("least", -math.inf), limits.get("most", math.inf)
    if not least <= value <= most or math.isinf(value):
        raise RecipeError(f"{where} must lie in [{least:g}, {most:g}], got {value!r}")


def _called(default: object) -> str:
    kinds = {bool: "true or false", str: "string", int: "whole number", float: "number"}
    return kinds[type(default)]


METHODS = ("wecolora", "weco_kd", "weco", "finetune", "slad", "family")
SEGMENTED = ("digit_masks", "masks")  # sources with a class for each pixel
BUILT_IN = ("digits", "digits_low", "digits_high", "digit_masks")  # sources without a path


@dataclass(frozen=True)
class Teacher(Table):
    """Where the teacher comes from: exactly one of weights that exist, or a recipe for them."""

    TITLE: ClassVar[str] = "teacher"

    model: str = ""  # timm's name
    options: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    pretrained: bool = False  # timm's own weights
    checkpoint: str = ""  # a file of weights: .safetensors, or torch's
    recipe: str = ""  # a finetune recipe, run first where its weights do not lie there yet

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.options, dict):
            raise RecipeError(f"{self.TITLE}.options must be a table, got {self.options!r}")
        given = [n for n in ("pretrained", "checkpoint", "recipe") if getattr(self, n)]
        if len(given) > 1:
            raise RecipeError(f"{self.TITLE} takes its weights from one place, got {given}")
        if bool(self.model) == bool(self.recipe):
            raise RecipeError(
                f"give {self.TITLE}.model, or {self.TITLE}.recipe in its place: got "
                f"{self.model!r} and {self.recipe!r}"
            )


@dataclass(frozen=True)
class SladTable(Teacher):
    """SLAD's student, a smaller model of its own, how the two learn, and the loss's weights."""

    TITLE: ClassVar[str] = "slad"

    # of fused_lora.distill.slad.prepare:
    method: str = word("joint", "joint", "two_step", "probe", "finetune")
    teacher_rate: float = number(1.0, 0)  # x train.blr, in a phase of the teacher's own
    mapping: str = word("even", "even", "first", "last")  # the teacher's block for each of its own
    on_student: float = number(1.0, 0)  # x CE(S)
    on_teacher: float = number(1.0, 0)  # x CE(T), of the method joint
    agreement: float = number(1.0, 0)  # x T^2 KL(S, T)
    temperature: float = number(2.0, 0.01, 100)
    head_blocks: int = number(3, 1, 64)  # whose class tokens the heads read


@dataclass(frozen=True)
class Family(Teacher):
    """A smaller model that learns its teacher's features, and how they are compared."""

    TITLE: ClassVar[str] = "family"

    compared: str = word("last", "last", "mapped")  # the last blocks; or each with its mapping's
    mapping: str = word("even", "even", "first", "last")  # also of the CKA at the end
    distance: str = word("cosine", "cosine", "l1")
    on_class: float = number(1.0, 0)  # x the distance of class tokens
    on_patches: float = number(1.0, 0)  # x the mean distance of patch tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.on_class and not self.on_patches:
            raise RecipeError("family.on_class and family.on_patches are both 0: give one")


@dataclass(frozen=True)
class Student(Table):
    """How many of the teacher's blocks stay, and what trains."""

    TITLE: ClassVar[str] = "student"

    reduction: int = number(2, 2, 64)  # keep block i where i % reduction == 0
    keep: str = word("spaced", "spaced", "first")  # first: as many blocks, from the input on
    rank: int = number(128, 1, 4096)  # of every adapter
    allow_large_rank: bool = False  # above min(in_features, columns)
    targets: tuple[str, ...] = names()  # roles that carry adapters; none for all six
    qkv: str = word("separate", "separate", "joint")
    dropout: float = number(0.0, 0, 0.99)
    trainable: tuple[str, ...] = names()  # patterns of further parameters to train: "^head"


@dataclass(frozen=True)
class Data(Table):
    """The images, and which of them the student sees."""

    TITLE: ClassVar[str] = "data"

    source: str = word(
        "digits",
        *("digits", "digits_low", "digits_high", "folder", "huggingface"),
        *("digit_masks", "masks"),
    )
    path: str = ""  # folder: holds train/ and val/, a folder per class in each, or is a tar archive
    # of them; masks: classes.txt and train/ and val/, with images/ and masks/ in each; "$NAME"
    # stands for a variable of the environment
    classes: tuple[str, ...] = names()  # learn and test on these alone; none for all
    image_size: int = number(0, 0, 4096)  # 0: what the model expects
    augment: str = word("none", "none", "flip", "crop", "shift")
    fraction: float = number(1.0, 0, 1)  # of the training images
    choice: str = word(
        "balanced", "balanced", "random", "kmeans++"
    )  # balanced: as many of each class
    seed: int = number(0, 0)  # of the choice
    bad_images: str = word("raise", "raise", "skip")  # those that do not decode
    workers: int = number(0, 0, 256)  # processes that load

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction == 0:
            raise RecipeError("data.fraction must be above 0, got 0.0")
        if (self.source in BUILT_IN) == bool(self.path):
            raise RecipeError(
                f"data.path is for the sources folder, huggingface and masks, which need it: got "
                f"source {self.source!r} and path {self.path!r}"
            )


@dataclass(frozen=True)
class Loss(Table):
    """tokens x mean |T - S| + labels x cross-entropy."""

    TITLE: ClassVar[str] = "loss"

    tokens: float = number(1.0, 0)
    labels: float = number(0.0, 0)  # the supervised variant; wants student.trainable = ["^head"]
    blocks: str = word("last", "last", "stages", "every")  # whose outputs T and S are; stages: the
    # last block of each stage of a convolutional encoder
    cache: str = word("off", "off", "memory", "disk")  # keep T: the teacher runs once

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens and not self.labels:
            raise RecipeError("loss.tokens and loss.labels are both 0: there is nothing to learn")


@dataclass(frozen=True)
class Train(Table):
    """AdamW, warm-up, cosine."""

    TITLE: ClassVar[str] = "train"

    epochs: int = number(100, 0, 1_000_000)
    steps: int = number(0, 0)  # in place of epochs where above 0
    batch_size: int = number(128, 1)  # images per process and micro-step
    accumulate: int = number(1, 1)  # micro-steps per step
    blr: float = number(1e-3, 0)  # lr = blr x effective batch / 256
    warmup: float = number(0.1, 0, 1)  # share of the steps
    weight_decay: float = number(0.05, 0)
    beta1: float = number(0.9, 0, 0.9999)
    beta2: float = number(0.95, 0, 0.99999)
    precision: str = word("fp32", "fp32", "bf16", "fp16", "fp64")  # 16 bits by autocast
    device: str = "auto"
    parallel: str = word("ddp", "ddp", "fsdp2")  # how several processes share a step
    seed: int = number(0, 0)
    log: str = word("jsonl", "jsonl", "tensorboard")
    log_every: int = number(10, 1)  # steps; the loss is looked at then, and NaN stops the run
    save_every: int = number(200, 1)  # steps between checkpoints
    stop_above: float = number(10.0, 0)  # x the first mean loss: a run above it stops; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epochs and not self.steps:
            raise RecipeError("train.epochs and train.steps are both 0: give one")
        if self.parallel == "fsdp2" and self.precision == "fp16":
            raise RecipeError(
                "train.parallel = 'fsdp2' goes with fp32, fp64 and bf16: the scaler of fp16 does "
                "not look at gradients in shards and whole ones together"
            )


@dataclass(frozen=True)
class Evaluate(Table):
    """What is measured of the student at the end, merged."""

    TITLE: ClassVar[str] = "evaluate"

    head: bool = True  # accuracy through the classification head copied from the teacher
    probe: str = word("none", "none", "logistic", "sgd")  # a linear probe on all training labels
    knn: int = number(0, 0, 1000)  # neighbours; 0: none
    seen: float = number(
        1.0, 0.001, 1
    )  # share of the training images that probe and knn learn from
    cka: bool = False  # SLAD's student's blocks against those of the teacher they share with
    cosine: bool = False  # student's blocks against those of the teacher they stand for
    teacher: bool = False  # the same figures of the teacher, beside
    report: bool = True  # report.html, and a plain export of the student


@dataclass(frozen=True)
class Recipe(Table):
    """One run."""

    method: str = word("wecolora", *METHODS)
    teacher: Teacher = Teacher(model="vit_base_patch16_224")
    student: Student = Student()
    data: Data = Data()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    slad: SladTable | None = None  # of the method slad alone
    family: Family | None = None  # of the method family alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss.cache != "off" and self.data.augment != "none":
            raise RecipeError(
                f"loss.cache = {self.loss.cache!r} keeps one view of each image, and data.augment "
                f"= {self.data.augment!r} makes a new one each time: use one of the two"
            )
        for own in ("slad", "family"):
            if (self.method == own) != (getattr(self, own) is not None):
                raise RecipeError(
                    f"the table [{own}] goes with the method {own}, not {self.method!r}"
                )
        if self.data.source in SEGMENTED:
            self._check_segmented()
        if self.method == "finetune" and self.teacher.recipe:
            raise RecipeError("a finetune recipe trains the teacher itself: give teacher.model")

    def _check_segmented(self) -> None:
        source, about = self.data.source, self.evaluate
        if self.method in ("slad", "family"):
            looks = "labels" if self.method == "slad" else "class tokens"
            raise RecipeError(
                f"the method {self.method} has {looks}, and data.source = {source!r} has masks"
            )
        if self.data.classes:
            raise RecipeError(
                f"data.classes = {list(self.data.classes)} is for labels, and data.source = "
                f"{source!r} has masks"
            )
        if about.probe != "none" or about.knn:
            raise RecipeError(
                f"evaluate.probe = {about.probe!r} and knn = {about.knn} are for labels, and "
                f"data.source = {source!r} has masks: they are measured by evaluate.head"
            )
