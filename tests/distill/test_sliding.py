"""Windows over large images, and intersection over union."""

import math

import pytest
import torch

from fused_lora.distill.segmentation import MeanIoU, sliding_window


class TestSlidingWindow:
    @pytest.mark.parametrize(
        ("size", "window", "stride"), [((8, 8), 8, 8), ((11, 13), 4, 3), ((9, 5), 5, 5)]
    )
    def test_a_prediction_per_pixel_comes_back(self, size, window, stride):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        seen = []

        def predict(part):
            seen.append(part.shape)
            return torch.cat([part, part.sum(1, keepdim=True)], 1)

        torch.testing.assert_close(sliding_window(predict, images, window, stride), predict(images))
        assert set(seen[:-1]) == {(2, 3, window, window)}

    def test_overlaps_are_averaged(self):
        calls = iter([10.0, 20.0, 40.0])
        images = torch.zeros(1, 1, 2, 5, dtype=torch.float64)  # windows from columns 0, 2 and 3
        y = sliding_window(lambda part: part + next(calls), images, 2, 2)
        assert y[0, 0, 0].tolist() == [10.0, 10.0, 20.0, 30.0, 40.0]

    @pytest.mark.parametrize(
        ("window", "stride", "message"),
        [
            (4, 5, "stride must lie in 1 to window = 4, got 5"),
            (4, 0, "got 0"),
            (9, 1, "images of 8 x 12 are smaller than a window of 9"),
        ],
    )
    def test_bad_windows(self, window, stride, message):
        with pytest.raises(ValueError, match=message):
            sliding_window(lambda part: part, torch.zeros(1, 3, 8, 12), window, stride)

    def test_predictions_of_another_size(self):
        with pytest.raises(ValueError, match=r"predictions are \(1, 3, 2, 2\), the window 4"):
            sliding_window(lambda part: part[..., ::2, ::2], torch.zeros(1, 3, 8, 8), 4, 4)


class TestMeanIoU:
    def test_by_hand(self):
        score = MeanIoU(4)
        guess = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
        labels = torch.tensor([[[0, 1, 1], [1, 255, 2]]])
        logits = torch.nn.functional.one_hot(guess, 4).movedim(-1, 1).float()
        for _ in range(2):  # twice the same changes nothing
            score.update(logits, labels)
        *known, absent = score.per_class().tolist()
        assert known == [1 / 2, 2 / 3, 1.0]
        assert math.isnan(absent)
        assert score.mean() == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)

    def test_what_does_not_fit(self):
        score = MeanIoU(3)
        labels = torch.zeros(1, 2, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"logits \(1, 4, 2, 2\) .* do not fit 3 classes"):
            score.update(torch.zeros(1, 4, 2, 2), labels)
        with pytest.raises(ValueError, match=r"labels \(1, 2, 3\)"):
            score.update(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="labels run from 0 to 3, classes to 2"):
            labels[0, 0, 0] = 3
            score.update(torch.zeros(1, 3, 2, 2), labels)
        assert not score.confusion.any()
