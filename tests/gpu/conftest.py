import pytest
from on_device import has_cuda


@pytest.fixture
def torch():
    if not has_cuda():
        pytest.skip("no GPU that this build and torch can use")
    import torch
    return torch
