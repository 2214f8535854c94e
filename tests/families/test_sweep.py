"""Every family of vision transformers: equal to naive LoRA, or refused with a reason."""

import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")

from pathlib import Path

from fused_lora.testing.families import table
from fused_lora.testing.families.sweep import families, outcome

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
REFUSED = {  # convolutions, no attention, or q, k and v by another name
    "EfficientFormerV2", "CoAtNet", "PoolFormer", "MobileViTv2", "SwiftFormer", "Visformer",
    "MLP-Mixer", "iFormer", "MobileNetV4 hybrid", "ConvNeXt",
}  # fmt: skip


@pytest.mark.parametrize(("library", "family"), list(families()), ids=lambda name: str(name))
def test_a_family_is_served_as_naive_lora_or_refused(library, family):
    seen = outcome(library, family)
    assert seen.passed, (seen.worst, seen.unreached, [str(each) for each in seen.verdicts])
    if seen.refusal:
        assert family in REFUSED, seen.refusal
        assert "no block has an attention and an MLP of linears" in seen.refusal
    else:
        assert seen.linears > 0 and {"q", "k", "v", "out"} & set(seen.roles)


def test_the_documents_table_is_current():
    if table.versions() not in PAGE.read_text():
        pytest.skip(f"docs/families.md was not written {table.versions().lower()}")
    assert PAGE.read_text() == table.page(outcome(*each) for each in families())
