"""Sudden convergence: planted rises are found where they are, noise raises no alarm, and the answers never change."""

import numpy as np
import pytest

from difftuning_control.evaluation.convergence import find_convergence, has_settled

INTERVAL = 250


def curve(at: float, count: int = 40, width: float = 0, noise: float = 0.04, seed: int = 0, low=0.2, high=0.7):
    """Steps and values of a rise that begins at a share of the steps and takes another share."""
    rng = np.random.default_rng(seed)
    steps = INTERVAL * np.arange(1, count + 1)
    share = (steps - steps[0]) / (steps[-1] - steps[0])
    ramp = ((share - at) / width).clip(0, 1) if width else (share > at).astype(float)
    return steps.tolist(), (low + (high - low) * ramp + noise * rng.normal(size=count)).tolist()


def planted(at: float, count: int = 40) -> float:
    return INTERVAL * (1 + at * (count - 1))


@pytest.mark.parametrize(("at", "count"), [(0.21, 40), (0.5, 40), (0.83, 40), (0.4, 15), (0.33, 150)])
def test_a_planted_step_is_found_within_one_interval(at, count):
    found = [find_convergence(*curve(at, count, seed=s)) for s in range(50)]
    near = [c for c in found if c is not None and abs(c.step - planted(at, count)) <= INTERVAL]
    assert len(near) >= 0.95 * 50
    assert sum(c.sudden for c in near) >= 0.9 * len(near)
    assert np.median([c.before for c in near]) == pytest.approx(0.2, abs=0.02)
    assert np.median([c.after for c in near]) == pytest.approx(0.7, abs=0.02)
    assert all(c.start < c.end and c.step == (c.start + c.end) / 2 for c in near)


def test_a_planted_ramp_without_noise_is_found_exactly():
    steps = [100 * k for k in range(21)]
    found = find_convergence(steps, [0.1 + 0.8 * min(max((s - 600) / 400, 0), 1) for s in steps])
    assert (found.start, found.end, found.step, found.sudden) == (600, 1000, 800, True)
    assert (found.before, found.after) == pytest.approx((0.1, 0.9))


def test_a_clean_step_lies_between_its_two_measurements():
    found = find_convergence([0, 10, 20, 30, 40, 50, 100], [0, 0, 0, 1, 1, 1, 1])
    assert (found.start, found.end, found.step, found.sudden) == (20, 30, 25, True)


def test_the_closed_form_equals_least_squares_for_uneven_steps():
    rng = np.random.default_rng(3)
    steps = np.cumsum(rng.integers(1, 900, 12))
    values = np.where(steps > steps[5], 0.8, 0.3) + 0.05 * rng.normal(size=12)
    best = (np.inf,)
    for i in range(12):
        for j in range(i + 1, 12):
            ramp = np.interp(steps, [steps[i], steps[j]], [0, 1])
            (before, rise), error, *_ = np.linalg.lstsq(np.stack([np.ones(12), ramp], 1), values)
            best = min(best, (error[0], steps[i], steps[j], before, before + rise))
    found = find_convergence(steps.tolist(), values.tolist())
    assert (found.start, found.end, found.before, found.after) == pytest.approx(best[1:])


@pytest.mark.parametrize("count", [5, 8, 20, 60])
def test_noise_raises_no_alarm(count):
    alarms = [find_convergence(*curve(0.5, count, seed=s, high=0.2)) is not None for s in range(300)]
    assert np.mean(alarms) <= 0.02


def test_a_curve_that_wanders_seldom_raises_one():
    def wander(seed):
        rng, level = np.random.default_rng(seed), [0.0]
        for e in rng.normal(size=99):
            level.append(0.7 * level[-1] + e)
        return level

    assert np.mean([find_convergence(range(100), wander(s)) is not None for s in range(300)]) <= 0.05


@pytest.mark.wide
def test_noise_does_not_settle():
    assert np.mean([has_settled(*curve(0.5, 40, seed=s, high=0.2)) is not None for s in range(100)]) <= 0.02


def test_a_gradual_rise_is_not_sudden():
    found = [find_convergence(*curve(0.1, width=0.8, seed=s)) for s in range(50)]
    assert all(c is not None and not c.sudden for c in found)


