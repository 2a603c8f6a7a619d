"""Chrome trace of some training steps, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, record_function

from dnnlib.util import temporary_folder

WARM_UP = 2  # steps before recording: by then memory is allocated and kernels are chosen


class StepProfile:
    """Records steps after a warm-up; a context manager whose `step` is called after every training step.

    Writes `profile-<kimg>.json.gz`, named by the images seen at its end, with names for the parts of the loop
    and the networks' calls. A training that ends early writes what was recorded.

    Args:
        steps: number of steps to record; 0 disables recording.
        run_dir: output folder.
        networks: networks by the names of their calls (with gradients, without).
        say: function that logs a line.
    """

    def __init__(
        self,
        steps: int,
        run_dir: str,
        device: torch.device,
        networks: dict[tuple[str, str], torch.nn.Module],
        say: Callable[[str], None],
    ):
        self._steps, self._run_dir, self._say = steps, run_dir, say
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == 'cuda' else [])]
        self._networks, self._undo = networks, []
        self._profiler, self._done, self._nimg = None, 0, 0

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *_):
        if self._profiler is not None:
            self._finish()

    def part(self, name: str):
        """A context whose operations appear under that name."""
        return record_function(name) if self._profiler is not None else contextlib.nullcontext()

    def step(self, nimg: int) -> None:
        """Called after each step, with the images seen."""
        if self._done == WARM_UP + self._steps:
            return
        self._done, self._nimg = self._done + 1, nimg
        # The first steps compile and allocate, and are not recorded.
        if self._steps and self._done == WARM_UP:
            self._begin()
        elif self._profiler is not None and self._done == WARM_UP + self._steps:
            self._finish()

    def _begin(self) -> None:
        for names, network in self._networks.items():
            self._name_calls(network, *names)
        # PyTorch's tracer otherwise reports its own stages on stderr; its highest level is 5.
        os.environ.setdefault('KINETO_LOG_LEVEL', '6')
        self._profiler = torch.profiler.profile(activities=self._activities)
        self._profiler.start()

    def _name_calls(self, network: torch.nn.Module, with_gradients: str, without: str) -> None:
        """Wrap what every call goes through first; compiled networks would bypass hooks."""
        before, call = network._compiled_call_impl, network._compiled_call_impl or network._call_impl

        def named(*args, **kwargs):
            with record_function(with_gradients if torch.is_grad_enabled() else without):
                return call(*args, **kwargs)

        network._compiled_call_impl = named
        self._undo.append(lambda: setattr(network, '_compiled_call_impl', before))

    def _finish(self) -> None:
        # Stop recording, and unwrap the networks.
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        for undo in self._undo:
            undo()

        # Write the trace; PyTorch compresses it if its name ends in .gz.
        path = os.path.join(self._run_dir, f'profile-{self._nimg // 1000:06d}.json.gz')
        try:
            with temporary_folder(path) as folder:
                profiler.export_chrome_trace(str(folder / 'profile.json.gz'))
                os.replace(folder / 'profile.json.gz', path)
        except OSError as error:
            self._say(f'Cannot write {path}: {error.strerror}. Training goes on.')
        else:
            self._say(f'Profile of {self._done - WARM_UP} steps: {path}')
