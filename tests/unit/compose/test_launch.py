"""Which of several deaths an agent reports is told, and how."""

import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from stoker.cli.main import main
from stoker.compose import launch
from stoker.errors import HangError, TrainingError, UserError


def report(**failures):
    """An agent's report: rank N died of what `rN` says, an error's text or a signal, all within one second."""
    found = {}
    for name, what in failures.items():
        message = {"message": what, "extraInfo": {"py_callstack": "Traceback ..."}} if isinstance(what, str) else ""
        code = (2 if what.startswith("ConfigError") else 1) if isinstance(what, str) else -what
        found[int(name[1:])] = SimpleNamespace(message=message, exitcode=code, pid=100, timestamp=7)
    return SimpleNamespace(failures=found)


GLOO = "RuntimeError: [pair.cc:537] gloo/transport/tcp/pair.cc Read error: Connection reset by peer."


def test_who_died_first_is_told_and_not_who_lost_a_connection_by_it():
    error = launch._as_ours(report(r0=GLOO, r1=signal.SIGKILL), 2)
    assert str(error).startswith("rank 1 of 2 (process 100) failed, so all were ended: it was killed by SIGKILL.")
    assert error.exit_code == 128 + signal.SIGKILL
    error = launch._as_ours(report(r0=GLOO, r1="TrainingError: Memory is exhausted on rank 1 of 2."), 2)
    assert str(error).endswith("so all were ended: Memory is exhausted on rank 1 of 2.")


def test_who_was_ended_by_the_agent_is_not_told_as_the_one_who_failed():
    error = launch._as_ours(report(r0=signal.SIGTERM, r1="ConfigError: train.batch_size is odd."), 2)
    assert str(error) == "train.batch_size is odd."
    assert "rank 0 of 2 (process 100)" in str(launch._as_ours(report(r0=signal.SIGTERM), 2))


def test_a_hang_is_told_in_the_words_of_the_verdict_whoever_ended_by_it():
    verdict = "rank 1 (gpu07) has not finished step 7."
    error = launch._as_ours(report(r0=f"HangError: {verdict}", r1="ValueError: too late"), 2)
    assert (type(error), str(error)) == (HangError, verdict)


def test_a_mistake_of_the_user_is_told_without_a_rank():
    error = launch._as_ours(report(r1="ConfigError: train.batch_size is odd."), 2)
    assert isinstance(error, UserError)
    assert str(error) == "train.batch_size is odd."


def test_a_rank_is_told_once():
    error = launch._as_ours(report(r1="CheckpointError: rank 1 of 2: The checkpoint cannot be written."), 2)
    assert str(error) == "rank 1 of 2 (process 100) failed, so all were ended: The checkpoint cannot be written."


def test_an_error_that_is_not_ours_has_its_traceback():
    assert "Traceback ..." in str(launch._as_ours(report(r1="ZeroDivisionError: division by zero"), 2))


@pytest.mark.parametrize("speaks", [True, False])
def test_a_process_that_no_agent_started_tells_its_end_itself(monkeypatch, speaks):
    ended, said = [], []
    monkeypatch.delenv("STOKER_LAUNCHED", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(launch.os, "_exit", ended.append)
    monkeypatch.setattr(launch.os, "write", lambda descriptor, text: said.append(text.decode()))
    launch.fail(TrainingError("it hangs."), speaks)
    assert ended == [1]
    assert said == (["error: it hangs.\n"] if speaks else [])


class ReportedError(ChildFailedError):
    """The agent's report as it is raised."""

    def __init__(self, failures):
        self.failures = failures


class Starts:
    """Torch's launcher, whose n-th start ends as the n-th of `ends` says: a report of failures, or None."""

    def __init__(self, monkeypatch, *ends):
        self.ends, self.seen, self.runs = ends, [], set()
        monkeypatch.setattr(api, "elastic_launch", lambda config, entrypoint: partial(self.started, config))
        for name in (
            "STOKER_LAUNCHED",
            "STOKER_RESTART_COUNT",
            "STOKER_MAX_RESTARTS",
            "STOKER_INTERRUPTED",
            "OMP_NUM_THREADS",
        ):
            monkeypatch.setenv(name, "")  # so that what `start` sets is undone

    def started(self, config, *arguments):
        self.runs.add(config.run_id)
        self.seen += launch.restarts() or ["first"]
        failures = self.ends[len(self.seen) - 1]
        if failures is not None:
            raise ReportedError(report(**failures).failures)


AGAIN = ["A process died, so all were started again (1 of 2 restarts)."]
AGAIN += ["A process died, so all were started again (2 of 2 restarts)."]
KILLED = {"r1": signal.SIGKILL}


def test_processes_that_died_are_started_again_under_the_runs_name(monkeypatch):
    starts = Starts(monkeypatch, KILLED, KILLED, None)
    assert launch.start(["train"], num_processes=2, max_restarts=2) == 0
    assert starts.seen == ["first", *AGAIN]
    (run,) = starts.runs
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)  # as the agent tells its processes
    assert launch.is_restarted({"launch": run})
    assert not launch.is_restarted({"launch": "another"})


