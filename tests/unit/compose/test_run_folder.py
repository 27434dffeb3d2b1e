import pytest

from stoker.compose.run_folder import RunFolder
from stoker.errors import OutputError


@pytest.mark.parametrize("inside", ["", "runs/my-run"])
def test_a_file_in_the_way_of_the_folder_is_named_before_anything_is_done(tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="file is a file"):
        RunFolder(file / inside).check(resume=False, overwrite=True)
    assert file.read_text() == "mine"


def test_a_folder_that_is_not_there_yet_may_be_used(tmp_path):
    RunFolder(tmp_path / "runs" / "my-run").check(resume=False, overwrite=False)
    assert not (tmp_path / "runs").exists()
