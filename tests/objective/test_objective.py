import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from difftuning_control.objective.difftuning import DiffTuningObjective, per_sample_loss
from difftuning_control.objective.noise import NoiseProcess
from difftuning_control.objective.schedules import ConstantSchedule, PaperSchedule, PowerSchedule, TabulatedSchedule

T = 20
TABLE = TabulatedSchedule(u=[0.1, 0.5, 1.0], psi=[0.0, 0.2, 3.0], xi=[2.0, 2.0, 0.5])
HALVES = TabulatedSchedule(u=[0.0, 0.5, 1.0], psi=[0.0, 0.0, 1.0], xi=[1.0, 0.0, 0.0])
FOUR_ROLES = torch.tensor([False, True, True, False])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def process_of(prediction: str, levels: int = T, base_density: str = "uniform") -> NoiseProcess:
    if prediction == "flow":
        return NoiseProcess.from_scheduler(FlowMatchEulerDiscreteScheduler(levels, shift=3.0), base_density)
    return NoiseProcess.from_scheduler(DDPMScheduler(levels, prediction_type=prediction), base_density)


class TinyDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, noisy_model_input: Tensor, timesteps: Tensor) -> Tensor:
        known = torch.cat([noisy_model_input.flatten(1), timesteps.view(-1, 1) / T], dim=1)
        return self.layers(known).view_as(noisy_model_input)


