"""The order of the images and the positions of a step."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
import torch

from dinov2_equi.data.samplers import (
    BlockOrder,
    KeyedPermutation,
    PositionSampler,
    RandomStream,
    SampleOrder,
    random_generator,
    random_uniforms,
)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 100])
def test_every_epoch_holds_every_image_once(num_samples: int) -> None:
    order = SampleOrder(num_samples, seed=0)
    for epoch in range(4):
        positions = range(epoch * num_samples, (epoch + 1) * num_samples)
        assert sorted(order.index(position) for position in positions) == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch_order(seed: int, epoch: int) -> tuple[int, ...]:
        order = SampleOrder(50, seed)
        return tuple(order.index(50 * epoch + offset) for offset in range(50))

    orders = {epoch_order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert epoch_order(2, 1) == epoch_order(2, 1)


def test_position_alone_decides_whatever_was_asked_before() -> None:
    in_sequence = SampleOrder(11, seed=4)
    expected = [in_sequence.index(position) for position in range(200)]
    anywhere = SampleOrder(11, seed=4)
    for position in np.random.default_rng(0).integers(0, 200, 500):
        assert anywhere.index(int(position)) == expected[position]


def test_every_image_stands_at_every_place_equally_often() -> None:
    num_samples, num_epochs = 12, 1500
    order = SampleOrder(num_samples, seed=1)
    rows = np.array([[order.index(12 * epoch + place) for place in range(12)] for epoch in range(num_epochs)])
    at_places = np.stack([np.bincount(column, minlength=num_samples) for column in rows.T])
    steps = np.bincount((np.diff(rows, axis=1) % num_samples).ravel(), minlength=num_samples)[1:]
    for counts in (at_places, steps):
        # 5 standard deviations: of 155 counts one is beyond by chance in 10,000 seeds.
        assert np.abs(counts - counts.mean()).max() < 5 * math.sqrt(counts.mean())


def test_orders_of_three_images_come_equally_often() -> None:
    order = SampleOrder(3, seed=0)
    orders = [tuple(order.index(3 * epoch + place) for place in range(3)) for epoch in range(1800)]
    counts = [orders.count(permutation) for permutation in itertools.permutations(range(3))]
    assert max(abs(count - 300) for count in counts) < 5 * math.sqrt(300)


@pytest.mark.parametrize("num_samples", [63, 64, 65, 1000, 4097])
def test_numbers_are_permuted_whatever_their_bits(num_samples: int) -> None:
    permutation = KeyedPermutation(num_samples, [1, 2, 3, 4])
    assert sorted(permutation(number) for number in range(num_samples)) == list(range(num_samples))


def test_an_order_of_100_million_images_takes_time_or_memory_to_start() -> None:
    tracemalloc.start()
    started = time.thread_time()
    order = SampleOrder(100_000_000, seed=0)
    images = [order.index(position) for position in (0, 99_999_999, 100_000_000, 10**15)]
    seconds, (_, peak) = time.thread_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(images)) == 4 and max(images) < 100_000_000
    assert seconds < 0.1 and peak < 100_000  # some 0.2 ms on an idle core, traced


LENGTHS = np.array([5, 0, 3, 7, 1, 4, 6, 2])


def test_an_epoch_by_blocks_holds_every_image_once_and_few_blocks_at_a_time() -> None:
    order, buffer, total = BlockOrder(LENGTHS, 3, seed=2), 3, int(LENGTHS.sum())
    ends = np.cumsum(LENGTHS)
    epochs = [[order.index(total * epoch + offset) for offset in range(total)] for epoch in range(3)]
    for images in epochs:
        assert sorted(images) == list(range(total))
        blocks = [int(np.searchsorted(ends, image, side="right")) for image in images]
        last = {block: place for place, block in enumerate(blocks)}
        first = {block: blocks.index(block) for block in last}
        in_use = [sum(first[block] <= place <= last[block] for block in last) for place in range(total)]
        assert max(in_use) <= buffer
        assert any(blocks[place] != blocks[place + 1] != blocks[place + 2] for place in range(total - 2))  # shuffled
    assert epochs[0] != epochs[1] != epochs[2]


def test_position_alone_decides_by_blocks_too() -> None:
    expected = [BlockOrder(LENGTHS, 2, seed=4).index(position) for position in range(120)]
    anywhere = BlockOrder(LENGTHS, 2, seed=4)
    for position in np.random.default_rng(0).integers(0, 120, 300):
        assert anywhere.index(int(position)) == expected[position]
    assert expected != [BlockOrder(LENGTHS, 2, seed=5).index(position) for position in range(120)]


def test_blocks_without_images_or_a_buffer_are_refused() -> None:
    for lengths, buffer in ((np.array([0, 0]), 1), (LENGTHS, 0)):
        with pytest.raises(ValueError, match="images and a buffer of 1 or more"):
            BlockOrder(lengths, buffer, seed=0)


def test_streams_are_independent_of_each_other() -> None:
    draws = {
        tuple(random_generator(stream, seed, number).integers(0, 1 << 30, 3).tolist())
        for stream in RandomStream
        for seed in range(4)
        for number in range(4)
    }
    assert len(draws) == len(RandomStream) * 4 * 4


def test_positions_of_a_single_process() -> None:
    sampler = PositionSampler(batch_size=3, start_step=0, num_steps=2)
    assert list(sampler) == [[0, 1, 2], [3, 4, 5]]
    assert len(sampler) == 2


def test_ranks_share_a_step_without_overlap_or_gap() -> None:
    ranks = [
        list(PositionSampler(batch_size=2, start_step=1, num_steps=3, rank=rank, world_size=3)) for rank in range(3)
    ]
    for number in range(3):
        taken = [position for rank in ranks for position in rank[number]]
        assert taken == list(range(6 * (number + 1), 6 * (number + 2)))


def test_resume_goes_on_where_the_run_stopped() -> None:
    whole = list(PositionSampler(batch_size=4, start_step=0, num_steps=10, rank=1, world_size=2))
    resumed = list(PositionSampler(batch_size=4, start_step=6, num_steps=4, rank=1, world_size=2))
    assert whole[6:] == resumed


def test_another_number_of_processes_takes_the_same_images_in_each_step() -> None:
    one = list(PositionSampler(batch_size=8, start_step=3, num_steps=2))
    four = [
        list(PositionSampler(batch_size=2, start_step=3, num_steps=2, rank=rank, world_size=4)) for rank in range(4)
    ]
    assert one == [[position for rank in four for position in rank[step]] for step in range(2)]


@pytest.mark.parametrize("num_samples", [32, 37])
def test_a_rank_sees_the_same_part_of_the_images_in_each_epoch(num_samples: int) -> None:
    # 32 images are four steps of eight: a rank stands at the same places of each epoch. An image stays unseen by a rank
    # for 100 epochs in one of 1e12 seeds, of 128 pairs of rank and image.
    order = SampleOrder(num_samples, seed=0)
    for rank in range(4):
        steps = PositionSampler(batch_size=2, start_step=0, num_steps=100 * num_samples // 8, rank=rank, world_size=4)
        seen = [order.index(position) for step in steps for position in step]
        counts = np.bincount(seen, minlength=num_samples)
        assert counts.min() > 0
        # A quarter of 100 epochs each; six standard deviations of a binomial.
        assert np.abs(counts - 25).max() < 6 * math.sqrt(100 * 0.25 * 0.75)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"start_step": -1}, {"num_steps": -1}, {"rank": 2, "world_size": 2}, {"rank": -1}]
)
def test_faulty_arguments_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="got"):
        PositionSampler(**{"batch_size": 2, "start_step": 0, "num_steps": 1, **changes})


def test_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        SampleOrder(0, seed=0)


# ----------------------------------------------------------------------------------------------------- random_uniforms


@pytest.mark.parametrize("count", [1, 3, 4, 5, 196])
def test_numbers_of_a_position_depend_on_the_positions_beside_it(count: int) -> None:
    # Successive ones, a gap, a repetition, a step back, a late one.
    positions = torch.tensor([7, 8, 9, 12, 12, 3, 2**40, 2**40 + 1])
    together = random_uniforms(RandomStream.THETA, 5, positions, count)
    assert together.shape == (8, count) and together.dtype == torch.float32
    for row, position in zip(together, positions, strict=True):
        assert torch.equal(random_uniforms(RandomStream.THETA, 5, position[None], count)[0], row)
    assert len(together.unique(dim=0)) == 7


def test_numbers_repeat_between_positions_seeds_or_streams() -> None:
    numbers = [
        random_uniforms(stream, seed, torch.arange(50), 8)
        for stream in (RandomStream.THETA, RandomStream.PATCHES)
        for seed in (0, 1, 2**32 - 1)
    ]
    assert len(torch.stack(numbers).unique()) == pytest.approx(6 * 50 * 8, abs=2)  # of 2^24 values


def test_numbers_leave_the_unit_interval_or_are_not_uniform() -> None:
    numbers = random_uniforms(RandomStream.THETA, 0, torch.arange(20_000), 5)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers.flatten(), bins=10, min=0, max=1)
    assert (counts - 10_000).abs().max() < 5 * 95  # standard deviation of a bin: sqrt(100 000 * 0.1 * 0.9)
    neighbours = torch.corrcoef(torch.cat([numbers[:-1], numbers[1:]], dim=1).T)
    assert (neighbours - torch.eye(10)).abs().max() < 5 / math.sqrt(20_000)


def test_no_positions_give_no_numbers() -> None:
    assert random_uniforms(RandomStream.THETA, 0, torch.arange(0), 3).shape == (0, 3)
