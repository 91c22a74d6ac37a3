"""Every road by which a drop-in is loaded, without a network, and what comes along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline

import difftuning_control
from difftuning_control.errors import UserError
from difftuning_control.families.hub import in_precision
from difftuning_control.pipelines.registry import DROP_INS
from support.marks import needs_asking
from support.pipeline_samples import (
    EVERY,
    FILES,
    OURS,
    UNETS,
    adapter_file,
    add_adapter,
    denoiser_of,
    draw,
    drop_in,
    same_traces,
    source_of,
    stock,
    traces,
)
from support.tiny_models import tiny_sd3

ROOT = Path(__file__).parents[2]
every = pytest.mark.parametrize("kind", EVERY, indirect=True)
SETTINGS = {
    "domain_guidance": True,
    "tuned_adapters": ["tuned"],
    "adapter_schedule": {"kind": "power", "tau": 0.5},
    "hand_over": 0.25,
}
CONTROL = {"control_schedule": {"kind": "table", "u": [0.0, 1.0], "strength": [0.5, 1.0]}}


@pytest.fixture(params=UNETS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Stock pipelines on disk."""
    folder = tmp_path_factory.mktemp("stock")
    for kind in EVERY:
        stock(kind).save_pretrained(folder / kind)
    return {kind: str(folder / kind) for kind in EVERY}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_picture(found, expected) -> bool:
    """Up to rounding: weights that lie elsewhere in memory are multiplied by other instructions."""
    return np.abs(found - expected).max() < 1e-3


def settings_for(kind: str) -> dict:
    return SETTINGS | (CONTROL if kind.endswith("control") else {})


def settings_of(pipe) -> dict:
    found = {name: pipe.config[name] for name in SETTINGS}
    return found | ({"control_schedule": pipe.config["control_schedule"]} if "control_schedule" in pipe.config else {})


def expected_settings(kind: str) -> dict:
    found = settings_for(kind)
    return found | ({"control_schedule": [CONTROL["control_schedule"]]} if kind.endswith("control") else {})


# --- from disk --------------------------------------------------------------------------------------------------------


@pytest.mark.sample("sd")
@every
def test_a_file_of_the_repository(saved, kind):
    file = str(ROOT / "pipelines" / f"{FILES[kind]}.py")
    pipe = DiffusionPipeline.from_pretrained(
        saved[kind], custom_pipeline=file, trust_remote_code=True, **settings_for(kind)
    )
    assert type(pipe) is OURS[kind]
    assert settings_of(pipe) == settings_for(kind) | (
        {"control_schedule": [CONTROL["control_schedule"]]} if kind.endswith("control") else {}
    )
    plain = quiet(
        DiffusionPipeline.from_pretrained(saved[kind], custom_pipeline=file, trust_remote_code=True)
    )  # two files in one process do not collide
    assert same_picture(draw(plain, kind), draw(stock(kind), kind))


def test_the_files_are_one_line_with_a_name_each():
    files = sorted((ROOT / "pipelines").glob("*.py"))
    assert {f.stem for f in files} == {row.file for row in DROP_INS} >= set(FILES.values())
    assert all(len(f.read_text().strip().splitlines()) == 1 for f in files)


@needs_asking
@pytest.mark.sample("sd")
def test_a_file_is_not_loaded_without_trust(saved, kind):
    """Not implied by anything of ours; the class itself needs none."""
    file = str(ROOT / "pipelines" / f"{FILES[kind]}.py")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved[kind], custom_pipeline=file)
    assert type(OURS[kind].from_pretrained(saved[kind])) is OURS[kind]


