import io

import huggingface_hub
import pytest
from rich.console import Console

from stoker.compose.upload import upload
from stoker.errors import TrainingError


@pytest.fixture
def calls(monkeypatch):
    """What the Hub's client is asked to do."""
    made = []
    for name in ("create_repo", "create_branch", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda self, *rest, _name=name, **named: made.append((_name, rest, named))
        )
    return made


def test_weights_go_to_a_private_repository(calls, tmp_path):
    upload(tmp_path, "me/model", revision="tuned", console=Console(file=io.StringIO()))

    assert [name for name, _, _ in calls] == ["create_repo", "create_branch", "upload_folder"]
    assert calls[0][1:] == (("me/model",), {"private": True, "exist_ok": True})
    assert calls[2][2]["folder_path"] == tmp_path
    assert calls[2][2]["revision"] == "tuned"


def test_without_a_network_the_message_says_where_the_weights_are(monkeypatch, tmp_path):
    def no_network(self, *rest, **named):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", no_network)

    with pytest.raises(TrainingError, match=r"weights in .* could not be uploaded.*no route.*hf upload me/model"):
        upload(tmp_path, "me/model", revision=None, console=Console(file=io.StringIO()))


def test_a_name_that_is_none_is_refused_by_the_hubs_own_rules(tmp_path):
    with pytest.raises(TrainingError, match="could not be uploaded"):
        upload(tmp_path, "not a name", revision=None, console=Console(file=io.StringIO()))
