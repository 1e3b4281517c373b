"""Units: everything inside is in Å, eV and eV/Å; readers, losses that name a unit, and reports convert here.

Constants are CODATA 2018. Atomic units of length and energy are bohr and hartree.
"""

HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # Å
KCAL_PER_MOL = 1 / 23.060547830619026  # eV

ENERGY_UNITS: dict[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "Ha": HARTREE,
    "kcal/mol": KCAL_PER_MOL,
    "kJ/mol": KCAL_PER_MOL / 4.184,
}
"""Name of an energy unit -> its size in eV. A force in that unit per Å has the same factor."""

SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu "
    "Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr "
    "Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()
"""Chemical symbols by atomic number; index 0 is no element."""

ATOMIC_NUMBERS: dict[str, int] = {symbol: z for z, symbol in enumerate(SYMBOLS) if z}


def formula(numbers) -> str:
    """Hill formula (C, H, then alphabetical) of a list of atomic numbers, such as `C2H6O`."""
    symbols = [SYMBOLS[int(z)] for z in numbers]
    counts = {s: symbols.count(s) for s in sorted(set(symbols))}
    first = [s for s in ("C", "H") if s in counts] if "C" in counts else []
    order = first + [s for s in counts if s not in first]
    return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)