@pytest.mark.sample("dit")
@every
def test_what_was_saved_is_loaded_with_every_setting(tmp_path, kind):
    pipe = drop_in(kind, **source_of(kind), **settings_for(kind))
    add_adapter(pipe.denoiser, "tuned", 1)
    pipe.save_pretrained(tmp_path)
    again = quiet(DiffusionPipeline.from_pretrained(str(tmp_path)))
    assert type(again) is OURS[kind]
    assert settings_of(again) == settings_of(pipe) == expected_settings(kind)
    pipe.set_extras(adapter_schedule=None, tuned_adapters=None)
    again.set_extras(adapter_schedule=None, tuned_adapters=None)
    assert same_picture(draw(again, kind), draw(pipe, kind))
    assert not same_picture(draw(pipe, kind), draw(stock(kind), kind))


@pytest.mark.sample("sd", "flux-control", "dit")
@every
def test_without_a_source_none_is_written(tmp_path, kind):
    drop_in(kind).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("source_*"))
    assert OURS[kind].from_pretrained(str(tmp_path)).source is None


@needs_asking
@pytest.mark.sample("sd", "flux-control", "dit")
@every
def test_the_class_that_is_named_may_lie_in_the_directory(tmp_path, kind):
    """What `difftune export` writes: the one-line file, and the list form of `_class_name`."""
    drop_in(kind).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": [FILES[kind], OURS[kind].__name__]}))
    (tmp_path / f"{FILES[kind]}.py").write_text((ROOT / "pipelines" / f"{FILES[kind]}.py").read_text())
    pipe = DiffusionPipeline.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(pipe) is OURS[kind]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(str(tmp_path))


@pytest.mark.sample("sd")
@every
def test_stock_classes_open_what_ours_saved(tmp_path, kind):
    pipe = drop_in(kind)
    pipe.save_pretrained(tmp_path)
    again = quiet(type(stock(kind)).from_pretrained(str(tmp_path)))
    assert same_picture(draw(again, kind), draw(pipe, kind))


@pytest.mark.wide
def test_a_lora_file_makes_the_two_sides(tmp_path, kind):
    """`load_lora_weights` as everywhere, and then the adapter is what is switched off."""
    made = stock(kind)
    add_adapter(made.unet, "default", 1, lora_alpha=2)
    type(made).save_lora_weights(tmp_path, unet_lora_layers=adapter_file(made.unet, "default"), safe_serialization=True)
    pipe = drop_in(kind, domain_guidance=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    expected = drop_in(kind, domain_guidance=True)
    add_adapter(expected.unet, "default", 1, lora_alpha=2)
    assert np.abs(draw(pipe, kind) - draw(expected, kind)).max() < 1e-5
    assert not np.allclose(draw(pipe, kind), draw(made, kind))
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match="nothing to switch off"):
        draw(pipe, kind)


# --- from a running pipeline ------------------------------------------------------------------------------------------


@pytest.mark.sample("sd", "flux-control", "dit")
@every
def test_from_pipe_shares_modules_and_keeps_adapters(kind):
    pipe = stock(kind)
    for i, name in enumerate(("tuned", "style")):
        add_adapter(denoiser_of(pipe), name, i)
    denoiser_of(pipe).set_adapters(["tuned", "style"], [0.7, 0.2])
    before, expected = traces(denoiser_of(pipe)), draw(pipe, kind)
    ours = quiet(OURS[kind].from_pipe(pipe))
    assert ours.denoiser is denoiser_of(pipe)
    assert ours.vae is pipe.vae
    assert same_traces(before, traces(ours.denoiser))
    assert np.array_equal(draw(ours, kind), expected)


