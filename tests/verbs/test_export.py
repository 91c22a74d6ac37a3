"""An exported run opens where it says it does, without the run, and draws what the run draws."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from difftuning_control.adapters.files import LORA_FILE
from difftuning_control.adapters.loading import load_adapter
from difftuning_control.adapters.source import load_source
from difftuning_control.cli import main
from difftuning_control.data.control_spec import ControlSpec
from difftuning_control.errors import UserError
from difftuning_control.evaluation.report.tables import table_rows
from difftuning_control.families.loading import load_family
from difftuning_control.pipelines import DiffTuningControlNetPipeline, DiffTuningPipeline
from difftuning_control.pipelines.registry import BY_STOCK, DROP_INS
from difftuning_control.pipelines.strength import as_strength
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.inputs import BankConfig, ControlConfig, DataConfig, FidelityConfig, ModelConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import ExportRequest
from difftuning_control.recipe.studies import Evaluation
from difftuning_control.recipe.training import TrainingConfig, TuningConfig
from difftuning_control.runs.audit import read_audit
from difftuning_control.runs.card import model_card
from difftuning_control.runs.finished import finished_run
from difftuning_control.system.durable import write_json
from difftuning_control.verbs.evaluate import evaluate
from difftuning_control.verbs.export import export as export_module
from difftuning_control.verbs.export.card import Parts, export_card
from difftuning_control.verbs.export.export import export
from difftuning_control.verbs.parse import parse
from difftuning_control.verbs.train import train
from support.command_line import files_for_all
from support.controls import OUTLINE, write_photos
from support.feature_models import save_tiny_dinov2
from support.marks import needs, needs_asking
from support.pictures import write_pictures
from support.refusals import assert_refused, refusal, snapshot
from support.tiny_sd import tiny_pipeline

REPOSITORY = Path(__file__).parents[2]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PIPELINE_PARTS = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
OURS = {"README.md", "export.json"}
STOCK = {"pipeline": "stock"}

Maker = Callable[..., Recipe]
Exporter = Callable[..., Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def annotator(root: Path) -> Iterator[str]:
    (root / "export_outlines.py").write_text(OUTLINE)
    sys.path.insert(0, str(root))
    yield "export_outlines:outline"
    sys.path.remove(str(root))
    sys.modules.pop("export_outlines", None)


@pytest.fixture(scope="module")
def make(root: Path, model_dir: Path, annotator: str) -> Maker:
    """Makes recipes of a few strong steps on the tiny model: `make(name, method, adapter={…}, training={…})`."""
    data = {"lora": write_pictures(root / "data", count=14), "controlnet": write_photos(root / "photos")}

    def recipe(name: str, method: str = "lora", model: Path = model_dir, **sections: dict[str, Any]) -> Recipe:
        adapter = {"rank": 2, "alpha": 6.0} if method == "lora" else {}
        training = {
            "max_steps": 3,
            "batch_size": 5,
            "validate_every": 0,
            "validation_size": 2,
            "sample_every": 0,
            "learning_rate": 1e-1 if method == "lora" else 1e-2,
            "lr_scheduler": "constant",
        }
        control = ControlConfig(annotator=annotator, fidelity=FidelityConfig(every=0))
        return Recipe(
            method,
            ModelConfig(str(model)),
            DataConfig(
                str(data["controlnet" if method == "controlnet" else "lora"]), holdout=0.45, cache=str(root / "cache")
            ),
            TuningConfig(),
            BankConfig(size=10, steps=2, batch_size=4),
            AdapterConfig(**{**adapter, **sections.get("adapter", {})}),
            control if method == "controlnet" else ControlConfig(),
            TrainingConfig(**{**training, **sections.get("training", {})}),
            str(root / name),
        )

    return recipe


def tuned(recipe: Recipe) -> Recipe:
    train(recipe)
    return recipe


@pytest.fixture(scope="module")
def lora(make: Maker) -> Recipe:
    return tuned(make("icons"))


@pytest.fixture(scope="module")
def full(make: Maker) -> Recipe:
    return tuned(make("full", "full"))


@pytest.fixture(scope="module")
def controlnet(make: Maker) -> Recipe:
    return tuned(make("control", "controlnet"))


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[[str], Recipe]:
    return request.getfixturevalue


@pytest.fixture(scope="module")
def to(root: Path) -> Exporter:
    """Exports a run with these settings, once for all tests, which leave the folder as it is."""
    done: dict[str, Path] = {}

    def export_to(recipe: Recipe, **settings: Any) -> Path:
        key = json.dumps([recipe.output, settings], sort_keys=True)
        if key not in done:
            place = str(root / "exports" / str(len(done)))
            done[key] = export(ExportRequest(recipe.output, place, **settings))
        return done[key]

    return export_to


def draw(pipe: Any, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generator, "output_type": "np"}
    return pipe("red 1", height=16, width=16, **settings, **options).images


def condition() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))


def of_the_run(recipe: Recipe) -> np.ndarray:
    """What stock diffusers draws with the run's own folder."""
    if recipe.method == "full":
        return draw(StableDiffusionPipeline.from_pretrained(f"{recipe.output}/pipeline"))
    if recipe.method == "controlnet":
        model = ControlNetModel.from_pretrained(f"{recipe.output}/controlnet")
        pipe = StableDiffusionControlNetPipeline.from_pretrained(recipe.model.id, controlnet=model)
        return draw(pipe, image=condition())
    pipe = StableDiffusionPipeline.from_pretrained(recipe.model.id)
    pipe.load_lora_weights(recipe.output, weight_name="pytorch_lora_weights.safetensors")
    return draw(pipe)


