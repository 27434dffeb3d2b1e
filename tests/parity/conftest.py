"""Makes this folder's helpers importable, and the tests' results what `stoker models` says (proofs.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import proofs

_reports = []


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help=f"write what was found to {proofs.RECORD.name}")


def pytest_configure(config):
    config.addinivalue_line("markers", "proves(*properties, model_type=None): what passing means for a model type")
    config.stash[proofs.COLLECTED] = {}


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(config, items):
    for item in items:
        if pairs := proofs.of_test(item):
            config.stash[proofs.COLLECTED][item.nodeid] = pairs
            item.user_properties.append(("proves", pairs))


@pytest.fixture
def found(request):
    """A function that says how a property is there, where that is more than "yes": found(packing="by document")."""
    return lambda **facts: request.node.user_properties.append(("found", facts))


def pytest_runtest_logreport(report):
    if report.when == "call" and not report.skipped:
        _reports.append(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # of xdist; the controller has all reports
        return
    cells, failed = proofs.results(_reports)
    if session.config.getoption("--record", default=False):
        proofs.record(cells, failed)
    elif differing := proofs.differing(cells):
        print(f"\n{proofs.RECORD.name} holds otherwise what these tests found; --record writes it: {differing}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