@pytest.mark.sample("sd-dtypes0", "xl-control-dtypes*")
@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "float32"), ("float64", "float64")])
def test_from_pipe_keeps_every_dtype(kind, dtypes):
    """Also mixed ones: an autoencoder in float32 beside a denoiser in half precision is usual."""
    pipe = stock(kind)
    pipe.to(getattr(torch, dtypes[0]))
    pipe.vae.to(getattr(torch, dtypes[1]))
    kept = {n: m.dtype for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    ours = OURS[kind].from_pipe(pipe)
    assert {n: m.dtype for n, m in ours.components.items() if isinstance(m, torch.nn.Module)} == kept
    cast = OURS[kind].from_pipe(pipe, **in_precision(torch.float32))
    assert {m.dtype for m in cast.components.values() if isinstance(m, torch.nn.Module)} == {torch.float32}


@pytest.mark.sample("flux-control")
@every
def test_from_pipe_there_and_back_keeps_settings(kind):
    ours = drop_in(kind, **settings_for(kind))
    theirs = type(stock(kind)).from_pipe(ours, **in_precision(torch.float32))
    assert not hasattr(theirs, "extras")
    again = OURS[kind].from_pipe(theirs)
    assert settings_of(again) == expected_settings(kind)
    assert settings_of(OURS[kind].from_pipe(ours)) == expected_settings(kind)
    assert OURS[kind].from_pipe(ours, hand_over=0.5).extras.hand_over == 0.5


def test_sd3_without_t5_is_loaded_as_the_stock_class_is(tmp_path):
    """Which wants to be told that there is none; what the card of an export has too."""
    pipe = quiet(OURS["sd3"](**tiny_sd3(t5=False).components))
    pipe.save_pretrained(tmp_path)
    again = quiet(DiffusionPipeline.from_pretrained(str(tmp_path), text_encoder_3=None, tokenizer_3=None))
    assert type(again) is OURS["sd3"]
    drawn = draw(again, "sd3")
    assert same_picture(drawn, draw(pipe, "sd3"))
    assert not same_picture(drawn, draw(stock("sd3"), "sd3"))


def test_class_names_go_along(tmp_path):
    """The stock DiTPipeline loses them."""
    pipe = drop_in("dit")
    assert pipe.labels == stock("dit").labels == OURS["dit"].from_pipe(pipe).labels
    ours = OURS["dit"](**pipe.components, id2label={0: "ant", 1: "bee, wasp"})
    ours.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert again.labels == {"ant": 0, "bee": 1, "wasp": 1}
    OURS["dit"].from_pipe(again).save_pretrained(tmp_path / "from_pipe")
    assert DiffusionPipeline.from_pretrained(str(tmp_path / "from_pipe")).labels == again.labels


def test_from_pipe_keeps_functions(kind):
    ours = drop_in(kind, adapter_schedule=lambda u: u / 2)
    assert OURS[kind].from_pipe(ours).extras.adapter_schedule(0.5) == 0.25
    assert OURS[kind].from_pipe(ours, adapter_schedule=None).extras.adapter_schedule is None


@needs_asking
@pytest.mark.sample("sd")
@every
def test_diffusers_own_from_pipe_takes_the_file(kind):
    file = str(ROOT / "pipelines" / f"{FILES[kind]}.py")
    pipe = stock(kind)
    more = {"controlnet": pipe.controlnet} if kind.endswith("control") else {}
    ours = DiffusionPipeline.from_pipe(pipe, custom_pipeline=file, trust_remote_code=True, **more)
    assert type(ours) is OURS[kind]
    assert ours.denoiser is denoiser_of(pipe)


# --- the Auto classes -------------------------------------------------------------------------------------------------


@pytest.mark.sample("sd")
@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind != "dit"], indirect=True)
def test_auto_pipelines_find_ours(tmp_path, kind):
    drop_in(kind, hand_over=0.3, **source_of(kind)).save_pretrained(tmp_path)
    found = AutoPipelineForText2Image.from_pretrained(str(tmp_path))
    assert type(found) is OURS[kind]
    assert found.extras.hand_over == 0.3
    assert type(AutoPipelineForText2Image.from_pipe(found)) is OURS[kind]


@pytest.mark.sample("sd")
@pytest.mark.parametrize("kind", ["sd", "xl", "sd3", "flux"])
def test_auto_pipelines_add_a_controlnet_to_ours(tmp_path, kind):
    drop_in(kind).save_pretrained(tmp_path)
    net = stock(f"{kind}-control").controlnet
    found = AutoPipelineForText2Image.from_pretrained(str(tmp_path), controlnet=net)
    assert type(found) is OURS[f"{kind}-control"]