def of_the_base(recipe: Recipe) -> np.ndarray:
    return draw(StableDiffusionPipeline.from_pretrained(recipe.model.id))


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def weights(folder: Path, component: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(next((folder / component).glob("*.safetensors")))


def dtypes(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


# --- what is where --------------------------------------------------------------------------------------------------


@pytest.mark.sample(
    "controlnet-{}-",
    "full-{'source_unet': 'difference'}-",
    "controlnet-{'base': 'referenced', 'pipeline': 'stock'}-",
    "controlnet-{'base': 'referenced'}-",
    "lora-{'base': 'referenced', 'pipeline': 'stock'}-",
)
@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("lora", {}, PIPELINE_PARTS | {LORA_FILE, "difftuning_sd.py"}),
        ("lora", STOCK, PIPELINE_PARTS | {LORA_FILE}),
        ("lora", {"adapter": "fused"}, PIPELINE_PARTS | {"difftuning_sd.py"}),
        ("lora", {"base": "referenced"}, {LORA_FILE, "difftuning_sd.py"}),
        ("lora", {"base": "referenced", **STOCK}, {LORA_FILE}),
        ("lora", {"format": "kohya"}, {"icons.safetensors"}),
        ("lora", {"format": "comfyui"}, {"icons.safetensors"}),
        ("full", {}, PIPELINE_PARTS | {"difftuning_sd.py"}),
        ("full", STOCK, PIPELINE_PARTS),
        ("full", {"source_unet": "whole"}, PIPELINE_PARTS | {"difftuning_sd.py", "source_unet"}),
        (
            "full",
            {"source_unet": "difference"},
            PIPELINE_PARTS | {"difftuning_sd.py", "source_difference.safetensors"},
        ),
        ("controlnet", {}, PIPELINE_PARTS | {"difftuning_sd_controlnet.py", "controlnet"}),
        ("controlnet", {"base": "referenced"}, {"difftuning_sd_controlnet.py", "controlnet"}),
        ("controlnet", {"base": "referenced", **STOCK}, {"controlnet"}),
    ],
    ids=lambda given: "" if isinstance(given, set) else str(given),
)
def test_an_export_holds_what_was_asked_for_says_so_and_names_no_place(run, to, root, method, settings, expected):
    recipe = run(method)
    folder = to(recipe, **settings)
    assert names(folder) == expected | OURS
    marker = json.loads((folder / "export.json").read_text())
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert marker["files"] == found
    assert marker["method"] == method
    assert {k: marker["settings"][k] for k in settings} == settings
    record = json.loads((Path(recipe.output) / "run.json").read_text())
    assert marker["base"]["fingerprints"] == record["fingerprints"]["base"]
    assert marker["run"] == {"identity": record["identity"], "steps": 3}
    assert as_strength(marker["schedule"]).values == as_strength(recipe.output).values
    is_named = settings.get("base") == "referenced"
    assert marker["base"]["id"] == (recipe.model.id if is_named else Path(recipe.model.id).name)
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in folder.rglob("*.json"):
        text = path.read_text()
        assert str(root) not in text
        assert recipe.model.id not in text or (is_named and path.name == "export.json")


@pytest.mark.parametrize("method", ["lora", "full", "controlnet"])
def test_the_one_line_file_is_that_of_the_repository(run, to, method):
    folder = to(run(method))
    ((module, klass),) = [(d.file, d.name) for d in DROP_INS if (folder / f"{d.file}.py").exists()]
    assert (folder / f"{module}.py").read_text() == (REPOSITORY / "pipelines" / f"{module}.py").read_text()
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == [module, klass]


@pytest.mark.sample("lora-{'format': 'kohya'}")
@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora", {}), ("lora", {"format": "kohya"}), ("full", {"source_unet": "difference"}), ("controlnet", {})],
    ids=str,
)
def test_the_same_export_twice_is_the_same_byte_by_byte(run, tmp_path, method, settings):
    place, found = tmp_path / "out", []
    for _ in range(2):
        found.append(snapshot(export(ExportRequest(run(method).output, str(place), **settings), overwrite=True)))
    assert found[0] == found[1]


@pytest.mark.skipif(os.name == "nt", reason="it has no such permissions")
@pytest.mark.sample("lora-{'format': 'kohya'}")
@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora", {}), ("lora", {"format": "kohya"}), ("lora", {"base": "copied"}), ("full", {}), ("controlnet", {})],
    ids=str,
)
def test_who_may_read_an_export_may_read_its_weights(run, tmp_path, method, settings):
    with files_for_all():
        folder = export(ExportRequest(run(method).output, str(tmp_path / "out"), **settings))
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o644}


def test_the_card_tells_diffusers_what_a_model_was_saved_without(lora):
    """As SD 3 without T5, which it would ask for."""
    record = finished_run(lora.output)
    absent = ("text_encoder_3", "tokenizer_3")
    parts = Parts("StableDiffusion3Pipeline", None, None, None, "transformer", absent)
    card = export_card(ExportRequest(lora.output, "there", pipeline="stock"), lora, record, parts, [])
    assert "from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)" in card


def test_cards_name_the_variant_of_the_base(lora):
    record = finished_run(lora.output)
    recipe = replace(lora, model=replace(lora.model, variant="fp16"))
    request = ExportRequest(lora.output, "there", pipeline="stock", base="referenced")
    card = export_card(request, recipe, record, Parts("StableDiffusionPipeline", None, None, None), [])
    assert 'from_pretrained(base, variant="fp16")' in card
    assert f'from_pretrained("{lora.model.id}", variant="fp16")' in model_card(recipe, record)


@pytest.mark.parametrize(
    ("component", "network", "said"),
    [
        (
            "unet",
            "networks.lora",
            "`--network_module networks.lora --network_weights mine.safetensors`). Stock diffusers",
        ),
        (
            "transformer",
            "networks.lora_sd3",
            "networks.lora_sd3 --network_weights mine.safetensors`). This package reads",
        ),
        ("transformer", None, "in the web UIs). This package reads it too:"),
    ],
)
def test_the_card_of_a_kohya_file_names_the_module_that_reads_it(lora, component, network, said):
    parts = Parts("AnyPipeline", None, None, "mine.safetensors", component, network=network)
    request = ExportRequest(lora.output, "there", format="kohya")
    assert said in export_card(request, lora, finished_run(lora.output), parts, [])


