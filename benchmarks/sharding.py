"""Memory of a process in training, by number of processes, undivided and divided (--shard=optimizer).

Processes of one machine train a network with random weights on one image each, by gloo on the CPU, as the training
loop sets them up: whole or by FSDP2, Adam, an EMA and two power-function averages. What a process has more between steps than
before it built the network is measured by the system. The peak is counted, as the tensors that live in a step at the same
time: the system's would have what its allocator keeps. Beside both stands the formula of --dry-run (`training.memory`),
which leaves temporary tensors out.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import click
import psutil
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import apart, block, table
from benchmarks.sizes import SIZES
from dnnlib import EasyDict, cli
from torch_utils.flat import FlatParameters
from torch_utils.gradients import Gradients
from torch_utils.sharded import ShardedParameters
from training import execution, memory
from training.objectives.loss import State
from training.phema import WeightAverages
from training.starting_point import on_meta
from training.weight_update import WeightUpdate

STEPS = 3
STDS = [0.05, 0.1]


def in_use() -> int:
    """Bytes of this process alone, after freed memory has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_full_info().uss


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time, from `reset` on, of those that operators see.

    Attributes:
        peak: most of them.
    """

    def __init__(self):
        super().__init__()
        self.peak, self._counting = 0, False
        self._storages: dict[int, weakref.ref] = {}

    def reset(self) -> None:
        self.peak, self._counting = 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, DTensor):
                leaf = leaf.to_local()
            if isinstance(leaf, torch.Tensor) and leaf.device.type != 'meta':
                storage = leaf.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)
        if self._counting:
            # FSDP2 gathers into storages that it resizes, so that sizes are asked for anew.
            alive = [storage for ref in self._storages.values() if (storage := ref()) is not None]
            self.peak = max(self.peak, sum(storage.nbytes() for storage in alive))
        return result


def measure(size: str, divided: bool) -> dict:
    """Bytes of this process, one of a group, beyond those before the network was built."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    given = SIZES[size]
    # What is imported, and small steps allocate, at the first use.
    train(torch.nn.Linear(4, 4), [], divided, lambda net: net(torch.ones(1, 4)))
    before = in_use()

    net = given.build().train()
    x = torch.randn(1, given.channels, given.resolution, given.resolution)
    predict = lambda net: net(x, torch.ones(1), torch.zeros(1, given.classes))
    with LiveTensors() as live:
        held = train(net, execution.blocks_of(net), divided, predict, live.reset)
    parameters = sum(p.numel() for p in net.parameters())
    found = dict(parameters=parameters, between=in_use() - before, peak=live.peak)
    del held
    dist.barrier()
    dist.destroy_process_group()
    return found


def train(net, blocks, divided: bool, predict, after_first: Callable[[], None] = lambda: None) -> tuple:
    """Some steps. `after_first` is called after the first. Returns: everything that training keeps."""
    parameters = ShardedParameters(net, blocks) if divided else FlatParameters(net)
    update = WeightUpdate(parameters, (0.9, 0.999), 1e-8)
    averages = WeightAverages(net, parameters, 5e5, 0.05, STDS)
    gradients = Gradients(net, parameters)
    for step in range(1, STEPS + 1):
        gradients.begin_step()
        with gradients.round(last=True):
            predict(net).square().sum().backward()
        update.step(1e-5)
        averages.update(step, 1)
        if step == 1:
            after_first()
    return parameters, update, averages, gradients


def by_formula(size: str, processes: int, divided: bool) -> dict[str, int]:
    """Bytes of a process by part."""
    network = SIZES[size].description
    how = dict(precision='fp32', checkpoint_activations=False, compiled=False, phema_stds=STDS)
    c = EasyDict(how, network=network, shard='optimizer' if divided else 'none')
    return memory.parts(c, on_meta(network), None, State(), 1, processes, on_gpu=False)


def group(size: str, processes: int, divided: bool) -> dict:
    """What `measure` finds in the process of a group that has most."""
    with tempfile.TemporaryDirectory() as folder:
        apart(
            '-c',
            'import runpy, sys; sys.argv = sys.argv[1:]; print("null"); sys.stdout.flush();'
            'runpy.run_module("torch.distributed.run", run_name="__main__")',
            'run',
            '--standalone',
            f'--nproc_per_node={processes}',
            __file__,
            f'--size={size}',
            f'--measure={folder}',
            *(['--divided'] if divided else []),
            env=dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'),
        )
        found = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return {name: max(each[name] for each in found) for name in found[0]}


@click.command(cls=cli.Command)
@cli.option(
    '--size', type=click.Choice(list(SIZES)), default='cifar10-ddpmpp', show_default=True, help='Network.'
)
@cli.option(
    '--processes',
    metavar='LIST',
    type=cli.NumberList(click.IntRange(min=2)),
    default='2,4',
    show_default=True,
    help='Numbers of processes.',
)
@cli.option('--measure', 'folder', hidden=True)
@cli.option('--divided', is_flag=True, hidden=True)
def main(size, processes, folder, divided):
    """Measure the memory of a process with and without --shard=optimizer."""
    if folder is not None:
        found = measure(size, divided)
        Path(folder, str(psutil.Process().pid)).write_text(json.dumps(found))
        return
    rows = []
    for count in processes:
        for name, shard in (('none', False), ('optimizer', True)):
            found = group(size, count, shard)
            parts = by_formula(size, count, shard)
            total, activations = sum(parts.values()), parts['activations']
            each = [total - activations, found['between'], total, found['peak']]
            per_parameter = [f'{value / found["parameters"]:.1f}' for value in each]
            rows.append([f'{count}, --shard={name}', *per_parameter, f'{found["peak"] / total:.3f}'])
    click.echo(
        block(
            f'Memory of a process: {SIZES[size].title}',
            f'Bytes a parameter of {found["parameters"]:,}, of the process that has most, beyond those before the '
            'network was built; an EMA and two phEMA, no teacher, one image a process. `vectors` and `sum`, which is with '
            'activations, are by the formula of --dry-run (`training/memory.py`); `between steps` is measured; `peak` '
            'is counted, with temporary tensors.',
            table(['processes', 'vectors', 'between steps', 'sum', 'peak', 'peak / sum'], rows),
        )
    )


if __name__ == '__main__':
    main()