@pytest.mark.parametrize("kind", [*UNETS, "sd3", "flux"], indirect=True)
def test_auto_pipelines_lead_from_ours_to_other_tasks(kind):
    found = AutoPipelineForImage2Image.from_pipe(drop_in(kind))
    assert type(found).__name__.endswith("Img2ImgPipeline")
    assert not hasattr(found, "extras")


@pytest.mark.sample("xl-control")
def test_stock_models_go_on_finding_the_stock_classes(saved, kind):
    assert type(AutoPipelineForText2Image.from_pretrained(saved[kind])) is type(stock(kind))
    assert type(DiffusionPipeline.from_pretrained(saved[kind])) is type(stock(kind))


@pytest.mark.wide
@pytest.mark.parametrize("first", ["difftuning_control", "diffusers"])
def test_importing_the_package_is_enough_in_either_order(tmp_path, first):
    drop_in("sd").save_pretrained(tmp_path)
    second = {"difftuning_control": "diffusers", "diffusers": "difftuning_control"}[first]
    code = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
import {first}
if {first!r} == "difftuning_control":
    assert not {{"torch", "diffusers"}} & set(sys.modules), "importing the package is cheap"
import {second}
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
for one in (DiffusionPipeline, AutoPipelineForText2Image):
    print(type(one.from_pretrained({str(tmp_path)!r})).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.split() == ["DiffTuningPipeline"] * 2, done.stderr


@every
def test_the_names_are_the_package_s(kind):
    name = OURS[kind].__name__
    assert getattr(difftuning_control, name) is OURS[kind]
    assert name in difftuning_control.__all__
    assert OURS[kind].__module__.startswith("difftuning_control.pipelines.")


# --- what cannot be saved ---------------------------------------------------------------------------------------------


def test_a_function_is_not_saved_in_silence(tmp_path, kind):
    pipe = drop_in(kind, adapter_schedule=lambda u: u)
    with pytest.raises(UserError, match="a schedule is a function, which cannot be saved"):
        pipe.save_pretrained(tmp_path / "there")
    assert not (tmp_path / "there").exists()


# --- what finds the classes leaves diffusers as it is -----------------------------------------------------------------


def run_code(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.wide
def test_diffusers_itself_is_as_without_the_package():
    """Its loader reads its files, and the module can be pickled, found and imported again."""
    code = """
import difftuning_control, importlib.resources, inspect, pickle, pkgutil, sys
import diffusers
assert (importlib.resources.files("diffusers") / "dependency_versions_table.py").is_file()
assert pkgutil.get_data("diffusers", "dependency_versions_table.py")
assert diffusers.__spec__.loader.get_source("diffusers")
assert type(pickle.loads(pickle.dumps(diffusers))) is type(diffusers)
assert not hasattr(diffusers, "NoSuchPipeline")
importlib.reload(diffusers)
print(sys.modules["diffusers"].DiffTuningPipeline.__name__, type(diffusers).__module__)
"""
    assert run_code(code) == "DiffTuningPipeline diffusers.utils.import_utils"


@pytest.mark.wide
def test_the_tables_may_be_imported_first():
    code = """
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as table
import difftuning_control
print(table["difftuning-sd"].__name__)
"""
    assert run_code(code) == "DiffTuningPipeline"


@pytest.mark.slow
def test_diffusers_may_be_imported_all_at_once():
    code = """
import difftuning_control
import diffusers
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as table
print(diffusers.DiffTuningPipeline is table["difftuning-sd"])
"""
    assert run_code(code, DIFFUSERS_SLOW_IMPORT="1") == "True"


def test_threads_may_look_for_diffusers_at_once():
    finder = next(f for f in sys.meta_path if type(f).__module__ == "difftuning_control.discovery")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: finder.find_spec("diffusers"), range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert {spec.name for spec in found} == {"diffusers"}