def test_the_card_shows_a_files_name_as_it_is(lora):
    parts = Parts("AnyPipeline", None, None, "a&b [v2].safetensors", "unet", network="networks.lora")
    card = export_card(ExportRequest(lora.output, "there", format="kohya"), lora, finished_run(lora.output), parts, [])
    assert "Put `a&b [v2].safetensors` where" in card
    assert "`--network_module networks.lora --network_weights 'a&b [v2].safetensors'`" in card


# --- stock diffusers opens it ---------------------------------------------------------------------------------------

STOCK_SCRIPT = """
import json, sys
import numpy as np, torch
from pathlib import Path
from diffusers import DiffusionPipeline

for folder in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder)
    if (Path(folder) / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(5)}
    np.save(folder + ".npy", pipe("red 1", height=16, width=16, output_type="np", **settings).images)
    print(type(pipe).__module__.partition(".")[0], type(pipe).__name__, "difftuning_control" in sys.modules)
"""


@pytest.mark.wide
def test_stock_diffusers_alone_opens_and_draws(lora, full, to, tmp_path):
    """In a process of its own, which never imports this package."""
    folders = [to(lora, **STOCK), to(lora, adapter="fused", **STOCK), to(full, **STOCK)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_SCRIPT, json.dumps([str(f) for f in folders])],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines() == ["diffusers StableDiffusionPipeline False"] * 3
    for folder, recipe in zip(folders, (lora, lora, full)):
        found = np.load(f"{folder}.npy")
        np.testing.assert_allclose(found, of_the_run(recipe), atol=1e-5)
        assert np.abs(found - of_the_base(recipe)).max() > 0.01


@pytest.mark.parametrize("name", ["lora", "full", "controlnet"])
def test_half_precision_is_loaded_in_one_precision_by_who_names_none(run, to, name):
    folder = to(run(name), dtype="float16", **STOCK)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert weights(folder, "text_encoder").popitem()[1].dtype == torch.float16
    assert (
        StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).text_encoder.dtype == torch.float16
    )


def test_a_copied_base_is_the_base_bit_by_bit(lora, controlnet, to, model_dir):
    for recipe in (lora, controlnet):
        folder = to(recipe)
        for component in ("unet", "vae"):
            assert_equal(weights(folder, component), weights(model_dir, component))
        encoder = weights(model_dir, "text_encoder")  # an export has the names that every transformers knows
        renamed = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in encoder.items()}
        assert_equal(weights(folder, "text_encoder"), renamed)


def test_a_fused_adapter_is_in_the_weights_and_nowhere_else(lora, to, model_dir):
    folder = to(lora, adapter="fused", **STOCK)
    found, base = weights(folder), weights(model_dir)
    assert found.keys() == base.keys()
    moved = {n for n in found if not torch.equal(found[n], base[n])}
    assert moved == {n for n in found if n.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))}
    with safe_open(f"{lora.output}/{LORA_FILE}", "pt") as file:
        for name in moved:
            down, up = (file.get_tensor(f"unet.{name[:-7]}.lora_{x}.weight").double() for x in "AB")
            expected = base[name].double() + 6.0 / 2 * up @ down
            torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=1e-6)


ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"kind": "dora"},
    "text encoder": {"text_encoder": True},
    "pissa": {"init": "pissa"},
    "tlora": {"kind": "tlora"},
    "loha": {"kind": "loha"},
    "oft": {"kind": "oft", "block_size": 4, "rank": None, "alpha": None},
    "ia3": {"kind": "ia3", "rank": None, "alpha": None},
    "difffit": {"kind": "difffit", "rank": None, "alpha": None},
}


@pytest.mark.sample("tlora")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind_are_exported_as_they_were_trained(make, tmp_path, kind):
    recipe = tuned(make(f"kind-{kind}", adapter=ADAPTERS[kind]))
    pipe = StableDiffusionPipeline.from_pretrained(recipe.model.id)
    load_adapter(pipe, recipe.output)
    expected = draw(pipe)
    assert np.abs(expected - of_the_base(recipe)).max() > 1e-3
    folder = export(ExportRequest(recipe.output, str(tmp_path / "separate")))
    again = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    load_adapter(again, folder)
    assert np.array_equal(draw(again), expected)
    card = (folder / "README.md").read_text()
    assert ("load_adapter(pipe, folder)" in card) == (kind in ("tlora", "loha", "oft", "ia3", "difffit"))
    fused = ExportRequest(recipe.output, str(tmp_path / "fused"), adapter="fused", **STOCK)
    if kind in ("tlora", "difffit"):
        with pytest.raises(UserError, match=f"is a {kind}, which .* and cannot be fused"):
            export(fused)
    else:
        found = draw(StableDiffusionPipeline.from_pretrained(export(fused)))
        assert np.abs(found - expected).max() < 1e-4
    kohya = ExportRequest(recipe.output, str(tmp_path / "kohya"), format="kohya")
    if kind in ("pissa", "text encoder"):
        plain_one = load_family(recipe.model.id).pipe
        (file,) = export(kohya).glob("*.safetensors")
        load_adapter(plain_one, file)
        assert np.abs(draw(plain_one) - expected).max() < 1e-4
    else:
        with pytest.raises(UserError, match="which kohya's LoRA files do not hold here"):
            export(kohya)
        assert not (tmp_path / "kohya").exists()


def test_a_referenced_lora_is_the_runs_own_file(lora, to):
    folder = to(lora, base="referenced")
    assert (folder / LORA_FILE).read_bytes() == (Path(lora.output) / LORA_FILE).read_bytes()
    pipe = StableDiffusionPipeline.from_pretrained(lora.model.id)
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    assert np.array_equal(draw(pipe), of_the_run(lora))


