"""Five hundred random mixes of submit, extend, release and step against rows that are computed alone."""

import pytest

from support.mixed import mix


@pytest.mark.parametrize("fifty", range(10))
def test_random_mixes_of_calls_equal_rows_run_alone(fifty):
    for seed in range(50 * fifty, 50 * fifty + 50):
        mix(seed)
