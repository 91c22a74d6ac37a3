"""diffusers' own pipeline tests, once with the stock classes and once with ours in their place.

They are no part of an installed diffusers: DIFFUSERS_CHECKOUT names a checkout, at the tag that is nearest to the
installed version, of which only `tests` is used. What they load from the Hub is made by `support/suite_models.py`. They
need the packages parameterized and requests-mock.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.suite_models import write_hub

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
NEEDED = [name for name in ("parameterized", "requests_mock") if find_spec(name) is None]
HERE = Path(__file__).parents[1]
DROP_INS = (
    "stable_diffusion/test_stable_diffusion.py",
    "stable_diffusion_xl/test_stable_diffusion_xl.py",
    "stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    "flux/test_pipeline_flux.py",
    "controlnet/test_controlnet.py",
    "controlnet/test_controlnet_sdxl.py",
    "controlnet_sd3/test_controlnet_sd3.py",
    "controlnet_flux/test_controlnet_flux.py",
    "dit/test_dit.py",
    "sana/test_sana.py",
    "lumina2/test_pipeline_lumina2.py",
    "z_image/test_z_image.py",
    "qwenimage/test_qwenimage.py",
    "flux2/test_pipeline_flux2.py",
    "flux2/test_pipeline_flux2_klein.py",
    "chroma/test_pipeline_chroma.py",
    "krea2/test_krea2.py",
)
ATTACHED = (
    *DROP_INS,
    "stable_diffusion/test_stable_diffusion_img2img.py",
    "stable_diffusion/test_stable_diffusion_inpaint.py",
    "pixart_alpha/test_pixart.py",
    "pixart_sigma/test_pixart.py",
)
TOO_LARGE = ("test_pipeline_accept_tuple_type_unet_sample_size",)  # makes a UNet of full size, for a model of the Hub
DISTILLED = "the model is told its guidance and has no unconditional rows, which domain_guidance says instead of acting"
BESIDE = "the copy of the denoiser would not see the picture, which is said; with an adapter as the tuned part it works"
ALONE = "at a scale of 1 there is no guidance, which domain_guidance says instead of doing nothing"
REASONS: dict[str, dict[str, str]] = {
    "drop-in": {},
    "attached": {
        "test_stable_diffusion_lcm": DISTILLED,
        "test_stable_diffusion_lcm_custom_timesteps": DISTILLED,
        "test_stable_diffusion_ays": DISTILLED,
        "test_stable_diffusion_xl_euler_lcm": DISTILLED,
        "test_stable_diffusion_xl_euler_lcm_custom_timesteps": DISTILLED,
        "test_stable_diffusion_inpaint_lcm": DISTILLED,
        "test_stable_diffusion_inpaint_lcm_custom_timesteps": DISTILLED,
        "test_controlnet_sdxl_lcm": DISTILLED,
        "test_controlnet_lcm": DISTILLED,
        "test_controlnet_lcm_custom_timesteps": DISTILLED,
        "test_cfg": ALONE,  # of Z-Image
        "test_ip_adapter": BESIDE,
        "test_ip_adapter_cfg": BESIDE,
        "test_ip_adapter_masks": BESIDE,
        "test_ip_adapter_faceid": BESIDE,
    },
}
"""What a side fails and the stock class does not, by the test's name, and why that is meant."""


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    write_hub(cache)
    return cache


def results(side: str, hub: Path, report: Path, tests: list[str]) -> dict[str, str]:
    """`passed`, `failed` or `skipped` of each test, by its class and name, with the classes of a side."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "support.suite_sides"]
    command += ["--side", side, f"--junitxml={report}", "--rootdir", str(CHECKOUT)]
    command += ["-k", " and ".join(f"not {name}" for name in TOO_LARGE), *tests]
    places = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in places if p), "HF_HUB_CACHE": str(hub)}
    env |= {"HF_HUB_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    return {
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": result(case)
        for case in ElementTree.parse(report).iter("testcase")
    }


def result(case: ElementTree.Element) -> str:
    tags = {part.tag for part in case}
    if tags & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="DIFFUSERS_CHECKOUT does not name a checkout of diffusers")
@pytest.mark.skipif(bool(NEEDED), reason=f"diffusers' tests need {', '.join(NEEDED)}")
@pytest.mark.parametrize(
    ("side", "suite"), [*(("drop-in", suite) for suite in DROP_INS), *(("attached", suite) for suite in ATTACHED)]
)
def test_ours_fails_nothing_that_the_stock_class_passes(side, suite, hub, tmp_path):
    """The stock class is only asked for what ours fails."""
    file = Path(str(CHECKOUT), "tests", "pipelines", suite)
    if not file.exists():
        pytest.skip("this checkout has no such tests")
    ours = results(side, hub, tmp_path / "ours.xml", [str(file)])
    assert "passed" in ours.values()
    if failed := [f"{file}::{test}" for test, result in ours.items() if result == "failed"]:
        stock = results("stock", hub, tmp_path / "stock.xml", failed)
        alone = [test for test, result in stock.items() if result == "passed"]
        assert [test for test in alone if test.rpartition("::")[2] not in REASONS[side]] == []