def test_stock_diffusers_draws_with_the_kohya_file(lora, to):
    folder = to(lora, format="kohya")
    pipe = StableDiffusionPipeline.from_pretrained(lora.model.id)
    pipe.load_lora_weights(folder, weight_name="icons.safetensors")
    np.testing.assert_allclose(draw(pipe), of_the_run(lora), atol=1e-5)


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_a_file_for_another_program_has_the_runs_layers_at_its_scale(lora, to, format):
    file = to(lora, format=format) / "icons.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_base_model_version"] == "sd_v1"
        assert opened.metadata()["ss_network_dim"] == str(lora.adapter.rank)
        assert lora.output not in str(opened.metadata())
    found = load_file(file)
    own = load_file(Path(lora.output) / LORA_FILE)
    assert {t.item() for k, t in found.items() if k.endswith(".alpha")} == {6.0}
    for theirs, ours in (("lora_down", "lora_A"), ("lora_up", "lora_B")):
        its = [t for k, t in found.items() if k.endswith(f".{theirs}.weight")]
        mine = [t for k, t in own.items() if k.endswith(f".{ours}.weight")]
        assert len(its) == len(mine)
        assert all(any(a.equal(b) for b in mine) for a in its)
    assert len(found) == 3 * len(own) // 2


@pytest.mark.sample("referenced")
@pytest.mark.parametrize("base", ["copied", "referenced"])
def test_a_controlnet_comes_with_its_spec(controlnet, to, base):
    folder = to(controlnet, base=base, **STOCK)
    assert ControlSpec.load(folder / "controlnet") == ControlSpec.load(Path(controlnet.output) / "controlnet")
    assert_equal(weights(folder, "controlnet"), weights(Path(controlnet.output), "controlnet"))
    if base == "copied":
        pipe = DiffusionPipeline.from_pretrained(folder)
    else:
        model = ControlNetModel.from_pretrained(folder / "controlnet")
        pipe = StableDiffusionControlNetPipeline.from_pretrained(controlnet.model.id, controlnet=model)
    assert type(pipe) is StableDiffusionControlNetPipeline
    assert np.array_equal(draw(pipe, image=condition()), of_the_run(controlnet))


@pytest.mark.wide
def test_a_stock_directory_can_be_tuned_further(lora, full, to):
    for recipe, settings in ((lora, {"adapter": "fused"}), (full, {})):
        family = load_family(str(to(recipe, **settings, **STOCK)))
        np.testing.assert_allclose(draw(family.pipe), of_the_run(recipe), atol=1e-5)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.sample("controlnet-float16-*", "lora-bfloat16-*", "full-bfloat16-*")
@pytest.mark.parametrize(
    ("method", "dtype", "settings"),
    [
        ("lora", "float32", {}),
        ("lora", "bfloat16", {}),
        ("lora", "float16", {"adapter": "fused"}),
        ("lora", "float16", {"format": "kohya"}),
        ("full", "bfloat16", {"source_unet": "whole"}),
        ("full", "float16", STOCK),
        ("controlnet", "float16", {}),
        ("controlnet", "bfloat16", {"base": "referenced"}),
    ],
    ids=str,
)
def test_everything_is_written_in_the_precision_asked_for(run, to, method, settings, dtype):
    folder = to(run(method), dtype=dtype, **settings)
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            large = [n for n in file.keys() if not n.endswith((".alpha", "position_ids"))]  # noqa: SIM118
            assert {file.get_slice(n).get_dtype() for n in large} == {DTYPES[dtype]}, path
    if method == "controlnet":
        assert ControlSpec.load(folder / "controlnet") == ControlSpec.load(Path(run(method).output) / "controlnet")


@pytest.mark.wide
def test_a_lora_in_half_precision_keeps_its_scale(lora, to):
    folder = to(lora, base="referenced", dtype="float16", **STOCK)
    pipe = StableDiffusionPipeline.from_pretrained(lora.model.id)
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(draw(pipe), of_the_run(lora), atol=1e-2)
    assert np.abs(of_the_base(lora) - of_the_run(lora)).max() > 0.05


@pytest.mark.wide
def test_a_base_in_half_precision_stays_so_unless_asked(make, root, to):
    place = root / "half"
    tiny_pipeline().to(torch.float16).save_pretrained(place)
    recipe = tuned(make("of half", model=place))
    folder = to(recipe, **STOCK)
    assert_equal(weights(folder), weights(place))
    assert dtypes(folder / LORA_FILE) == {"F32"}
    assert {n: t.float() for n, t in weights(place).items()}.keys() == weights(to(recipe, dtype="float32")).keys()
    assert dtypes(next((to(recipe, adapter="fused") / "unet").glob("*.safetensors"))) == {"F16"}


@pytest.mark.wide
def test_a_base_that_a_run_had_in_lower_precision_is_copied_as_it_lies(make, to, model_dir):
    recipe = tuned(make("bf16", training={"mixed_precision": "bf16"}))
    folder = to(recipe)
    assert_equal(weights(folder), weights(model_dir))
    assert dtypes(next((to(recipe, adapter="fused") / "unet").glob("*.safetensors"))) == {"F32"}


# --- the source of full weights -------------------------------------------------------------------------------------


