import pytest
import yaml
from typer.testing import CliRunner

from stoker.cli.main import app
from stoker.errors import ConfigError, OutputError, PlanError


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "model": {"base": "builtin:tiny-llama"},
        "adapter": {},
        "data": {"train": [{"path": "builtin:fine-tuning"}]},
        "train": {"steps": 3, "batch_size": 32, "learning_rate": 1e-4},
        "output": {"folder": "runs/mine"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    def call(*arguments):
        result = CliRunner().invoke(app, ["launch", "run.yaml", *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0
        return result

    return call


def test_the_line_alone_is_on_stdout_and_the_advice_beside_it(launch):
    result = launch("--nodes", "2", "--gpus-per-node", "8", "--set", "train.seed=7")
    assert "torchrun --nnodes 2 --nproc-per-node 8" in result.stdout.splitlines()[0]
    assert "--set train.seed=7" in result.stdout
    assert "All must see run.yaml and runs/mine in one file system" in result.stderr


def test_a_folder_gets_a_file_for_each_scheduler(launch, tmp_path):
    launch("--nodes", "2", "-o", "jobs")
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == ["mine.kubernetes.yaml", "mine.sbatch"]


def test_one_kind_alone_is_printed_as_it_is(launch):
    assert launch("--nodes", "2", "--kind", "slurm").stdout.startswith("#!/bin/bash\n")
    printed = launch("--nodes", "2", "--kind", "kubernetes", "--image", "there/it:1", "--claim", "disk").stdout
    assert [one["kind"] for one in yaml.safe_load_all(printed)] == ["Service", "Job"]
    assert "image: there/it:1" in printed


def test_mistakes_are_told_before_anything_is_queued(launch, tmp_path):
    with pytest.raises(PlanError, match="32 sequences a step cannot be dealt out to 24 processes"):
        launch("--nodes", "3")
    with pytest.raises(ConfigError, match="--kind 'sge' is no launcher"):
        launch("--kind", "sge")
    with pytest.raises(ConfigError, match=r"engine\.strategy = single, but these are 16 processes"):
        launch("--nodes", "2", "--set", "engine.strategy=single")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        launch("--nodes", "2", "-o", "file")
