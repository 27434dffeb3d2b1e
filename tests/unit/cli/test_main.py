"""How the command line ends when it cannot go on."""

import errno

import pytest

from stoker.cli import main as command


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file that was being written: No space left on device. Free",
        ),
        (
            OSError(errno.EFBIG, "File too large", "/runs/x"),
            "/runs/x: File too large. Raise the largest size of a file",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "/runs/x"),
            "/runs/x: Permission denied. Name a folder that you may",
        ),
    ],
)
def test_a_place_that_takes_no_file_is_told_with_what_helps(monkeypatch, capsys, error, words):
    def fails():
        raise error

    monkeypatch.setattr(command, "app", fails)
    monkeypatch.setattr(command, "_quieten", lambda: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert f"error: {words}" in capsys.readouterr().err
