"""Every kind of adapter starts at the base, moves what it should and no more, and is the same wherever it is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftuning_control import load_adapter, unload_adapter
from difftuning_control.adapters.difffit import GAMMA, DiffFit
from difftuning_control.adapters.files import DIFFFIT_FILE, LORA_FILE, PEFT_CONFIG, PEFT_FILE
from difftuning_control.adapters.kinds import OWN, keep_part, own_parts
from difftuning_control.adapters.tuning import AdapterTuning, adapter_result, merged
from difftuning_control.errors import UserError
from difftuning_control.families.loading import family_of, load_family
from difftuning_control.families.sd import StableDiffusion
from difftuning_control.pipelines import DiffTuningPipeline
from difftuning_control.pipelines.guidance import active_adapters, adapters_at, hand_over, tuner_layers
from difftuning_control.recipe.adapter import AdapterConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.studies import AnalysisConfig
from difftuning_control.runs.finished import finished_run, tuned_model
from difftuning_control.training.checkpoint import checkpoints
from difftuning_control.training.loop import TrainingLoop
from difftuning_control.verbs.analyze import analyze
from difftuning_control.verbs.train import train
from support.tiny_sd import tiny_pipeline
from support.tuning import picture, tune, weights

KINDS = {
    "lora": {"rank": 2, "alpha": 3.0},
    "rslora": {"kind": "lora", "rank": 4, "alpha": 3.0, "rslora": True},
    "pissa": {"kind": "lora", "rank": 2, "alpha": 3.0, "init": "pissa"},
    "rspissa": {"kind": "lora", "rank": 4, "alpha": 3.0, "init": "pissa", "rslora": True},
    "orthogonal": {"kind": "lora", "rank": 2, "alpha": 3.0, "init": "orthogonal"},
    "dora": {"rank": 2, "alpha": 3.0},
    "tlora": {"rank": 4, "min_rank": 1, "alpha": 3.0},
    "tlora-gaussian": {"kind": "tlora", "rank": 4, "min_rank": 1, "init": "gaussian"},
    "loha": {"rank": 2, "alpha": 3.0},
    "lokr": {},
    "lokr-low": {"kind": "lokr", "rank": 1, "alpha": 3.0, "factor": 2},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "ia3": {},
    "difffit": {},
}
FORMATS = ["lora", "dora", "tlora", "loha", "lokr", "oft", "boft", "ia3", "difffit"]
UNSCALED = ("dora", "oft", "boft", "ia3")
INEXACT = ("pissa", "rspissa", "orthogonal", "tlora")  # their start is added and taken away again


def config_of(name: str, **changes) -> AdapterConfig:
    return AdapterConfig(**({"kind": name} | KINDS[name] | changes))


def tuned_family(config: AdapterConfig, rate: float = 0.05) -> tuple[StableDiffusion, AdapterTuning]:
    family = family_of(tiny_pipeline())
    tuning = AdapterTuning(family, config, seed=3)
    tune(family, tuning, rate=rate)
    return family, tuning


def plain_weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The pretrained weights of a pipeline, with nothing that adapters have added."""
    added = (".lora_", ".hada_", ".lokr_", ".oft_", ".boft_", ".ia3_", GAMMA)
    return {n: v for n, v in weights(pipe).items() if not any(part in n for part in added)}