def test_processes_are_started_again_no_more_often_than_was_asked_for(monkeypatch):
    starts = Starts(monkeypatch, KILLED, KILLED, KILLED)
    with pytest.raises(TrainingError, match="SIGKILL"):
        launch.start(["train"], num_processes=2, max_restarts=2)
    assert starts.seen == ["first", *AGAIN]


@pytest.mark.parametrize("before", [[], [KILLED]])
def test_nothing_is_started_again_after_a_mistake_of_the_user(monkeypatch, before):
    starts = Starts(monkeypatch, *before, {"r0": GLOO, "r1": "ConfigError: the row is malformed."})
    with pytest.raises(UserError, match="the row is malformed"):
        launch.start(["train"], num_processes=2, max_restarts=2)
    assert len(starts.seen) == len(before) + 1


def test_nothing_is_started_again_after_a_signal(monkeypatch):
    starts = Starts(monkeypatch, KILLED)
    plain = starts.started

    def interrupted(config, *arguments):
        signal.raise_signal(signal.SIGTERM)
        plain(config, *arguments)

    starts.started = interrupted
    assert launch.start(["train"], num_processes=2, max_restarts=2) == 128 + signal.SIGTERM
    assert starts.seen == ["first"]


@pytest.mark.parametrize("failures", [None, {"r0": GLOO}])
def test_a_signal_to_one_process_alone_is_told_with_its_rank_and_ends_them_all(monkeypatch, failures):
    starts = Starts(monkeypatch, failures)
    plain = starts.started

    def interrupted(config, *arguments):
        for rank, name in enumerate(("", "SIGINT", "SIGINT")):
            monkeypatch.setenv("RANK", str(rank))
            launch.tell_interrupted(name)
        plain(config, *arguments)

    starts.started = interrupted
    with pytest.raises(TrainingError, match=r"rank 1 of 3 \(process \d+\) was interrupted by SIGINT") as raised:
        launch.start(["train"], num_processes=3, max_restarts=2)
    assert raised.value.exit_code == 128 + signal.SIGINT
    assert starts.seen == ["first"]


def test_a_signal_that_comes_before_there_is_anything_to_save_is_named():
    failures = {1: SimpleNamespace(message="", exitcode=130, pid=100, timestamp=7)}
    error = launch._as_ours(SimpleNamespace(failures=failures), 2)
    assert "rank 1 of 2 (process 100) failed, so all were ended: it was interrupted by SIGINT." in str(error)
    assert error.exit_code == 130


def test_restarts_that_cannot_mend_a_mistake_are_said_to_be_in_vain(monkeypatch, capsys):
    monkeypatch.delenv("STOKER_LAUNCHED", raising=False)
    monkeypatch.setattr(sys, "argv", ["stoker", "train", "nowhere.yaml"])
    for count, is_said in ((0, True), (2, True), (3, False)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "nowhere.yaml" in said
        assert (f"({3 - count} of 3 restarts are left), which cannot mend this" in said) == is_said
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("STOKER_LAUNCHED", "1")  # our own start takes the exit code for what it is
    assert launch.restarts_in_vain() == ""


def test_processes_that_torchrun_started_again_say_so(monkeypatch):
    monkeypatch.delenv("STOKER_LAUNCHED", raising=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for count, said in (("0", []), ("2", ["A process died, so all were started again (2 of 3 restarts)."])):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert launch.restarts() == said
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert launch.restarts() == []
