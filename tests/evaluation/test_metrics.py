"""Metrics equal torchmetrics and their own equations, and say plainly what they cannot be computed from."""

import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from difftuning_control.errors import UserError
from difftuning_control.evaluation.metrics import (
    clip_score,
    density_coverage,
    diversity,
    domain_hit_rate,
    fid,
    fid_warning,
    kid,
    memorisation,
    pair_similarity,
)
from support.feature_models import save_tiny_clip


def cloud(count: int, dimensions: int = 6, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Features (count, dimensions) of a correlated Gaussian whose mean is `shift`."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(dimensions) + 0.3 * np.random.default_rng(9).normal(size=(dimensions, dimensions))
    return torch.from_numpy(rng.normal(size=(count, dimensions)) @ mixing + shift).float()


class Given(nn.Module):
    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.fixture(autouse=True)
def _few_pictures_on_purpose():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FID of|Metric `Kernel Inception Distance`")
        yield


# --- FID ------------------------------------------------------------------------------------------------------------


def test_fid_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = cloud(60), cloud(45, shift=0.4, seed=1)
    metric = FrechetInceptionDistance(feature=Given())
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert fid(real, generated) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_fid_is_the_frechet_distance_of_two_gaussians():
    real, generated = cloud(60), cloud(45, shift=0.4, seed=1)
    a, b = real.double().numpy(), generated.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.trace(sqrtm(first @ second).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross
    assert fid(real, generated) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_fid_of_equal_sets_is_zero(count):
    assert abs(fid(cloud(count), cloud(count))) < 1e-5


def test_fid_does_not_depend_on_sides_or_order():
    real, generated = cloud(20), cloud(30, shift=1.0, seed=1)
    assert fid(real, generated) == pytest.approx(fid(generated, real), rel=1e-9)
    assert fid(real.flip(0), generated) == pytest.approx(fid(real, generated), rel=1e-9)


@pytest.mark.parametrize(("real", "generated", "warns"), [(29, 90, True), (90, 29, True), (30, 30, False)])
def test_fid_warns_under_five_pictures_a_dimension(real, generated, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fid(cloud(real), cloud(generated, seed=1))
    said = [str(w.message) for w in caught]
    assert [m for m in said if "FID of 29 pictures in 6 dimensions is biased upwards" in m] == (said if warns else [])
    assert len(said) == warns


def test_the_warning_is_none_where_there_is_nothing_to_warn_of():
    assert fid_warning(30, 30, 6) is None
    assert "trust KID more" in (fid_warning(30, 29, 6) or "")


# --- KID ------------------------------------------------------------------------------------------------------------


def unbiased_mmd(real: Tensor, generated: Tensor) -> float:
    """The squared distance written out as sums over pairs."""
    a, b = real.double().tolist(), generated.double().tolist()

    def kernel(x: list[float], y: list[float]) -> float:
        return (sum(p * q for p, q in zip(x, y)) / len(x) + 1) ** 3

    def within(rows: list[list[float]]) -> float:
        return sum(kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j)

    n, m = len(a), len(b)
    across = sum(kernel(x, y) for x in a for y in b)
    return within(a) / (n * (n - 1)) + within(b) / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize("size", [None, 20])
def test_kid_is_that_of_torchmetrics(size):
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = cloud(40), cloud(30, shift=0.4, seed=1)
    metric = KernelInceptionDistance(feature=Given(), subsets=30, subset_size=size or 30)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        mean, spread = metric.compute()
    found = kid(real, generated, subsets=30, subset_size=size, seed=3)
    assert found == pytest.approx((float(mean), float(spread)), rel=1e-4)
    assert spread > 0


def test_kid_of_the_whole_set_is_the_unbiased_mmd():
    real, generated = cloud(25), cloud(25, shift=0.4, seed=1)
    mean, spread = kid(real, generated, subsets=3)
    assert mean == pytest.approx(unbiased_mmd(real, generated), rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-12)


def test_kid_is_near_zero_within_a_distribution_and_far_above_across():
    one = cloud(400)
    within, across = (kid(one[:200], other, subset_size=100)[0] for other in (one[200:], cloud(200, shift=1.0, seed=1)))
    assert abs(within) < 0.05 * across


def test_kid_follows_its_seed_alone():
    real, generated = cloud(40), cloud(40, shift=0.4, seed=1)
    found = kid(real, generated, subset_size=10)
    torch.manual_seed(77)
    assert kid(real, generated, subset_size=10) == found
    assert kid(real, generated, subset_size=10, seed=1) != found


def test_kid_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    kid(cloud(10), cloud(10, seed=1), subset_size=4)
    assert torch.equal(torch.get_rng_state(), before)


# --- density and coverage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "neighbours", "expected"),
    [
        ([0.5, 3.5], 1, (2.0, 1.0)),  # balls of 0, 1, 3, 7 reach 1, 1, 2, 4 far
        ([0.5, 20.0], 1, (1.0, 0.5)),
        ([20.0], 1, (0.0, 0.0)),
        ([3.5], 2, (1.0, 0.5)),  # they reach 3, 2, 3, 6 far
        ([0.0, 1.0, 3.0, 7.0], 1, (1.0, 1.0)),
    ],
)
def test_density_and_coverage_by_hand(generated, neighbours, expected):
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert density_coverage(real, torch.tensor(generated)[:, None], neighbours) == pytest.approx(expected)


def test_density_and_coverage_by_counting():
    real, generated = cloud(25).double(), cloud(12, shift=0.3, seed=1).double()
    far = [sorted(math.dist(r, o) for o in real.tolist())[5] for r in real.tolist()]
    inside = [[math.dist(r, g) < radius for g in generated.tolist()] for r, radius in zip(real.tolist(), far)]
    density = sum(map(sum, inside)) / (5 * len(generated))
    assert density_coverage(real, generated) == pytest.approx((density, sum(map(any, inside)) / len(real)))


# --- the domain judge -----------------------------------------------------------------------------------------------


def test_separated_clusters_are_hit_or_missed():
    source, target = cloud(20, shift=-5), cloud(30, shift=5, seed=1)
    assert domain_hit_rate(source, target, cloud(8, shift=5, seed=2)) == (1.0, 1.0)
    assert domain_hit_rate(source, target, cloud(8, shift=-5, seed=2)) == (0.0, 1.0)
    half = torch.cat([cloud(6, shift=5, seed=2), cloud(2, shift=-5, seed=3)])
    assert domain_hit_rate(source, target, half)[0] == 0.75


def test_the_judge_of_one_distribution_guesses():
    _, accuracy = domain_hit_rate(cloud(200), cloud(200, seed=1), cloud(10, seed=2))
    assert 0.38 < accuracy < 0.62


def test_more_pictures_of_the_source_do_not_make_the_judge_surer():
    _, accuracy = domain_hit_rate(cloud(300), cloud(20, seed=1), cloud(10, seed=2))
    assert 0.25 < accuracy < 0.75


# --- cosines --------------------------------------------------------------------------------------------------------


def test_pair_similarity_compares_row_by_row():
    generated = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    truth = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-2.0, -2.0]])
    assert pair_similarity(generated[:1], truth[:1]) == pytest.approx(1)
    assert pair_similarity(generated[:2], truth[:2]) == pytest.approx(0.5)
    assert pair_similarity(generated, truth) == pytest.approx(0)


