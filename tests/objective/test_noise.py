import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from difftuning_control.objective.noise import NoiseProcess

T = 1000
DDPM_TYPE = {
    "ddpm-epsilon": lambda: DDPMScheduler(clip_sample=False),
    "ddpm-v": lambda: DDPMScheduler(
        prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", clip_sample=False
    ),
    "ddim": lambda: DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
}
FLOW = {
    "flow": lambda: FlowMatchEulerDiscreteScheduler(T),
    "flow-shift-3": lambda: FlowMatchEulerDiscreteScheduler(T, shift=3.0),
    "flow-dynamic-shift": lambda: FlowMatchEulerDiscreteScheduler(T, shift=3.0, use_dynamic_shifting=True),
}
ddpm_type = pytest.mark.parametrize("make", DDPM_TYPE.values(), ids=DDPM_TYPE)
flow = pytest.mark.parametrize("make", FLOW.values(), ids=FLOW)
every_scheduler = pytest.mark.parametrize("make", (DDPM_TYPE | FLOW).values(), ids=DDPM_TYPE | FLOW)
zero_terminal_snr = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def latents_and_noise(rows: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, rows, 2, 3, 3, generator=generator)
    return latents, noise


@every_scheduler
def test_u_rises_and_ends_at_pure_noise(make):
    process = NoiseProcess.from_scheduler(make())
    assert len(process) == T
    assert (process.u.diff() > 0).all()
    assert 0 < process.u[0] < 0.01
    assert process.u[-1] == 1


@every_scheduler
def test_noise_grows_and_signal_fades_with_the_level(make):
    process = NoiseProcess.from_scheduler(make())
    assert (process.sigmas.diff() >= 0).all()
    assert (process.alphas.diff() <= 0).all()


@ddpm_type
def test_ddpm_type_processes_preserve_variance(make):
    process = NoiseProcess.from_scheduler(make())
    torch.testing.assert_close(process.alphas**2 + process.sigmas**2, torch.ones(T))


