"""The platforms whose algorithms are tested, all of them on a CPU."""

import pytest

from jaxbn._core import lowering


def pytest_configure(config):
    config.addinivalue_line("markers", "slow_but_on_cpu: slow on platforms other than the CPU")


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow_but_on_cpu") and item.callspec.params["platform"] != "cpu":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", params=["cpu", "tpu", "cuda"])
def platform(request):
    """The platform whose algorithms are used; module-scoped, because changing it forgets all compiled programs."""
    with lowering.assumed(request.param):
        yield request.param
