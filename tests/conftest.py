import os
import sys

import errors
import pytest
from hypothesis import HealthCheck, settings
from on_device import has_cuda, wrappers

import sinkattn
from sinkattn.config import cpu_tables, use_cpu_table

if errors.LOG:
    errors.watch()

TABLES = ("reference", "avx2", "avx512", "avx512bf16", "amx", "neon", "neonbf16")
CUDA = ("cuda", "cuda_numbers") if has_cuda() else ()  # the second: auxiliary arrays there too

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60,
                          suppress_health_check=list(HealthCheck))
settings.register_profile("few", settings.get_profile("ci"), max_examples=12)
settings.register_profile("default", settings.get_profile("ci"), max_examples=40)
settings.register_profile("deep", settings.get_profile("ci"), max_examples=1500, derandomize=False,
                          print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def move_to_cuda(request, monkeypatch, numbers):
    """attend, attend_backward, mass, merge and SinkCache of the test's module, of the oracle and of the package now run on the
    device."""
    for name, wrapper in wrappers(numbers).items():
        original = getattr(sinkattn, name)
        for module in (request.module, sys.modules.get("oracle"), sinkattn):
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, wrapper)


@pytest.fixture(params=TABLES + CUDA)
def table(request, monkeypatch):
    """The test runs once with every kernel table that this machine can run, and on its GPU."""
    if request.param in CUDA:
        move_to_cuda(request, monkeypatch, request.param == "cuda_numbers")
        yield request.param
        return
    if request.param not in cpu_tables():
        pytest.skip(f"kernel table {request.param} is not usable here")
    before = use_cpu_table(request.param)
    yield request.param
    use_cpu_table(before)


@pytest.fixture(params=("cpu", *CUDA))
def device(request, monkeypatch):
    """The test runs on the CPU and on the GPU of the machine."""
    if request.param != "cpu":
        move_to_cuda(request, monkeypatch, request.param == "cuda_numbers")
    return request.param