@every_scheduler
def test_the_training_process_does_not_depend_on_the_sampling_steps(make):
    scheduler = make()
    before = NoiseProcess.from_scheduler(scheduler)
    scheduler.set_timesteps(7, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
    after = NoiseProcess.from_scheduler(scheduler)
    assert after.timesteps.equal(before.timesteps)
    assert after.alphas.equal(before.alphas)


@pytest.mark.parametrize("kind", ["ddpm-epsilon", "ddpm-v", "ddim"])
def test_add_noise_equals_the_schedulers(kind):
    scheduler = DDPM_TYPE[kind]()
    process, (latents, noise), levels = NoiseProcess.from_scheduler(scheduler), latents_and_noise(), torch.arange(T)
    expected = scheduler.add_noise(latents, noise, process.timesteps)
    torch.testing.assert_close(process.add_noise(latents, noise, levels), expected)


@pytest.mark.parametrize("level", [0, 1, 250, 999])
def test_add_noise_equals_what_euler_shows_the_model(level):
    scheduler = DDPM_TYPE["euler"]()
    process, (latents, noise), levels = (
        NoiseProcess.from_scheduler(scheduler),
        latents_and_noise(2),
        torch.tensor([level]),
    )
    timestep = process.timesteps[levels]
    expected = scheduler.scale_model_input(scheduler.add_noise(latents, noise, timestep.expand(2)), timestep)
    torch.testing.assert_close(process.add_noise(latents, noise, levels.expand(2)), expected)


@flow
def test_add_noise_equals_the_flow_schedulers_scale_noise(make):
    scheduler = make()
    process, (latents, noise), levels = NoiseProcess.from_scheduler(scheduler), latents_and_noise(), torch.arange(T)
    expected = scheduler.scale_noise(latents, process.timesteps, noise)
    torch.testing.assert_close(process.add_noise(latents, noise, levels), expected)


@flow
def test_flow_levels_are_exactly_the_schedulers_in_rising_order(make):
    scheduler = make()
    process = NoiseProcess.from_scheduler(scheduler)
    assert process.timesteps.equal(scheduler.timesteps.flip(0))
    assert process.sigmas.equal(scheduler.sigmas.flip(0))
    assert process.u.equal(process.sigmas)


@ddpm_type
def test_ddpm_type_levels_are_the_timesteps(make):
    process = NoiseProcess.from_scheduler(make())
    assert process.timesteps.tolist() == list(range(T))
    torch.testing.assert_close(process.u, torch.arange(1, T + 1) / T)


def test_the_target_of_epsilon_prediction_is_the_noise():
    latents, noise = latents_and_noise()
    process = NoiseProcess.from_scheduler(DDPM_TYPE["ddpm-epsilon"]())
    assert process.target(latents, noise, torch.arange(T)).equal(noise)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_the_target_of_v_prediction_is_the_schedulers_velocity(scheduler_class):
    scheduler = scheduler_class(prediction_type="v_prediction", beta_schedule="scaled_linear")
    process, (latents, noise), levels = NoiseProcess.from_scheduler(scheduler), latents_and_noise(), torch.arange(T)
    expected = scheduler.get_velocity(latents, noise, process.timesteps)
    torch.testing.assert_close(process.target(latents, noise, levels), expected)


def test_the_process_is_the_same_whichever_scheduler_samples():
    euler = DDPM_TYPE["euler"]()
    process = NoiseProcess.from_scheduler(euler)
    other = NoiseProcess.from_scheduler(DDPMScheduler.from_config(euler.config))
    assert process.prediction == other.prediction == "v_prediction"
    assert process.alphas.equal(other.alphas)
    assert process.timesteps.equal(other.timesteps)


@pytest.mark.parametrize("kind", ["ddpm-epsilon", "ddpm-v", "ddim"])
@pytest.mark.parametrize("level", [0, 300, 900])
def test_a_model_that_predicts_the_target_lets_the_scheduler_find_the_latents(kind, level):
    scheduler = DDPM_TYPE[kind]()
    process, (latents, noise), levels = (
        NoiseProcess.from_scheduler(scheduler),
        latents_and_noise(2),
        torch.full((2,), level),
    )
    if isinstance(scheduler, DDIMScheduler):
        scheduler.set_timesteps(T)
    noisy, target = process.add_noise(latents, noise, levels), process.target(latents, noise, levels)
    found = scheduler.step(target, level, noisy).pred_original_sample
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


@flow
def test_the_target_of_flow_matching_is_the_velocity_along_the_path(make):
    process, (latents, noise) = NoiseProcess.from_scheduler(make()), latents_and_noise(1)
    first, last = torch.tensor([0]), torch.tensor([T - 1])
    travelled = process.add_noise(latents, noise, last) - process.add_noise(latents, noise, first)
    velocity = travelled / (process.sigmas[last] - process.sigmas[first])
    for level in (first, last):
        torch.testing.assert_close(process.target(latents, noise, level), velocity)


@every_scheduler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_latents_dtype_is_kept(make, dtype):
    process, (latents, noise) = NoiseProcess.from_scheduler(make()), latents_and_noise(3)
    latents, noise, levels = latents.to(dtype), noise.to(dtype), torch.tensor([0, 500, 999])
    assert process.add_noise(latents, noise, levels).dtype == dtype
    assert process.target(latents, noise, levels).dtype == dtype


@every_scheduler
@pytest.mark.parametrize("jitter", [-0.49, 0.0, 0.49])
def test_levels_of_finds_the_nearest_level(make, jitter):
    process = NoiseProcess.from_scheduler(make())
    timesteps = process.timesteps.double()
    gap = timesteps.diff().min()
    assert process.levels_of(timesteps + jitter * gap).equal(torch.arange(T))


@every_scheduler
def test_levels_of_inverts_the_timesteps_in_their_own_dtype_and_in_any_order(make):
    process = NoiseProcess.from_scheduler(make())
    levels = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    assert process.levels_of(process.timesteps[levels]).equal(levels)


@ddpm_type
def test_levels_of_takes_integer_timesteps(make):
    process = NoiseProcess.from_scheduler(make())
    for dtype in (torch.int32, torch.int64):
        assert process.levels_of(torch.tensor([0, 1, 500, 999], dtype=dtype)).tolist() == [0, 1, 500, 999]


@every_scheduler
def test_levels_of_timesteps_beyond_the_grid_are_its_ends(make):
    process = NoiseProcess.from_scheduler(make())
    assert process.levels_of(torch.tensor([-10.0, 1e5])).tolist() == [0, T - 1]


@ddpm_type
def test_snr_equals_diffusers(make):
    scheduler = make()
    levels = torch.arange(T)
    torch.testing.assert_close(NoiseProcess.from_scheduler(scheduler).snr(levels), compute_snr(scheduler, levels))


@ddpm_type
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_equals_diffusers_training_scripts(make, gamma):
    scheduler, levels = make(), torch.arange(T)
    snr = compute_snr(scheduler, levels)
    divisor = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
    expected = torch.stack([snr, gamma * torch.ones_like(levels)], dim=1).min(dim=1)[0] / divisor
    torch.testing.assert_close(NoiseProcess.from_scheduler(scheduler).min_snr_weight(levels, gamma), expected)


@flow
def test_min_snr_weight_is_refused_for_flow_matching(make):
    with pytest.raises(ValueError, match="defined for epsilon and v_prediction"):
        NoiseProcess.from_scheduler(make()).min_snr_weight(torch.zeros(1, dtype=torch.long), 5.0)


@zero_terminal_snr
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_a_zero_terminal_snr_scheduler_stays_finite(scheduler_class, prediction):
    process = NoiseProcess.from_scheduler(scheduler_class(rescale_betas_zero_snr=True, prediction_type=prediction))
    (latents, noise), levels = latents_and_noise(), torch.arange(T)
    assert process.add_noise(latents, noise, levels).isfinite().all()
    assert process.target(latents, noise, levels).isfinite().all()
    assert process.min_snr_weight(levels, 5.0).isfinite().all()


@zero_terminal_snr
def test_at_zero_snr_the_min_snr_weight_is_the_limit_of_its_formula(prediction):
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction)
    weight = NoiseProcess.from_scheduler(scheduler).min_snr_weight(torch.tensor([T - 1]), 5.0)
    assert weight.tolist() == [1.0 if prediction == "epsilon" else 0.0]


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_base_densities_sum_to_one(kind):
    density = NoiseProcess.from_scheduler(FLOW["flow-shift-3"](), kind).base_density
    assert float(density.sum()) == pytest.approx(1.0, abs=1e-12)
    assert (density >= 0).all()