def test_the_whole_source_is_the_base(full, to, model_dir):
    folder = to(full, source_unet="whole")
    assert_equal(weights(folder, "source_unet"), weights(model_dir))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["source_unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.wide
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_the_difference_gives_the_base_back(full, to, model_dir, dtype):
    folder = to(full, source_unet="difference", dtype=dtype)
    path = folder / "source_difference.safetensors"
    assert dtypes(path) == {"F32" if dtype == "float32" else "F16"}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    source = load_source(unet, path).state_dict()
    for name, expected in weights(model_dir).items():
        step = 2**-10 if dtype == "float16" else 2**-23
        bound = step * (expected.abs() + unet.state_dict()[name].abs())
        bound += 0 if dtype == "float32" else 2**-11 * (expected - unet.state_dict()[name]).abs() + 2**-25
        assert ((source[name] - expected).abs() <= bound).all(), name


def test_a_measured_schedule_comes_along_while_its_file_is_there(lora, tmp_path):
    measured = {"kind": "table", "u": [0.0, 0.5, 1.0], "psi": [0.0, 0.4, 1.0], "xi": [1.0, 0.6, 0.0]}
    write_json(tmp_path / "schedule.json", measured)
    moved = Path(shutil.copytree(lora.output, tmp_path / "run"))
    record = json.loads((moved / "run.json").read_text())
    schedule = {"kind": "measured", "path": str(tmp_path / "schedule.json")}
    record["recipe"]["tuning"]["schedule"] = {**dict.fromkeys(record["recipe"]["tuning"]["schedule"]), **schedule}
    write_json(moved / "run.json", record)
    request = ExportRequest(str(moved), str(tmp_path / "out"), base="referenced")
    found = json.loads((export(request) / "export.json").read_text())["schedule"]
    assert as_strength(found)(0.5) == pytest.approx(0.4)
    (tmp_path / "schedule.json").unlink()
    assert json.loads((export(request, overwrite=True) / "export.json").read_text())["schedule"] is None


def test_full_weights_need_no_base(full, to, root, tmp_path):
    moved = Path(shutil.copytree(full.output, tmp_path / "run"))
    record = json.loads((moved / "run.json").read_text())
    record["recipe"]["model"]["id"] = record["base_path"] = str(root / "gone")
    write_json(moved / "run.json", record)
    folder = to(replace(full, output=str(moved)), **STOCK)
    assert np.array_equal(draw(DiffusionPipeline.from_pretrained(folder)), of_the_run(full))


# --- the model card -------------------------------------------------------------------------------------------------


def test_the_card_has_the_runs_figures_and_no_place_of_the_base(lora, to):
    card, own = ((f / "README.md").read_text() for f in (to(lora), Path(lora.output)))
    table = own[own.index("## Loss by noise band") : own.index("`run.json`")]
    assert table in card
    assert f"# LoRA for {Path(lora.model.id).name}\n" in card
    assert lora.model.id not in card
    assert "base_model" not in card
    assert "- lora\n" in card


def test_a_hub_base_is_named_in_the_cards_head(lora, make):
    from difftuning_control.runs.card import model_card

    record = finished_run(lora.output)
    for base, expected in (("some-body/sd15", True), ("embedded", False), (lora.model.id, False)):
        card = model_card(replace(lora, model=ModelConfig(base)), record)
        assert (f"base_model: {base}\n" in card) == expected


@pytest.fixture(scope="module")
def evaluated(lora: Recipe, root: Path) -> Path:
    features = str(save_tiny_dinov2(root / "features"))
    settings = {"pictures": 5, "seeds": [0, 1], "steps": 1, "features": features, "outside": ["a dog"]}
    evaluate(Evaluation([lora.output], output=str(root / "evaluation"), **settings))
    return root / "evaluation" / "evaluation.json"


def test_figures_of_an_evaluation_become_a_table(lora, to, evaluated):
    card = (to(lora, evaluation=str(evaluated)) / "README.md").read_text()
    result = json.loads(evaluated.read_text())
    part = card[card.index("## Pictures against real ones") :].split("\n## ")[0]
    assert "5 prompts, 2 seeds, 1 steps, guidance 4, features" in part
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    head, base, own = table_rows(result)
    assert rows == [head, ["---"] * len(head), base, ["tuned", *own[1:]]]
    assert f"{1000 * result['sides'][0]['summary']['kid']['mean']:.1f} ±" in part


def test_figures_without_held_out_pictures_say_what_was_kept(lora, to, root, evaluated, tmp_path):
    settings = {"seeds": [0], "steps": 1, "features": str(root / "features"), "outside": list("abcde")}
    with_none = replace(lora, output=str(tmp_path / "run"), data=replace(lora.data, holdout=0.0, validation_path=None))
    train(with_none)
    evaluate(Evaluation([with_none.output], output=str(tmp_path / "judged"), **settings))
    card = (to(with_none, evaluation=str(tmp_path / "judged" / "evaluation.json")) / "README.md").read_text()
    part = card[card.index("## What was kept") :].split("\n## ")[0]
    assert "5 prompts outside the new domain, 1 steps" in part
    assert "still drawn" in part
    assert "kid ×1000" not in part


def test_a_run_is_known_by_what_it_is_and_in_older_files_by_its_place(lora, to, evaluated, tmp_path):
    result = json.loads(evaluated.read_text())
    result["sides"][0]["name"] = "somewhere/else"
    write_json(tmp_path / "moved.json", result)
    assert "## Pictures against" in (to(lora, evaluation=str(tmp_path / "moved.json")) / "README.md").read_text()
    result["sides"][0] |= {"name": lora.output}
    del result["sides"][0]["identity"]
    write_json(tmp_path / "older.json", result)
    assert "## Pictures against" in (to(lora, evaluation=str(tmp_path / "older.json")) / "README.md").read_text()


# --- whole or not at all --------------------------------------------------------------------------------------------


def test_overwrite_replaces_an_export(lora, full, tmp_path):
    export(ExportRequest(lora.output, str(tmp_path / "out")))
    export(ExportRequest(full.output, str(tmp_path / "out"), pipeline="stock"), overwrite=True)
    assert names(tmp_path / "out") == PIPELINE_PARTS | OURS
    assert names(tmp_path) == {"out"}


@pytest.mark.sample("KeyboardInterrupt")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_breaks_off_leaves_what_was_there(lora, full, tmp_path, monkeypatch, error):
    export(ExportRequest(lora.output, str(tmp_path / "old")))
    before = snapshot(tmp_path)

    def break_off(*args: Any) -> str:
        raise error

    monkeypatch.setattr(export_module, "export_card", break_off)
    for place in ("old", "new", "deep/er/new"):
        with pytest.raises(error):
            export(ExportRequest(full.output, str(tmp_path / place)), overwrite=True)
        assert snapshot(tmp_path) == before


@pytest.mark.wide
def test_an_empty_folder_and_one_that_is_not_there_are_filled(lora, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("empty", "not/there"):
        folder = export(ExportRequest(lora.output, str(tmp_path / place), format="kohya"))
        assert names(folder) == {"icons.safetensors"} | OURS


# --- the Hub --------------------------------------------------------------------------------------------------------

TOKEN = "hf_this_is_a_secret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A Hub that only writes down what is asked of it."""
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub,
            name,
            lambda *args, name=name, **given: calls.append(
                (name, (args, given, sorted(names(Path(given.get("folder_path", "."))))))
            ),
        )
    return calls


@pytest.mark.parametrize("method", ["lora", "full", "controlnet"])
def test_without_push_nothing_asks_the_hub_or_the_network(run, hub, tmp_path, monkeypatch, method):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("the token was read"))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network was used"))
    export(ExportRequest(run(method).output, str(tmp_path / "out")))
    assert hub == []


