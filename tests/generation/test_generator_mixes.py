"""Five hundred random mixes of submit, extend, release and step, by default half as many, against rows computed alone."""

import pytest

from support.mixed import mix


@pytest.mark.parametrize("fifty", range(10))
def test_random_mixes_of_calls_equal_rows_run_alone(fifty, full):
    for seed in range(50 * fifty, 50 * fifty + (50 if full else 25)):
        mix(seed)
