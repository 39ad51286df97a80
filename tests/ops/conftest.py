from __future__ import annotations

from collections.abc import Iterator

import pytest

from vapi_fast import ops


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on both implementations, on the device of the kernels' tests."""
    with ops.use_backend(request.param):
        yield request.param