@pytest.fixture(scope="module")
def base_picture() -> np.ndarray:
    return picture(tiny_pipeline())


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Name, folder of the saved adapter, and the picture of the model that it was saved from."""
    folder = tmp_path_factory.mktemp(request.param)
    family, tuning = tuned_family(config_of(request.param))
    tuning.save(folder)
    return request.param, folder, picture(family.pipe)


# --- where it starts, and what moves --------------------------------------------------------------------------------


@pytest.mark.sample("lora")
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_starts_at_the_base(name, base_picture):
    family = family_of(tiny_pipeline())
    before = plain_weights(family.pipe)
    AdapterTuning(family, config_of(name))
    atol = 2e-5 if name in INEXACT else 0
    np.testing.assert_allclose(picture(family.pipe), base_picture, atol=atol, rtol=0)
    torch.testing.assert_close(plain_weights(family.pipe), before, atol=0, rtol=0)


@pytest.mark.sample("loha")
@pytest.mark.parametrize("name", [name for name in KINDS if name != "difffit"])
def test_a_kind_moves_all_that_trains_and_no_weight_of_the_base(name):
    family = family_of(tiny_pipeline())
    base = plain_weights(family.pipe)
    tuning = AdapterTuning(family, config_of(name))
    frozen = {n: p.clone() for n, p in family.denoiser.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in tuning.parameters().items()}
    tune(family, tuning)
    torch.testing.assert_close(plain_weights(family.pipe), base, atol=0, rtol=0)
    assert [n for n, p in tuning.parameters().items() if torch.equal(p, before[n])] == []
    parameters = dict(family.denoiser.named_parameters())
    assert [n for n, p in frozen.items() if not torch.equal(p, parameters[n])] == []


@pytest.mark.sample("ia3")
@pytest.mark.parametrize("name", KINDS)
def test_switched_off_the_model_is_the_base_bit_for_bit(name, base_picture):
    family, _ = tuned_family(config_of(name))
    tuned = picture(family.pipe)
    assert np.abs(tuned - base_picture).max() > 1e-3
    names = active_adapters(family.denoiser)
    assert names == ["default"]
    with adapters_at(tuner_layers(family.denoiser), names, 0):
        np.testing.assert_array_equal(picture(family.pipe), base_picture)
    np.testing.assert_array_equal(picture(family.pipe), tuned)


@pytest.mark.sample("difffit")
@pytest.mark.parametrize("name", KINDS)
def test_a_hand_over_draws_with_the_base_where_it_should(name, base_picture):
    family, _ = tuned_family(config_of(name))
    tuned = picture(family.pipe)
    for u0, expected in ((0, tuned), (1, base_picture)):
        with hand_over(family, u0):
            np.testing.assert_array_equal(picture(family.pipe), expected)
    with hand_over(family, 0.4):
        between = picture(family.pipe)
    assert not np.array_equal(between, tuned)
    assert not np.array_equal(between, base_picture)
    np.testing.assert_array_equal(picture(family.pipe), tuned)


@pytest.mark.sample("difffit")
@pytest.mark.parametrize("saved", ["pissa", "tlora", "ia3", "difffit"], indirect=True)
def test_the_drop_in_pipeline_takes_the_pretrained_weights_from_under_it(saved, base_picture):
    _, folder, trained = saved
    stock = tiny_pipeline()
    load_adapter(stock, folder)
    pipe = DiffTuningPipeline(**stock.components, domain_guidance=True, requires_safety_checker=False)
    guided = picture(pipe)
    assert np.abs(guided - trained).max() > 1e-3
    source = {"source_unet": tiny_pipeline().unet, "requires_safety_checker": False}
    other = DiffTuningPipeline(**stock.components, domain_guidance=True, **source)
    np.testing.assert_allclose(guided, picture(other), atol=1e-5)
    pipe.set_extras(domain_guidance=False, hand_over=1.0)
    np.testing.assert_array_equal(picture(pipe), base_picture)
    pipe.set_extras(hand_over=0.0)
    np.testing.assert_allclose(picture(pipe), trained, atol=1e-5)
    if folder.joinpath(LORA_FILE).exists() or folder.joinpath(DIFFFIT_FILE).exists():
        half = tiny_pipeline()
        load_adapter(half, folder, strength=0.5)
        pipe.set_extras(hand_over=None, adapter_schedule=lambda u: 0.5)
        np.testing.assert_allclose(picture(pipe), picture(half), atol=1e-5)


def expected_numbers(family: StableDiffusion) -> dict[str, int]:
    """How many weights train, from the layers' sizes alone."""
    layers = [m for n, m in family.denoiser.named_modules() if n.endswith(family.lora_targets)]
    sizes = [tuple(m.weight.shape) for m in layers]
    kronecker = {8: (2, 4), 16: (4, 4)}
    whole = [(kronecker[o], kronecker[i]) for o, i in sizes]
    return {
        "lora": sum(2 * (o + i) for o, i in sizes),
        "rslora": sum(4 * (o + i) for o, i in sizes),
        "pissa": sum(2 * (o + i) for o, i in sizes),
        "rspissa": sum(4 * (o + i) for o, i in sizes),
        "orthogonal": sum(2 * (o + i) for o, i in sizes),
        "dora": sum(2 * (o + i) + o for o, i in sizes),
        "tlora": sum(4 * (o + i + 1) for o, i in sizes),
        "tlora-gaussian": sum(4 * (o + i) for o, i in sizes),
        "loha": sum(4 * (o + i) for o, i in sizes),
        "lokr": sum(a[0] * b[0] + a[1] * b[1] for a, b in whole),
        "lokr-low": sum(4 + o // 2 + i // 2 for o, i in sizes),
        "oft": sum(i // 4 * 6 for _, i in sizes),
        "boft": sum(i // 4 * 16 + o for o, i in sizes),
        "ia3": sum(o for o, _ in sizes),
    }


@pytest.mark.sample("boft", "oft", "lokr", "loha")
@pytest.mark.parametrize("name", [name for name in KINDS if name != "difffit"])
def test_as_many_weights_train_as_the_formula_says(name):
    family = family_of(tiny_pipeline())
    expected = expected_numbers(family)[name]
    assert sum(p.numel() for p in AdapterTuning(family, config_of(name)).parameters().values()) == expected


@pytest.mark.sample("tlora", "ia3")
@pytest.mark.parametrize("name", ["pissa", "tlora", "loha", "oft", "boft", "ia3", "dora", "lokr"])
def test_a_kind_trains_in_float32_on_a_base_in_lower_precision(name):
    family = family_of(tiny_pipeline().to(torch.bfloat16))
    base = plain_weights(family.pipe)
    tuning = AdapterTuning(family, config_of(name))
    before = {n: p.clone() for n, p in tuning.parameters().items()}
    tune(family, tuning)
    assert {p.dtype for p in tuning.parameters().values()} == {torch.float32}
    assert [n for n, p in tuning.parameters().items() if torch.equal(p, before[n])] == []
    torch.testing.assert_close(plain_weights(family.pipe), base, atol=0, rtol=0)


@pytest.mark.sample("lora", "lokr")
@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "boft", "ia3"])
def test_kinds_that_fit_convolutions_start_at_the_base_there_too(name, tmp_path):
    family = family_of(tiny_pipeline())
    before = picture(family.pipe)
    tuning = AdapterTuning(family, config_of(name, targets="conv1,proj_in,downsamplers.0.conv"))
    np.testing.assert_array_equal(picture(family.pipe), before)
    tune(family, tuning)
    tuning.save(tmp_path)
    stock = tiny_pipeline()
    load_adapter(stock, tmp_path)
    np.testing.assert_allclose(picture(stock), picture(family.pipe), atol=1e-5)


def test_pissa_starts_from_the_largest_singular_vectors_of_the_weight():
    family = family_of(tiny_pipeline())
    AdapterTuning(family, config_of("pissa"))
    layer = family.denoiser.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    left, values, right = torch.linalg.svd(layer.base_layer.weight)
    largest = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    torch.testing.assert_close(layer.scaling["default"] * up.weight @ down.weight, largest)
    torch.testing.assert_close(layer.scaling["default"] * up.start @ down.start, -largest)


@pytest.mark.sample("oft")
@pytest.mark.parametrize("name", ["oft", "boft"])
def test_an_orthogonal_kind_rotates(name):
    family, _ = tuned_family(config_of(name))
    layer = family.denoiser.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    found = layer.get_delta_weight("default")
    rotation = found if name == "oft" else found[0]
    assert not torch.allclose(rotation, torch.eye(len(rotation)), atol=1e-3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)), atol=1e-5, rtol=0)


