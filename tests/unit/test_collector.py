import gc
from contextlib import suppress

import pytest

from stoker import collector


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_within_it_whatever_ends_it(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(RuntimeError), collector.at_rest():
            assert not gc.isenabled()
            raise RuntimeError("capture failed")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
