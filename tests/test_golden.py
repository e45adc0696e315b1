"""Runs of every sort give the numbers and the messages that were pinned; ``python tests/golden.py`` compares all."""

import json

import pytest
from golden import PINNED, differences, machine, run

QUICK = ("cafedistill alike", "fedavg alike")
SORTS = (
    *("cafedistill resumed", "cafedistill-plus float16", "cafedistill-prior unequal"),
    *("cafedistill-text resumed", "ditto unequal", "pfedgraph float16", "fedpac alike"),
)


@pytest.mark.parametrize("sort", [*QUICK, *(pytest.param(sort, marks=pytest.mark.slow) for sort in SORTS)])
def test_a_run_gives_the_numbers_and_messages_that_were_pinned(sort):
    pinned = json.loads(PINNED.read_text())
    assert not differences(run(*sort.split()), pinned["runs"][sort], exact=machine() == pinned["machine"])
