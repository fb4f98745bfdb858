import os

import errors
import pytest
from hypothesis import HealthCheck, settings

from sinkattn.config import cpu_tables, use_cpu_table

if errors.LOG:
    errors.watch()

TABLES = ("reference", "avx2", "avx512", "avx512bf16", "amx", "neon", "neonbf16")

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60,
                          suppress_health_check=list(HealthCheck))
settings.register_profile("few", settings.get_profile("ci"), max_examples=12)
settings.register_profile("default", settings.get_profile("ci"), max_examples=40)
settings.register_profile("deep", settings.get_profile("ci"), max_examples=1500, derandomize=False,
                          print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=TABLES)
def table(request):
    """The test runs once with every kernel table that this machine can run."""
    if request.param not in cpu_tables():
        pytest.skip(f"kernel table {request.param} is not usable here")
    before = use_cpu_table(request.param)
    yield request.param
    use_cpu_table(before)
