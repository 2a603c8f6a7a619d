"""Post-hoc EMA: reconstruct power-function averages of any width from those stored during training."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import os
from typing import TYPE_CHECKING

import click

from dnnlib import cli

if TYPE_CHECKING:  # torch takes seconds to import, and --help does not need it
    from training.posthoc_ema import Output, Stored

STORED, WANTED = 'Stored averages', 'Reconstructed averages'
MOST_WIDTHS = 280  # widths in 0.001 ... 0.28 that differ in the third decimal
ROUGH = 0.05  # profile error above which to warn


class Widths(click.ParamType):
    """Widths, ascending: `0.05,0.1`, or with three dots that continue evenly: `0.05,0.1,...,0.25`."""

    name = 'list'

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value

        # Numbers, and those that dots stand for.
        items = [item.strip() for item in value.split(',')]
        try:
            numbers = [
                number
                for i, item in enumerate(items)
                for number in (_between(items, i) if item == '...' else [width(item)])
            ]
        except (ValueError, IndexError, ZeroDivisionError, OverflowError):
            self.fail(
                f'{cli.shown(value)} is not a list of widths such as 0.05,0.1 or 0.05,0.1,...,0.25',
                param,
                ctx,
            )

        # File names have three decimals.
        if not all(0.001 <= std <= 0.28 for std in numbers) or len({f'{std:.3f}' for std in numbers}) < len(
            numbers
        ):
            self.fail(
                f'{cli.shown(value)}: widths must be in [0.001, 0.28] and differ in the third decimal, which '
                'names files',
                param,
                ctx,
            )
        return sorted(numbers)


def width(text: str) -> float:
    """Raises: ValueError if it is not a number."""
    if not cli.NUMBER.fullmatch(text):
        raise ValueError(f'{text} is not a number')
    return float(text)


def _between(items: list[str], dots: int) -> list[float]:
    """The numbers that three dots at an index stand for. Raises: ValueError if neighbors do not fit."""
    if dots < 2:
        raise ValueError('two numbers must come first')
    first, second, last = (width(items[dots + offset]) for offset in (-2, -1, 1))
    step = second - first
    count = round((last - second) / step)
    if not 1 <= count <= MOST_WIDTHS or abs(second + count * step - last) > 1e-6:
        raise ValueError('the end must be some steps away')
    # Rounded, because sums of decimals are not exact in binary.
    return [round(second + k * step, 9) for k in range(1, count)]


class FilePrefix(click.ParamType):
    """The beginning of file names, without a folder."""

    name = 'prefix'

    def convert(self, value, param, ctx):
        if not value or os.path.basename(value) != value:
            self.fail(f'{value!r} cannot begin a file name', param, ctx)
        return value


@click.command(cls=cli.Command)
@cli.option(
    '--indir',
    metavar='DIR',
    type=cli.PATH,
    required=True,
    group=STORED,
    help='Folder of the run that stored the averages.',
)
@cli.option(
    '--inprefix',
    metavar='STR',
    type=FilePrefix(),
    group=STORED,
    help='Use files named STR-<kimg>-<width>.pkl.  [default: the only such prefix in the folder]',
)
@cli.option('--instd', type=Widths(), group=STORED, help='Use only these stored widths.  [default: all]')
@cli.option(
    '--training_batch',
    type=cli.BATCH,
    default=1024,
    group=STORED,
    help='Training batch size, to derive the number of images seen from the names of files that do not '
    'record it.',
)
@cli.option(
    '--outstd',
    type=Widths(),
    group=WANTED,
    help='Widths to reconstruct, such as 0.07,0.15 or 0.01,0.02,...,0.25.',
)
@cli.option(
    '--outkimg',
    type=cli.SOME_KIMG,
    group=WANTED,
    help='Training time to reconstruct averages for, at which averages were stored.  [default: the last]',
)
@cli.option('--outdir', metavar='DIR', type=cli.PATH, group=WANTED, help='Output folder.  [default: --indir]')
@cli.option(
    '--outprefix',
    metavar='STR',
    type=FilePrefix(),
    default='phema',
    group=WANTED,
    help='Name outputs STR-<kimg>-<width>.pkl.',
)
@cli.option('--skip', is_flag=True, group=WANTED, help='Keep outputs that exist.')
@cli.option(
    '--batch',
    type=cli.COUNT,
    default=1,
    group=WANTED,
    help='Widths to reconstruct per pass over the files; memory holds this many networks and one more.',
)
@cli.option(
    '--list',
    'list_only',
    is_flag=True,
    help='List the stored averages and, with --outstd, the profile errors of a reconstruction. Writes '
    'nothing.',
)
def main(indir, inprefix, instd, training_batch, outstd, outkimg, outdir, outprefix, skip, batch, list_only):
    """Reconstruct power-function averages of the weights, of any width, from stored ones (EDM2, Section 3.2).

    \b
    Train with two widths, stored often:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=run --nosubdir \\
          --data=data.zip --phema=0.05,0.10 --phema_snap=10
    \b
    List the stored averages, and how well they reconstruct a width:
      python reconstruct_phema.py --indir=run --outstd=0.15 --list
    \b
    A sweep at the last stored time, into run/phema-<kimg>-<width>.pkl:
      python reconstruct_phema.py --indir=run --outstd=0.01,0.02,...,0.25 --batch=5

    A width is the standard deviation of an average's profile over training, as a fraction of the training so
    far: 0.10 covers mostly the last fifth. A reconstruction is the weighted sum of stored averages whose
    profile is closest to the requested one. The relative distance that remains is the profile error. It
    shrinks if averages are stored more often, and with two widths instead of one.

    Reads snapshots of train.py and of EDM2. Nothing in a file is executed.
    """
    if not outstd and not list_only:
        raise click.UsageError('Give --outstd=LIST, the widths to reconstruct, or --list.')
    from training import posthoc_ema

    # What is stored.
    stored = posthoc_ema.find_stored(indir, inprefix, instd, training_batch)
    click.echo(table(stored, indir))
    if not outstd:
        return

    # How well it reconstructs the requested widths.
    inputs = posthoc_ema.stored_until(stored, outkimg)
    outputs = posthoc_ema.plan(inputs, outstd, outdir or indir, outprefix)
    report(outputs, inputs, selected=instd is not None)
    if list_only:
        return

    # Reconstructions.
    outputs = [output for output in outputs if not (skip and os.path.exists(output.path))]
    posthoc_ema.prepare(outputs, outdir or indir)
    posthoc_ema.write_all(inputs, outputs, batch)
    click.echo(f'Wrote {len(outputs)} snapshot(s) to {outdir or indir}.')


def table(stored: list[Stored], indir: str) -> str:
    """Table of stored widths with their numbers of snapshots and ranges of training times."""
    lines = [f'Stored in {indir}:', '  width  snapshots  kimg']
    for std in sorted({average.std for average in stored}):
        times = [average.nimg / 1e3 for average in stored if average.std == std]
        lines.append(
            f'  {std:.3f}  {len(times):9}  {times[0]:g}' + (f' to {times[-1]:g}' if len(times) > 1 else '')
        )
    return '\n'.join(lines)


def report(outputs: list[Output], inputs: list[Stored], selected: bool) -> None:
    """Print profile errors, and advice if they are large; `selected`: whether --instd was given."""
    click.echo(f'From {len(inputs)} of them, at {inputs[-1].nimg / 1e3:g} kimg:')
    for output in outputs:
        click.echo(f'  {output.std:.3f}  profile error {100 * output.error:.2g} %')
    # Advice, by what limits a reconstruction: the widths, the choice among them, the time between snapshots.
    rough = [f'{output.std:.3f}' for output in outputs if output.error > ROUGH]
    if rough:
        widths = sorted({f'{average.std:.3f}' for average in inputs})
        cures = [
            f'widths closer to {" and ".join(widths)}',
            *(['all stored averages, without --instd'] if selected else []),
            f'in the next run a smaller --phema_snap{"" if len(widths) > 1 else " and two widths"}',
        ]
        click.echo(
            f'Warning: {", ".join(rough)} is only a rough reconstruction, with a profile error above '
            f'{100 * ROUGH:g} %. What helps: {"; ".join(cures)}.'
        )


if __name__ == '__main__':
    main()
