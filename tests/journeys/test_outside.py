"""Bombs, ways out of a folder, pipes, pickles, code by name and secrets: refused by name, or never shown."""

import json
import os
import pickle
import shutil
import struct
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from difftuning_control.adapters.loading import load_adapter
from difftuning_control.cli import main
from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.control_spec import Conditioner, ControlSpec
from difftuning_control.data.datasets import dataset_rows
from difftuning_control.data.examples import Columns
from difftuning_control.data.images import decode_image
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.evaluation.features import load_features
from difftuning_control.families.loading import load_controlnet, load_family
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.system.secrets import without_secrets
from difftuning_control.system.tensors import write_tensors
from difftuning_control.system.untrusted import MAX_PIXELS, MOST_PIXELS, read_file
from support.command_line import flags, settings
from support.pictures import captioned_by_text_files, rewrite_metadata, write_pictures
from support.refusals import assert_refused, refusal
from support.tiny_sd import tiny_pipeline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data", count=8)


@pytest.fixture
def train(tmp_path: Path, model_dir: Path, folder: Path):
    return lambda **changes: ["train", *flags(settings(model_dir, folder, tmp_path, **changes))]


# --- pictures that are too large ------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has this size, and holds nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.sample("size2")
@pytest.mark.parametrize(
    "size", [(9460, 9460), (13_000, 13_000), (40_000, 40_000), (2_000_000_000, 2), (1, MAX_PIXELS + 1)]
)
def test_a_picture_with_too_many_pixels_is_refused_by_name_before_it_is_decoded(train, folder, tmp_path, capsys, size):
    (folder / "3.png").write_bytes(png_of(*size))
    assert_refused(train(), capsys, tmp_path, f"3.png in {folder} has ", f"pixels, expected at most {MAX_PIXELS}")


def test_the_limit_can_be_changed_and_holds_for_pictures_conditions_and_the_size_of_files(folder):
    load_images(str(folder), max_pixels=256)
    with pytest.raises(UserError, match=r"0.png in .* has 256 pixels, expected at most 255 \(--data.max_pixels"):
        load_images(str(folder), max_pixels=255)
    with (folder / "5.png").open("ab") as file:
        file.truncate(256 * 8 + 1)
    with pytest.raises(UserError, match=r"5.png in .* cannot be read \(it has 2049 bytes, expected at most 2048\)"):
        load_images(str(folder), max_pixels=256)


@pytest.mark.parametrize("value", [0, MOST_PIXELS + 1])
def test_a_limit_out_of_range_is_refused(train, tmp_path, capsys, value):
    words = train(**{"data.max_pixels": value})
    assert_refused(words, capsys, tmp_path, f"data.max_pixels is {value}; expected 1 to {MOST_PIXELS}.")


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICNS", "PCX"])
def test_a_picture_of_another_kind_is_not_handed_to_its_decoder(folder, kind):
    picture = Image.new("RGB", (64, 64), "red")
    picture.save(folder / "3.png", kind)
    with pytest.raises(UserError, match="is not a picture that can be read"):
        decode_image((folder / "3.png").read_bytes())


# --- ways out, pipes and names --------------------------------------------------------------------------------------


def pipe_behind_a_link(folder: Path) -> None:
    captioned_by_text_files(folder)
    (folder / "3.png").unlink()
    os.mkfifo(folder / "pipe")
    (folder / "3.png").symlink_to("pipe")


def caption_pipe(folder: Path) -> None:
    captioned_by_text_files(folder)
    (folder / "3.txt").unlink()
    os.mkfifo(folder / "3.txt")


def named(name: object):
    return lambda folder: rewrite_metadata(folder, lambda rows: rows[3].update(file_name=name))


