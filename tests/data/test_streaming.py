"""A streamed set gives the same rows whatever was read before and whoever reads, and trains like any other."""

import io
import json
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftuning_control.data import stream as streaming
from difftuning_control.data.batches import BatchSource
from difftuning_control.data.caption_lengths import check_caption
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.framing import Framing
from difftuning_control.data.prepare import read_data
from difftuning_control.data.stream import Lane, Stream
from difftuning_control.data.stream_batches import StreamSource, empty_targets
from difftuning_control.errors import UserError
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.recipe.gates import GatesConfig
from difftuning_control.recipe.inputs import DataConfig
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.recipe.requests import VerifyRequest
from difftuning_control.recipe.training import TrainingConfig
from difftuning_control.runs.verify import verify
from difftuning_control.verbs.train import train
from support.pictures import write_pictures
from support.process_worker import run

FILES, EACH, HELD = 4, 6, 2


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (20, 16), (10 * number, 255 - 9 * number, 40)).save(content, "PNG")
    return content.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same pictures as tar shards, as Parquet files, and with a metadata.jsonl."""
    import datasets

    root = tmp_path_factory.mktemp("collections")
    numbers = [range(file * EACH, (file + 1) * EACH) for file in range(FILES)]
    for kind in ("tar", "parquet", "jsonl"):
        (root / kind).mkdir()
    for file, part in enumerate(numbers):
        with tarfile.open(root / "tar" / f"{file:03d}.tar", "w") as tar:
            for i in part:
                add(tar, f"{i:03d}.png", png(i))
                add(tar, f"{i:03d}.txt", f"red {i}".encode())
        rows = {"image": [{"bytes": png(i), "path": None} for i in part], "text": [f"red {i}" for i in part]}
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "parquet" / f"{file:03d}.parquet")
    lines = []
    for i in range(FILES * EACH):
        (root / "jsonl" / f"{i}.png").write_bytes(png(i))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"red {i}"}))
    (root / "jsonl" / "metadata.jsonl").write_text("\n".join(lines))
    return {kind: root / kind for kind in ("tar", "parquet", "jsonl")}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 3)


def stream_of(folder: Path, **settings) -> Stream:
    stream = Stream(DataConfig(str(folder), stream=True, **settings), HELD, seed=5)
    stream.head()
    return stream


def captions(stream: Stream, step: int, rows: range = range(8), total: int = 8) -> list[str]:
    return [e.caption for e in stream.pictures(step, rows, total, map)]


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_all_rows_are_seen_but_those_held_out_and_pictures_are_whole(folders, kind):
    stream = Stream(DataConfig(str(folders[kind]), stream=True), HELD, seed=5)
    held = [e.caption for e in stream.head().examples]
    assert held == ["red 0", "red 1"]
    assert stream.captions(5) == [f"red {i}" for i in range(2, 7)]
    found = {e.caption: e for step in range(12) for e in stream.pictures(step, range(8), 8, map)}
    assert sorted(found) == sorted(f"red {i}" for i in range(2, FILES * EACH))
    for caption, example in found.items():
        expected = Image.open(io.BytesIO(png(int(caption.split()[1]))))
        assert example.load().tobytes() == expected.tobytes()
        assert example.size == (20, 16)


def test_rows_follow_from_the_step_alone_whoever_reads_them(folders):
    stream = stream_of(folders["tar"])
    expected = [captions(stream, step) for step in range(9)]
    assert len({tuple(row) for row in expected}) > 5  # shuffled anew
    assert captions(stream_of(folders["tar"]), 7) == expected[7]  # a resumed run
    assert captions(stream, 2) == expected[2]  # also backwards
    for processes in (2, 3):
        for index in range(processes):
            part = stream_of(folders["tar"])
            for step in (0, 4, 8):
                assert captions(part, step, range(index, 8, processes)) == expected[step][index::processes]


def test_each_of_as_many_processes_as_lanes_reads_files_of_its_own(folders):
    read = []
    for index in range(2):
        stream = stream_of(folders["tar"])
        rows, opened = stream.collection.rows, set()

        def noting(file, start=0, rows=rows, opened=opened):
            opened.add(file)
            return rows(file, start)

        stream.collection.rows = noting
        for step in range(6):
            captions(stream, step, range(index, 8, 2))
        read.append(opened)
    assert read[0].isdisjoint(read[1])
    assert read[0] | read[1] == set(range(FILES))


@pytest.fixture
def source(folders, family, tmp_path):
    """A stream's batches with three of ten rows from a bank."""
    from difftuning_control.data.bank import KnowledgeBank

    stream, framing = stream_of(folders["tar"]), Framing(16, flip=True)
    embeddings = cached_embeddings(family, ["a", "b"], tmp_path, lambda count: None)
    bank = KnowledgeBank.from_latents(torch.randn(4, 4, 8, 8), ["a", "b", "a", "b"], "here", "0")
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, "paper", retention_ratio=0.3)
    plain = BatchSource(family, objective, empty_targets(family, framing), embeddings, bank, "own", 0.3, 10, seed=3)
    return StreamSource(plain, stream, framing, lambda example: None)


