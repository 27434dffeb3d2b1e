"""The commands that must answer at once, without torch."""

import subprocess
import sys

import pytest

from stoker.cli.main import app

HEAVY = ("torch", "transformers", "datasets", "plotly", "pyarrow", "numpy")
PROBE = """
import sys
sys.argv = ["stoker", *{arguments!r}]
from stoker.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", [name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["check", "run.yaml"], ["train", "--help"]], ids=" ".join)
def test_help_and_check_do_not_import_torch(arguments, run_values, write_yaml, tmp_path, stoker):
    write_yaml(run_values)
    script = PROBE.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=stoker.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_every_help_fits_a_screen_and_shows_an_example(stoker):
    for command in (info.name for info in app.registered_commands):
        said = stoker(command, "--help").stdout
        assert "Example: stoker" in said
        assert said.count("\n") <= 40, command
