"""How rules find projections: by whatever way a module has them, and without asking the rest."""

from __future__ import annotations

import pytest
from torch import nn

from fused_lora.patching import rules
from fused_lora.patching.rules import find
from tests.patching.models import build


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)


class Delegate(nn.Module):
    """Hands on what its inner module has, as adapters of other libraries do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]  # no child: found through this module alone

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inner"][0], name)


class Property(Mlp):
    """Its second linear has another name, and a property with the usual one."""

    def __init__(self):
        super().__init__()
        self.last = self._modules.pop("fc2")

    @property
    def fc2(self):
        return self.last


def paths(module):
    return rules._match(module).paths


@pytest.mark.parametrize("module", [Mlp(), Delegate(Mlp()), Property()], ids=lambda m: type(m))
def test_an_mlp_however_it_has_its_linears(module):
    assert paths(module) == ("fc1", "fc2")


def test_an_attention_with_bare_weights():
    assert paths(nn.MultiheadAttention(8, 2)) == ("in_proj_weight", "out_proj")


def test_the_rest_of_a_model_is_asked_nothing(monkeypatch):
    """Looking by every rule in every module was most of what ``patch`` took."""
    model, asked = build(), []
    right = rules.projection
    monkeypatch.setattr(rules, "projection", lambda m, path: (asked.append(m), right(m, path))[1])
    assert find(model)
    kinds = {type(module).__name__ for module in asked}
    assert kinds == {"Attention", "Mlp"}, kinds