def test_memorisation_takes_the_nearest_training_picture():
    training = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert memorisation(training.flip(0) * 7, training) == pytest.approx(1)
    assert memorisation(torch.tensor([[1.0, 1.0]]), training) == pytest.approx(math.sqrt(0.5))
    assert memorisation(torch.tensor([[-1.0, -1.0]]), training) == pytest.approx(-math.sqrt(0.5))
    assert memorisation(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), training) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_diversity_is_between_pictures_of_one_prompt():
    x, y = [3.0, 0.0], [0.0, 1.0]
    assert diversity(torch.tensor([x, y]), ["a", "b"]) is None
    assert diversity(torch.tensor([x, y, x, y]), ["a", "b", "a", "b"]) == pytest.approx(0)
    assert diversity(torch.tensor([x, y]), ["a", "a"]) == pytest.approx(1)
    assert diversity(torch.tensor([x, x, y]), ["a", "a", "a"]) == pytest.approx(2 / 3)
    assert diversity(torch.tensor([x, y, x, x, x]), ["a", "a", "b", "b", "c"]) == pytest.approx(0.5)


# --- what is refused ------------------------------------------------------------------------------------------------

FEW = cloud(4)
SIX, FLAT, BAD = cloud(6), torch.zeros(6), torch.full((6, 6), math.nan)
REFUSED = {
    "one real picture for FID": (lambda: fid(SIX[:1], SIX), "FID needs at least 2 real pictures; there are 1."),
    "one picture for FID": (lambda: fid(SIX, SIX[:1]), "FID needs at least 2 generated pictures; there are 1."),
    "flat features for FID": (lambda: fid(SIX, FLAT), "FID needs features (N, D); the generated ones are (6,)."),
    "NaN for FID": (lambda: fid(BAD, SIX), "the real features for FID are not finite."),
    "infinity for FID": (lambda: fid(SIX, SIX / 0), "the generated features for FID are not finite."),
    "one picture for KID": (
        lambda: kid(SIX, SIX[:1]),
        "KID needs at least 2 pictures on each side; there are 6 and 1.",
    ),
    "a subset too large for KID": (
        lambda: kid(SIX, FEW, subset_size=5),
        "KID needs at least 5 generated pictures; there are 4.",
    ),
    "flat features for KID": (lambda: kid(FLAT, SIX), "KID needs features (N, D); the real ones are (6,)."),
    "NaN for KID": (lambda: kid(SIX, BAD), "the generated features for KID are not finite."),
    "few real pictures for density": (
        lambda: density_coverage(SIX[:5], SIX),
        "density needs at least 6 real pictures; there are 5.",
    ),
    "no picture for density": (
        lambda: density_coverage(SIX, SIX[:0]),
        "density needs at least 1 generated pictures; there are 0.",
    ),
    "NaN for density": (lambda: density_coverage(SIX, BAD), "the generated features for density are not finite."),
    "few source pictures": (
        lambda: domain_hit_rate(FEW, SIX, SIX),
        "domain hit rate needs at least 5 source pictures; there are 4.",
    ),
    "few target pictures": (
        lambda: domain_hit_rate(SIX, FEW, SIX),
        "domain hit rate needs at least 5 target pictures; there are 4.",
    ),
    "nothing to judge": (
        lambda: domain_hit_rate(SIX, SIX, SIX[:0]),
        "domain hit rate needs at least 1 generated pictures; there are 0.",
    ),
    "NaN to judge": (
        lambda: domain_hit_rate(SIX, SIX, BAD),
        "the generated features for domain hit rate are not finite.",
    ),
    "unequal pairs": (
        lambda: pair_similarity(SIX, FEW),
        "there are 6 generated pictures and 4 true counterparts.",
    ),
    "no pair": (
        lambda: pair_similarity(SIX[:0], SIX[:0]),
        "pair similarity needs at least 1 generated pictures; there are 0.",
    ),
    "a NaN pair": (lambda: pair_similarity(SIX, BAD), "the true features for pair similarity are not finite."),
    "nothing to have copied": (
        lambda: memorisation(SIX, SIX[:0]),
        "memorisation needs at least 1 train pictures; there are 0.",
    ),
    "flat copies": (
        lambda: memorisation(FLAT, SIX),
        "memorisation needs features (N, D); the generated ones are (6,).",
    ),
    "prompts amiss": (lambda: diversity(SIX, ["a"]), "there are 6 generated pictures and 1 prompts."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_that_cannot_serve_are_refused(case):
    call, expected = REFUSED[case]
    with pytest.raises(UserError) as refused:
        call()
    assert str(refused.value) == expected


# --- the CLIP score -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


def cosines(folder: Path, pictures: list[Image.Image], prompts: list[str]) -> Tensor:
    """Of each picture and its prompt, from the model itself."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for picture, prompt in zip(pictures, prompts):
            out = model(**processor(text=[prompt], images=[picture], return_tensors="pt"))
            found.append(torch.cosine_similarity(out.image_embeds, out.text_embeds)[0])
    return torch.stack(found)


def noise(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (28 + i, 40, 3), dtype=np.uint8)) for i in range(count)]


def test_clip_score_is_a_hundred_times_the_mean_cosine_but_not_below_zero(clip_dir, tmp_path):
    from transformers import CLIPModel

    pictures, prompts, places = noise(4), ["red", "a blue square", "z", "red red red"], {}
    for sign in (1, -1):  # of this model at random, of which transformers' versions make another
        places[sign] = tmp_path / str(sign)
        shutil.copytree(clip_dir, places[sign])
        model = CLIPModel.from_pretrained(clip_dir)
        model.visual_projection.weight.data.mul_(sign)
        model.save_pretrained(places[sign])
    alike = max(places, key=lambda sign: float(cosines(places[sign], pictures, prompts).min()))
    expected = cosines(places[alike], pictures, prompts)
    assert expected.min() > 0
    score = clip_score(pictures[1:2], prompts[1:2], str(places[alike]))
    assert score == pytest.approx(100 * float(expected[1]), abs=1e-3)
    score = clip_score(pictures, prompts, str(places[alike]))
    assert score == pytest.approx(100 * float(expected.mean()), abs=1e-3)
    assert clip_score(pictures, prompts, str(places[-alike])) == 0


def test_clip_score_without_weights_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"CLIP \(openai/clip-vit-large-patch14\) are not .* local directory"):
        clip_score(noise(1), ["red"])
