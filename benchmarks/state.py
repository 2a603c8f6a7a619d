"""Time and memory of saving, verifying and loading a training state, compared with `torch.save` and
`torch.load`.

The state is that of a run with an EMA and two phEMA: six FP32 vectors with as many numbers as the network has
parameters. `peak` is resident memory above what it was before. `save_state` waits until the file is on the
disk, `torch.save` does not; files are read from the page cache if they fit.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoint import forget_peak, resident
from benchmarks.common import apart, block, table
from dnnlib import cli
from training import checkpoint

VECTORS = ('net', 'exp_avg', 'exp_avg_sq', 'ema', 'phema-0.050', 'phema-0.100')
SAVES, LOADS = ('torch.save', 'save_state', 'verify'), ('torch.load', 'load_state')


def new_state(parameters: int) -> dict:
    """A state as of a run with a network of `parameters`, in tensors of a million numbers."""
    sizes = [1 << 20] * (parameters >> 20) + [parameters % (1 << 20)]
    return {name: {str(i): torch.full([size], 0.5) for i, size in enumerate(sizes)} for name in VECTORS}


def measure(rows: tuple[str, ...], folder: Path, parameters: int) -> dict[str, dict]:
    """Seconds and peak memory in bytes of each row, in the given order."""
    state = new_state(parameters) if 'save_state' in rows else None
    calls = {
        'torch.save': lambda: torch.save(state, folder / 'theirs.pt'),
        'save_state': lambda: checkpoint.save_state(folder / 'ours.pt', state),
        'verify': lambda: checkpoint.verify(folder / 'ours.pt'),
        'load_state': lambda: checkpoint.load_state(folder / 'ours.pt'),
        'torch.load': lambda: torch.load(folder / 'ours.pt', weights_only=True),
    }
    found = {}
    for row in rows:
        # The peak above what is resident before the call.
        before, start = forget_peak(), time.perf_counter()
        result = calls[row]()
        found[row] = dict(seconds=time.perf_counter() - start, peak=resident(peak=True) - before)
        del result
        (folder / 'theirs.pt').unlink(missing_ok=True)
    return found


@click.command(cls=cli.Command)
@cli.option(
    '--parameters',
    metavar='INT',
    type=click.IntRange(min=1),
    default=295_899_267,
    show_default=True,
    help='Number of parameters of the network.',
)
@cli.option(
    '--folder',
    metavar='DIR',
    type=cli.PATH,
    help='Folder to write the files in, twice 7.1 GB by default.  [default: a temporary folder]',
)
@cli.option('--rows', hidden=True)
def main(parameters, folder, rows):
    """Time saving and loading a training state."""
    if rows is not None:
        click.echo(json.dumps(measure(tuple(rows.split(',')), Path(folder), parameters)))
        return
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # In separate processes, so that loading cannot reuse memory that saving has allocated.
        for group in (SAVES, LOADS):
            found |= apart(
                __file__, f'--rows={",".join(group)}', f'--folder={temporary}', f'--parameters={parameters}'
            )
        size = os.path.getsize(Path(temporary) / 'ours.pt')

    # Print the block.
    cells = []
    for row, values in found.items():
        seconds, peak = values['seconds'], values['peak']
        cells.append(
            [
                row,
                f'{seconds:.2f}',
                f'{size / seconds / 1e9:.2f}',
                f'{peak / 1e9:.2f} GB',
                f'{peak / size:.0%}',
            ]
        )
    click.echo(
        block(
            f'A training state of {parameters:,} parameters',
            f"{size / 1e9:.3g} GB: weights, Adam's moments, EMA and two phEMA. Training waits for "
            '`save_state` and `verify` at every --dump. `peak` is memory above what was there before: the '
            'state when saving, nothing when loading. Writing is limited by the disk and varies from run to '
            'run; rows were measured in this order.',
            table(['', 'seconds', 'GB/s', 'peak', 'of the state'], cells),
        )
    )


if __name__ == '__main__':
    main()
