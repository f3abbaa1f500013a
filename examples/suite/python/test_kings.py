import pytest

import kings


@pytest.mark.parametrize(
    "number, want", [(1, "Louis I"), (9, "Louis IX"), (14, "Louis XIV")]
)
def test_name(number, want):
    assert kings.name("Louis", number) == want
