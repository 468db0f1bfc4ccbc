"""Factor tables that tests of forms read and write."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from longrope.factors import FactorTable, RopeFactors


@st.composite
def two_row_tables(draw: st.DrawFn) -> FactorTable:
    """Tables that the longrope format can express, of 16 pairs."""
    original, attention = draw(st.integers(2, 2**17)), draw(st.floats(0.5, 2.0))
    longer = draw(st.integers(original + 1, 2**21))
    vectors = st.lists(st.floats(0.5, 600.0), min_size=16, max_size=16)
    rows = tuple(RopeFactors(up_to, tuple(draw(vectors)), 0, attention) for up_to in (original, longer))
    return FactorTable(draw(st.floats(2.0, 1e8)), 32, original, rows)


def long_table() -> FactorTable:
    """A table of two rows, up to eight times the original length, of 16 pairs."""
    rows = tuple(RopeFactors(up_to, tuple(np.linspace(1, up_to / 256, 16)), 0, 1.125) for up_to in (256, 2048))
    return FactorTable(10000.0, 32, 256, rows)
