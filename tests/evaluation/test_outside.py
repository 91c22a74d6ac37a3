"""Pictures outside the new domain are judged by what the pretrained model draws for the same prompts."""

from __future__ import annotations

import pytest
import torch

from difftuning_control.evaluation.figures import Sampling
from difftuning_control.evaluation.outside import Outside, still_drawn
from difftuning_control.families.loading import load_family


def features(count: int, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Rows (count, 16) of directions that differ, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 16, generator=torch.Generator().manual_seed(99))
    return rows + noise * torch.randn(count, 16, generator=generator)


def test_what_is_drawn_as_before_is_recognised_whatever_its_length():
    before = features(20)
    assert still_drawn(3 * features(20, 0.1), before) == 1.0


@pytest.mark.parametrize("changed", [5, 10, 20])
def test_a_picture_that_shows_another_prompt_is_not_recognised(changed):
    before = features(20)
    found = before.clone()
    found[:changed] = before[:changed].roll(1, 0)
    assert still_drawn(found, before) == pytest.approx(1 - changed / 20)


def test_pictures_that_are_all_alike_are_recognised_once():
    before = features(20)
    assert still_drawn(before[:1].expand(20, -1), before) == 1 / 20


@pytest.fixture(scope="module")
def judged() -> tuple:
    family = load_family("embedded")
    prompts = [
        "noto emoji pizza",
        "noto emoji guitar",
        "twemoji emoji dog face",
        "emojione emoji red heart",
        "noto emoji tree",
    ]

    def seen(pictures: list) -> torch.Tensor:
        """The mean colours of a picture's sixteen parts."""
        rows = [torch.tensor(list(p.convert("RGB").resize((4, 4)).getdata())).flatten() for p in pictures]
        return torch.stack(rows).float() / 255

    return family, Outside.of(family, seen, Sampling(prompts, [0], 2, 2.0, 64, 5))


def test_the_base_is_compared_with_its_own_pictures_of_other_noise(judged):
    family, outside = judged
    assert outside.before.shape == (5, 48)
    drawn = outside.sampling.draw(family)
    assert not torch.allclose(outside.features(drawn), outside.before)  # or it would be compared with itself
    found = outside.figures(drawn)
    assert set(found) == {"outside_kid", "still_drawn"}
    assert outside.figures(drawn[::-1])["still_drawn"] < 1.0


def test_pictures_of_one_colour_are_far_from_what_was_drawn(judged):
    family, outside = judged
    drawn = outside.sampling.draw(family)
    black = [picture.point(lambda value: 0) for picture in drawn]
    assert outside.figures(black)["outside_kid"] > outside.figures(drawn)["outside_kid"]
