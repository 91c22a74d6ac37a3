"""Keys, tokens and passwords: one function takes them out of every text, and leaves words, hashes and names alone."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from difftuning_control.cli import main
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.runs.audit import COMMAND, FILE, Session, read_audit
from difftuning_control.runs.verify import verify
from difftuning_control.system.digests import digest_of_file
from difftuning_control.system.secrets import HIDDEN, without_secrets
from support.command_line import flags, settings
from support.pictures import rewrite_metadata, write_pictures

HEX = "0123456789abcdef0123456789abcdef01234567"
# what must not get around: no variable holds any of these
LOOSE = {
    "the Hub": "hf_CanaryHubAbcDefGhi",
    "Weights & Biases, old": HEX,
    "Weights & Biases, new": "wandb_v1_CanaryNew0123456789abcdef_xyz",
    "Weights & Biases, own server": f"local-{HEX}",
    "GitHub's": "ghp_CanaryHub0123456789",
    "another's": "sk-canary-0123456789abcdef",
}


@pytest.mark.parametrize("secret", LOOSE.values(), ids=LOOSE)
@pytest.mark.parametrize("text", ["{}", "key {}.", '"{}"', "['{}']", "a={}", "x: {}\n{}", "https://{}@host/x"])
def test_keys_known_by_their_form_are_left_out_wherever_they_stand(secret, text):
    if text == "key {}." and secret in (HEX, f"local-{HEX}"):
        text = "key {} "  # with a point behind it, it is the name of a file
    shown = without_secrets(text.replace("{}", secret))
    assert secret not in shown
    assert HEX not in shown
    assert shown == text.replace("{}", HIDDEN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:p:w@host/x", "https://(secret)@host/x"),
        ("git+ssh://me@host", "git+ssh://(secret)@host"),
        ("https://h/x?token=abc&a=1", "https://h/x?token=(secret)&a=1"),
        ("https://h/x?X-Amz-Signature=ab12&Key=1", "https://h/x?X-Amz-Signature=(secret)&Key=1"),
        ("Authorization: Bearer abc", "Authorization: (secret)"),
        ("-H 'authorization: Basic YWJj'", "-H 'authorization: (secret)'"),
        ('{"Authorization": "Bearer abc", "b": 1}', '{"Authorization": "(secret)", "b": 1}'),
        (json.dumps('{"Authorization": "Token abc", "b": 1}'), r'"{\"Authorization\": \"(secret)\", \"b\": 1}"'),
        ("Proxy-Authorization=abc", "Proxy-Authorization=(secret)"),
        ("sent Bearer abcdefgh12345678", "sent Bearer (secret)"),
        ("x-api-key: abc", "x-api-key: (secret)"),
        ("{api_key: abc, b: 1}", "{api_key: (secret), b: 1}"),
        ("hub_token: abc123\nb: 1", "hub_token: (secret)\nb: 1"),
        ("--hub.token abc x", "--hub.token (secret) x"),
        ("MY_PASSWORD='abc' run", "MY_PASSWORD='(secret)' run"),
    ],
)
def test_what_a_name_announces_is_left_out(text, expected):
    assert without_secrets(text) == expected
    assert without_secrets(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a ring bearer walks, a secret: the garden, the password: open",
        "pip install hf_transfer; hf_hub_download(x)",
        "risk-free sk-learn task-0123456789ab",
        f'"revision": "{HEX}"',
        f"/home/me/.cache/huggingface/hub/models--a--b/snapshots/{HEX}",
        f'"name": "{HEX}.png"',
        f"class/{HEX}",
        "0123456789abcdef" * 4,
        '"bos_token_id": 49406, "pad_token": 1, "max_tokens": 77, "trainable_token_indices": null',
        '"pad_token": "<|endoftext|>", "secret_key": null',
        "difftune train --training.max_steps 3",
    ],
)
def test_words_names_and_hashes_stay(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MYTOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "X_PASSWORD",
        "AWS_ACCESS_KEY_ID",
        "MY_SECRET_THING",
    ],
)
def test_the_value_of_a_variable_is_left_out_in_every_form(monkeypatch, name):
    value = 'se"cret & more'
    monkeypatch.setenv(name, value)
    for text in (value, json.dumps(value), "se&quot;cret &amp; more", "se%22cret%20%26%20more"):
        assert without_secrets(f"a {text}.") == f"a {text}.".replace(
            text.strip('"') if text != value else value, HIDDEN
        )


@pytest.mark.parametrize(
    ("name", "value"), [("TOKENIZERS_PARALLELISM", "a longer word 1"), ("MY_TOKEN", "off"), ("MY_API_KEY", "disabled")]
)
def test_variables_with_words_in_them_change_nothing(monkeypatch, tmp_path, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))
    assert without_secrets(f"{value} {tmp_path}") == f"{value} {tmp_path}"


@pytest.mark.wide
def test_long_texts_are_read_through_once():
    size = 1 << 20  # were it the square of that, nobody would see the end
    text = "x" * size + "-" * size + " " * size + "token" * size
    assert without_secrets(text) == text


def test_an_audit_line_has_no_key_and_the_chain_is_whole(tmp_path):
    keys = list(LOOSE.values())
    before = COMMAND.set(["difftune", "train", *keys, "--hub.token", "abc-of-the-option"])

    def fail() -> None:
        with Session(tmp_path) as session:
            session.begin()
            raise RuntimeError(f"no https://me:canarypw@host: Authorization: Bearer abc-of-the-header {keys}")

    try:
        with pytest.raises(RuntimeError):
            fail()
    finally:
        COMMAND.reset(before)
    text = (tmp_path / FILE).read_text()
    assert [s for s in [*keys, "canarypw", "abc-of-the-header", "abc-of-the-option"] if s in text] == []
    assert HIDDEN in text
    assert read_audit(tmp_path).faults == []


def test_a_crash_shows_no_key_and_commands_no_terminal(monkeypatch, capsys):
    def crash(command: object) -> None:
        raise RuntimeError(f"\x1b[2J {' '.join(LOOSE.values())}")

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setitem(main.__globals__["RUNNERS"], "bank", crash)
    with pytest.raises(RuntimeError) as crashed:
        main(["bank", "--data.path", "embedded/icons"])
    sys.excepthook(crashed.type, crashed.value, crashed.tb)
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert "\nRuntimeError: " in said
    assert [key for key in LOOSE.values() if key in said] == []
    assert "\x1b" not in said


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, model_dir) -> Path:
    """A run and its export with secrets in whatever text a user gives."""
    root = tmp_path_factory.mktemp("secrets")
    data = write_pictures(root / "data", count=8)
    header = "Authorization: Bearer abc-of-the-header"
    rewrite_metadata(data, lambda rows: rows[0].update(text=f"red {LOOSE['the Hub']} {header}"))
    prompts = [f"red https://user:canarypw@host/x {header}", *LOOSE.values()]
    recipe = root / "r.yaml"
    recipe.write_text(yaml.safe_dump({"training": {"sample_prompts": prompts, "trackers": ["tensorboard"]}}))
    values = settings(model_dir, data, root, **{"training.sample_every": 2, "training.sample_steps": 1})
    main(["train", *flags(values), "--data.truncate_captions", "true", "--config", str(recipe)])
    main(["export", str(root / "run"), "--to", str(root / "export"), "--base", "referenced"])
    return root


def test_no_file_of_a_run_and_of_its_export_has_a_key(spoken):
    wanted = [*LOOSE.values(), "canarypw", "abc-of-the-header"]
    files = [p for place in ("run", "export") for p in (spoken / place).rglob("*") if p.is_file()]
    assert {"run.json", FILE, "README.md", "recipe.yaml", "metrics.jsonl"} <= {p.name for p in files}
    assert any("tfevents" in p.name for p in files)
    assert [(p.name, s) for p in files for s in wanted if s.encode() in p.read_bytes()] == []
    assert HIDDEN in (spoken / "run" / "run.json").read_text()


def test_a_run_with_hidden_words_verifies(spoken):
    found = verify(VerifyRequest(str(spoken / "run")))
    assert [(p["part"], p["findings"]) for p in found["parts"] if p["findings"]] == []


@pytest.mark.wide
def test_pictures_named_by_their_hashes_verify(tmp_path, model_dir):
    data = write_pictures(tmp_path / "data", count=8)
    names = {f"{i}.png": f"{digest_of_file(data / f'{i}.png')[:40]}.png" for i in range(8)}
    for old, new in names.items():
        (data / old).rename(data / new)
    rewrite_metadata(data, lambda rows: [row.update(file_name=names[row["file_name"]]) for row in rows])
    main(["train", *flags(settings(model_dir, data, tmp_path))])
    assert verify(VerifyRequest(str(tmp_path / "run")))["status"] == "same"
    assert len(re.findall(r"[0-9a-f]{40}\.png", (tmp_path / "run" / "inputs.jsonl").read_text())) == 8
