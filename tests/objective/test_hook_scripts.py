"""The lines of examples/hooks in loops of their scripts' shape, and, where a checkout is named, in the scripts.

DIFFUSERS_CHECKOUT=/path/to/diffusers python -m pytest -m slow tests/objective/test_hook_scripts.py
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from difftuning_control import BankRequest, KnowledgeBank, family_of
from support.tiny_models import tiny_flux, tiny_sd3, tiny_sdxl
from support.tiny_sd import tiny_pipeline

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / "examples" / "hooks"
LOOPS = Path(__file__).parent / "loops"
PIPELINES = {
    "train_text_to_image_lora_sdxl": (tiny_sdxl, "sdxl"),
    "train_dreambooth_lora_sd3": (tiny_sd3, "dreambooth"),
    "train_dreambooth_lora_flux": (tiny_flux, "dreambooth"),
    "train_controlnet": (tiny_pipeline, "controlnet"),
}
BATCH = 3
HOOK = runpy.run_path(str(HOOKS / "apply.py"))


def hooked(name: str, script: str) -> str:
    return HOOK["apply"]((HOOKS / f"{name}.txt").read_text(), script)


def build_bank(pipe) -> KnowledgeBank:
    """In runs/bank, where the hooks look for it."""
    torch.manual_seed(0)
    request = BankRequest(["red 1", ""], size=4, steps=2, resolution=16)
    return KnowledgeBank.build(family_of(pipe), "runs/bank", request)


@pytest.fixture(params=PIPELINES)
def ran(request, tmp_path, monkeypatch):
    """The local names of a loop after two steps with its hook, and what its denoiser was told at the last."""
    monkeypatch.chdir(tmp_path)
    make, loop = PIPELINES[request.param]
    pipe = make()
    bank = build_bank(pipe)
    controlnet = family_of(pipe).new_controlnet(0) if loop == "controlnet" else None
    trained = controlnet or family_of(pipe).denoiser
    told = {}

    def watch(module, args, kwargs):
        told.update(kwargs, positional=args)

    trained.register_forward_pre_hook(watch, with_kwargs=True)
    torch.manual_seed(1)
    batch = {
        "pixel_values": torch.rand(BATCH, 3, 16, 16) * 2 - 1,
        "conditioning_pixel_values": torch.rand(BATCH, 3, 16, 16),
        "prompts": ["red 1"] * BATCH,
    }
    args = SimpleNamespace(
        batches=[batch, batch],
        begun_at=7,
        resolution=16,
        snr_gamma=None,
        debug_loss=False,
        weighting_scheme="logit_normal",
        instance_prompt="red 1",
        dataset=SimpleNamespace(custom_instance_prompts=False),
        controlnet=controlnet,
    )
    scope = {"__name__": loop}
    exec(hooked(request.param, (LOOPS / f"{loop}.py").read_text()), scope)
    losses = []

    def backward(loss):
        losses.append(loss.detach())
        loss.backward()

    found = scope["train"](pipe, SimpleNamespace(backward=backward, process_index=5), args)
    return SimpleNamespace(name=request.param, found=found, told=told, losses=losses, trained=trained, bank=bank)


def test_fault_15_20_a_hook_adds_bank_rows_to_all_that_the_model_is_told(ran):
    found, told = ran.found, ran.told
    assert found["is_retention"].tolist() == [False] * BATCH + [True]
    assert found["global_step"] == len(ran.losses) == 2
    # what the loop is seeded with, where the run went on, and the process
    assert found["generator"].initial_seed() == 1 + 1_000_003 * 7 + 5
    tensors = [t for t in (*told["positional"], *told.values()) if isinstance(t, torch.Tensor)]
    tensors += told.get("added_cond_kwargs", {}).values()
    rows = {len(t) for t in tensors if t.ndim != 2 or t.shape[1] != 3}  # FLUX's ids of places have no rows
    assert rows == {BATCH + 1}
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in ran.trained.parameters())


def test_fault_15_20_a_hooks_loss_is_the_objective(ran):
    found = ran.found
    objective, roles = found["objective"], found["is_retention"]
    losses = (found["model_pred"] - found["target"]).square().flatten(1).mean(1)
    levels = objective.process.levels_of(found["timesteps"])
    assert torch.equal(objective.process.timesteps[levels], found["timesteps"])
    torch.testing.assert_close(ran.losses[-1], objective.combine(losses, levels, roles).detach())
    assert objective.process.base_density[0] < objective.process.base_density[500] or "dreambooth" not in ran.name


def test_fault_15_20_a_hooks_bank_rows_are_told_the_empty_prompt_or_their_own_condition(ran):
    found, told, name = ran.found, ran.told, ran.name
    if name == "train_text_to_image_lora_sdxl":
        assert (found["prompt_embeds"][BATCH:] == 0).all()
        assert (found["prompt_embeds"][:BATCH] != 0).any()
        assert told["added_cond_kwargs"]["time_ids"].tolist() == [[40, 30, 4, 2, 16, 16]] * BATCH + [
            [16, 16, 0, 0, 16, 16]
        ]
    elif name == "train_controlnet":
        assert torch.equal(found["controlnet_image"][BATCH:], found["bank_conditions"][found["items"]])
        assert found["bank_conditions"].shape == (4, 3, 16, 16)
    else:
        for whole, empty in zip((found["prompt_embeds"], found["pooled_prompt_embeds"]), found["empty"]):
            torch.testing.assert_close(whole[BATCH:], empty)
            assert not torch.allclose(whole[:BATCH], empty)


def test_fault_15_20_a_hook_says_its_script_and_refuses_another():
    for name in PIPELINES:
        first = (HOOKS / f"{name}.txt").read_text().splitlines()[0]
        assert f"/{name}.py of diffusers 0.40.0" in first
        with pytest.raises(ValueError, match=r"0 lines of the script begin with .* the version"):
            hooked(name, "print(1)\n")
        with pytest.raises(ValueError, match="2 lines of the script begin with 'import diffusers'"):
            hooked(name, "import diffusers\nimport diffusers\n")


# --- the scripts themselves -------------------------------------------------------------------------------------------

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
SHARED = ["--resolution=16", "--train_batch_size=2", "--max_train_steps=3", "--seed=0", "--output_dir=out"]
FLAGS = {
    "train_text_to_image_lora_sdxl": ["--train_data_dir=data", "--rank=2"],
    "train_dreambooth_lora_sd3": ["--instance_data_dir=plain", "--instance_prompt=red 1", "--rank=2"],
    "train_dreambooth_lora_flux": ["--instance_data_dir=plain", "--instance_prompt=red 1", "--rank=2"],
    "train_controlnet": ["--train_data_dir=data"],
}


def write_data(folder: Path) -> None:
    """Pictures with captions and conditions in `data`, and the pictures alone in `plain`."""
    for name in ("data", "plain"):
        (folder / name).mkdir()
    rows = []
    for i in range(4):
        Image.effect_noise((24, 24), 60).convert("RGB").save(folder / "plain" / f"{i}.png")
        for kind in ("picture", "condition"):
            Image.effect_noise((24, 24), 60).convert("RGB").save(folder / "data" / f"{kind}{i}.png")
        rows.append(
            {"file_name": f"picture{i}.png", "conditioning_image_file_name": f"condition{i}.png", "text": "red 1"}
        )
    (folder / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def lengthen(encoder: Any, length: int = 77) -> None:
    """Give a CLIP text encoder positions for as many tokens as the scripts always take."""
    embeddings = next(m for m in encoder.modules() if hasattr(m, "position_embedding"))
    embeddings.position_embedding = torch.nn.Embedding(length, embeddings.position_embedding.embedding_dim)
    embeddings.register_buffer("position_ids", torch.arange(length)[None], persistent=False)
    encoder.config.max_position_embeddings = length


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="DIFFUSERS_CHECKOUT names no checkout of diffusers")
@pytest.mark.parametrize("name", PIPELINES)
def test_fault_15_20_a_hook_runs_in_its_script(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = PIPELINES[name][0]()
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if encoder is not None and "CLIP" in type(encoder).__name__:
            lengthen(encoder)
    pipe.save_pretrained("model")
    flags = list(FLAGS[name])
    if name == "train_controlnet":  # the script's own is for an autoencoder of factor 8
        ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).save_pretrained("controlnet")
        flags.append("--controlnet_model_name_or_path=controlnet")
    build_bank(pipe)
    write_data(tmp_path)
    place = (HOOKS / f"{name}.txt").read_text().split()[1]
    script = hooked(name, (Path(CHECKOUT) / place).read_text())
    # what the denoiser's rows were, at the end of the run
    script = script.replace(
        "accelerator.backward(loss)", "print('rows', is_retention.tolist()); accelerator.backward(loss)"
    )
    Path("script.py").write_text(script)
    command = [sys.executable, "script.py", "--pretrained_model_name_or_path=model", *SHARED, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line for line in result.stdout.splitlines() if line.startswith("rows")] == ["rows [False, False, True]"] * 3
    assert list(Path("out").rglob("*.safetensors"))
