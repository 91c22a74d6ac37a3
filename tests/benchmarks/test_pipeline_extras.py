"""The drop-in pipelines against the stock ones on the embedded model: without extras, and what each extra costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from difftuning_control import DiffTuningPipeline, add_control
from difftuning_control.families.loading import load_family
from difftuning_control.families.sd import StableDiffusion

pytestmark = pytest.mark.benchmark
ROUNDS, STEPS, PROMPTS = 15, 10, ["noto emoji red apple"] * 4


@pytest.fixture
def family() -> StableDiffusion:
    found = load_family("embedded")
    found.pipe.set_progress_bar_config(disable=True)
    return found


def timed(call: Callable[[], object]) -> float:
    begun = time.process_time()  # of this process, so that neighbours count less
    call()
    return time.process_time() - begun


def sampling(pipe, **given) -> Callable[[], object]:
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=3.0, output_type="latent", **given)


def compare(capsys, sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each side over the first one's, the median of rounds in which the sides take turns."""
    for call in sides.values():
        call()
    rounds = [{name: timed(call) for name, call in sides.items()} for _ in range(ROUNDS)]
    first = next(iter(sides))
    ratios = {name: statistics.median(r[name] / r[first] for r in rounds) for name in sides}
    spread = {name: statistics.quantiles([r[name] / r[first] for r in rounds], n=4) for name in sides}
    with capsys.disabled():
        print()
        for name, ratio in ratios.items():
            low, _, high = spread[name]
            print(f"  {name}: {ratio:.3f} of {first}'s time (quartiles {low:.3f} to {high:.3f})")
    return ratios


def test_what_the_extras_cost(family, capsys):
    torch.set_num_threads(1)
    family.pipe.unet.add_adapter(_lora(), adapter_name="tuned")
    off, on = (DiffTuningPipeline.from_pipe(family.pipe) for _ in range(2))
    scheduled = DiffTuningPipeline.from_pipe(family.pipe, adapter_schedule={"kind": "power", "tau": 1.0})
    on.set_extras(domain_guidance=True)
    ratios = compare(
        capsys,
        {
            "stock": sampling(family.pipe),
            "extras off": sampling(off),
            "Domain Guidance": sampling(on),
            "adapter schedule": sampling(scheduled),
        },
    )
    assert set(ratios) == {"stock", "extras off", "Domain Guidance", "adapter schedule"}


def test_what_a_control_schedule_saves(family, capsys):
    torch.set_num_threads(1)
    family.controlnet = family.new_controlnet(0)
    stock = family.control_pipeline()
    late = {"kind": "table", "u": [0, 0.549, 0.55, 1], "strength": [0, 0, 1, 1]}
    ours = add_control(family.pipe, family.controlnet, control_schedule=late)
    image = torch.rand(1, 3, 64, 64)
    compare(
        capsys,
        {
            "stock, control_guidance_end=0.5": sampling(stock, image=image, control_guidance_end=0.5),
            "control schedule, 0 below u = 0.55": sampling(ours, image=image),
        },
    )
    use = ours.control_use[0]
    with capsys.disabled():
        print(f"  the pipeline's own figure: {use.run} run, {use.skipped} skipped, {use.seconds_saved:.2f} s saved")
    assert use.skipped == STEPS // 2


def _lora():
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
