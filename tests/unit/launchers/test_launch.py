"""Every launcher's start can be shown and started in the same way."""

import inspect

import pytest

from launchers.hostfile_job import HostfileStart
from launchers.launch import Launch
from launchers.local import LocalLaunch


@pytest.mark.parametrize("kind", [LocalLaunch, HostfileStart])
def test_launchers_keep_the_protocol(kind):
    wanted = {name for name, value in vars(Launch).items() if inspect.isfunction(value)}
    methods = {name for name in wanted if not name.startswith("_")}
    assert methods == {"start", "describe", "lines"}
    assert all(callable(getattr(kind, name, None)) for name in methods)
