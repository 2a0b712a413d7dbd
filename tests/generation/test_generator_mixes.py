"""A thousand random mixes of submit, extend, release and step against rows that are computed alone."""

import pytest

from support.mixed import mix


@pytest.mark.parametrize("hundred", range(10))
def test_random_mixes_of_calls_equal_rows_run_alone(hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
        mix(seed)
