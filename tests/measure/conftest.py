import pytest

from sinkattn.demo.workers import Workers


@pytest.fixture(autouse=True, scope="package")
def workers():
    """One thread for the BLAS: two wait for each other more than they work on a model so small."""
    with Workers() as workers:
        yield workers