def test_push_uploads_what_is_written(lora, hub, tmp_path, capsys):
    folder = tmp_path / "out"
    main(["export", lora.output, "--to", str(folder), "--base", "referenced", "--push", "some-body/icons"])
    (first, (args, given, _)), (second, (_, upload, held)) = hub
    assert (first, args, given) == ("create_repo", ("some-body/icons",), {"private": True, "exist_ok": True})
    assert second == "upload_folder"
    assert (upload["repo_id"], upload["folder_path"]) == ("some-body/icons", folder)
    assert held == sorted(names(folder))
    shown = capsys.readouterr()
    assert shown.out.endswith("uploaded: https://huggingface.co/some-body/icons\n")
    assert TOKEN not in shown.out + shown.err
    assert not [p for p in folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert 'folder = snapshot_download("some-body/icons")' in (folder / "README.md").read_text()


def test_a_failed_upload_keeps_the_export_and_says_why(lora, hub, tmp_path, monkeypatch):
    def refuse(*args: Any, **given: Any) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"is written, but could not be uploaded to a/b \(no route to the host\); run"):
        export(ExportRequest(lora.output, str(tmp_path / "out"), format="kohya", push="a/b"))
    assert names(tmp_path / "out") == {"icons.safetensors"} | OURS


def test_an_export_whose_upload_failed_stands_in_the_audit(lora, hub, tmp_path, monkeypatch, capsys):
    def refuse(*args: Any, **given: Any) -> None:
        raise ConnectionError("no route to the host")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    words = ["export", lora.output, "--to", str(tmp_path / "out"), "--format", "kohya", "--push", "a/b"]
    before = len(read_audit(Path(lora.output)).entries)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "is written, but could not be uploaded to a/b (no route to the host); run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:  # nothing is changed and nothing written down
        main(words)
    assert stopped.value.code == 2
    assert "already holds export.json; give --overwrite or another --to." in capsys.readouterr().err
    (line,) = read_audit(Path(lora.output)).entries[before:]
    assert (line["outcome"], list(line["artefacts"])) == ("failed", ["export.json"])
    assert "could not be uploaded" in line["said"]


# --- the command, and what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["runs/a", "--to", "x"],
        ["--to", "x", "runs/a"],
        ["--run", "runs/a", "--to", "x"],
        ["--run=runs/a", "--to=x"],
        ["--overwrite", "--to", "x", "--run", "runs/a"],
    ],
    ids=" ".join,
)
def test_a_run_is_given_with_or_without_its_key(words):
    verb, command = parse(["export", *words])
    assert (verb, command.run, command.to) == ("export", "runs/a", "x")
    assert command.overwrite == ("--overwrite" in words)


def test_the_command_exports(lora, tmp_path, capsys):
    main(["export", lora.output, "--to", str(tmp_path / "out"), "--adapter", "fused", "--pipeline", "stock"])
    assert capsys.readouterr().out == f"done: {tmp_path / 'out'}/README.md says how it is used\n"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(draw(pipe), of_the_run(lora), atol=1e-5)


def words(recipe: Recipe, place: Path, *more: str) -> list[str]:
    return ["export", recipe.output, "--to", str(place), *more]