def test_a_controlnet_takes_the_merged_update_of_every_start():
    for name in ("lora", "pissa"):
        family, _ = tuned_family(config_of(name))
        plain = merged(family.denoiser).eval()
        latents, prompts = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
        with torch.no_grad():
            found = plain(latents, torch.tensor([3, 700]), prompts)[0]
            expected = family.denoiser(latents, torch.tensor([3, 700]), prompts)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.sample("lokr-low")
def test_a_saved_adapter_gives_the_trained_picture_in_a_fresh_pipeline(saved):
    _, folder, trained = saved
    stock = tiny_pipeline()
    load_adapter(stock, folder)
    np.testing.assert_allclose(picture(stock), trained, atol=1e-5)
    assert not [p for p in folder.rglob("*") if p.suffix not in (".safetensors", ".json")]


@pytest.mark.sample("dora", "lokr-low", "ia3")
def test_what_diffusers_and_peft_load_themselves_gives_the_trained_picture(saved, base_picture):
    name, folder, trained = saved
    if name == "difffit":
        pytest.skip("nobody else knows it")
    assert np.abs(trained - base_picture).max() > 1e-3
    stock = tiny_pipeline()
    if (folder / PEFT_CONFIG).exists():
        from peft import PeftModel

        stock.unet = PeftModel.from_pretrained(stock.unet, folder).get_base_model()
    else:
        stock.load_lora_weights(folder, weight_name=LORA_FILE)
    if config_of(name).kind == "tlora":  # at its full rank throughout, which is another model
        assert np.abs(picture(stock) - trained).max() > 1e-3
    else:
        np.testing.assert_allclose(picture(stock), trained, atol=1e-5)