NOT_READ = {
    "a pipe behind a link": (pipe_behind_a_link, "3.png", "cannot be read (it is no ordinary file)"),
    "a caption that is a pipe": (caption_pipe, "3.png", "3.txt, that cannot be read (it is no ordinary file)"),
    "a name with a NUL": (named("a\0b"), "a␀b", "does not exist"),
    "a name that is too long": (named("x" * 5000), "x" * 5000, "does not exist"),
    "a name that is a list": (named(["3.png"]), "row 4", "has a list for a file_name; expected text"),
    "a device": (named("/dev/zero"), "/dev/zero", "lies outside the folder"),
    "half a character": (lambda f: rewrite_metadata(f, lambda r: r[3].update(text="\ud800")), "3.png", "lone surr"),
}


@pytest.mark.sample("a pipe behind a link")
@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_no_file_of_the_folder_is_named_and_not_read(train, folder, tmp_path, capsys, case):
    spoil, name, fault = NOT_READ[case]
    spoil(folder)
    assert len(load_images(str(folder), skip_bad=True)) == 7
    with pytest.raises(SystemExit):
        main(train())
    shown = capsys.readouterr().err
    assert f"difftune: {name} in {folder}" in shown
    assert fault in shown


def says(words: list[str], capsys: pytest.CaptureFixture[str], expected: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.wide
def test_metadata_prompts_and_recipes_that_are_pipes_are_not_waited_for(train, folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    says([*train(), "--config", str(tmp_path / "pipe")], capsys, "pipe cannot be read; name a YAML file")
    says(train(**{"bank.prompts": tmp_path / "pipe"}), capsys, "bank.prompts is")
    (folder / "metadata.jsonl").unlink()
    os.mkfifo(folder / "metadata.jsonl")
    says(train(), capsys, "it is no ordinary file")
    with pytest.raises(OSError, match="no ordinary file"):
        read_file("/dev/zero")


def test_a_data_set_on_disk_names_no_picture_outside_of_it(tmp_path):
    import datasets

    Image.new("RGB", (8, 8), "red").save(tmp_path / "private.png")
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "set" / "own.png")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})

    def write(path: str) -> None:
        rows = {"image": [{"bytes": None, "path": path}], "text": ["red"]}
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "set" / "a.parquet"), batch_size=1)

    inside = datasets.Dataset.from_dict({"image": [str(tmp_path / "private.png")], "text": ["red"]}, features)
    for path in (str(tmp_path / "private.png"), "../private.png"):
        found = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": path}], "text": ["red"]}, features)
        (row,) = dataset_rows(found, Columns(), Captioning(), [tmp_path / "set"], [])
        with pytest.raises(UserError, match="names a picture outside the data set"):
            row.read(10**6)
    (row,) = dataset_rows(inside, Columns(), Captioning(), [tmp_path], [])
    assert row.read(10**6) == (tmp_path / "private.png").read_bytes()
    write("own.png")
    shutil.move(tmp_path / "set" / "a.parquet", tmp_path / "private.parquet")
    (tmp_path / "set" / "a.parquet").symlink_to("../private.parquet")
    with pytest.raises(UserError, match=r"a\.parquet leads outside the folder"):
        load_images(str(tmp_path / "set"))


def test_a_bank_reads_no_shard_from_elsewhere(tmp_path):
    manifest = {"identity": {}, "shards": {"../x.safetensors": "0"}, "prompts": "0"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="holds no complete bank"):
        KnowledgeBank.load(tmp_path)


def test_a_refused_run_leaves_no_folder_that_it_made(train, tmp_path, capsys):
    words = train(output=tmp_path / "runs" / "deep" / "run", **{"data.path": tmp_path / "nowhere"})
    assert "does not exist" in refusal(words, capsys, tmp_path)
    (tmp_path / "runs").mkdir()
    assert "does not exist" in refusal(words, capsys, tmp_path)  # which checks that this one stays


# --- pickles and code -----------------------------------------------------------------------------------------------


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.fixture
def trap(tmp_path: Path):
    """Puts a pickle in a place; at the end of the test, nothing must have read it."""
    made = tmp_path / "made"

    def put(path: Path, zipped: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if zipped:
            torch.save({"weight": Trap(made)}, path)
        else:
            path.write_bytes(pickle.dumps({"weight": Trap(made)}))

    yield put
    assert not made.exists()


def test_the_trap_would_spring(tmp_path):
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(Trap(tmp_path / "no" / "made")))


