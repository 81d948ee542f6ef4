"""What any reader makes of damage: what it accepts is accepted, and all else is one error in little memory."""

import tracemalloc
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.readers import Reader, accepts, damaged, readers

READERS = readers()
MOST_BYTES = 32 << 20
"""that reading a file of a few kilobytes may take at any time"""


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return READERS[request.param]


def test_what_is_to_be_damaged_is_accepted(reader: Reader, tmp_path: Path) -> None:
    assert all(accepts(reader, tmp_path, seed) for seed in reader.seeds)
    assert not any(accepts(reader, tmp_path, seed[: len(seed) // 2]) for seed in reader.seeds)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**32 - 1), times=st.integers(1, 4))
def test_damage_is_accepted_or_one_error(seed: int, times: int, reader: Reader, tmp_path: Path) -> None:
    random = Random(seed)
    content = random.choice(reader.seeds)
    for _ in range(times):
        content = damaged(content, reader.kind, random)
    tracemalloc.start()
    try:
        accepts(reader, tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