@pytest.mark.parametrize(("width", "sudden"), [(4, True), (5, True), (6, False)])
def test_sudden_is_a_quarter_of_the_steps_measured(width, sudden):
    steps = range(21)
    found = find_convergence(steps, [min(max((s - 8) / width, 0), 1) for s in steps])
    assert (found.end - found.start, found.sudden) == (width, sudden)


def test_a_curve_that_is_still_rising_ends_at_its_last_step():
    steps, values = curve(0.6, width=1.0, noise=0.001)
    assert find_convergence(steps, values).end == steps[-1]
    assert has_settled(steps, values) is None


@pytest.mark.parametrize("width", [0, 0.5])
def test_a_falling_curve_is_no_convergence(width):
    steps, values = curve(0.4, width=width, low=0.7, high=0.2)
    assert find_convergence(steps, values) is None
    assert has_settled(steps, values) is None


def test_an_error_that_falls_is_a_convergence_where_lower_is_better():
    steps, values = curve(0.4, low=0.35, high=0.1, noise=0.01)
    found = find_convergence(steps, values, higher_is_better=False)
    assert abs(found.step - planted(0.4)) <= INTERVAL
    assert (found.before, found.after) == pytest.approx((0.35, 0.1), abs=0.02)
    assert has_settled(steps, values, higher_is_better=False) is not None
    mirrored = find_convergence(steps, [-v for v in values])
    assert (mirrored.step, mirrored.before) == (found.step, -found.before)
    assert find_convergence(steps, [0.5 - v for v in values], higher_is_better=False) is None


def test_scale_and_offset_of_the_values_do_not_matter():
    steps, values = curve(0.3, width=0.1)
    found, scaled = (find_convergence(steps, v) for v in (values, [1e-4 * v + 3 for v in values]))
    assert (found.start, found.end, found.sudden) == (scaled.start, scaled.end, scaled.sudden)


def test_curves_that_say_nothing():
    assert find_convergence([], []) is None
    assert find_convergence([1, 2, 3, 4], [0, 0, 1, 1]) is None
    assert find_convergence(range(10), [0.3] * 10) is None
    assert find_convergence(range(10), [0.0] * 10) is None
    assert find_convergence(range(5), [0, 0, 1, 1, 1]) is not None


@pytest.mark.sample("0.0-0.5")
@pytest.mark.parametrize("at", [0.2, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_settling_is_the_same_online_and_afterwards(at, noise):
    steps, values = curve(at, noise=noise, seed=5)
    whole = has_settled(steps, values)
    online = [has_settled(steps[:k], values[:k]) for k in range(1, len(steps) + 1)]
    fired = [answer for answer in online if answer is not None]
    assert whole is not None
    assert fired == [whole] * (len(steps) - steps.index(whole))
    other = values[: steps.index(whole) + 1] + [0.0] * (len(steps) - steps.index(whole) - 1)
    assert has_settled(steps, other) == whole


@pytest.mark.parametrize("patience", [1, 3, 6])
def test_settling_waits_for_the_plateau(patience):
    steps, values = curve(0.4, noise=0.0)
    end = find_convergence(steps, values).end
    assert has_settled(steps, values, patience=patience) == end + patience * INTERVAL
    for seed in range(20):
        settled = has_settled(*curve(0.4, seed=seed), patience=patience)
        assert settled >= planted(0.4) + (patience - 1) * INTERVAL
        assert settled <= planted(0.4) + (patience + 9) * INTERVAL


@pytest.mark.sample("0.005")
@pytest.mark.parametrize("noise", [0.005, 0.02, 0.05])
def test_it_does_not_settle_during_a_slow_rise(noise):
    early = [has_settled(*curve(0.2, width=0.8, noise=noise, seed=s)) is not None for s in range(40)]
    assert np.mean(early) <= 0.1


@pytest.mark.parametrize("function", [find_convergence, has_settled])
def test_errors(function):
    with pytest.raises(ValueError, match="as many"):
        function([1, 2, 3], [0.1, 0.2])
    with pytest.raises(ValueError, match="must rise"):
        function([1, 2, 2], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="not finite"):
        function([1, 2, 3], [0.1, float("nan"), 0.3])


def test_patience_of_nothing():
    with pytest.raises(ValueError, match="patience"):
        has_settled(range(6), range(6), patience=0)
