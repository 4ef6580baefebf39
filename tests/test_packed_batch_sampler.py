"""PackedBatchSampler: every document on one rank once, ranks in step, resumed on any world size."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from packed_attn import PackedBatchSampler, PackedCollator, PackedDataset, Packs, pack_lengths
from packed_attn.packing import PackPart


def random_packs(documents: int, capacity: int, seed: int = 0) -> Packs:
    lengths = np.random.default_rng(seed).integers(1, capacity // 2, documents)
    return pack_lengths(lengths, capacity)


def pieces_of(packs: Packs, index: int | PackPart) -> list[int]:
    """The pieces that an index of a batch stands for."""
    if isinstance(index, PackPart):
        begin = packs.offsets[index.pack]
        return list(range(begin + index.first, begin + index.stop))
    return list(range(packs.offsets[index], packs.offsets[index + 1]))


def run(packs: Packs, samplers: list[PackedBatchSampler], steps: int | None = None) -> list[int]:
    """Runs all ranks for some micro-steps (None: to the end): the pieces that they ran."""
    ran = []
    assert len({len(sampler) for sampler in samplers}) == 1
    for sampler in samplers:
        for number, batch in enumerate(sampler, start=1):
            assert len(batch) == sampler.batch_size
            for index in batch:
                pieces = pieces_of(packs, index)
                assert pieces
                assert packs.lengths[pieces].sum() <= packs.capacity
                ran += pieces
            if number == steps:
                break
    return ran


@given(
    documents=st.integers(1, 60),
    world_size=st.integers(1, 9),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=60)
def test_every_document_is_run_once(documents, world_size, batch_size, seed):
    packs = random_packs(documents, 30, seed)
    if documents < world_size * batch_size * 2:
        return
    ranks = [
        PackedBatchSampler(packs, rank=r, world_size=world_size, batch_size=batch_size, seed=seed)
        for r in range(world_size)
    ]
    assert sorted(run(packs, ranks)) == list(range(packs.num_pieces))
    assert not ranks[0].dropped
    assert not ranks[0].repeated


@given(
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 2)), min_size=2, max_size=4),
    remainder=st.sampled_from(["split", "drop", "repeat"]),
    data=st.data(),
)
@settings(max_examples=60)
def test_resumes_on_other_numbers_of_ranks(worlds, remainder, data):
    packs = random_packs(120, 40)
    ran: list[int] = []
    again: Counter[int] = Counter()
    state = None
    for number, (world_size, batch_size) in enumerate(worlds):
        ranks = []
        for rank in range(world_size):
            sampler = PackedBatchSampler(
                packs,
                rank=rank,
                world_size=world_size,
                batch_size=batch_size,
                remainder=remainder,
                seed=3,
            )
            if state is not None:
                sampler.load_state_dict(json.loads(json.dumps(state)))
            ranks.append(sampler)
        last = number == len(worlds) - 1
        steps = None if last else data.draw(st.integers(1, max(1, min(5, len(ranks[0]) - 1))))
        if steps is None or steps >= len(ranks[0]):  # the last micro-step holds what runs twice
            again.update(p for index in ranks[0].repeated for p in pieces_of(packs, index))
        ran += run(packs, ranks, steps)
        states = [sampler.state_dict() for sampler in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
    counts = Counter(ran)
    left_out = {piece for index in ranks[0].dropped for piece in pieces_of(packs, index)}
    assert set(counts) | left_out == set(range(packs.num_pieces))
    assert not left_out & set(counts)
    assert counts == Counter(set(range(packs.num_pieces)) - left_out) + again
    assert remainder == "repeat" or not again


def test_a_resumed_run_continues_to_the_letter():
    packs = random_packs(300, 50)
    whole = list(PackedBatchSampler(packs, world_size=2))
    for done in range(1, len(whole)):
        sampler = PackedBatchSampler(packs, world_size=2)
        head = [batch for batch, _ in zip(sampler, range(done))]
        resumed = PackedBatchSampler(packs, world_size=2, rank=1)
        resumed.load_state_dict(sampler.state_dict(done))
        assert head == whole[:done]
        assert len(resumed) == len(whole) - done


@pytest.mark.parametrize("world_size", [8, 64])
def test_ranks_finish_together(world_size):
    rng = np.random.default_rng(0)
    draws = rng.lognormal(np.log(2000) - 0.5, 1.0, 60_000)
    packs = pack_lengths(np.clip(draws, 1, 32768).astype(int), 32768, seed=0)
    sampler = PackedBatchSampler(packs, world_size=world_size)
    assert sampler.stretch() <= 1.02
    alone = [sampler.batch(step, rank) for step in range(len(sampler)) for rank in (0, 1)]
    assert len(alone) == 2 * len(sampler)
    random_order = PackedBatchSampler(packs, world_size=world_size, window_steps=1)
    assert random_order.stretch() > 1.1


def test_several_packs_a_batch_are_balanced_too():
    packs = pack_lengths(np.random.default_rng(1).integers(1, 8000, 20_000), 8192, seed=0)
    assert PackedBatchSampler(packs, world_size=8, batch_size=4).stretch() <= 1.01


def test_epochs_differ_and_repeat_themselves():
    packs = random_packs(200, 40)
    sampler = PackedBatchSampler(packs, seed=7)
    first = list(sampler)
    with pytest.raises(RuntimeError, match="epoch 0 is finished: call set_epoch"):
        list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(PackedBatchSampler(packs, seed=8)) != first


def test_set_epoch_after_resuming_keeps_the_cursor():
    packs = random_packs(200, 40)
    sampler = PackedBatchSampler(packs)
    for _ in zip(sampler, range(5)):
        pass
    resumed = PackedBatchSampler(packs)
    resumed.load_state_dict(sampler.state_dict(5))
    left = len(resumed)
    resumed.set_epoch(0)
    assert len(resumed) == left
    assert len(list(resumed)) == left
    resumed.set_epoch(1)
    assert len(resumed) > left


def test_drives_a_dataloader_of_a_packed_dataset():
    documents = [[d] * (1 + d % 7) for d in range(50)]
    rows = PackedDataset(documents, 12, seed=1, on_report=lambda report: None)
    seen = Counter()
    for rank in range(3):
        sampler = PackedBatchSampler(rows, rank=rank, world_size=3)
        for batch in DataLoader(rows, batch_sampler=sampler, collate_fn=PackedCollator()):
            seen.update(batch["input_ids"].flatten().tolist())
    assert seen == Counter({d: 1 + d % 7 for d in range(50)})


def test_other_plans_are_refused():
    state = PackedBatchSampler(random_packs(50, 40)).state_dict()
    with pytest.raises(ValueError, match="state must be of the same plan"):
        PackedBatchSampler(random_packs(50, 40, seed=1)).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be below world_size, got 2 and 2"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        ({"remainder": "lose"}, "remainder must be one of 'split', 'drop', 'repeat', got 'lose'"),
        ({"linear": -1.0}, "linear and quadratic must be at least 0"),
        ({"world_size": 500}, "remainder='split' must find a document for each row"),
    ],
)
def test_bad_settings_are_named(settings_, words):
    with pytest.raises(ValueError, match=words):
        PackedBatchSampler(random_packs(50, 40), **settings_)
    with pytest.raises(ValueError, match="steps must be at most"):
        PackedBatchSampler(random_packs(50, 40)).state_dict(1000)


def test_a_second_division_among_ranks_is_refused():
    """What accelerate's prepare wraps a batch sampler in where there are several processes."""
    accelerate = pytest.importorskip("accelerate.data_loader", reason="the shards are accelerate's")
    packs = random_packs(60, 40)
    with pytest.raises(
        ValueError, match="those of rank 1 of 2 already: do not hand the DataLoader"
    ):
        accelerate.BatchSamplerShard(PackedBatchSampler(packs, rank=1, world_size=2), 2, 1)
    undivided = PackedBatchSampler(packs)
    shards = [accelerate.BatchSamplerShard(PackedBatchSampler(packs), 2, r) for r in (0, 1)]
    batches = [list(shard) for shard in shards]
    assert {i for part in batches for [i] in part} == {i for [i] in undivided}
