"""Fidelity to a condition: what agrees scores best, what does not scores less, and small cases equal those by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from difftuning_control.evaluation.condition_figures import KINDS, MAIN, fidelity

RED, GREEN, BLUE, BLACK, GREY = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0, 0, 0), (0.5, 0.5, 0.5)


def one(kind: str, asked: Tensor, found: Tensor, figure: str | None = None) -> float:
    """A figure of single pictures, the main one unless named."""
    return float(fidelity(kind, asked[None], found[None])[figure or MAIN[kind][0]][0])


def grey(plane) -> Tensor:
    return torch.as_tensor(plane, dtype=torch.float32).expand(3, -1, -1)


def lines(shift: int = 0, size: int = 64) -> Tensor:
    """Thin vertical lines, 16 pixels apart."""
    plane = torch.zeros(size, size)
    plane[:, 8 + shift :: 16] = 1
    return grey(plane)


def noisy(seed: int, *size: int) -> Tensor:
    return torch.rand(3, *(size or (24, 24)), generator=torch.Generator().manual_seed(seed))


def colours(rows, scale: int = 1) -> Tensor:
    """A picture (3, H, W) of colours by pixel, each repeated into a square."""
    plane = torch.tensor(rows).permute(2, 0, 1)
    return plane.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def normal_map(angle: float) -> Tensor:
    """One normal everywhere, turned by the angle about the y axis."""
    n = torch.tensor([math.sin(angle), 0, math.cos(angle)])
    return ((n + 1) / 2).view(3, 1, 1).expand(3, 16, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_asked_scores_best_and_every_picture_has_its_own_value(kind):
    asked = torch.stack([noisy(s) for s in range(4)])
    found = asked.clone()
    found[2] = 0
    figures = fidelity(kind, asked, found)
    name, higher = MAIN[kind]
    assert all(v.shape == (4,) and v.dtype == torch.float32 for v in figures.values())
    for figure, values in figures.items():
        best = 0.0 if figure == "rmse" else 1.0
        torch.testing.assert_close(values[[0, 1, 3]], torch.full((3,), best))
    if kind != "masks":  # colours of segments are arbitrary
        assert (figures[name][2] < figures[name][0]) == higher
    torch.testing.assert_close(figures[name][1:2], fidelity(kind, asked[1:2], found[1:2])[name])


def test_edges_tolerate_one_pixel_and_not_three():
    assert one("edges", lines(), lines()) == 1
    assert one("edges", lines(), lines(1)) == 1
    assert one("edges", lines(), lines(-1)) == 1
    assert one("edges", lines(), lines(2)) == 0
    assert one("edges", lines(), lines(3)) < 0.5


def test_a_diagonal_neighbour_is_within_one_pixel():
    asked, found = torch.zeros(2, 8, 8)
    asked[3, 3], found[4, 4] = 1, 1
    assert one("edges", grey(asked), grey(found)) == 1


def test_f1_by_hand():
    asked, found = torch.zeros(2, 12, 12)
    asked[2, [1, 4, 7, 10]] = 1  # four, of which three are found
    found[2, [1, 4, 7]] = 1
    found[8, [1, 4, 7]] = 1  # six, of which three were asked
    precision, recall = 3 / 6, 3 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert one("edges", grey(asked), grey(found)) == pytest.approx(expected)
    assert one("edges", grey(found), grey(asked)) == pytest.approx(expected)


def test_f1_falls_with_every_false_edge_and_with_every_missing_one():
    false, missing = [], []
    for k in range(5):
        found = lines().clone()
        found[:, :, [4 + 16 * j for j in range(k)]] = 1
        false.append(one("edges", lines(), found))
        found = lines().clone()
        found[:, :, 8 : 8 + 16 * k] = 0
        missing.append(one("edges", lines(), found))
    assert false[0] == missing[0] == 1
    assert all(b < a for a, b in pairwise(false))
    assert all(b < a for a, b in pairwise(missing))
    assert missing[-1] == 0


def test_edges_of_empty_pictures():
    empty = torch.zeros(3, 64, 64)
    assert one("edges", empty, empty) == 1
    assert one("edges", empty, lines()) == 0
    assert one("edges", lines(), empty) == 0


def test_soft_edges_are_cut_at_a_quarter_of_full_scale():
    assert one("edges", lines(), 0.3 * lines()) == 1
    assert one("edges", lines(), 0.2 * lines()) == 0


def test_rmse_of_depth_by_hand():
    asked, found = grey(torch.zeros(8, 8)), grey(torch.full((8, 8), 0.3))
    assert one("depth", asked, found) == pytest.approx(0.3)
    half = torch.zeros(8, 8)
    half[:4] = 0.4
    assert one("depth", asked, grey(half)) == pytest.approx(0.4 / math.sqrt(2))
    tinted = torch.zeros(3, 8, 8)
    tinted[0] = 0.3  # a mean of 0.1
    assert one("depth", asked, tinted) == pytest.approx(0.1)


def reference_ssim(a: np.ndarray, b: np.ndarray, sigma: float = 1.5) -> float:
    """Wang et al.'s SSIM by scipy, over planes mirrored at their borders."""
    blur = lambda x: gaussian_filter(x, (0, sigma, sigma), truncate=3.5, mode="mirror")  # noqa: E731
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * cov + c2) / (var_a + var_b + c2)).mean())


