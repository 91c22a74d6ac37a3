"""`audit.jsonl`: lines that are chained, whoever writes them, and what becomes of torn and edited ones."""

import hashlib
import json
import multiprocessing
import re
from pathlib import Path

import pytest

from difftuning_control.errors import UserError
from difftuning_control.runs import audit
from difftuning_control.runs.audit import (
    FILE,
    FIRST,
    Session,
    append,
    clear_but_audit,
    noted,
    read_audit,
    redacted_words,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a chain of four lines."""
    for i in range(4):
        append(tmp_path, "done", said=f"żółw {i}", artefacts={"weights": f"{i:064x}"})
    return tmp_path


def lines_of(folder: Path) -> list[bytes]:
    return (folder / FILE).read_bytes().splitlines(keepends=True)


def write_lines(folder: Path, lines: list[bytes]) -> None:
    (folder / FILE).write_bytes(b"".join(lines))


# --- the chain ------------------------------------------------------------------------------------------------------


def test_each_line_names_the_hash_of_the_one_before_as_anybody_can_compute_it(folder):
    last = FIRST
    for line in lines_of(folder):
        entry = json.loads(line)
        assert entry["previous"] == last
        last = entry.pop("hash")
        assert hashlib.sha256(json.dumps(entry).encode()).hexdigest() == last
    chain = read_audit(folder)
    assert (chain.faults, chain.torn, chain.head) == ([], 0, last)
    assert [e["said"] for e in chain.entries] == [f"żółw {i}" for i in range(4)]
    assert chain.last_hash_of("weights") == f"{3:064x}"
    assert chain.last_hash_of("nothing") is None


def test_a_line_says_when_by_what_version_and_in_universal_time(folder):
    for entry in read_audit(folder).entries:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", entry["time"])
        assert entry["version"]


@pytest.mark.parametrize("number", range(4))
def test_an_edited_line_is_found_wherever_it_stands(folder, number):
    lines = lines_of(folder)
    lines[number] = lines[number].replace(b'"done"', b'"gone"')
    write_lines(folder, lines)
    assert read_audit(folder).faults == [f"line {number + 1} was edited"]


def test_every_byte_of_a_line_counts(folder):
    lines = lines_of(folder)
    for place in range(len(lines[1]) - 1):
        changed = bytearray(lines[1])
        changed[place] ^= 1
        write_lines(folder, [lines[0], bytes(changed), *lines[2:]])
        assert read_audit(folder).faults, place


@pytest.mark.parametrize("number", range(1, 3))
def test_a_line_edited_with_its_own_hash_made_right_breaks_the_chain(folder, number):
    lines = lines_of(folder)
    entry = json.loads(lines[number])
    del entry["hash"]
    entry["outcome"] = "failed"
    digest = hashlib.sha256(json.dumps(entry).encode()).hexdigest()
    lines[number] = json.dumps({**entry, "hash": digest}).encode() + b"\n"
    write_lines(folder, lines)
    (fault,) = read_audit(folder).faults
    assert fault.startswith(f"line {number + 2} does not follow")


@pytest.mark.parametrize(
    "order", [(1, 2, 3), (0, 2, 3), (0, 1, 3), (1, 0, 2, 3), (0, 2, 1, 3), (0, 1, 1, 2, 3)], ids=str
)
def test_removed_exchanged_and_repeated_lines_are_found(folder, order):
    lines = lines_of(folder)
    write_lines(folder, [lines[i] for i in order])
    assert read_audit(folder).faults


def test_a_missing_end_shows_by_the_hash_that_was_kept_elsewhere_alone(folder):
    head = read_audit(folder).head
    write_lines(folder, lines_of(folder)[:-1])
    chain = read_audit(folder)
    assert chain.faults == []
    assert head not in chain.hashes


def test_no_file_is_a_fault(tmp_path):
    assert read_audit(tmp_path).faults == [f"there is no {FILE}"]


# --- power cuts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.98])
def test_a_torn_line_is_no_edited_one_and_the_chain_goes_on(folder, kept):
    lines = lines_of(folder)
    write_lines(folder, [*lines[:-1], lines[-1][: int(kept * len(lines[-1]))]])
    chain = read_audit(folder)
    assert (chain.faults, chain.torn, len(chain.entries)) == ([], 1, 3)
    append(folder, "done")
    append(folder, "done")
    chain = read_audit(folder)
    assert (chain.faults, chain.torn, len(chain.entries)) == ([], 1, 5)
    assert chain.entries[3]["previous"] == chain.hashes[2]


def test_a_fragment_that_is_changed_later_is_an_edited_line(folder):
    lines = lines_of(folder)
    write_lines(folder, [*lines[:-1], lines[-1][:-20]])
    append(folder, "done")
    lines = lines_of(folder)
    lines[3] = lines[3].replace(b"done", b"gone")
    write_lines(folder, lines)
    assert read_audit(folder).faults == ["line 4 was edited"]


def test_a_line_that_lacks_but_its_end_is_kept(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])
    append(folder, "done")
    chain = read_audit(folder)
    assert (chain.faults, chain.torn, len(chain.entries)) == ([], 0, 5)


def test_an_edited_last_line_does_not_pass_for_a_torn_one_later(folder):
    lines = lines_of(folder)
    write_lines(folder, [*lines[:-1], lines[-1].replace(b"done", b"gone")])
    append(folder, "done")
    assert read_audit(folder).faults == ["line 4 was edited"]


# --- several writers ------------------------------------------------------------------------------------------------


def _write_many(folder: Path) -> None:
    for _ in range(20):
        append(folder, "done", said="x" * 5000)


def test_writers_at_once_make_one_chain(tmp_path):
    writers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    chain = read_audit(tmp_path)
    assert (chain.faults, chain.torn, len(chain.entries)) == ([], 0, 60)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


# --- sessions -------------------------------------------------------------------------------------------------------


def outcomes(folder: Path) -> list[tuple[str, str | None]]:
    return [(e["outcome"], e["said"]) for e in read_audit(folder).entries]


def test_a_session_has_a_line_for_its_beginning_and_one_for_its_end(tmp_path):
    with Session(tmp_path) as session:
        session.begin("recipe's hash")
        assert outcomes(tmp_path) == [("begun", None)]
        session.artefacts = {"run.json": "0"}
    first, last = read_audit(tmp_path).entries
    assert (last["outcome"], last["artefacts"], last["recipe"]) == ("done", {"run.json": "0"}, "recipe's hash")
    assert first["session"] == last["session"]
    assert read_audit(tmp_path).is_ended


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("the loss\nis hf_abcdefghijk"), ("failed", "the loss is (secret)")),
        (UserError("no."), ("failed", "no.")),
        (KeyboardInterrupt(), ("interrupted", None)),
        (SystemExit(143), ("interrupted", None)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_session_that_breaks_off_says_how(tmp_path, error, outcome):
    def work() -> None:
        with Session(tmp_path) as session:
            session.begin()
            raise error

    with pytest.raises(type(error)):
        work()
    assert outcomes(tmp_path) == [("begun", None), outcome]
    assert not read_audit(tmp_path).is_ended


def test_what_is_refused_before_it_began_leaves_no_line(tmp_path):
    with pytest.raises(UserError), Session(tmp_path):
        raise UserError("no.")
    with pytest.raises(UserError), noted(tmp_path):
        raise UserError("no.")
    assert list(tmp_path.iterdir()) == []


def test_a_short_command_leaves_one_line_in_each_folder(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    with noted(tmp_path / "a", tmp_path / "b") as artefacts:
        artefacts["evaluation.json"] = "1"
    with pytest.raises(OSError, match="full"), noted(tmp_path / "a"):
        raise OSError("full")
    assert outcomes(tmp_path / "a") == [("done", None), ("failed", "full")]
    assert outcomes(tmp_path / "b") == [("done", None)]
    assert read_audit(tmp_path / "b").last_hash_of("evaluation.json") == "1"


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / FILE).mkdir()
    with noted(tmp_path):
        pass
    assert f"note: {tmp_path / FILE} cannot be written" in capsys.readouterr().err


def test_clearing_a_folder_leaves_the_audit_alone(folder):
    before = (folder / FILE).read_bytes()
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("x")
    (folder / "file").write_text("x")
    clear_but_audit(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {FILE: before}


# --- who, and by which words ----------------------------------------------------------------------------------------


def test_who_is_the_user_and_host_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv(audit.WHO, raising=False)
    assert "@" in str(audit.who())
    monkeypatch.setenv(audit.WHO, "team-7")
    assert audit.who() == "team-7"
    monkeypatch.setenv(audit.WHO, "")
    assert audit.who() is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--data.path", "my pictures"], ["train", "--data.path", "my pictures"]),
        (["--hub.token", "abc", "x"], ["--hub.token", "(secret)", "x"]),
        (["--hub.token=abc"], ["--hub.token=(secret)"]),
        (["--hub", "{api_key: abc, b: 1}"], ["--hub", "{api_key: (secret), b: 1}"]),
        (["https://me:pw@host/x"], ["https://(secret)@host/x"]),
        (["https://host/x?token=abc&a=1"], ["https://host/x?token=(secret)&a=1"]),
        (["hf_aBcDeFgHiJkL"], ["(secret)"]),
        (["x" + "0123456789" * 4, "0123456789" * 4], ["x" + "0123456789" * 4, "(secret)"]),
        (["--prompts", '["a token of love"]'], ["--prompts", '["a token of love"]']),
        (["Authorization: Bearer abc"], ["Authorization: (secret)"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_secrets_are_left_out_and_nothing_else(words, expected):
    assert redacted_words(words) == expected


def test_the_value_of_a_secret_variable_is_left_out(monkeypatch):
    monkeypatch.setenv("MY_SECRET_THING", "correct horse")
    assert redacted_words(["a correct horse!"]) == ["a (secret)!"]
