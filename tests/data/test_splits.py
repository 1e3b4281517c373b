"""The split of a key depends on nothing but the key, the seed and the fractions."""

import numpy as np
import pytest

from hpcmlip.data import splits

FRACTIONS = (0.8, 0.1, 0.1)
KNOWN_KEYS = [1, 0, 0, 0, 0, 0, 0, 2]
KNOWN_ROWS = [0, 0, 0, 0, 0, 0, 2, 2, 2, 1, 0, 0, 0, 0, 2, 0, 1, 2, 0, 0, 1, 0, 2, 2]
KEYS = np.array([f"C{i}H{2 * i + 2}" for i in range(4000)])


def test_known_values():
    """Stores of today and of next year, of this machine and of another, must agree."""
    keys = np.array(["C", "CC", "CCO", "[C-]#[O+]", "H2O", "C2H6O", "O=C=O", "c1ccccc1"])
    assert splits.of_keys(keys, FRACTIONS, 0).tolist() == KNOWN_KEYS
    assert splits.of_rows("/C1H1N1", np.arange(24), FRACTIONS, 0).tolist() == KNOWN_ROWS


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.9, 0.1, 0.0), (1.0, 0.0, 0.0), (0.7, 0.0, 0.3)]
)
def test_fractions_are_met(fractions):
    """Within four standard deviations; a fraction of 0 gets nothing at all."""
    for found in (splits.of_keys(KEYS, fractions, 0), splits.of_rows("/g", np.arange(100_000), fractions, 0)):
        for split, fraction in enumerate(fractions):
            share = (found == split).mean()
            assert abs(share - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / len(found))


def test_independent_of_company_and_order():
    whole = splits.of_keys(KEYS, FRACTIONS, 3)
    order = np.random.default_rng(0).permutation(len(KEYS))
    assert np.array_equal(splits.of_keys(KEYS[order], FRACTIONS, 3), whole[order])
    assert np.array_equal(splits.of_keys(KEYS[100:110], FRACTIONS, 3), whole[100:110])
    assert [splits.of_key(key, FRACTIONS, 3) for key in KEYS[:50]] == whole[:50].tolist()
    rows = splits.of_rows("/g", np.arange(1000), FRACTIONS, 3)
    assert np.array_equal(splits.of_rows("/g", np.arange(500, 700), FRACTIONS, 3), rows[500:700])


def test_seeds_and_groups_are_unrelated():
    """Two seeds, or neighbouring rows and groups, agree as often as independent draws do: 0.66."""
    pairs = [
        (splits.of_keys(KEYS, FRACTIONS, 0), splits.of_keys(KEYS, FRACTIONS, 1)),
        (splits.of_rows("/a", np.arange(9999), FRACTIONS, 0), splits.of_rows("/b", np.arange(9999), FRACTIONS, 0)),
        (splits.of_rows("/a", np.arange(9999), FRACTIONS, 0), splits.of_rows("/a", np.arange(1, 10000), FRACTIONS, 0)),
    ]
    for one, other in pairs:
        assert (one == other).mean() == pytest.approx(0.66, abs=0.04)


def test_growing_the_training_fraction_moves_nobody_out_of_it():
    small = splits.of_keys(KEYS, (0.6, 0.2, 0.2), 0) == 0
    large = splits.of_keys(KEYS, (0.8, 0.1, 0.1), 0) == 0
    assert not (small & ~large).any()