class TwoPictures:
    """A bank of a few lines, as the protocol allows: constant latents, numbered 100 and on."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, items: Tensor) -> Tensor:
        return (100 + items).view(-1, 1, 1, 1).expand(len(items), 4, 2, 2).double()


def loss_at_every_level(objective: DiffTuningObjective, model: nn.Module, seed: int) -> Tensor:
    """ℓ of one picture with one noise, (T,)."""
    latents, noise = torch.randn(2, 1, 1, 2, 2, generator=seeded(seed))
    levels = torch.arange(T)
    noised = objective.add_noise(latents.expand(T, -1, -1, -1), noise.expand(T, -1, -1, -1), levels)
    return per_sample_loss(model(noised.noisy_model_input, noised.timesteps), noised.target)


def expected_loss_and_gradient(objective: DiffTuningObjective) -> tuple[Tensor, Tensor]:
    """E[combine] of a target row and a bank row, summed over all T² pairs of their levels."""
    model = TinyDenoiser()
    target_loss, bank_loss = (loss_at_every_level(objective, model, seed) for seed in (1, 2))
    target_density, bank_density = objective.density(retention=False), objective.density(retention=True)
    pairs = torch.cartesian_prod(torch.arange(T), torch.arange(T))
    losses = torch.stack([target_loss[pairs[:, 0]], bank_loss[pairs[:, 1]]], dim=1)
    combined = torch.vmap(objective.combine, in_dims=(0, 0, None))(losses, pairs, torch.tensor([False, True]))
    loss = (target_density[pairs[:, 0]] * bank_density[pairs[:, 1]] * combined).sum()
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in gradient]).double()


@pytest.mark.parametrize(
    ("prediction", "base_density", "min_snr_gamma"),
    [
        ("epsilon", "uniform", None),
        ("epsilon", "uniform", 5.0),
        ("v_prediction", "uniform", None),
        ("v_prediction", "uniform", 5.0),
        ("flow", "uniform", None),
        ("flow", "logit_normal", None),
    ],
)
@pytest.mark.parametrize(
    "schedule",
    [
        PowerSchedule(0.3),
        PowerSchedule(1.0),
        PowerSchedule(2.0),
        PaperSchedule(0.5, T),
        TABLE,
        ConstantSchedule(2.0, 0.5),
    ],
    ids=lambda schedule: schedule.to_dict()["kind"],
)
def test_both_estimators_have_the_same_expected_loss_and_gradient(schedule, prediction, base_density, min_snr_gamma):
    process = process_of(prediction, T, base_density)
    settings = {"retention_weight": 0.7, "min_snr_gamma": min_snr_gamma}
    weight_loss, weight_gradient = expected_loss_and_gradient(
        DiffTuningObjective(process, schedule, "weight", **settings)
    )
    sample_loss, sample_gradient = expected_loss_and_gradient(
        DiffTuningObjective(process, schedule, "sample", **settings)
    )
    z_psi = (schedule.psi(process.u).double() * process.base_density).sum()
    torch.testing.assert_close(sample_loss * z_psi, weight_loss, rtol=1e-5, atol=0)
    assert (sample_gradient * z_psi - weight_gradient).norm() < 1e-5 * weight_gradient.norm()


def test_the_expected_weighted_loss_is_the_equation():
    schedule, process = PowerSchedule(2.0), process_of("epsilon")
    objective = DiffTuningObjective(process, schedule, "weight", retention_weight=0.7)
    target_loss, bank_loss = (loss_at_every_level(objective, TinyDenoiser(), seed).detach() for seed in (1, 2))
    equation = (process.u**2 * target_loss).mean() + 0.7 * ((1 - process.u**2) * bank_loss).mean()
    torch.testing.assert_close(expected_loss_and_gradient(objective)[0].float(), equation)


# --- the authors' code ------------------------------------------------------------------------------------------------


def authors_probabilities(tau: float) -> tuple[Tensor, Tensor]:
    probs = torch.tensor([i**tau for i in range(1, 1001)], dtype=torch.float64)
    rev_probs = torch.tensor([i**tau for i in range(1000, 0, -1)], dtype=torch.float64)
    return probs / probs.sum(), rev_probs / rev_probs.sum()


def paper_objective(tau: float) -> DiffTuningObjective:
    if tau == 1.0:
        return DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="paper")
    return DiffTuningObjective.from_scheduler(DDPMScheduler(), schedule=PaperSchedule(tau, 1000))


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_paper_densities_are_the_authors(tau):
    objective = paper_objective(tau)
    probs, rev_probs = authors_probabilities(tau)
    torch.testing.assert_close(objective.density(retention=False), probs, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(objective.density(retention=True), rev_probs, rtol=1e-4, atol=1e-9)


def test_paper_timesteps_are_drawn_with_the_authors_probabilities():
    draws = 100_000
    is_retention = torch.arange(2 * draws) % 2 == 1
    timesteps = paper_objective(1.0).sample_timesteps(is_retention, seeded())
    for role, probs in zip((~is_retention, is_retention), authors_probabilities(1.0)):
        expected = probs.view(20, 50).sum(1)
        frequency = (timesteps[role] // 50).bincount(minlength=20) / draws
        assert ((frequency - expected).abs() <= 5 * (expected / draws).sqrt()).all()


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_paper_loss_is_the_authors(tau):
    batch_size, retention_rows = 26, 6
    objective = paper_objective(tau)
    losses = torch.rand(batch_size + retention_rows, generator=seeded())
    is_retention = torch.arange(len(losses)) >= batch_size
    timesteps = objective.sample_timesteps(is_retention, seeded())
    loss_t, loss_s = losses.split([batch_size, retention_rows])
    expected = loss_t.mean() + 0.1 * loss_s.mean()
    torch.testing.assert_close(objective.reduce(losses, timesteps, is_retention), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("batch_size", "rows"), [(4, 0), (5, 1), (9, 1), (32, 6), (256, 51)])
def test_paper_takes_a_fifth_of_the_batch_from_the_bank_rounded_down(batch_size, rows):
    assert paper_objective(1.0).retention_rows(batch_size) == rows


# --- the baselines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sample", "weight"])
def test_plain_preset_is_the_ordinary_mean_squared_error(estimator):
    objective = DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="plain", estimator=estimator)
    prediction, target = torch.randn(2, 8, 4, 2, 2, generator=seeded())
    roles = torch.zeros(8, dtype=torch.bool)
    timesteps = objective.sample_timesteps(roles, seeded())
    loss = objective.reduce(per_sample_loss(prediction, target), timesteps, roles)
    torch.testing.assert_close(loss, F.mse_loss(prediction, target))


def test_plain_preset_draws_uniformly_and_takes_nothing_from_the_bank():
    objective = DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="plain")
    torch.testing.assert_close(objective.density(retention=False), torch.full((1000,), 1e-3, dtype=torch.float64))
    assert objective.retention_rows(32) == 0
    assert not objective.uses_retention


@pytest.mark.parametrize("estimator", ["sample", "weight"])
def test_prior_preservation_preset_is_dreambooths_loss(estimator):
    objective = DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="prior_preservation", estimator=estimator)
    prediction, target = torch.randn(2, 8, 4, 2, 2, generator=seeded())
    is_prior = torch.arange(8) >= 4
    timesteps = objective.sample_timesteps(is_prior, seeded())
    loss = objective.reduce(per_sample_loss(prediction, target), timesteps, is_prior)
    instance_loss, prior_loss = F.mse_loss(prediction[:4], target[:4]), F.mse_loss(prediction[4:], target[4:])
    torch.testing.assert_close(loss, instance_loss + 1.0 * prior_loss)


def test_prior_preservation_preset_draws_uniformly_for_half_of_the_batch():
    objective = DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="prior_preservation")
    for retention in (False, True):
        torch.testing.assert_close(objective.density(retention), torch.full((1000,), 1e-3, dtype=torch.float64))
    assert objective.retention_rows(8) == 4


def test_a_presets_settings_can_be_overridden():
    objective = DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="prior_preservation", retention_weight=0.3)
    assert (objective.retention_weight, objective.retention_ratio) == (0.3, 0.5)


# --- mix --------------------------------------------------------------------------------------------------------------


def mixed(
    rows: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0, **settings
) -> tuple[Tensor, Tensor, Tensor]:
    objective = DiffTuningObjective(process_of("epsilon"), PowerSchedule(), **settings)
    latents = torch.arange(rows, dtype=dtype).view(-1, 1, 1, 1).expand(rows, 4, 2, 2)
    prompt_embeds, empty = torch.ones(rows, 3, 5, dtype=dtype), torch.full((1, 3, 5), -1.0)
    return objective.mix(latents, prompt_embeds, TwoPictures(), empty, seeded(seed))


def test_mix_appends_bank_rows_of_the_same_shape():
    latents, prompt_embeds, is_retention = mixed(rows=8, retention_ratio=0.2)
    assert latents.shape == (10, 4, 2, 2)
    assert prompt_embeds.shape == (10, 3, 5)
    assert is_retention.tolist() == [False] * 8 + [True] * 2


def test_mix_keeps_the_target_rows_and_adds_the_banks():
    latents, _, is_retention = mixed(rows=8, retention_ratio=0.5)
    assert latents[~is_retention][:, 0, 0, 0].tolist() == list(range(8))
    assert set(latents[is_retention][:, 0, 0, 0].tolist()) == {100, 101}


def test_mix_gives_bank_rows_the_empty_prompt():
    _, prompt_embeds, is_retention = mixed(rows=8)
    assert (prompt_embeds[is_retention] == -1).all()
    assert (prompt_embeds[~is_retention] == 1).all()


@pytest.mark.parametrize("rows", [4, 8, 32])
@pytest.mark.parametrize("ratio", [0.2, 0.25, 0.5, 0.8])
def test_the_banks_share_of_a_mixed_batch_is_the_ratio(rows, ratio):
    is_retention = mixed(rows=rows, retention_ratio=ratio)[2]
    assert int(is_retention.sum()) == pytest.approx(ratio * len(is_retention), abs=0.5)


def test_mix_takes_at_least_one_row_from_the_bank():
    assert mixed(rows=1, retention_ratio=0.1)[2].tolist() == [False, True]


@pytest.mark.parametrize("off", ["retention_ratio", "retention_weight"])
def test_without_retention_mix_adds_nothing(off):
    latents, prompt_embeds, is_retention = mixed(rows=8, **{off: 0.0})
    assert len(latents) == len(prompt_embeds) == 8
    assert is_retention.tolist() == [False] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mix_keeps_the_batches_dtype(dtype):
    latents, prompt_embeds, is_retention = mixed(dtype=dtype)
    assert latents.dtype == prompt_embeds.dtype == dtype
    assert is_retention.dtype == torch.bool


def test_mix_draws_from_the_bank_with_the_generator():
    first, again, other = (mixed(rows=32, retention_ratio=0.5, seed=seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratified", [False, True])
def test_the_same_generator_draws_the_same_levels(stratified):
    objective = DiffTuningObjective(process_of("epsilon", 1000), PowerSchedule(), stratified=stratified)
    roles = torch.arange(32) % 4 == 0
    first, again, other = (objective.sample_levels(roles, seeded(seed)).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_rows_draw_by_their_role_wherever_they_are(prediction, stratified):
    process = process_of(prediction, 100)
    is_retention = torch.rand(400, generator=seeded()) < 0.3
    objective = DiffTuningObjective(process, HALVES, stratified=stratified)
    u = process.u[objective.sample_levels(is_retention, seeded())]
    assert (u[~is_retention] > 0.5).all()
    assert (u[is_retention] < 0.5).all()


def test_stratified_levels_cover_the_density_of_each_role_evenly():
    objective = DiffTuningObjective(process_of("epsilon", 1000), PowerSchedule(), stratified=True)
    roles = torch.arange(96) % 3 == 0
    levels = objective.sample_levels(roles, seeded())
    for retention, count in ((False, 64), (True, 32)):
        below = levels[roles == retention].bincount(minlength=1000).cumsum(0)
        assert ((below - count * objective.density(retention).cumsum(0)).abs() <= 1 + 1e-9).all()


def test_the_draws_of_a_role_do_not_depend_on_where_its_rows_are():
    objective = DiffTuningObjective(process_of("epsilon", 1000), PowerSchedule())
    roles = torch.arange(10) >= 7
    shuffled = roles[torch.randperm(10, generator=seeded())]
    levels, moved = objective.sample_levels(roles, seeded(1)), objective.sample_levels(shuffled, seeded(1))
    for retention in (False, True):
        assert levels[roles == retention].equal(moved[shuffled == retention])


@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
@pytest.mark.parametrize("estimator", ["sample", "weight"])
def test_permuting_the_rows_permutes_their_weights_and_keeps_the_loss(estimator, min_snr_gamma):
    objective = DiffTuningObjective(process_of("epsilon"), TABLE, estimator, min_snr_gamma=min_snr_gamma)
    roles, levels, losses = torch.arange(10) >= 7, torch.arange(10), torch.rand(10, generator=seeded())
    order = torch.randperm(10, generator=seeded())
    weights = objective.row_weights(levels, roles)
    assert objective.row_weights(levels[order], roles[order]).equal(weights[order])
    torch.testing.assert_close(
        objective.combine(losses[order], levels[order], roles[order]), objective.combine(losses, levels, roles)
    )


def test_more_bank_rows_do_not_change_the_banks_weight():
    objective = DiffTuningObjective(process_of("epsilon"), PowerSchedule())
    losses, levels = torch.tensor([0.5, 0.25, 0.75, 1.0]), torch.tensor([3, 4, 5, 6])
    once = objective.combine(losses, levels, FOUR_ROLES)
    rows = torch.tensor([0, 3, 1, 2, 1, 2, 1, 2])
    torch.testing.assert_close(objective.combine(losses[rows], levels[rows], FOUR_ROLES[rows]), once)


def test_the_loss_of_a_batch_is_the_sum_of_its_roles():
    objective = DiffTuningObjective(process_of("epsilon"), PowerSchedule(), "weight")
    losses, levels = torch.tensor([0.5, 0.25, 0.75, 1.0]), torch.tensor([3, 4, 5, 6])
    parts = [objective.combine(losses[part], levels[part], FOUR_ROLES[part]) for part in (~FOUR_ROLES, FOUR_ROLES)]
    torch.testing.assert_close(objective.combine(losses, levels, FOUR_ROLES), parts[0] + parts[1])


@pytest.mark.parametrize("role", [False, True])
def test_a_batch_of_one_role_has_the_mean_of_its_weighted_losses(role):
    objective = DiffTuningObjective(process_of("epsilon"), PowerSchedule(), "weight")
    losses, levels, roles = torch.rand(4, generator=seeded()), torch.arange(4), torch.full((4,), role)
    expected = (losses * objective.row_weights(levels, roles)).mean()
    torch.testing.assert_close(objective.combine(losses, levels, roles), expected)


@pytest.mark.parametrize("estimator", ["sample", "weight"])
def test_parts_of_a_batch_add_up_to_its_loss_when_they_know_its_counts(estimator):
    objective = DiffTuningObjective(process_of("epsilon"), TABLE, estimator)
    losses, levels, roles = torch.rand(10, generator=seeded()), torch.arange(10), torch.arange(10) >= 7
    parts = [objective.combine(losses[p], levels[p], roles[p], (7, 3)) for p in (slice(4), slice(4, 8), slice(8, 10))]
    torch.testing.assert_close(torch.stack(parts).sum(), objective.combine(losses, levels, roles))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_reduce_by_timesteps_is_combine_by_levels(prediction):
    objective = DiffTuningObjective(process_of(prediction, 1000), TABLE, "weight")
    roles, losses = torch.arange(64) % 5 == 0, torch.rand(64, generator=seeded())
    levels = objective.sample_levels(roles, seeded(1))
    timesteps = objective.sample_timesteps(roles, seeded(1))
    assert objective.reduce(losses, timesteps, roles).equal(objective.combine(losses, levels, roles))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_add_noise_gives_what_the_process_gives(prediction):
    process = process_of(prediction)
    latents, noise = torch.randn(2, T, 1, 2, 2, generator=seeded())
    levels = torch.arange(T).flip(0)
    noised = DiffTuningObjective(process, PowerSchedule()).add_noise(latents, noise, levels)
    assert noised.noisy_model_input.equal(process.add_noise(latents, noise, levels))
    assert noised.target.equal(process.target(latents, noise, levels))
    assert noised.timesteps.equal(process.timesteps.flip(0))
    assert noised.levels.equal(levels)


def test_min_snr_multiplies_the_weights_of_both_estimators():
    process, levels, roles = process_of("v_prediction", 1000), torch.tensor([0, 300, 600, 999]), FOUR_ROLES
    for estimator in ("sample", "weight"):
        without, with_gamma = (
            DiffTuningObjective(process, TABLE, estimator, min_snr_gamma=gamma).row_weights(levels, roles)
            for gamma in (None, 5.0)
        )
        torch.testing.assert_close(with_gamma, without * process.min_snr_weight(levels, 5.0))


@pytest.mark.parametrize("estimator", ["sample", "weight"])
def test_losses_in_half_precision_are_reduced_in_float32(estimator):
    objective = DiffTuningObjective(process_of("epsilon"), TABLE, estimator)
    loss = objective.combine(torch.ones(4, dtype=torch.bfloat16), torch.arange(4), FOUR_ROLES)
    assert loss.dtype == torch.float32


def test_per_sample_loss_averages_each_row_in_float32():
    prediction, target = torch.randn(2, 5, 4, 2, 2, generator=seeded()).bfloat16()
    losses = per_sample_loss(prediction, target)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses, torch.stack([F.mse_loss(p.float(), t.float()) for p, t in zip(prediction, target)])
    )


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "both"}, "estimator is 'both'; expected sample or weight"),
        ({"retention_weight": -0.1}, "retention_weight is -0.1; expected a finite number of at least 0"),
        ({"retention_weight": float("inf")}, "retention_weight is inf"),
        ({"retention_weight": float("nan")}, "retention_weight is nan"),
        ({"retention_ratio": -0.1}, "retention_ratio is -0.1; expected at least 0 and less than 1"),
        ({"retention_ratio": 1.0}, "retention_ratio is 1.0"),
        ({"retention_ratio": float("nan")}, "retention_ratio is nan"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma is 0.0; expected a finite number above 0"),
        ({"min_snr_gamma": float("inf")}, "min_snr_gamma is inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffTuningObjective(process_of("epsilon"), PowerSchedule(), **settings)


def test_min_snr_is_refused_for_flow_matching():
    with pytest.raises(ValueError, match="defined for epsilon and v_prediction"):
        DiffTuningObjective(process_of("flow"), PowerSchedule(), min_snr_gamma=5.0)


def test_sampling_refuses_bank_rows_that_never_count():
    with pytest.raises(ValueError, match=r"xi is 0 at every level, .* set retention_ratio and retention_weight to 0"):
        DiffTuningObjective(process_of("epsilon"), ConstantSchedule(1.0, 0.0))


@pytest.mark.parametrize("given", [{}, {"preset": "paper", "schedule": PowerSchedule()}])
def test_from_scheduler_needs_either_a_preset_or_a_schedule(given):
    with pytest.raises(ValueError, match="either preset= or schedule="):
        DiffTuningObjective.from_scheduler(DDPMScheduler(), **given)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset is 'best'; expected one of paper, plain, prior_preservation"):
        DiffTuningObjective.from_scheduler(DDPMScheduler(), preset="best")


@pytest.mark.wide
def test_the_objective_can_be_imported_without_any_model_library():
    code = "import sys, difftuning_control.objective.difftuning; print(*sys.modules)"
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert {"diffusers", "accelerate", "transformers"}.isdisjoint(loaded.split())
