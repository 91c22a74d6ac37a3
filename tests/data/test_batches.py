"""What a row of a step holds follows from the seed, the step and the row: not from history, nor from the processes."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from difftuning_control.data.bank import KnowledgeBank
from difftuning_control.data.batches import BANK, TARGET, BatchSource, TargetSet, TrainingRows
from difftuning_control.data.embeddings import cached_embeddings
from difftuning_control.data.latents import LatentMoments
from difftuning_control.families.loading import family_of
from difftuning_control.objective.difftuning import DiffTuningObjective
from difftuning_control.system.seeds import shuffled, step_seed
from support.tiny_sd import tiny_pipeline

CAPTIONS = ["red 1", "red 2", "blue", "a square", "red 5", "six", "seven"]
PROMPTS = ["bank a", "bank b", "red 1", "bank d", "bank e"]
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BatchSource:
    """Seven pictures in two views, five bank items; a fifth of the rows from the bank."""
    family = family_of(tiny_pipeline())
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, len(CAPTIONS), 2, *SHAPE, generator=generator)
    targets = TargetSet(LatentMoments(mean, std.exp()), CAPTIONS, [f"picture {i}" for i in range(len(CAPTIONS))])
    embeddings = cached_embeddings(family, CAPTIONS + PROMPTS, tmp_path_factory.mktemp("prompts"), lambda count: None)
    bank = KnowledgeBank.from_latents(torch.randn(len(PROMPTS), *SHAPE, generator=generator), PROMPTS, "here", "0")
    objective = DiffTuningObjective.from_scheduler(family.pipe.scheduler, "paper", stratified=True)
    return BatchSource(family, objective, targets, embeddings, bank, "empty", 0.0, size=10, seed=3)


def with_ratio(source: BatchSource, ratio: float, **settings) -> BatchSource:
    objective = replace(source.objective, retention_ratio=ratio, retention_weight=0.1 if ratio else 0.0)
    return replace(source, objective=objective, **settings)


def assert_same_rows(found: TrainingRows, expected: TrainingRows, rows: slice = slice(None)) -> None:
    """`found` is what `expected` has at the given rows, and knows the counts of all of them."""
    batch = expected.batch.rows(rows)
    assert torch.equal(found.batch.latents, batch.latents)
    assert torch.equal(found.batch.conditioning["prompt_embeds"], batch.conditioning["prompt_embeds"])
    assert torch.equal(found.batch.is_retention, batch.is_retention)
    assert found.batch.ids == batch.ids
    assert torch.equal(found.noise, expected.noise[rows])
    assert torch.equal(found.levels, expected.levels[rows])
    assert found.counts == expected.counts


def has_embedding_of(source: BatchSource, rows: TrainingRows, prompt: str) -> torch.Tensor:
    embedding = source.embeddings.rows([prompt])["prompt_embeds"]
    return (rows.batch.conditioning["prompt_embeds"] == embedding).flatten(1).all(1)


# --- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 30])
@pytest.mark.parametrize("stream", [TARGET, BANK])
def test_every_epoch_holds_each_entry_once_in_an_order_of_its_own(size, stream):
    epochs = [shuffled(0, stream, epoch * size, size, size) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 7 or len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("count", [1, 3, 10])
def test_shuffled_is_one_endless_sequence_however_it_is_cut(count):
    whole = shuffled(5, TARGET, 0, 30, 7)
    assert [i for start in range(0, 30, count) for i in shuffled(5, TARGET, start, count, 7)] == whole


def test_target_and_bank_have_orders_of_their_own():
    assert len({tuple(shuffled(seed, stream, 0, 30, 30)) for seed in (0, 1) for stream in (TARGET, BANK)}) == 4


def test_seeds_of_different_numbers_are_different():
    numbers = [n for length in (1, 2, 3, 4) for n in product((0, 1, 7), repeat=length)]
    assert len({step_seed(*n) for n in numbers}) == len(numbers)


def test_training_visits_all_pictures_equally_often(source):
    ids = [i for step in range(7) for i in source.rows(step).batch.ids]
    assert {i: ids.count(i) for i in source.targets.names} == dict.fromkeys(source.targets.names, 8)
    bank = [i for i in ids if i.startswith("bank")]
    assert len(bank) == 14
    assert {bank.count(f"bank item {i}") for i in range(5)} == {2, 3}


# --- a function of the step -----------------------------------------------------------------------------------------


def test_rows_follow_from_the_step_alone(source):
    expected = source.rows(4)
    for step in (0, 9, 2):
        source.rows(step)
    torch.manual_seed(99)
    assert_same_rows(replace(source).rows(4), expected)


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 5}])
def test_another_seed_or_step_draws_everything_afresh(source, change):
    change = {"seed": 3, "step": 4, **change}
    rows, others = source.rows(4), replace(source, seed=change["seed"]).rows(change["step"])
    assert not torch.equal(rows.levels, others.levels)
    assert not torch.isclose(rows.noise, others.noise, atol=1e-6).flatten(1).all(1).any()
    assert rows.batch.ids != others.batch.ids


@pytest.mark.sample("dropout-1-0.5-2")
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(("size", "ratio"), [(5, 0.2), (3, 0.34), (2, 0.0), (1, 0.5)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"retention_prompts": "own", "prompt_dropout": 0.5}, {"retention_prompts": "both"}],
    ids=["plain", "dropout", "both"],
)
def test_processes_together_hold_the_rows_of_one_with_a_batch_as_large(source, processes, size, ratio, settings):
    one = with_ratio(source, ratio, size=size * processes, **settings)
    for step in (0, 11):
        for index in range(processes):
            part = replace(one, size=size, process_index=index, num_processes=processes).rows(step)
            assert_same_rows(part, one.rows(step), slice(index, None, processes))
            assert len(part.batch) == size


# --- roles and prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "ratio"), [(10, 0.2), (9, 0.2), (5, 0.5), (4, 0.9), (7, 0.0)])
def test_the_banks_share_is_rounded_down(source, size, ratio):
    rows = with_ratio(source, ratio, size=size).rows(0)
    banks = int(size * ratio)
    assert rows.counts == (size - banks, banks)
    assert int(rows.batch.is_retention.sum()) == banks
    assert [i.startswith("bank item") for i in rows.batch.ids] == rows.batch.is_retention.tolist()


def test_without_a_bank_all_rows_are_targets(source):
    rows = replace(source, bank=None).rows(0)
    assert rows.counts == (10, 0)
    assert not rows.batch.is_retention.any()


def test_bank_rows_hold_the_banks_latents_unchanged(source):
    rows = source.rows(2)
    for row in rows.batch.is_retention.nonzero().flatten():
        assert torch.equal(rows.batch.latents[row], source.bank.latents[int(rows.batch.ids[row].split()[-1])])


@pytest.mark.parametrize("words", ["empty", "own"])
def test_bank_rows_carry_the_empty_prompt_or_their_own(source, words):
    rows = replace(source, retention_prompts=words).rows(0)
    for row in rows.batch.is_retention.nonzero().flatten():
        prompt = PROMPTS[int(rows.batch.ids[row].split()[-1])] if words == "own" else ""
        assert has_embedding_of(source, rows, prompt)[row]


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_bank_rows_of_both_carry_their_own_and_the_empty_prompt_in_turn(source, ratio):
    """Half of all rows each, and half of every item's, though a step may have only one."""
    both, seen = with_ratio(source, ratio, retention_prompts="both"), {prompt: [] for prompt in PROMPTS}
    for step in range(200):
        rows = both.rows(step)
        for row in rows.batch.is_retention.nonzero().flatten().tolist():
            own = PROMPTS[int(rows.batch.ids[row].split()[-1])]
            empty = (step + row) % 2 == 1
            assert has_embedding_of(source, rows, "" if empty else own)[row]
            seen[own].append(empty)
    assert all(0.3 < sum(turns) / len(turns) < 0.7 for turns in seen.values())


