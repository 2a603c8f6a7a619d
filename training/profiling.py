"""A Chrome trace of some steps of a run, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, record_function

from dnnlib.util import temporary_folder

WARM_UP = 2  # steps before the first one that is recorded: by then memory is taken and kernels are chosen


class StepProfile:
    """Records some steps after the first two; a context, in which `step` follows every step.

    The file is `profile-<kimg>.json.gz`, after the images seen at its end. In it the loop's parts have their
    names, and so have the networks' calls. Of a training that ends before, there is what was recorded.

    Args:
        steps: how many; 0 records nothing.
        run_dir: where the file goes.
        networks: names of calls with gradients and without, and whose they are.
        say: takes a line for people.
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
        """A context whose operations are shown under that name."""
        return record_function(name) if self._profiler is not None else contextlib.nullcontext()

    def step(self, nimg: int) -> None:
        """A step is over, and `nimg` images were seen."""
        if self._done == WARM_UP + self._steps:
            return
        self._done, self._nimg = self._done + 1, nimg
        if self._steps and self._done == WARM_UP:
            self._begin()
        elif self._profiler is not None and self._done == WARM_UP + self._steps:
            self._finish()

    def _begin(self) -> None:
        for names, network in self._networks.items():
            self._name_calls(network, *names)
        self._profiler = torch.profiler.profile(activities=self._activities)
        self._profiler.start()

    def _name_calls(self, network: torch.nn.Module, with_gradients: str, without: str) -> None:
        """By what a call goes through before anything else; what is compiled would not see hooks."""
        before, call = network._compiled_call_impl, network._compiled_call_impl or network._call_impl

        def named(*args, **kwargs):
            with record_function(with_gradients if torch.is_grad_enabled() else without):
                return call(*args, **kwargs)

        network._compiled_call_impl = named
        self._undo.append(lambda: setattr(network, '_compiled_call_impl', before))

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        for undo in self._undo:
            undo()
        path = os.path.join(self._run_dir, f'profile-{self._nimg // 1000:06d}.json.gz')
        try:
            with temporary_folder(path) as folder:
                profiler.export_chrome_trace(str(folder / 'profile.json.gz'))
                os.replace(folder / 'profile.json.gz', path)
        except OSError as error:
            self._say(f'Cannot write {path}: {error.strerror}. Training goes on.')
        else:
            self._say(f'Profile of {self._done - WARM_UP} steps: {path}')
