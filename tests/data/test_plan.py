"""The plan: every row once an epoch, within the budget, the same steps for any number of processes."""

import numpy as np
import pytest

from hpcmlip.data import plan


def make_groups(seed: int, rows_per_chunk: int = 50) -> list[plan.Rows]:
    rng = np.random.default_rng(seed)
    groups = []
    for num_atoms in (3, 7, 12, 18):
        ranges, at = [], 0
        for _ in range(3):
            at += int(rng.integers(0, 90))
            stop = at + int(rng.integers(1, 400))
            ranges.append((at, stop))
            at = stop
        groups.append(plan.wanted_rows(num_atoms, ranges, rows_per_chunk))
    return groups


def visited(groups, streams, seed, epoch):
    """[(group, row)] in the order in which the streams' steps take them, and the pairs of each micro-batch."""
    seen, pairs = [], []
    orders = [plan.order(rows, group=g, seed=seed, epoch=epoch) for g, rows in enumerate(groups)]
    for step in range(len(streams[0].edges) - 1):
        for stream in streams:
            total = 0
            for group, start, stop in stream.micro_batch(step):
                total += (stop - start) * groups[group].num_atoms ** 2
                for window, first, last in orders[group].locate(start, stop):
                    rows = np.concatenate([np.arange(a, b) for a, b in orders[group].window_pieces(window)])
                    seen += [(group, r) for r in rows[orders[group].permutation(window)][first:last].tolist()]
            pairs.append(total)
    return seen, pairs


@pytest.mark.parametrize("num_streams", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_row_once_and_within_the_budget(num_streams, seed):
    groups = make_groups(3)
    streams = plan.plan(groups, num_streams=num_streams, budget=4000, blocks_per_batch=4, seed=seed, epoch=2)
    assert len({len(s.edges) for s in streams}) == 1, "all streams have the same number of steps"
    seen, pairs = visited(groups, streams, seed, 2)
    want = [(g, r) for g, rows in enumerate(groups) for a, b in rows.pieces for r in range(a, b)]
    assert sorted(seen) == sorted(want)
    assert max(pairs) <= 4000
    assert np.mean(pairs) > 0.6 * 4000 * (1 - 1 / 4), "batches are filled"


def test_wanted_rows_do_not_cross_chunks():
    rows = plan.wanted_rows(5, [(10, 130), (130, 170), (400, 401)], 100)
    assert rows.pieces.tolist() == [[10, 100], [100, 170], [400, 401]]
    assert rows.count == 161


def test_order_depends_on_seed_and_epoch_only():
    groups = make_groups(5)

    def run(seed, epoch):
        streams = plan.plan(groups, num_streams=2, budget=4000, blocks_per_batch=4, seed=seed, epoch=epoch)
        return visited(groups, streams, seed, epoch)[0]

    assert run(0, 0) == run(0, 0)
    assert run(0, 0) != run(0, 1)
    assert run(0, 0) != run(1, 0)


def test_sizes_mix_within_a_batch():
    groups = make_groups(7)
    streams = plan.plan(groups, num_streams=2, budget=8000, blocks_per_batch=4, seed=0)
    mixed = [len({g for g, _, _ in streams[0].micro_batch(t)}) for t in range(len(streams[0].edges) - 1)]
    assert np.mean(mixed) > 1.5


def test_a_window_is_walked_through_once_by_a_stream():
    # each chunk is decoded once an epoch: a stream never returns to an earlier window of a group
    groups = make_groups(11)
    streams = plan.plan(groups, num_streams=2, budget=3000, blocks_per_batch=4, seed=4)
    orders = [plan.order(rows, group=g, seed=4) for g, rows in enumerate(groups)]
    for stream in streams:
        last = [-1] * len(groups)
        for step in range(len(stream.edges) - 1):
            for group, start, stop in stream.micro_batch(step):
                for window, _, _ in orders[group].locate(start, stop):
                    assert window >= last[group]
                    last[group] = window


def test_fewer_structures_than_streams():
    groups = [plan.wanted_rows(4, [(0, 2)], 100)]
    streams = plan.plan(groups, num_streams=5, budget=1000, blocks_per_batch=4, seed=0)
    assert sorted(visited(groups, streams, 0, 0)[0]) == [(0, 0), (0, 1)]
    assert sum(not s.micro_batch(0) for s in streams) == 3, "three streams only fill up"


def test_one_structure_beyond_the_budget_stands_alone():
    groups = [plan.wanted_rows(50, [(0, 4)], 100), plan.wanted_rows(3, [(0, 40)], 100)]
    streams = plan.plan(groups, num_streams=1, budget=1000, blocks_per_batch=4, seed=0)
    big = [b for t in range(len(streams[0].edges) - 1) for b in streams[0].micro_batch(t) if b[0] == 0]
    assert all(stop - start == 1 for _, start, stop in big)


@pytest.mark.parametrize("num_streams", [1, 2, 5])
@pytest.mark.parametrize("budget", [4000, 20000, 60000])
def test_no_step_is_empty_where_structures_are_large(num_streams, budget):
    # boxes of 300 atoms count 19200 pairs each: more than a step's share, or than its whole budget
    boxes = plan.wanted_rows(300, [(0, 83)], 10, periodic=True)
    for groups in ([boxes], [boxes, plan.wanted_rows(3, [(0, 4000)], 100)]):
        for epoch in range(3):
            streams = plan.plan(groups, num_streams=num_streams, budget=budget, blocks_per_batch=4, seed=1, epoch=epoch)
            work = plan.work(groups, streams)
            assert work[..., 0].any(axis=1).all()
            assert work[..., 2].sum() == sum(rows.count * rows.pairs for rows in groups)


def test_a_large_molecule_counts_its_lists():
    assert plan.pairs(64, periodic=False) == 64**2
    assert plan.pairs(100, periodic=False) == plan.pairs(100, periodic=True) == 100 * plan.LIST_LENGTH