@pytest.mark.parametrize("kind", ["similarity", "edges", "depth"])
def test_ssim_equals_its_equation(kind):
    a, b = noisy(0, 32, 48), noisy(1, 32, 48)
    b = 0.7 * a + 0.3 * b
    assert one(kind, a, b, "ssim") == pytest.approx(reference_ssim(a.double().numpy(), b.double().numpy()), abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3), (4, 16), (10, 10), (11, 11)])
def test_ssim_of_pictures_smaller_than_its_window(size):
    a, b = noisy(0, *size), noisy(1, *size)
    assert one("similarity", a, a) == pytest.approx(1)
    assert -1 <= one("similarity", a, b) < 1
    if min(size) == 10:  # 9 pixels
        expected = reference_ssim(a.double().numpy(), b.double().numpy(), 4 / 3.5)
        assert one("similarity", a, b) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("degrees", [0, 30, 90, 150, 180])
def test_cosine_of_turned_normals(degrees):
    angle = math.radians(degrees)
    assert one("normals", normal_map(0.4), normal_map(0.4 + angle)) == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_length_of_a_normal_does_not_matter_to_its_direction():
    short = (normal_map(0.7) - 0.5) * 0.4 + 0.5
    assert one("normals", normal_map(0.7), short) == pytest.approx(1)
    assert one("normals", normal_map(0.7), short, "rmse") > 0.1


def test_normals_without_a_direction():
    none = colours([[GREY] * 16] * 16)
    nearly = (none * 255).round() / 255  # as it comes from a file
    assert one("normals", none, nearly) == 1
    assert one("normals", normal_map(0), nearly) == 0
    half = normal_map(0).clone()
    half[:, :8] = 0.5
    assert one("normals", normal_map(0), half) == pytest.approx(0.5)


def test_miou_does_not_depend_on_the_colours():
    asked = colours([[RED, GREEN], [BLUE, BLACK]], 8)
    permuted = colours([[GREEN, (1.0, 1.0, 0)], [(0.2, 0.3, 0.4), RED]], 8)
    assert one("masks", asked, permuted) == 1


def test_miou_by_hand():
    asked = colours([[RED, RED, RED, RED, GREEN, GREEN, GREEN, GREEN]])
    found = colours([[BLUE, BLUE, BLUE, BLUE, BLUE, BLUE, RED, RED]])
    assert one("masks", asked, found) == pytest.approx((4 / 6 + 2 / 4) / 2)


def test_a_found_segment_serves_one_asked_segment_only():
    asked = colours([[RED, GREEN, BLUE, BLACK]], 8)
    assert one("masks", asked, colours([[RED] * 4], 8)) == pytest.approx(1 / 4 / 4)
    assert one("masks", colours([[RED] * 4], 8), asked) == pytest.approx(1 / 4)


def test_segments_are_matched_for_the_best_sum():
    asked = colours([[RED] * 6 + [GREEN] * 4])
    found = colours([[BLUE] * 2 + [RED] * 8])  # red fits red best with 4/10, but serves green with 4/8
    assert one("masks", asked, found) == pytest.approx((2 / 6 + 4 / 8) / 2)


def test_tiny_segments_are_not_asked_for():
    asked = colours([[RED, GREEN]], 32)
    found = asked.clone()
    asked[:, 5, 5] = 1  # 1 of 2048 pixels
    assert one("masks", asked, found) > 0.99
    assert one("masks", noisy(0, 32, 64), found) == 0


def test_noise_has_more_colours_than_could_be_matched():
    assert one("masks", colours([[RED, GREEN]], 128), noisy(0, 128, 256)) == 0


def test_errors():
    fine = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="'hough'"):
        fidelity("hough", fine, fine)
    for asked, found in ((fine, fine[:1]), (fine[0], fine[0]), (fine[:, :1], fine[:, :1]), (fine[:0], fine[:0])):
        with pytest.raises(ValueError, match="expected equal"):
            fidelity("edges", asked, found)
    with pytest.raises(ValueError, match=r"found conditions lie in 0 to 255"):
        fidelity("edges", fine, torch.linspace(0, 255, 384).view(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"asked conditions lie in -1 to 0"):
        fidelity("depth", torch.linspace(-1, 0, 384).view(2, 3, 8, 8), fine)
    with pytest.raises(ValueError, match="nan"):
        fidelity("normals", fine + torch.nan, fine)


def test_half_precision_is_taken():
    asked = torch.stack([noisy(3)])
    figures = fidelity("similarity", asked.half(), asked)
    assert figures["ssim"][0] == pytest.approx(1, abs=1e-3)