def test_the_logit_normal_density_is_what_diffusers_draws():
    density = NoiseProcess.from_scheduler(FLOW["flow-shift-3"](), "logit_normal").base_density
    draws = 100_000
    generator = torch.Generator().manual_seed(0)
    drawn = compute_density_for_timestep_sampling("logit_normal", draws, 0.0, 1.0, generator=generator)
    frequency = torch.histc(drawn, bins=20, min=0, max=1) / draws
    expected = density.view(20, -1).sum(1)
    assert ((frequency - expected).abs() <= 5 * (expected / draws).sqrt()).all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), "DDPMScheduler with prediction_type 'sample' is not supported"),
        (EDMEulerScheduler(), "EDMEulerScheduler with .* expected a DDPM-type scheduler"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "'flow_prediction'"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        NoiseProcess.from_scheduler(scheduler)


def test_an_unknown_base_density_is_refused():
    with pytest.raises(ValueError, match="base density is 'cosine'; expected uniform or logit_normal"):
        NoiseProcess.from_scheduler(DDPMScheduler(), "cosine")


LEVELS = torch.tensor([0.2, 0.6, 1.0])


@pytest.mark.parametrize(
    ("sigmas", "u", "prediction", "message"),
    [
        (LEVELS, LEVELS, "score", "prediction is 'score'; expected epsilon, v_prediction or flow"),
        (LEVELS[:2], LEVELS, "flow", r"shapes \[\(2,\), \(3,\)\]; expected one shape"),
        (LEVELS, LEVELS.flip(0), "flow", "u must rise"),
        (LEVELS, torch.tensor([0.2, 0.6, 0.6]), "flow", "u must rise"),
    ],
)
def test_levels_that_are_no_process_are_refused(sigmas, u, prediction, message):
    with pytest.raises(ValueError, match=message):
        NoiseProcess(1 - LEVELS, sigmas, LEVELS, u, torch.full((3,), 1 / 3), prediction)
