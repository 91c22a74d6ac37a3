"""The weights of a masked loss."""

import pytest
import torch

from difftuning_control.objective import mask_weights, per_sample_loss
from difftuning_control.objective.batch import LatentBatch


def left_half(side: int = 16) -> torch.Tensor:
    mask = torch.zeros(1, 1, side, side)
    mask[..., : side // 2] = 1
    return mask


@pytest.mark.parametrize("outside", [0.0, 0.1, 0.7, 1.0])
def test_a_white_mask_is_the_loss_without_one(outside):
    weights = mask_weights(torch.ones(2, 1, 16, 16), (4, 4), outside)
    assert torch.equal(weights, torch.ones(2, 1, 4, 4))
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(per_sample_loss(prediction, target, weights), per_sample_loss(prediction, target))


def test_the_loss_is_the_mean_error_of_what_is_learnt():
    weights = mask_weights(left_half(), (4, 4))
    prediction, target = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    expected = (prediction - target)[..., :2].square().mean()
    torch.testing.assert_close(per_sample_loss(prediction, target, weights)[0], expected)


def test_outside_counts_as_much_as_is_said():
    weights = mask_weights(left_half(), (4, 4), 0.25)
    torch.testing.assert_close(weights[..., 2:] / weights[..., :2], torch.full((1, 1, 4, 2), 0.25))
    assert weights.mean() == pytest.approx(1)


def test_a_small_subject_counts_as_a_large_one():
    small = torch.zeros(1, 1, 16, 16)
    small[..., :4, :4] = 1
    constant = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    losses = [per_sample_loss(*constant, mask_weights(mask, (4, 4), 0.1)) for mask in (small, left_half())]
    assert [float(loss) for loss in losses] == pytest.approx([1, 1])


@pytest.mark.parametrize("outside", [0.0, 0.1])
def test_a_black_mask_counts_as_what_is_outside(outside):
    weights = mask_weights(torch.zeros(1, 1, 8, 8), (4, 4), outside)
    torch.testing.assert_close(weights, torch.full((1, 1, 4, 4), outside))


def test_a_place_counts_by_the_share_of_its_pixels():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :2, :2] = 1
    mask[..., :2, 2] = 1  # half of the next place
    weights = mask_weights(mask, (4, 4))[0, 0]
    assert float(weights[0, 1] / weights[0, 0]) == pytest.approx(0.5)
    assert float(weights[1:].abs().max()) == 0


@pytest.mark.parametrize(
    ("masks", "outside", "said"),
    [
        (torch.ones(1, 8, 8), 0.1, r"masks are \(1, 8, 8\); expected \(B, 1, H, W\)"),
        (torch.ones(1, 3, 8, 8), 0.1, r"masks are \(1, 3, 8, 8\)"),
        (2 * torch.ones(1, 1, 8, 8), 0.1, "masks have values from 2 to 2; expected 0 to 1"),
        (torch.ones(1, 1, 8, 8), 1.5, "outside is 1.5; expected 0 to 1"),
    ],
)
def test_masks_out_of_their_range_are_refused(masks, outside, said):
    with pytest.raises(ValueError, match=said):
        mask_weights(masks, (4, 4), outside)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"loss_weights are \(1, 3, 4, 4\); expected \(1, 1, 4, 4\)"):
        per_sample_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match="loss_weights"):
        LatentBatch(torch.zeros(2, 3, 4, 4), {}, torch.zeros(2, dtype=torch.bool), [], torch.ones(1, 1, 4, 4))


def test_a_batch_takes_them_along():
    weights = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    batch = LatentBatch(torch.zeros(3, 3, 4, 4), {}, torch.zeros(3, dtype=torch.bool), [], weights)
    chosen = batch.rows(torch.tensor([2, 0])).to("cpu", torch.bfloat16)
    assert chosen.loss_weights is not None
    assert (chosen.latents.dtype, chosen.loss_weights.dtype) == (torch.bfloat16, torch.float32)
    assert chosen.loss_weights[:, 0, 0, 0].tolist() == [2, 0]
