"""Units against their definitions: SI constants (exact since 2019) and CODATA 2018."""

import pytest

from hpcmlip.units import ATOMIC_NUMBERS, BOHR, ENERGY_UNITS, HARTREE, KCAL_PER_MOL, SYMBOLS, formula

AVOGADRO = 6.02214076e23
ELEMENTARY_CHARGE = 1.602176634e-19


def test_kcal_per_mol_follows_from_the_exact_constants():
    assert pytest.approx(4184 / AVOGADRO / ELEMENTARY_CHARGE, rel=1e-14) == KCAL_PER_MOL
    assert ENERGY_UNITS["kJ/mol"] == pytest.approx(1000 / AVOGADRO / ELEMENTARY_CHARGE, rel=1e-14)


def test_atomic_units_agree_with_each_other():
    # hartree * bohr = e^2 / (4 pi epsilon_0) = 14.3996454784255 eV Å in CODATA 2018
    assert pytest.approx(14.3996454784255, rel=1e-9) == HARTREE * BOHR
    assert pytest.approx(627.5094740631, rel=1e-12) == HARTREE / KCAL_PER_MOL


def test_symbols_and_numbers_are_inverse():
    assert len(SYMBOLS) == 119 and len(ATOMIC_NUMBERS) == 118
    assert all(SYMBOLS[z] == symbol for symbol, z in ATOMIC_NUMBERS.items())
    assert [ATOMIC_NUMBERS[s] for s in ("H", "C", "N", "O", "Cl", "Br", "I", "Og")] == [1, 6, 7, 8, 17, 35, 53, 118]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([8, 1, 1], "H2O"), ([1, 6, 1, 1, 6, 8, 1, 1, 1], "C2H6O"), ([7, 7], "N2"), ([17, 1], "ClH"), ([6, 17], "CCl")],
)
def test_hill_formula(numbers, expected):
    assert formula(numbers) == expected