PARTS = [
    ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ("vae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ("text_encoder", "model.safetensors", "pytorch_model.bin"),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("part", "safe", "pickled"), PARTS)
def test_a_model_with_pickled_weights_is_refused_with_the_way_to_convert_it(
    model_dir, tmp_path, trap, part, safe, pickled, zipped
):
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (model / part / safe).unlink()
    trap(model / part / pickled, zipped)
    with pytest.raises(UserError, match=rf"as a pickle \({pickled}\), .* never loaded; .* convert it: python -c"):
        load_family(str(model))


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt", ".pth", ".pkl"])
def test_models_adapters_and_networks_in_pickles_are_refused(pipe, family, tmp_path, trap, ending):
    for zipped in (False, True):
        trap(tmp_path / "one" / f"pytorch_lora_weights{ending}", zipped)
        file = tmp_path / "one" / f"pytorch_lora_weights{ending}"
        adapter, model = partial(load_adapter, pipe), partial(load_controlnet, family)
        for load, place in ((adapter, file), (adapter, file.parent), (load_family, file), (model, file.parent)):
            with pytest.raises(UserError, match=rf"as a pickle \(pytorch_lora_weights{ending}\).* convert it: "):
                load(str(place))


def test_the_way_to_convert_an_adapter_works_and_reads_tensors_alone(tmp_path, trap):
    from safetensors.torch import load_file

    torch.save({"weight": torch.ones(2)}, tmp_path / "a.bin")
    with pytest.raises(UserError) as refused:
        load_adapter(tiny_pipeline(), tmp_path / "a.bin")
    code = str(refused.value).split("python -c '")[1].rsplit("'", 1)[0]
    code = code.replace("converted.safetensors", str(tmp_path / "a.safetensors"))
    exec(code)
    assert load_file(tmp_path / "a.safetensors")["weight"].tolist() == [1, 1]
    trap(tmp_path / "a.bin")
    with pytest.raises(pickle.UnpicklingError):
        exec(code)


def test_features_of_a_pickled_network_are_refused(tmp_path, trap):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor"})
    )
    (tmp_path / "clip" / "model.safetensors").unlink()
    trap(tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(UserError, match="as a pickle"):
        load_features(str(tmp_path / "clip"))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[1]", "5"])
def test_an_adapter_whose_header_is_no_table_is_refused_in_a_sentence(pipe, tmp_path, text):
    write_tensors(tmp_path / "a.safetensors", {"x.lora_A.weight": torch.ones(2)}, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=r"the header of .* cannot be read"):
        load_adapter(pipe, tmp_path / "a.safetensors")


@pytest.mark.parametrize("where", ["class of a part", "class of the pipeline", "custom pipeline"])
def test_code_beside_a_model_is_never_run(model_dir, tmp_path, where):
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    evil = f"import os\nos.mkdir({str(tmp_path / 'made')!r})\nfrom diffusers import *\n"
    for place in ("unet/evil.py", "evil.py", "pipeline.py"):
        (model / place).write_text(evil)
    if where == "class of a part":
        index["unet"] = ["evil", "UNet2DConditionModel"]
    elif where == "class of the pipeline":
        index["_class_name"] = ["evil", "StableDiffusionPipeline"]
    (model / "model_index.json").write_text(json.dumps(index))
    if where == "custom pipeline":  # which nothing names, so that the model is a stock one
        load_family(str(model))
    else:
        with pytest.raises(UserError):
            load_family(str(model))
    assert not (tmp_path / "made").exists()


def test_a_spec_from_elsewhere_names_no_function_of_pythons_own_library(tmp_path):
    values = {"annotator": "os:mkdir", "params": {}, "resolution": 16}
    with pytest.raises(UserError, match="is of Python's own library"):
        Conditioner(ControlSpec(**values)).load()


# --- what is shown and written --------------------------------------------------------------------------------------


def test_names_do_not_command_the_terminal(train, folder, tmp_path, capsys):
    rewrite_metadata(folder, lambda rows: rows[3].update(file_name="\x1b[2J\u202e\x9b31m.png"))
    with pytest.raises(SystemExit):
        main(train())
    shown = capsys.readouterr().err
    assert "␛[2J⟨U+202E⟩⟨U+009B⟩31m.png in" in shown
    assert not set(shown) & set("\x1b\u202e\x9b")


CANARIES = {
    "HF_TOKEN": "hf_CanaryOne1234567890",
    "WANDB_API_KEY": "canary2222222222222222222222222222222222",
    "MY_COMPANY_PASSWORD": "canary-three-333",
}
SECRETS = [*CANARIES.values(), "user4:canary4", "canary55555", "hf_CanarySix66666666666"]


@pytest.mark.parametrize("text", ["a top-secret token ring", "price=3 tokenizer=x", "me@home.org", "https://a.b/c@d"])
def test_words_that_are_no_secrets_stay(text):
    assert without_secrets(text) == text


@pytest.mark.wide
def test_secrets_are_in_no_file_and_no_line_of_a_run_its_export_and_its_report(
    train, folder, tmp_path, capfd, monkeypatch
):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    address = "https://user4:canary4@hub.example/x?token=canary55555"
    prompts = [f"{address} {CANARIES['WANDB_API_KEY']}", "=cmd|x <script>alert(1)</script> \x1b[31m ```", *SECRETS[:3]]
    rewrite_metadata(folder, lambda rows: rows[0].update(text="<b>red</b>\u202e"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"training": {"sample_prompts": prompts, "trackers": ["tensorboard"]}}))
    more = {
        "training.sample_every": 2,
        "training.checkpoint_every": 1,
        "training.max_steps": 2,
        "training.sample_steps": 1,
    }
    more |= {"bank.size": 12}
    words = [*train(**more), "--config", str(recipe), "--data.truncate_captions"]
    main(words)
    run = tmp_path / "run"
    main(["export", str(run), "--to", str(tmp_path / "export"), "--base", "referenced", "--pipeline", "stock"])
    main(
        [
            "analyze",
            "--run",
            str(run),
            "--analysis.rows",
            "4",
            "--analysis.draws",
            "1",
            "--output",
            str(tmp_path / "analysis"),
        ]
    )
    for wrong in (
        ["--model.id", address],
        ["--model.id", "nobody/hf_CanarySix66666666666"],
        ["--data.path", address],
        ["--hf_token=canary55555"],
        ["--hf_token", "canary55555"],
        ["--training.max_steps", CANARIES["HF_TOKEN"]],
        ["--config", f"/nowhere/{CANARIES['MY_COMPANY_PASSWORD']}"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--overwrite", *wrong])
        assert stopped.value.code == 2
    shown = "".join(capfd.readouterr())
    assert shown.count("difftune: ") == 7
    assert "\x1b" not in shown.replace("\x1b[A", "")
    assert [s for s in SECRETS if s in shown] == []
    files = [
        p for place in ("run", "export", "analysis", "cache") for p in (tmp_path / place).rglob("*") if p.is_file()
    ]
    assert {"run.json", "README.md", "report.html", "recipe.yaml", "export.json"} <= {p.name for p in files}
    assert any("tfevents" in p.name for p in files)
    assert [(p, s) for p in files for s in SECRETS if s.encode() in p.read_bytes()] == []
    assert not [p for p in files if p.suffix == ".csv"]  # no table is written that a spreadsheet would compute
    assert "<script>" not in (tmp_path / "analysis" / "report.html").read_text()


# --- without a network ----------------------------------------------------------------------------------------------


def test_without_the_hub_the_sentence_is_short_and_says_what_to_do(family):
    for load in (load_family, lambda name: load_controlnet(family, name)):
        with pytest.raises(UserError) as refused:
            load("nobody/no-such-model")
        text = str(refused.value)
        assert (
            "nobody/no-such-model is no directory here and could not be downloaded (offline mode is on: HF_HUB_" in text
        )
        assert len(text) < 260
