"""A process that has the large libraries loaded and forks one for each command line that it is asked to run.

Each is a process of its own, with its folder, environment, streams, signals and exit code, and imports Stoker itself;
that PyTorch and Transformers are there already spares some four seconds of the processor, a hundred times.

Of this file: `Server`, which a test's process holds, and, run as a script, its other end. They speak lines of JSON.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys

LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "triton",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "plotly.graph_objects",
)


class Server:
    """Starts command lines, one after another."""

    def __init__(self, environment):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, arguments, folder, environment, streams):
        """Starts `stoker` with these files as its input, output and errors; the one before must have ended."""
        asked = {"arguments": arguments, "folder": str(folder), "environment": environment}
        self._process.stdin.write(json.dumps(asked | {"streams": list(map(str, streams))}) + "\n")
        return Command(self._process.stdout)

    def close(self):
        """Ends it."""
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


class Command:
    """A command line that runs, with what tests use of `subprocess.Popen`."""

    def __init__(self, answers):
        self._answers, self.returncode = answers, None
        self.pid = int(answers.readline())

    def poll(self):
        """Returns the exit code, or None as long as it runs; minus the signal where one ended it."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def wait(self, timeout):
        """Returns the exit code; past `timeout` seconds it is killed, which raises."""
        if self.returncode is None and not select.select([self._answers], [], [], timeout)[0]:
            self.send_signal(signal.SIGKILL)
            self.wait(60)
            raise subprocess.TimeoutExpired("stoker", timeout)
        return self.poll()

    def send_signal(self, number):
        """Sends a signal to the process."""
        os.kill(self.pid, number)


def serve():
    """Forks for each line of the input; returns, in the fork, what is to be run."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(asked):
    """Makes this process the command line that was asked for, as `python -m stoker.cli.main` would start it."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv, sys.path[0] = ["stoker", *asked["arguments"]], asked["folder"]
    for number, (path, flags) in enumerate(zip(asked["streams"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    # What the server has read of its own input is not the command's.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - they stay open
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    runpy.run_module("stoker.cli.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for library in LIBRARIES:
        __import__(library)
    if (command := serve()) is not None:
        become(command)