def test_target_rows_carry_their_captions(source):
    rows = source.rows(0)
    for row in (~rows.batch.is_retention).nonzero().flatten():
        assert has_embedding_of(source, rows, CAPTIONS[int(rows.batch.ids[row].split()[-1])])[row]


@pytest.mark.sample("1.0")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_prompt_dropout_empties_that_share_of_the_target_rows_only(source, share):
    dropping = replace(source, prompt_dropout=share, retention_prompts="own")
    target, bank = [], []
    for step in range(100):
        rows = dropping.rows(step)
        empty = has_embedding_of(source, rows, "")
        target.append(empty[~rows.batch.is_retention])
        bank.append(empty[rows.batch.is_retention])
    emptied = torch.stack(target).double()
    variance = share * (1 - share)
    assert abs(float(emptied.mean()) - share) <= 4 * (variance / emptied.numel()) ** 0.5
    assert float(emptied.mean(1).var()) <= 2 * variance / emptied.shape[1]  # each row by itself, not whole batches
    assert not torch.cat(bank).any()


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_target_rows_are_draws_from_the_moments_of_either_view(source):
    moments = source.targets.moments
    exact = replace(
        source, targets=replace(source.targets, moments=replace(moments, std=torch.zeros_like(moments.std)))
    )
    views = set()
    for step in range(5):
        rows = exact.rows(step)
        for row in (~rows.batch.is_retention).nonzero().flatten():
            item = int(rows.batch.ids[row].split()[-1])
            shown = [torch.equal(rows.batch.latents[row], moments.mean[item, view] * 0.7) for view in (0, 1)]
            assert sum(shown) == 1
            views.add(shown.index(True))
    assert views == {0, 1}