def test_rows_are_encoded_as_they_would_be_for_the_cache(source, family):
    rows, draws = source.rows(4), source.plain.draws(4)
    assert rows.counts == (7, 3)
    examples = source.stream.pictures(4, range(7), 7, map)
    for row, example in enumerate(examples):
        mean, std = family.encode_moments(source.framing.pixels(example))
        view, noise = draws.views[row], source.plain._noise(4, row, mean.shape[1:])
        latents = family.scale_latents(mean[view] + std[view] * noise[0])
        torch.testing.assert_close(rows.batch.latents[row], latents, atol=1e-5, rtol=1e-5)
        prompt = "" if draws.dropped[row] else example.caption
        embeds = family.encode_prompts([prompt])["prompt_embeds"][0]
        torch.testing.assert_close(rows.batch.conditioning["prompt_embeds"][row], embeds, atol=1e-5, rtol=1e-4)
    items = [int(name.split()[-1]) for name in rows.batch.ids[7:]]
    assert torch.equal(rows.batch.latents[7:], source.plain.bank.latents[items])


def test_processes_and_forwards_together_hold_the_rows_of_one(source):
    whole = source.rows(2)
    for index in range(2):
        plain = replace(source.plain, size=5, process_index=index, num_processes=2)
        part = StreamSource(plain, source.stream, source.framing, source.check).rows(2)
        assert part.batch.ids == whole.batch.ids[index::2]
        torch.testing.assert_close(part.batch.latents, whole.batch.latents[index::2], atol=1e-5, rtol=1e-5)
    plain = replace(source.plain, size=5, forwards=2)
    halves = StreamSource(plain, source.stream, source.framing, source.check)
    assert [halves.rows(2, f).batch.ids for f in range(2)] == [whole.batch.ids[f::2] for f in range(2)]


def test_a_streamed_run_goes_on_bit_for_bit(recipe, folders, tmp_path):
    recipe = replace(
        recipe,
        data=DataConfig(str(folders["tar"]), stream=True, flip=True, cache=recipe.data.cache),
        training=replace(recipe.training, validate_every=0),
    )
    found = train(replace(recipe, output=str(tmp_path / "whole"))).record
    assert found.data.pictures == "streamed"
    assert found.data.held_out == recipe.training.validation_size
    assert set(found.losses) == {"target", "bank"}
    run({"recipe": recipe.to_dict(), "stop": 4})
    train(replace(recipe, training=replace(recipe.training, resume=True)))
    name = "pytorch_lora_weights.safetensors"
    torch.testing.assert_close(
        load_file(f"{recipe.output}/{name}"), load_file(tmp_path / "whole" / name), atol=0, rtol=0
    )
    assert len(list(Path(recipe.data.cache).glob("moments-*"))) == 1  # of the held-out pictures


@pytest.mark.sample("tar")
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_a_streamed_run_verifies_by_its_files_and_what_it_held_out(recipe, folders, tmp_path, kind):
    data = Path(shutil.copytree(folders[kind], tmp_path / "streamed"))
    held = replace(recipe.training, max_steps=1, validation_size=HELD, validate_every=0)
    streamed = replace(recipe, data=DataConfig(str(data), stream=True, cache=recipe.data.cache), training=held)
    train(streamed)

    def part() -> dict:
        result = verify(VerifyRequest(recipe.output))
        return next(p for p in result["parts"] if p["part"] == "data")

    assert (part()["state"], part()["checked"], part()["findings"]) == ("unchecked", 1 + HELD, [])
    assert "it was streamed" in part()["unchecked"]
    if kind == "jsonl":
        table = data / "metadata.jsonl"
        table.write_text(table.read_text().replace("red 1", "blue"))
        assert {(f["item"], f["what"]) for f in part()["findings"]} == {(str(data), "changed"), ("1.png", "changed")}
    else:
        (data / f"{FILES - 1:03d}.{kind}").unlink()
        assert [(f["item"], f["what"]) for f in part()["findings"]] == [(str(data), "changed")]
    shutil.rmtree(data)
    assert [f["what"] for f in part()["findings"]] == ["missing"]


