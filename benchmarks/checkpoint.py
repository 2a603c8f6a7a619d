"""Time and memory of loading and saving a network with random weights, compared with `torch.load` and
`torch.save` of its tensors.

Every row is measured in processes of its own, rows in turns over several rounds; numbers are minima over
rounds. `first` is the first call in a process, which has no memory to reuse yet, `again` the best of the
later ones. `peak` is resident memory above what it was before and, when loading, above the network itself.
Files are in the page cache; `save_snapshot` waits until its file is on the disk, `torch.save` does not.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import apart, block, machine, rounds_option, table
from dnnlib import cli
from training import networks
from training.checkpoint import load_network, save_snapshot

FILES = {'torch': 'net.pt', 'ours': 'net.pkl', 'edm': 'edm.pkl'}
LOADS = {'torch.load, weights only': 'torch', 'load_network, sealed': 'ours', "load_network, EDM's": 'edm'}
SAVES = {'torch.save': 'torch', 'save_snapshot': 'ours'}


def write_files(folder: Path, channels: int, resolution: int) -> tuple[int, int]:
    """Write a network by PyTorch, by us, and as EDM does. Returns: (parameters, bytes of tensors)."""
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        resolution, 3, 1000, model_type='DhariwalUNet', model_channels=channels, channel_mult=[1, 2, 3, 4]
    )
    torch.save(net.state_dict(), folder / FILES['torch'])
    save_snapshot(folder / FILES['ours'], net)
    with open(folder / FILES['edm'], 'wb') as file:
        pickle.dump(dict(ema=net, loss_fn=None, augment_pipe=None, dataset_kwargs={}), file)
    return sum(p.numel() for p in net.parameters()), sum(
        tensor.nbytes for tensor in net.state_dict().values()
    )


def resident(peak: bool) -> int:
    """Bytes of resident memory of this process, now or at its peak (Linux)."""
    return (
        int(
            re.search(
                rf'^Vm{"HWM" if peak else "RSS"}:\s+(\d+) kB', Path('/proc/self/status').read_text(), re.M
            )[1]
        )
        * 1024
    )


def forget_peak() -> int:
    """Reset the peak of resident memory; returns the bytes resident now (Linux)."""
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')
    return resident(peak=False)


def measure(row: str, folder: Path, repeats: int) -> dict:
    """Seconds of the first call and of the fastest later one, and peak memory of the first."""
    # What to call.
    if row in LOADS:
        path = folder / FILES[LOADS[row]]
        call = (
            (lambda: torch.load(path, weights_only=True))
            if LOADS[row] == 'torch'
            else (lambda: load_network(path))
        )
    else:
        net, path = load_network(folder / FILES['ours']), folder / 'saved'
        call = (
            (lambda: torch.save(net.state_dict(), path))
            if SAVES[row] == 'torch'
            else (lambda: save_snapshot(path, net))
        )

    # Memory counts in the first call, before any can be reused.
    before, seconds = forget_peak(), []
    for attempt in range(1 + repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        if attempt == 0:
            peak = resident(peak=True) - before
        del result
    return dict(first=seconds[0], again=min(seconds[1:]), peak=peak)


def measure_apart(row: str, folder: Path, repeats: int) -> dict:
    return apart(__file__, f'--measure={row}', f'--folder={folder}', f'--repeats={repeats}')


@click.command(cls=cli.Command)
@cli.option(
    '--channels',
    metavar='INT',
    type=click.IntRange(min=4),
    default=192,
    show_default=True,
    help='Width of the network, an ADM U-Net.',
)
@cli.option(
    '--res',
    metavar='INT',
    type=click.IntRange(min=8),
    default=64,
    show_default=True,
    help='Resolution of its images.',
)
@rounds_option('Number of processes per row.')
@cli.option(
    '--repeats',
    metavar='INT',
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help='Number of calls after the first in each process.',
)
@cli.option(
    '--folder',
    metavar='DIR',
    type=cli.PATH,
    help='Folder to write the files in, 3.6 GB by default.  [default: a temporary folder]',
)
@cli.option('--measure', 'row', metavar='ROW', hidden=True)
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
def main(channels, res, rounds, repeats, folder, row, as_json):
    """Time loading and saving a network."""
    if row is not None:
        click.echo(json.dumps(measure(row, Path(folder), repeats)))
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        temporary = Path(temporary)
        parameters, nbytes = write_files(temporary, channels, res)
        runs = [
            {row: measure_apart(row, temporary, repeats) for row in (*LOADS, *SAVES)} for _ in range(rounds)
        ]
        sizes = {kind: os.path.getsize(temporary / name) for kind, name in FILES.items()}
    rows = {
        row: {what: min(run[row][what] for run in runs) for what in ('first', 'again', 'peak')}
        for row in runs[0]
    }
    for row in LOADS:
        # The network that a load returns is part of its peak.
        rows[row]['peak'] -= nbytes
    if as_json:
        click.echo(json.dumps(dict(device=machine(), parameters=parameters, bytes=sizes, rows=rows)))
        return

    # Ratios are over PyTorch's time.
    cells = []
    for row, values in rows.items():
        base, size = rows[next(iter(LOADS if row in LOADS else SAVES))], sizes[(LOADS | SAVES)[row]]
        times = [
            cell
            for what in ('first', 'again')
            for cell in (f'{values[what]:.3f} s', f'{values[what] / base[what]:.2f}')
        ]
        cells.append([row, *times, f'{values["peak"] / 1e6:.0f} MB', f'{values["peak"] / size:.0%}'])
    click.echo(
        block(
            f'Loading and saving a snapshot of {parameters:,} parameters',
            f'{sizes["ours"] / 1e9:.3g} GB. `first` is the first call in a process, `again` the fastest '
            f'later one, which reuses memory; least of {rounds} processes. `peak` is memory above the '
            "network's own. A sealed file is read and checked against its checksum in one pass, which needs "
            'a core of its own. `save_snapshot` computes a digest and waits for the disk; `torch.save` does '
            'neither.',
            table(['', 'first', 'ratio', 'again', 'ratio', 'peak', 'of the file'], cells),
        )
    )


if __name__ == '__main__':
    main()