def test_the_same_picture_is_drawn_afresh_with_the_spread_of_its_posterior(source):
    moments = source.targets.moments
    alone = replace(
        source, targets=TargetSet(LatentMoments(moments.mean[:1, :1], moments.std[:1, :1]), ["red 1"], ["p"])
    )
    drawn = torch.cat([with_ratio(alone, 0.0, size=50).rows(step).batch.latents for step in range(20)]) / 0.7
    standard = (drawn - moments.mean[0, 0]) / moments.std[0, 0]
    assert abs(float(standard.mean())) < 0.02
    assert abs(float(standard.std()) - 1) < 0.02


def test_levels_are_drawn_by_role(source):
    rows = [source.rows(step) for step in range(100)]
    levels = torch.cat([r.levels for r in rows]).double()
    retention = torch.cat([r.batch.is_retention for r in rows])
    last = len(source.objective.process) - 1
    assert abs(float(levels[~retention].mean()) / last - 2 / 3) < 0.03  # density ∝ u
    assert abs(float(levels[retention].mean()) / last - 1 / 3) < 0.05  # density ∝ 1 − u


@pytest.mark.wide
@pytest.mark.parametrize("row", [0, 7])
def test_a_rows_noises_are_standard_normal_and_unrelated_to_its_level_and_each_other(source, row):
    shape = (len(CAPTIONS), 1, *SHAPE)
    standard = TargetSet(LatentMoments(torch.zeros(shape), torch.ones(shape)), CAPTIONS, source.targets.names)
    plain = replace(source, targets=standard, objective=replace(source.objective, stratified=False))
    rows = [plain.rows(step) for step in range(1000)]
    noise = torch.stack([r.noise[row].flatten() for r in rows]).double()
    posterior = torch.stack([r.batch.latents[row].flatten() for r in rows]).double() / 0.7
    levels = torch.stack([r.levels for r in rows]).double()
    for values in (noise, posterior):
        assert abs(float(values.mean())) < 0.01
        assert abs(float(values.std()) - 1) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), posterior.flatten()]))[0, 1])) < 0.01
    for values in (noise, posterior, noise.abs(), posterior.abs()):
        correlations = torch.corrcoef(torch.cat([levels, values], dim=1).T)[:10, 10:]
        assert float(correlations.abs().max()) < 5.5 / len(rows) ** 0.5
