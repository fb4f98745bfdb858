import pytest


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Of torch's, whose threads would spin beside ours over models this small."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