def test_a_bad_row_stops_with_its_name_or_is_left_out(folders, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(9):
            add(tar, f"{i:03d}.png", b"no picture" if i == 4 else png(i))
            add(tar, f"{i:03d}.txt", f"red {i}".encode())
    with pytest.raises(UserError, match=r"004 in .* is not a picture that can be read; mend it"):
        captions(stream_of(tmp_path), 0, range(12), 12)
    stream = stream_of(tmp_path, skip_bad=True)
    found = {c for step in range(6) for c in captions(stream, step)}
    assert found == {f"red {i}" for i in (2, 3, 5, 6, 7, 8)}


def test_a_caption_that_is_too_long_stops_with_its_name_or_another_row_stands_in(source, tmp_path):
    family, bad, long = source.plain.family, tmp_path / "bad", tmp_path / "long"
    for folder, broken in ((bad, 7), (long, None)):
        folder.mkdir()
        with tarfile.open(folder / "0.tar", "w") as tar:
            for i in range(11):
                add(tar, f"{i:03d}.png", b"no picture" if i == broken else png(i))
                add(tar, f"{i:03d}.txt", ("red " * 30 if i in (4, 8) else f"red {i}").encode())

    check = check_caption(family, DataConfig("x"))

    def over(stream: Stream) -> StreamSource:
        return StreamSource(source.plain, stream, source.framing, check)

    with pytest.raises(UserError, match=r"00[48] in .* has a caption of 32 tokens, and the text encoder takes 16"):
        over(stream_of(long)).rows(0)
    stream = stream_of(bad, skip_bad=True)
    met = over(stream)
    seen = [met.rows(step).batch.ids[:7] for step in range(4)]
    assert {name for names in seen for name in names} == {f"{i:03d}" for i in (2, 3, 5, 6, 9, 10)}
    assert over(stream_of(bad, skip_bad=True)).rows(3).batch.ids[:7] == seen[3]
    (line,) = stream.notes()
    for name in ("004", "008"):
        assert f"{name} (a caption of 32 tokens, and the text encoder takes 16" in line
    head = Stream(DataConfig(str(bad), stream=True, skip_bad=True), 6, seed=0)
    assert [e.name for e in head.head(check).examples] == ["000", "001", "002", "003", "005", "006"]
    with pytest.raises(UserError, match=r"004 .* has a caption of 32 tokens"):
        Stream(DataConfig(str(long), stream=True), 6, seed=0).head(check)


def test_a_row_that_is_refused_where_a_block_ends_reads_nothing_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr("difftuning_control.data.stream.BLOCK", 4)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(13):
            add(tar, f"{i:03d}.png", png(i))
            add(tar, f"{i:03d}.txt", ("red " * 30 if i == 5 else f"red {i}").encode())
    stream = stream_of(tmp_path, skip_bad=True)
    begun: list[int] = []
    monkeypatch.setattr(Lane, "_begin", lambda lane, own=Lane._begin: (begun.append(lane.number), own(lane)))
    met = StreamSource(source.plain, stream, source.framing, check_caption(source.plain.family, DataConfig("x")))
    for step in range(4):
        met.rows(step)
    assert "005" in stream.notes()[0]
    assert len(begun) == len(set(begun))


def test_what_cannot_be_streamed_is_refused(folders, tmp_path):
    config = TrainingConfig()
    for settings in ({"method": "controlnet"}, {"data": DataConfig("x", stream=True, limit=3)}):
        with pytest.raises(UserError, match="stream"):
            Recipe(training=config, **{"data": DataConfig("x", stream=True), **settings})
    with pytest.raises(UserError, match=r"gates\.kid is given, which is judged on all pictures after training"):
        Recipe(data=DataConfig("x", stream=True), gates=GatesConfig(retention_loss=0.1, kid=0.2))
    with pytest.raises(UserError, match="for train and bank, and this reads all pictures; leave it out"):
        read_data(Recipe(data=DataConfig(str(folders["tar"]), stream=True)))
    plain = write_pictures(tmp_path / "plain", 2)
    (plain / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="nothing that can be streamed"):
        stream_of(plain)
    with pytest.raises(UserError, match="no column 'label'"):
        stream_of(folders["jsonl"], caption_column="label")
    with pytest.raises(UserError, match="fewer than"):
        Stream(DataConfig(str(folders["tar"]), stream=True), 7, seed=0).head()


def test_decoding_goes_by_threads_in_order(folders):
    with ThreadPoolExecutor(3) as pool:
        found = [e.caption for e in stream_of(folders["tar"]).pictures(3, range(8), 8, pool.map)]
    assert found == captions(stream_of(folders["tar"]), 3)
