import numpy as np
import pytest

from benchmarks import train as module


@pytest.mark.parametrize(("shape", "to_cap"), [("3x7", False), ("mix", False), ("mix", True)])
def test_every_side_gets_the_same_tokens(shape, to_cap):
    wanted = module.sequences(shape)
    rows = [row for batch in module.padded(shape, to_cap=to_cap) for row in batch]
    assert len(rows) == len(wanted)
    for row, ids in zip(rows, wanted, strict=True):
        np.testing.assert_array_equal(row[row >= 0], ids)
    if to_cap:
        assert {len(row) for row in rows} == {module.MIXES["mix"][2]}
