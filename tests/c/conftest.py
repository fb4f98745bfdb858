import emulated
import pytest


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The folder with the kernels compiled for the host: a library of calls, and a driver that runs them."""
    folder = tmp_path_factory.mktemp("kernels")
    return folder / "cuda", emulated.build(folder)


@pytest.fixture(scope="session")
def library(emulation):
    return emulation[1]