@pytest.mark.sample("lora---adaptor fused-there is no option --adaptor; did you mean --adapter[?]")
@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("lora", "--format kohya --adapter fused", "--format kohya writes one LoRA file; leave out --adapter fused."),
        (
            "lora",
            "--format comfyui --base referenced --pipeline stock",
            "--format comfyui writes one LoRA file; leave out --base referenced and --pipeline stock.",
        ),
        ("full", "--format kohya --source_unet whole", "leave out --source_unet whole."),
        ("full", "--format kohya", "has the method full; --format kohya is for LoRAs only."),
        ("controlnet", "--format comfyui", "has the method controlnet; --format comfyui is for LoRAs only."),
        ("lora", "--adapter fused --base referenced", "--adapter fused changes the base's weights; it needs --base"),
        ("full", "--adapter fused", "has the method full and no adapter; leave out --adapter fused."),
        ("controlnet", "--adapter fused", "has the method controlnet and no adapter; leave out --adapter fused."),
        ("full", "--base referenced", "whose result is a whole pipeline; leave out --base referenced."),
        ("full", "--source_unet whole --pipeline stock", "no use for a source UNet; it needs --pipeline difftuning."),
        ("full", "--source_unet difference --pipeline stock", "no use for a source UNet; it needs --pipeline difft"),
        ("lora", "--source_unet whole", "the base's denoiser is still there; leave out --source_unet whole."),
        ("controlnet", "--source_unet difference", "is still there; leave out --source_unet difference."),
        ("lora", "--push one/two/three", "push is 'one/two/three'; expected a repository on the Hub, such as user/na"),
        ("lora", "--push /a", "push is '/a'; expected a repository on the Hub"),
        ("lora", "--push a/b", "--push needs the network, and HF_HUB_OFFLINE is set; unset it, or leave out --push."),
        ("lora", "--format webui", 'format is webui; expected one of "diffusers", "kohya", "comfyui".'),
        ("lora", "--dtype int8", 'dtype is int8; expected one of "float32", "float16", "bfloat16" or null.'),
        ("lora", "--adaptor fused", "there is no option --adaptor; did you mean --adapter?"),
        ("lora", "--evaluation nowhere.json", "the evaluation nowhere.json cannot be read; name one of difftune eval"),
        ("lora", "--run other", "run is given twice; give it once, as --run or without a key."),
        ("lora", "other", "export takes one folder, and 2 are named: "),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(run, tmp_path, capsys, monkeypatch, method, more, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(words(run(method), tmp_path / "out", *more.split()), capsys, tmp_path, expected)


def test_a_login_is_asked_for_before_anything_is_written(lora, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    expected = "--push needs a login on the Hub; run `hf auth login`, or leave out --push."
    assert_refused(words(lora, tmp_path / "out", "--push", "a/b"), capsys, tmp_path, expected)


@pytest.mark.parametrize("given", [[], ["--to", "x"], ["some/run"]], ids=" ".join)
def test_a_run_and_a_place_are_needed(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = refusal(["export", *given], capsys, tmp_path)
    assert ("run" if "some/run" not in given else "to") in shown


def test_no_run_and_an_unfinished_one_are_refused(lora, tmp_path, capsys):
    nothing = replace(lora, output=str(tmp_path / "nothing"))
    assert_refused(words(nothing, tmp_path / "out"), capsys, tmp_path, "there is no folder", "nothing")
    record = json.loads((Path(lora.output) / "run.json").read_text())
    write_json(tmp_path / "cut" / "run.json", {**record, "status": "running"})
    cut = replace(lora, output=str(tmp_path / "cut"))
    assert_refused(words(cut, tmp_path / "out"), capsys, tmp_path, "is running, not complete; go on with difftune")


@pytest.mark.parametrize("more", [[], ["--base", "referenced"], ["--format", "kohya"], ["--adapter", "fused"]], ids=str)
def test_another_base_is_refused(lora, tmp_path, capsys, more):
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    moved = Path(shutil.copytree(lora.output, tmp_path / "run"))
    record = json.loads((moved / "run.json").read_text())
    record["recipe"]["model"]["id"] = record["places"]["model"] = str(tmp_path / "other")
    write_json(moved / "run.json", record)
    expected = "was tuned from another base (its denoiser, vae, text_encoder differ"
    assert_refused(words(replace(lora, output=str(moved)), tmp_path / "out", *more), capsys, tmp_path, expected)


def test_a_base_that_is_gone_is_told(controlnet, tmp_path, capsys):
    moved = Path(shutil.copytree(controlnet.output, tmp_path / "run"))
    record = json.loads((moved / "run.json").read_text())
    record["recipe"]["model"]["id"] = record["places"]["model"] = str(tmp_path / "gone")
    write_json(moved / "run.json", record)
    recipe = replace(controlnet, output=str(moved))
    told = "gone; if it was moved, give its new place: --moved.model"
    assert_refused(words(recipe, tmp_path / "out"), capsys, tmp_path, "the base of the run", told)


@pytest.mark.parametrize("method", ["lora", "full", "controlnet"])
@pytest.mark.parametrize("change", ["changed", "removed"])
def test_a_result_that_is_not_the_runs_any_more_is_refused(run, tmp_path, capsys, method, change):
    moved = Path(shutil.copytree(run(method).output, tmp_path / "run"))
    path = next(moved.rglob("*.safetensors"))
    if change == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    recipe, expected = replace(run(method), output=str(moved)), "has changed" if change == "changed" else "is missing"
    assert_refused(words(recipe, tmp_path / "out"), capsys, tmp_path, f"{path} {expected} since the run; train it anew")


def test_an_export_is_not_replaced_unasked(lora, tmp_path, capsys):
    export(ExportRequest(lora.output, str(tmp_path / "out"), format="kohya"))
    expected = f"the output {tmp_path / 'out'} already holds export.json; give --overwrite or another --to."
    assert_refused(words(lora, tmp_path / "out"), capsys, tmp_path, expected)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_that_is_no_export_is_never_replaced(lora, tmp_path, capsys, more):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    expected = "is not empty and holds no export.json; choose another folder."
    assert_refused(words(lora, tmp_path / "out", *more), capsys, tmp_path, expected)
    for text in ("mine", "{}", '{"files": 3}'):
        (tmp_path / "out" / "export.json").write_text(text)
        expected = "export.json is not of difftune export" if more else "already holds export.json"
        assert_refused(words(lora, tmp_path / "out", *more), capsys, tmp_path, expected)


@pytest.mark.parametrize("name", ["notes.txt", "unet/notes.txt"])
def test_what_somebody_put_into_an_export_is_not_lost(lora, tmp_path, capsys, name):
    folder = export(ExportRequest(lora.output, str(tmp_path / "out")))
    (folder / name).write_text("mine")
    expected = f"also holds {name}, which is not of the export; move it, or choose another folder."
    assert_refused(words(lora, folder, "--overwrite"), capsys, tmp_path, expected)


@pytest.mark.parametrize("place", ["run", "run/export", ".", "base", "base/export"])
def test_an_export_may_not_cost_the_run_or_its_base(lora, model_dir, tmp_path, capsys, place):
    run, base = (Path(shutil.copytree(a, tmp_path / b)) for a, b in ((lora.output, "run"), (model_dir, "base")))
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["model"]["id"] = record["places"]["model"] = record["base_path"] = str(base)
    for folder in (tmp_path, run, base):
        write_json(folder / "export.json", {"files": []})
    write_json(run / "run.json", record)
    recipe, what = replace(lora, output=str(run)), "base" if "base" in place else "run"
    given = words(recipe, tmp_path / place, "--overwrite")
    assert_refused(given, capsys, tmp_path, f"and the {what} {tmp_path / what} lie in one another; choose another fold")


def test_a_file_in_the_way_is_told(lora, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    expected = "is a file or lies below one; name a folder."
    for place in ("out", "out/deeper"):
        assert_refused(words(lora, tmp_path / place), capsys, tmp_path, expected)


def test_an_evaluation_of_other_runs_is_refused(lora, full, tmp_path, capsys, evaluated):
    given = words(full, tmp_path / "out", "--evaluation", str(evaluated))
    expected = f"judged {lora.output}, not this run ({full.output}); evaluate it, or omit it."
    assert_refused(given, capsys, tmp_path, expected)
    for text in ("[]", "{", '{"sides": [{}]}', '{"sides": [{"identity": 1, "name": 2}]}', '{"sides": [], "base": 3}'):
        (tmp_path / "e.json").write_text(text)
        shown = refusal(words(lora, tmp_path / "out", "--evaluation", str(tmp_path / "e.json")), capsys, tmp_path)
        assert shown.startswith(f"the evaluation {tmp_path / 'e.json'} ")


def test_layers_that_a_format_has_no_name_for_are_told(make, tmp_path, capsys):
    recipe = tuned(make("first convolution", adapter={"targets": "to_q,conv_in"}))
    expected = "sd-scripts would leave out the LoRA on conv_in, which lie in no block; export it with --format comfyui"
    assert_refused(words(recipe, tmp_path / "out", "--format", "kohya"), capsys, tmp_path, expected)
    found = load_file(
        export(ExportRequest(recipe.output, str(tmp_path / "c"), format="comfyui")) / "first convolution.safetensors"
    )
    assert "diffusion_model.input_blocks.0.0.lora_down.weight" in found


def test_a_pipeline_without_a_drop_in_is_told(lora, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(BY_STOCK, "StableDiffusionPipeline")
    expected = f"there is no drop-in for the StableDiffusionPipeline of the run {lora.output}; give --pipeline stock."
    assert_refused(words(lora, tmp_path / "out"), capsys, tmp_path, expected)


# --- with the package's own pipelines -------------------------------------------------------------------------------


@pytest.mark.sample("lora-settings0-DiffusionPipeline")
@pytest.mark.parametrize(
    ("method", "settings", "opened_by"),
    [
        ("lora", {}, DiffusionPipeline),
        ("lora", {"adapter": "fused"}, StableDiffusionPipeline),
        ("lora", {}, DiffTuningPipeline),
        ("full", {}, DiffusionPipeline),
        ("full", {}, StableDiffusionPipeline),
    ],
)
def test_a_directory_opens_as_our_class_and_draws_what_the_run_draws(run, to, method, settings, opened_by):
    folder = to(run(method), **settings)
    pipe = opened_by.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe) is DiffTuningPipeline
    if settings == {} and method == "lora":
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    np.testing.assert_allclose(draw(pipe), of_the_run(run(method)), atol=1e-5)


def test_a_controlnet_directory_opens_as_our_class_and_makes_its_conditions(controlnet, to):
    folder = to(controlnet)
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe) is DiffTuningControlNetPipeline
    assert np.array_equal(draw(pipe, image=condition()), of_the_run(controlnet))
    assert pipe.control_spec() == ControlSpec.load(Path(controlnet.output) / "controlnet")


@needs_asking
@pytest.mark.parametrize("opened_by", [DiffusionPipeline, StableDiffusionPipeline])
def test_our_class_is_not_run_untrusted(lora, to, opened_by):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        opened_by.from_pretrained(to(lora))


@pytest.mark.sample("difference")
@pytest.mark.parametrize("how", ["whole", "difference"])
def test_a_source_guides(full, to, how):
    """Domain Guidance with what was exported, and with the base itself, give one picture."""
    folder = to(full, source_unet=how, dtype="float32")
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    if how == "difference":
        assert pipe.source_unet is None
        pipe.register_modules(source_unet=load_source(pipe.unet, folder / "source_difference.safetensors"))
    plain = draw(pipe)
    pipe.set_extras(domain_guidance=True)
    guided = draw(pipe)
    base = UNet2DConditionModel.from_pretrained(full.model.id, subfolder="unet")
    other = DiffTuningPipeline.from_pretrained(f"{full.output}/pipeline", source_unet=base)
    other.set_extras(domain_guidance=True)
    np.testing.assert_allclose(guided, draw(other), atol=1e-5)
    assert np.abs(guided - plain).max() > 1e-3


CARDS = [
    ("lora", {}),
    ("lora", STOCK),
    ("lora", {"adapter": "fused"}),
    ("lora", {"base": "referenced"}),
    ("lora", {"base": "referenced", **STOCK}),
    ("lora", {"format": "kohya"}),
    ("full", {}),
    ("full", STOCK),
    ("full", {"source_unet": "whole"}),
    ("full", {"source_unet": "difference"}),
    ("controlnet", {}),
    ("controlnet", STOCK),
    ("controlnet", {"base": "referenced"}),
    ("controlnet", {"base": "referenced", **STOCK}),
]


@pytest.mark.sample("lora-{'format': 'kohya'}")
@pytest.mark.parametrize(("method", "settings"), CARDS, ids=str)
def test_the_cards_lines_draw(run, to, root, tmp_path, monkeypatch, method, settings):
    folder = to(run(method), **settings)
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace(").images", ", num_inference_steps=2).images")
    assert ("trust_remote_code" in card) == (settings.get("pipeline") != "stock" and "format" not in settings)
    shutil.copyfile(root / "photos" / "0.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["image"].size == (16, 16)
    stock = settings.get("pipeline") == "stock" or settings.get("format") == "kohya"
    assert type(found["pipe"]).__module__.startswith("diffusers." if stock else "difftuning_control.")
    if method == "lora" and settings.get("adapter") != "fused":
        (layers,) = found["pipe"].get_list_adapters().values()
        assert len(layers) == 1
    if "source_unet" in settings:
        assert found["pipe"].source_unet is not None


@needs("diffusers", "0.36")  # before it a LoRA is loaded offline by the name of its file alone
def test_the_embedded_base_is_found_by_whoever_has_the_package(root, tmp_path, monkeypatch):
    recipe = Recipe(
        model=ModelConfig("embedded"),
        tuning=TuningConfig(retention_ratio=0.0, retention_weight=0.0),
        data=DataConfig("embedded/icons", holdout=0.0, limit=2, cache=str(root / "cache")),
        training=TrainingConfig(max_steps=1, batch_size=1, validate_every=0, sample_every=0),
        output=str(tmp_path / "run"),
    )
    train(recipe)
    folder = export(ExportRequest(recipe.output, str(tmp_path / "out"), base="referenced"))
    card = (folder / "README.md").read_text()
    assert "base = str(embedded_model())" in card
    assert json.loads((folder / "export.json").read_text())["base"]["id"] == "embedded"
    code = card.split("```python\n")[1].split("```")[0].replace(").images", ", num_inference_steps=1).images")
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    assert type(found["pipe"]) is DiffTuningPipeline