@pytest.mark.sample("ia3", "tlora", "difffit")
def test_an_adapter_comes_off_again_and_leaves_the_pipeline_as_it_was(saved, base_picture):
    _, folder, _ = saved
    stock = tiny_pipeline()
    before, structure = weights(stock), [(n, type(m)) for n, m in stock.unet.named_modules()]
    for _ in range(2):
        load_adapter(stock, folder, "style")
        unload_adapter(stock, "style")
    assert [(n, type(m)) for n, m in stock.unet.named_modules()] == structure
    torch.testing.assert_close(weights(stock), before, atol=0, rtol=0)
    np.testing.assert_array_equal(picture(stock), base_picture)
    with pytest.raises(UserError, match="has no adapter style"):
        unload_adapter(stock, "style")


@pytest.mark.sample("lora", "oft", "difffit")
def test_strength_leads_from_the_base_to_the_trained_model(saved, base_picture):
    name, folder, trained = saved
    if name in UNSCALED:
        with pytest.raises(UserError, match=f"strength is 0.5, but an adapter of kind {name} cannot be scaled"):
            load_adapter(tiny_pipeline(), folder, strength=0.5)
        return
    found = {}
    for strength in (0.0, 0.5, 1.0):
        stock = tiny_pipeline()
        load_adapter(stock, folder, strength=strength)
        found[strength] = picture(stock)
    np.testing.assert_allclose(found[0.0], base_picture, atol=1e-5)
    np.testing.assert_allclose(found[1.0], trained, atol=1e-5)
    assert np.abs(found[0.5] - trained).max() > 1e-4
    assert np.abs(found[0.5] - base_picture).max() > 1e-4


@pytest.mark.sample("difffit")
def test_two_saves_of_one_adapter_are_the_same_bytes(saved, tmp_path):
    name, folder, _ = saved
    _, tuning = tuned_family(config_of(name))
    tuning.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


# --- what does not fit ----------------------------------------------------------------------------------------------


