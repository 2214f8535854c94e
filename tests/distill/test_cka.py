"""Linear CKA against its definitions."""

import itertools
import math

import pytest
import torch

from fused_lora.distill.cka import MinibatchCKA, layer_cka, linear_cka
from tests.patching.models import build, images


def features(n=30, p=6):
    return torch.randn(n, p, dtype=torch.float64)


def rotated(x):
    q, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=torch.float64))
    return 3 * x @ q + 5


def batchwise(*batches):
    sums = MinibatchCKA()
    for x, y in batches:
        sums.update([x], [y])
    return float(sums.result())


class TestWhole:
    def test_the_kernels_form(self):
        x, y = features(), features(30, 4)
        h = torch.eye(30, dtype=torch.float64) - 1 / 30
        k, m = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
        expected = (k * m).sum() / (k.norm() * m.norm())
        assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-12)

    def test_what_it_does_not_see(self):
        x = features()
        assert linear_cka(x, rotated(x)) == pytest.approx(1.0, rel=1e-12)

    def test_low_precision_features_are_summed_in_float64(self):
        x, y = features().to(torch.bfloat16), features().to(torch.bfloat16)
        assert linear_cka(x, y) == linear_cka(x.double(), y.double())

    def test_a_constant(self):
        assert math.isnan(linear_cka(features(), torch.ones(30, 2)))


def by_definition(k, m):
    """Song et al. 2012: the mean over all 4-tuples of distinct rows."""
    tuples = list(itertools.permutations(range(len(k)), 4))
    each = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in tuples]
    return float(sum(each)) / len(tuples)


class TestBatches:
    def test_the_unbiased_estimator(self):
        x, y = features(6), features(6, 4)
        k, m = x @ x.T, y @ y.T
        expected = by_definition(k, m) / math.sqrt(by_definition(k, k) * by_definition(m, m))
        assert batchwise((x, y)) == pytest.approx(expected, rel=1e-10)

    def test_sums_over_batches(self):
        pairs = [(features(6), features(6, 4)), (features(9), features(9, 4))]
        grams = [(x @ x.T, y @ y.T) for x, y in pairs]
        cross = sum(by_definition(k, m) for k, m in grams)
        own = [sum(by_definition(g, g) for g in side) for side in zip(*grams, strict=True)]
        assert batchwise(*pairs) == pytest.approx(cross / math.sqrt(own[0] * own[1]), rel=1e-10)

    def test_what_it_does_not_see(self):
        x = features()
        assert batchwise((x, rotated(x))) == pytest.approx(1.0, rel=1e-9)

    def test_unrelated_features_are_near_zero_where_the_whole_form_is_biased(self):
        x, y = features(20, 200), features(20, 200)
        assert abs(batchwise((x, y))) < 0.15 < 0.85 < linear_cka(x, y)

    def test_what_does_not_fit(self):
        sums = MinibatchCKA()
        with pytest.raises(ValueError, match="no batch was counted"):
            sums.result()
        with pytest.raises(ValueError, match=r"n >= 4; got \(3, 6\) and \(3, 6\)"):
            sums.update([features(3)], [features(3)])
        with pytest.raises(ValueError, match=r"got \(8, 6\) and \(7, 6\)"):
            sums.update([features(8)], [features(7)])
        sums.update([features(8)], [features(8)])
        before = sums.result()
        with pytest.raises(ValueError, match=r"layers were \(1, 1\), now \(2, 1\)"):
            sums.update([features(8)] * 2, [features(8)])
        assert torch.equal(sums.result(), before)


class TestLayers:
    @pytest.mark.parametrize("patches", [False, True])
    def test_teacher_by_student(self, patches):
        big, small = build(depth=3).double(), build(embed_dim=32, num_heads=2).double()
        batches = [images(big, 6) for _ in range(3)]
        found = layer_cka(big, small, batches, patches=patches)
        assert found.shape == (3, 2)
        own = layer_cka(big, big, batches, patches=patches)
        torch.testing.assert_close(own.diagonal(), torch.ones(3, dtype=torch.float64))
        torch.testing.assert_close(own, own.T)

    def test_no_batch(self):
        model = build()
        with pytest.raises(ValueError, match="no batch was counted"):
            layer_cka(model, model, [])
