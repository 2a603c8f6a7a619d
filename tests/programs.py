"""The scripts as processes of their own, which start in a tenth of the time that importing PyTorch takes.

Each is forked from a server that has imported what scripts import, and has its own arguments, environment,
output, exit status and process id. Tests of what happens while a script imports, of what it imports, and of
torchrun itself start a new interpreter by `subprocess`.
"""

import atexit
import contextlib
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ('out', 'err')
POLL_SEC = 0.005
ALONE_SEC = 30  # for the ranks to notice that one of them has failed

# A process that starts asks for the statuses of all others, and a status can be read once: a second thread that
# waits for it would read nothing, which counts as 255.
STATUSES = threading.Lock()
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['imported'])


class Program:
    """`python <arguments>` in the repository, single-threaded and without warnings; names as of `Popen`.

    Args:
        arguments: a script and its command line, or '-m', a module and its command line.
        env: variables beside those of this process.
        limits: of resources, by their number.
        folder: where its output goes, to the end of the files `out` and `err`.
    """

    def __init__(self, arguments, env=None, limits=None, folder=None):
        self.args = list(map(str, arguments))
        self.folder = Path(folder or tempfile.mkdtemp())
        env = {**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})}
        self._process = server.Process(target=_main, args=(self.args, env, limits or {}, self.folder))
        with STATUSES, _path_of_server():
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        with STATUSES:
            return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None) -> int:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
            time.sleep(POLL_SEC)
        return status

    def output(self) -> tuple[str, str]:
        """What it has written to standard output and standard error."""
        return tuple(
            path.read_text() if path.exists() else '' for path in (self.folder / name for name in OUTPUT)
        )

    def communicate(self, timeout=None) -> tuple[str, str]:
        self.wait(timeout)
        output = self.output()
        shutil.rmtree(self.folder, ignore_errors=True)
        return output


class PipedProgram(Program):
    """A command of `experiments.runner` in place of `Popen`: both its outputs come through `stdout`."""

    def __init__(self, command, env, **_):
        folder = Path(tempfile.mkdtemp())
        os.mkfifo(folder / 'out')
        (folder / 'err').symlink_to('out')
        assert command[:3] == [sys.executable, '-W', 'ignore']
        super().__init__(command[3:], env, folder=folder)
        self.stdout = open(folder / 'out')  # noqa: SIM115  (a pipe, read to its end)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run_together(processes: int, arguments, timeout: float, env=None, limits=None):
    """The ranks of one process group, in the environment that torchrun gives them, to their end."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    group = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    folder = tempfile.mkdtemp()
    ranks = [
        Program(
            arguments, {**(env or {}), **group, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}, limits, folder
        )
        for rank in range(processes)
    ]
    deadline = time.monotonic() + timeout
    while None in (statuses := [rank.poll() for rank in ranks]):
        if any(statuses):
            deadline = min(deadline, time.monotonic() + ALONE_SEC)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
        time.sleep(POLL_SEC)
    return subprocess.CompletedProcess(ranks[0].args, int(any(statuses)), *ranks[0].communicate())


@contextlib.contextmanager
def _path_of_server():
    """The server takes its path of modules from the environment in which the first program starts it."""
    before = os.environ.copy()
    os.environ.update(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests')]), OMP_NUM_THREADS='1')
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main(arguments: list[str], env: dict[str, str], limits: dict[int, int], folder: Path) -> None:
    """In the forked process: become what a new interpreter would be."""
    multiprocessing.set_start_method(None, force=True)
    for descriptor, name in enumerate(OUTPUT, start=1):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for number, limit in limits.items():
        resource.setrlimit(number, (limit, limit))
    warnings.simplefilter('ignore')
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in (str(ROOT), str(ROOT / 'tests')))]
    try:
        if arguments[0] == '-m':
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str((ROOT / arguments[0]).parent)
            runpy.run_path(arguments[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()