def damaged(folder: Path, target: Path, change) -> Path:
    """A copy of a saved adapter whose tensors were changed."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".json":
            (target / path.name).write_bytes(path.read_bytes())
            continue
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(change(load_file(path)), target / path.name, metadata)
    return target


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(tensors.items())[1:])


def with_another(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = min(k for k in tensors if "down_blocks.1" in k)
    return tensors | {key.replace("down_blocks.1", "down_blocks.7"): tensors[key].clone()}


def of_another_shape(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = max(tensors, key=lambda k: tensors[k].numel())
    return tensors | {key: torch.zeros(*tensors[key].shape[:-1], 2 * tensors[key].shape[-1])}


@pytest.mark.sample("without_one-tlora", "with_another-lokr", "of_another_shape-ia3", "without_one-difffit")
@pytest.mark.parametrize("saved", FORMATS, indirect=True)
@pytest.mark.parametrize("change", [without_one, with_another, of_another_shape])
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_left(saved, tmp_path, change, base_picture):
    _, folder, _ = saved
    place = damaged(folder, tmp_path / "damaged", change)
    stock = tiny_pipeline()
    structure = [(n, type(m)) for n, m in stock.unet.named_modules()]
    with pytest.raises(UserError, match=r"does not fit this model|is not whole") as error:
        load_adapter(stock, place)
    assert str(error.value).count("\n") == 0
    assert [(n, type(m)) for n, m in stock.unet.named_modules()] == structure
    np.testing.assert_array_equal(picture(stock), base_picture)
    load_adapter(stock, folder)


def test_other_places_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "pickle.bin").write_text("no")
    for place, fault in (
        (tmp_path, "holds no adapter"),
        (tmp_path / "nothing", "holds no adapter"),
        (tmp_path / "pickle.bin", "is never loaded; .* convert it"),
    ):
        with pytest.raises(UserError, match=fault):
            load_adapter(tiny_pipeline(), place)
    with pytest.raises(UserError, match="damaged or no safetensors file"):
        load_adapter(tiny_pipeline(), tmp_path / "text.safetensors")
    _, tuning = tuned_family(config_of("lora"))
    tuning.save(tmp_path / "lora")
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="expected a finite number of at least 0"):
            load_adapter(tiny_pipeline(), tmp_path / "lora", strength=strength)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as an adapter"),
        ('{"peft_type": "PROMPT_TUNING"}', "cannot be read as an adapter of LORA, LOHA"),
        ('{"peft_type": "LOHA", "colour": 1}', "colour"),
    ],
)
def test_other_peft_directories_are_refused(tmp_path, content, said):
    (tmp_path / PEFT_CONFIG).write_text(content)
    with pytest.raises(UserError, match=said):
        load_adapter(tiny_pipeline(), tmp_path)


def test_a_pickled_peft_adapter_is_not_read(tmp_path):
    _, tuning = tuned_family(config_of("ia3"))
    tuning.save(tmp_path)
    torch.save(load_file(tmp_path / PEFT_FILE), tmp_path / "adapter_model.bin")
    (tmp_path / PEFT_FILE).unlink()
    with pytest.raises(UserError, match="safetensors files only"):
        load_adapter(tiny_pipeline(), tmp_path)


def test_adapters_side_by_side_are_named_apart_and_each_comes_off_alone(tmp_path):
    for name, targets in (("lora", "to_q"), ("tlora", "to_v"), ("difffit", "auto")):
        _, tuning = tuned_family(AdapterConfig(name, targets=targets, **({} if name == "difffit" else {"rank": 4})))
        tuning.save(tmp_path / name)
    alone = tiny_pipeline()
    load_adapter(alone, tmp_path / "lora", "one")
    both = tiny_pipeline()
    load_adapter(both, tmp_path / "lora", "one")
    with pytest.raises(UserError, match="has an adapter one already"):
        load_adapter(both, tmp_path / "tlora", "one")
    load_adapter(both, tmp_path / "tlora", "two")
    with pytest.raises(UserError, match="beside which a DiffFit cannot be put"):
        load_adapter(both, tmp_path / "difffit", "three")
    both.set_adapters(["one", "two"])
    assert np.abs(picture(both) - picture(alone)).max() > 1e-3
    unload_adapter(both, "two")
    both.set_adapters("one")
    np.testing.assert_array_equal(picture(both), picture(alone))
    fit = tiny_pipeline()
    load_adapter(fit, tmp_path / "difffit")
    with pytest.raises(UserError, match="has a DiffFit, beside which"):
        load_adapter(fit, tmp_path / "lora", "one")


@pytest.mark.sample(
    "settings10-conv1, a convolution, but kind tlora fits linear",
    "settings7-adapter\\\\.block_size is 32, which does not divide the 16 inputs of",
    "settings11-kind lora with init pissa fits linear layers only",
    "settings9-conv1, a convolution, but kind oft fits no convol",
    "settings5-is 16 \\xd7 16; expected at most 16",
    "settings6-second Kronecker factor of .[*] is 4 \\xd7 4, which trains whole from rank 2 on",
)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 9}, r"adapter\.rank is 9, but .*attn\d\.to_\w+.* is \d+ × 8; expected at most 8"),
        ({"rank": 32}, "adapter.rank is 32, but .* expected at most"),
        ({"kind": "dora", "rank": 17, "targets": "attn1.to_q"}, "is 16 × 16; expected at most 16"),
        ({"kind": "tlora", "rank": 17, "targets": "attn1.to_q"}, "is 16 × 16; expected at most 16"),
        ({"rank": 17, "init": "pissa", "targets": "attn1.to_q"}, "is 16 × 16; expected at most 16"),
        ({"kind": "loha", "rank": 17, "targets": "attn1.to_q"}, "is 16 × 16; expected at most 16"),
        ({"kind": "lokr", "rank": 2}, "second Kronecker factor of .* is 4 × 4, which trains whole from rank 2 on"),
        ({"kind": "oft"}, r"adapter\.block_size is 32, which does not divide the 16 inputs of"),
        ({"kind": "boft", "block_size": 3}, "block_size is 3, which does not divide the 16 inputs of .* of 16"),
        ({"kind": "oft", "block_size": 4, "targets": "conv1"}, "conv1, a convolution, but kind oft fits no convol"),
        ({"kind": "tlora", "rank": 2, "targets": "to_q,conv1"}, "conv1, a convolution, but kind tlora fits linear"),
        ({"rank": 2, "init": "pissa", "targets": "conv1"}, "kind lora with init pissa fits linear layers only"),
        ({"rank": 2, "init": "orthogonal", "targets": "conv1"}, "kind lora with init orthogonal fits linear"),
        ({"kind": "ia3", "targets": "to_queue"}, "adapter.targets names to_queue"),
    ],
)
def test_what_does_not_fit_the_layers_is_refused_by_name_and_nothing_is_attached(settings, said):
    family = family_of(tiny_pipeline())
    before = list(family.denoiser.state_dict())
    if said.startswith(r"adapter\.rank is 9"):
        settings = settings | {"targets": "conv_shortcut,time_emb_proj"}
        said = r"adapter\.rank is 9, but [\w.]+ is \d+ × \d+; expected at most 8"
    with pytest.raises(UserError, match=said):
        AdapterTuning(family, AdapterConfig(**settings))
    assert list(family.denoiser.state_dict()) == before


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "ia3", "rank": 4}, "adapter.rank is given, but kind ia3 takes only targets; leave it out."),
        ({"kind": "oft", "alpha": 4.0}, "adapter.alpha is given, but kind oft takes only block_size, targets"),
        ({"kind": "difffit", "targets": "to_q"}, "adapter.targets is given, but kind difffit has no settings"),
        ({"kind": "loha", "dropout": 0.1}, "adapter.dropout is given, but kind loha takes only"),
        ({"kind": "dora", "init": "pissa"}, "adapter.init is given, but kind dora"),
        ({"kind": "tlora", "init": "pissa"}, "a tlora starts gaussian or orthogonal"),
        ({"kind": "tlora", "text_encoder": True}, "adapter.text_encoder is given, but kind tlora"),
        ({"min_rank": 2}, "adapter.min_rank is given, but kind lora"),
        ({"kind": "tlora", "rank": 4, "min_rank": 5}, "adapter.min_rank is 5; expected 1 to adapter.rank"),
        ({"kind": "tlora", "min_rank": 0}, "adapter.min_rank is 0; expected 1 to adapter.rank"),
        ({"kind": "lokr", "alpha": 4.0}, "a lokr without adapter.rank is not scaled"),
        ({"kind": "lokr", "factor": 1}, "adapter.factor is 1; expected at least 2"),
        ({"kind": "oft", "block_size": 1}, "adapter.block_size is 1; expected at least 2"),
        ({"rank": 0}, "adapter.rank is 0; expected at least 1"),
        ({"rank": 3, "init": "orthogonal"}, "adapter.rank is 3; expected an even number for init orthogonal"),
        ({"init": "pissa", "dropout": 0.1}, "a lora with init pissa starts away from 0"),
        ({"text_encoder_learning_rate": 1e-4}, "is given, but adapter.text_encoder is false"),
        ({"text_encoder": True, "text_encoder_learning_rate": 0.0}, "text_encoder_learning_rate is 0.0; expected"),
        ({"on": "controlnet", "kind": "dora"}, "adapter.kind dora is given for a ControlNet"),
        ({"on": "controlnet", "text_encoder": True}, "adapter.text_encoder is given for a ControlNet"),
    ],
)
def test_settings_that_a_kind_has_no_use_for_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        AdapterConfig(**settings)


# --- through the trainer --------------------------------------------------------------------------------------------


def short(recipe: Recipe, name: str, output: Path, **training) -> Recipe:
    settings = replace(recipe.training, max_steps=4, validate_every=0, **training)
    return replace(recipe, adapter=config_of(name), training=settings, output=str(output))


@pytest.fixture(params=["pissa", "dora", "tlora", "lokr", "oft", "ia3", "difffit"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.wide
def test_a_run_of_any_kind_is_resumed_bit_for_bit_and_judged_from_its_folder(recipe, kind, tmp_path, monkeypatch):
    whole = short(recipe, kind, tmp_path / "whole", ema_decay=0.9, save_at=[2])
    record = train(whole).record
    result = adapter_result(whole.adapter)
    assert set(record.outputs) == (
        {f"adapter/{PEFT_CONFIG}", f"adapter/{PEFT_FILE}"} if result == "adapter" else {result}
    )
    card = (tmp_path / "whole" / "README.md").read_text()
    assert ("load_adapter(pipe" in card) == (kind not in ("pissa", "dora"))
    assert ("pipe.load_lora_weights(" in card) == (kind in ("pissa", "dora"))

    broken = short(recipe, kind, tmp_path / "broken", ema_decay=0.9, save_at=[2])
    advance = TrainingLoop.advance

    def stop(self, number, more=True):
        if number == 3:
            raise KeyboardInterrupt
        return advance(self, number, more)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    (checkpoint,) = checkpoints(tmp_path / "broken")
    starts = [name for name in load_file(checkpoint / "weights.safetensors") if name.endswith(".start")]
    assert (len(starts) > 0) == (kind in ("pissa", "tlora"))
    resumed = train(replace(broken, training=replace(broken.training, resume=True))).record
    assert resumed.outputs == record.outputs
    assert resumed.losses == record.losses

    family = load_family(recipe.model.id)
    run = finished_run(tmp_path / "whole")
    assert run.recipe == replace(whole, data=replace(whole.data, resolution=run.data.resolution))
    before = picture(family.pipe)
    pictures = {}
    for number in (None, 2):
        with tuned_model(family, tmp_path / "whole", run, number) as tuned:
            pictures[number] = picture(tuned.pipe)
        np.testing.assert_array_equal(picture(family.pipe), before)
    assert not np.array_equal(pictures[None], pictures[2])
    assert not np.array_equal(pictures[None], before)


@pytest.mark.wide
def test_the_losses_of_a_run_are_those_of_its_saved_adapter(recipe, kind, tmp_path):
    trained = short(recipe, kind, tmp_path / "run")
    record = train(trained).record
    found = analyze(trained, AnalysisConfig(rows=4, draws=1), str(tmp_path / "run"))
    base, tuned = record.losses["bank"].base.losses, record.losses["bank"].tuned.losses
    expected = [after / before - 1 for before, after in zip(base, tuned)]
    np.testing.assert_allclose(found["forgetting"]["mean"], expected, atol=1e-4)


@pytest.mark.wide
def test_scale_factors_and_vectors_do_not_decay_towards_zero(recipe):
    training = replace(recipe.training, weight_decay=0.5, learning_rate=0.1)
    for name, kept in (("ia3", 1.0), ("difffit", 1.0), ("dora", None), ("lora", None)):
        family = family_of(tiny_pipeline())
        tuning = AdapterTuning(family, config_of(name))
        groups = tuning.groups(training)
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        names = {n for n, p in tuning.parameters().items() if id(p) in decayed}
        assert sum(len(g["params"]) for g in groups) == len(tuning.parameters())
        assert (names == set()) == (kept is not None)
        assert not any("magnitude" in n for n in names)


@pytest.mark.wide
def test_the_output_of_an_earlier_run_of_another_kind_goes(recipe, tmp_path):
    for name in ("ia3", "difffit", "lora"):
        train(short(recipe, name, tmp_path / "run"), overwrite=True)
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert LORA_FILE in left
    assert not left & {"adapter", DIFFFIT_FILE}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["adapter"]["kind"] == "lora"


def test_own_parts_are_read_without_a_trace_and_found_on_a_compiled_denoiser(pipe):
    torch._dynamo.reset()
    assert own_parts(pipe.unet) == {}
    assert OWN not in vars(pipe.unet)
    compiled = torch.compile(pipe.unet, backend="eager")
    keep_part(compiled, "tuned", DiffFit(pipe.unet, "tuned"))
    assert OWN not in vars(compiled)
    assert own_parts(compiled) is own_parts(pipe.unet)
    assert active_adapters(compiled) == active_adapters(pipe.unet) == ["tuned"]
    pipe.unet = compiled
    unload_adapter(pipe, "tuned")
    assert own_parts(compiled) == own_parts(compiled._orig_mod) == {}
