"""Post-hoc EMA: power-function averages of any width from those stored during training."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import os
import re
from typing import TYPE_CHECKING, NamedTuple

import click

from dnnlib import EasyDict, UserError, cli

if TYPE_CHECKING:
    import torch

STORED, WANTED = 'Stored averages', 'Reconstructed averages'
MOST_WIDTHS = 280  # widths in 0.001 ... 0.28 that differ in the third decimal
ROUGH = 0.05  # larger profile errors are warned about
# Metadata that differs between snapshots of a run, and entries of dataset_kwargs that a resume may change.
OF_ONE_SNAPSHOT = ('nimg', 'kimg', 'ema', 'ema_std', 'fid', 'digest', 'reconstructed', 'profile_error')
OF_A_MACHINE = ('path', 'cache')


class Widths(click.ParamType):
    """Ascending widths: `0.05,0.1`; three dots continue evenly: `0.05,0.1,...,0.25` is [0.05, 0.1, 0.15, 0.2,
    0.25]."""

    name = 'list'

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        words = [word.strip() for word in value.split(',')]
        try:
            numbers = [
                number
                for i, word in enumerate(words)
                for number in (_between(words, i) if word == '...' else [width(word)])
            ]
        except (ValueError, IndexError, ZeroDivisionError, OverflowError):
            self.fail(
                f'{cli.shown(value)} is not a list of widths such as 0.05,0.1 or 0.05,0.1,...,0.25',
                param,
                ctx,
            )
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


def width(word: str) -> float:
    """Raises: ValueError if it is not a number."""
    if not cli.NUMBER.fullmatch(word):
        raise ValueError(f'{word} is not a number')
    return float(word)


def _between(words: list[str], dots: int) -> list[float]:
    """The numbers that three dots stand for. Raises: ValueError if their neighbors do not define them."""
    if dots < 2:
        raise ValueError('two numbers must come first')
    first, second, last = (width(words[dots + offset]) for offset in (-2, -1, 1))
    step = second - first
    count = round((last - second) / step)
    if not 1 <= count <= MOST_WIDTHS or abs(second + count * step - last) > 1e-6:
        raise ValueError('the end must be some steps away')
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
@cli.option(
    '--instd',
    metavar='LIST',
    type=Widths(),
    group=STORED,
    help='Use only these stored widths.  [default: all]',
)
@cli.option(
    '--training_batch',
    metavar='INT',
    type=cli.BATCH,
    default=1024,
    show_default=True,
    group=STORED,
    help='Training batch size, to derive the number of images seen from the names of files that do not '
    'record it.',
)
@cli.option(
    '--outstd',
    metavar='LIST',
    type=Widths(),
    group=WANTED,
    help='Widths to reconstruct, such as 0.07,0.15 or 0.01,0.02,...,0.25.',
)
@cli.option(
    '--outkimg',
    metavar='KIMG',
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
    show_default=True,
    group=WANTED,
    help='Name outputs STR-<kimg>-<width>.pkl.',
)
@cli.option('--skip', is_flag=True, group=WANTED, help='Keep outputs that exist.')
@cli.option(
    '--batch',
    metavar='INT',
    type=cli.COUNT,
    default=1,
    show_default=True,
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
    stored = find_stored(indir, inprefix, instd, training_batch)
    click.echo(table(stored, indir))
    if not outstd:
        return
    inputs = stored_until(stored, outkimg)
    outputs = plan(inputs, outstd, outdir or indir, outprefix)
    report(outputs, inputs, selected=instd is not None)
    if list_only:
        return
    outputs = [output for output in outputs if not (skip and os.path.exists(output.path))]
    prepare(outputs, outdir or indir)
    write_all(inputs, outputs, batch)
    click.echo(f'Wrote {len(outputs)} snapshot(s) to {outdir or indir}.')


# ----------------------------------------------------------------------------
# Stored averages.


class Stored(NamedTuple):
    """A stored average: its file's name and header."""

    path: str
    prefix: str
    stem: str  # its time in file names: <kimg>, or <kimg>-<nimg>
    nimg: int
    std: float
    facts: dict[str, str]  # equal in all snapshots of a run
    reconstructed: bool


def find_stored(
    indir: str, inprefix: str | None, instd: list[float] | None, training_batch: int
) -> list[Stored]:
    """The averages that a run stored in a folder, sorted by time and width.

    Raises: UserError if there are none, one cannot be read, or they are of several runs.
    """
    try:
        names = sorted(os.listdir(indir))
    except OSError as error:
        raise UserError(
            f'--indir={indir} cannot be listed: {error.strerror}. Name the folder of a run.'
        ) from error
    prefix = re.escape(inprefix) if inprefix else '.+?'
    matches = filter(
        None, (re.fullmatch(rf'({prefix})-(\d+(?:-\d+)?)-(0\.\d{{3}})\.pkl', name) for name in names)
    )
    found = [read_stored(os.path.join(indir, match[0]), *match.groups(), training_batch) for match in matches]
    # At 0 images there is nothing to average.
    stored = [average for average in found if average.nimg > 0 and not average.reconstructed]
    if not stored:
        raise UserError(
            f'{indir} holds no averages stored by training, '
            f'{inprefix or "network-snapshot"}-<kimg>-<width>.pkl. Name the folder of a run trained with '
            '--phema=0.05,0.10, or the prefix of its files with --inprefix.'
        )
    check_one_run(stored)

    # Those that --instd selects.
    if instd:
        stored = [average for average in stored if f'{average.std:.3f}' in {f'{std:.3f}' for std in instd}]
        if missing := [
            f'{std:.3f}' for std in instd if f'{std:.3f}' not in {f'{average.std:.3f}' for average in stored}
        ]:
            raise UserError(f'--instd: {", ".join(missing)} is not stored in {indir}. --list shows what is.')
    return sorted(stored, key=lambda average: (average.nimg, average.std))


def read_stored(path: str, prefix: str, stem: str, width: str, training_batch: int) -> Stored:
    """Read a stored average's header, without its tensors.

    A file without our metadata is taken for EDM2's, whose name has the width and the floor of kimg.
    Raises: UserError, naming the file, if it is damaged or hostile, or its time is unknown.
    """
    from torch_utils.restricted_pickle import MalformedPickle

    try:
        metadata, facts = read_header(path)
        if not {'nimg', 'ema_std'} & metadata.keys():
            metadata.update(nimg=nimg_at(int(stem.partition('-')[0]), training_batch), ema_std=float(width))
        nimg, std = metadata.get('nimg'), metadata.get('ema_std')
        if not (type(nimg) is int and type(std) is float and nimg >= 0 and 0.001 <= std <= 0.28):
            raise MalformedPickle(
                f'has an invalid metadata entry: nimg {nimg!r}, ema_std {std!r} (must be in [0.001, 0.28])'
            )
    except MalformedPickle as error:
        raise UserError(
            f'{path} cannot be used as a stored average: it {error}. Copy it again, or remove it.'
        ) from error
    return Stored(path, prefix, stem, nimg, std, facts, bool(metadata.get('reconstructed')))


def read_header(path: str) -> tuple[dict, dict[str, str]]:
    """(metadata, facts equal in all snapshots of the run) of a snapshot. Raises: MalformedPickle,
    UserError."""
    import dnnlib
    from torch_utils.restricted_pickle import MalformedPickle, persistent_object, plain, read_pickle

    with dnnlib.open_url(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        snapshot = read_pickle(file, stop=size)
    network = persistent_object(snapshot.get('ema')) if isinstance(snapshot, dict) else None
    if network is None:
        raise MalformedPickle('holds no network named ema')
    class_name, state = network
    entries = state.get('_init_kwargs'), snapshot.get('dataset_kwargs'), snapshot.get('metadata')
    arguments, data, metadata = (plain(entry or {}) for entry in entries)
    if (
        not all(isinstance(entry, dict) for entry in (arguments, data, metadata))
        or {'path', 'net'} & metadata.keys()
    ):
        raise MalformedPickle('has malformed metadata or arguments')
    facts = dict(
        network=class_name,
        arguments=plain(state.get('_init_args', ())),
        **{f'argument {name}': value for name, value in arguments.items()},
    )
    facts.update((f'data set {name}', value) for name, value in data.items() if name not in OF_A_MACHINE)
    facts.update((name, value) for name, value in metadata.items() if name not in OF_ONE_SNAPSHOT)
    return metadata, {name: repr(value) for name, value in facts.items()}


def nimg_at(kimg: int, training_batch: int) -> int:
    """Images seen by an EDM2 snapshot, whose name has the floor of kimg: the first multiple of the batch that
    fits."""
    from torch_utils.restricted_pickle import MalformedPickle

    nimg = -(-kimg * 1000 // training_batch) * training_batch
    if nimg // 1000 != kimg:
        raise MalformedPickle(
            'does not record how many images it has seen, and no multiple of '
            f'--training_batch={training_batch} is at {kimg} kimg'
        )
    return nimg


def check_one_run(stored: list[Stored]) -> None:
    """Raises: UserError if headers show averages of several runs, or two have the same width and time."""
    prefixes = sorted({average.prefix for average in stored})
    if len(prefixes) > 1:
        raise UserError(
            f'{os.path.dirname(stored[0].path)} holds averages under several names: {", ".join(prefixes)}. '
            'Choose one with --inprefix.'
        )

    # The first average with each fact, and with each width and time. A missing fact contradicts nothing:
    # older versions record fewer.
    told, places = {}, {}
    for average in stored:
        for name, fact in sorted(average.facts.items()):
            other = told.setdefault(name, average)
            if other.facts[name] != fact:
                raise UserError(
                    f'{other.path} and {average.path} are of different runs: {name} is '
                    f'{other.facts[name][:80]} there and {fact[:80]} here. Give each run a folder of its own.'
                )
        other = places.setdefault((f'{average.std:.3f}', average.nimg), average)
        if other is not average:
            raise UserError(
                f'{other.path} and {average.path} are both the average of width {average.std:.3f} after '
                f'{average.nimg:,} images. Remove the one that is not of this run.'
            )


def table(stored: list[Stored], indir: str) -> str:
    """Table of the stored widths: number of snapshots and range of training times."""
    lines = [f'Stored in {indir}:', '  width  snapshots  kimg']
    for std in sorted({average.std for average in stored}):
        times = [average.nimg / 1e3 for average in stored if average.std == std]
        lines.append(
            f'  {std:.3f}  {len(times):9}  {times[0]:g}' + (f' to {times[-1]:g}' if len(times) > 1 else '')
        )
    return '\n'.join(lines)


def stored_until(stored: list[Stored], kimg: float | None) -> list[Stored]:
    """The averages up to a time at which some were stored.

    A profile is highest at its end, which no earlier average covers. `kimg`: exact, or the integer in file
    names; None for the last time.
    """
    if kimg is None:
        return stored
    times = sorted({average.nimg for average in stored})
    matching = [nimg for nimg in times if nimg == round(kimg * 1e3)] or [
        nimg for nimg in times if nimg // 1000 == kimg
    ]
    if len(matching) != 1:
        near = sorted(matching or sorted(times, key=lambda nimg: abs(nimg - kimg * 1e3))[:2])
        problem = (
            'is ambiguous; give the decimals of'
            if matching
            else 'is not a time at which averages were stored; the nearest are'
        )
        raise UserError(f'--outkimg={kimg:g} {problem} {" or ".join(f"{nimg / 1e3:g}" for nimg in near)}.')
    return [average for average in stored if average.nimg <= matching[0]]


# ----------------------------------------------------------------------------
# Requested averages.


def plan(inputs: list[Stored], stds: list[float], outdir: str, prefix: str) -> list[EasyDict]:
    """Outputs at the time of the last input, one per width: path, std, weights of the inputs, profile
    error."""
    from training.phema import posthoc_error, solve_posthoc_coefficients

    in_nimg, in_std, out_nimg = (
        [average.nimg for average in inputs],
        [average.std for average in inputs],
        [inputs[-1].nimg] * len(stds),
    )
    weights = solve_posthoc_coefficients(in_nimg, in_std, out_nimg, stds)
    errors = posthoc_error(in_nimg, in_std, out_nimg, stds, weights)
    return [
        EasyDict(
            path=os.path.join(outdir, f'{prefix}-{inputs[-1].stem}-{std:.3f}.pkl'),
            std=std,
            weights=column.tolist(),
            error=float(error),
        )
        for std, column, error in zip(stds, weights.T, errors)
    ]


def report(outputs: list[EasyDict], inputs: list[Stored], selected: bool) -> None:
    """Print profile errors, and advice if they are large. `selected`: more widths may be stored."""
    click.echo(f'From {len(inputs)} of them, at {inputs[-1].nimg / 1e3:g} kimg:')
    for output in outputs:
        click.echo(f'  {output.std:.3f}  profile error {100 * output.error:.2g} %')
    rough = [f'{output.std:.3f}' for output in outputs if output.error > ROUGH]
    if rough:
        widths = sorted({f'{average.std:.3f}' for average in inputs})
        cures = [
            f'widths closer to {" and ".join(widths)}',
            *(['all stored averages, without --instd'] if selected else []),
            f'in the next run a smaller --phema_snap{"" if len(widths) > 1 else ", and two widths"}',
        ]
        click.echo(
            f'Warning: {", ".join(rough)} is only a rough reconstruction, with a profile error above '
            f'{100 * ROUGH:g} %. What helps: {"; ".join(cures)}.'
        )


def prepare(outputs: list[EasyDict], outdir: str) -> None:
    """Create the folder. Raises: UserError if it is not writable, or an output would replace another kind of
    file."""
    from torch_utils.restricted_pickle import MalformedPickle

    for output in outputs:
        try:
            replaceable = not os.path.lexists(output.path) or read_header(output.path)[0].get('reconstructed')
        except (MalformedPickle, UserError):
            replaceable = False
        if not replaceable:
            raise UserError(
                f'{output.path} exists and is not a reconstruction, so it is not replaced. Choose another '
                '--outprefix or --outdir, or --skip.'
            )
    try:
        os.makedirs(outdir, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be created: {error.strerror}') from error
    if not os.access(outdir, os.W_OK):
        raise UserError(f'--outdir={outdir} cannot be written to.')


# ----------------------------------------------------------------------------
# Weighted sums.


def write_all(inputs: list[Stored], outputs: list[EasyDict], batch: int) -> None:
    """Reconstruct the outputs, `batch` of them per pass over the inputs."""
    import tqdm

    passes = [outputs[first : first + batch] for first in range(0, len(outputs), batch)]
    with tqdm.tqdm(
        total=len(passes) * len(inputs), unit='snapshot', disable=None, dynamic_ncols=True, leave=False
    ) as bar:
        for part in passes:
            reconstruct(inputs, part, bar.update)


def reconstruct(inputs: list[Stored], outputs: list[EasyDict], advance=lambda: None) -> None:
    """Write the weighted sums of the inputs' parameters for all outputs, in one pass over the inputs.

    Sums are in FP32, the precision of the inputs; half-precision parameters are converted and back. Memory
    holds the sums and one input or, while a file is written, the sums and its bytes.
    """
    # Start from the last input, which also provides buffers and metadata.
    from training.checkpoint import save_snapshot
    from training.phema import average_name

    *others, last = inputs
    net, metadata = load(last)
    dtypes = {name: parameter.dtype for name, parameter in net.named_parameters()}
    sums = [scaled(net, output.weights[-1]) for output in outputs]
    for parameter in net.parameters():  # free their memory for the next input
        parameter.data = parameter.data.new_empty(0)
    advance()

    # Add the others, then write.
    for i, average in enumerate(others):
        add(average, net, sums, [output.weights[i] for output in outputs])
        advance()
    for output, total in zip(outputs, sums):
        for name, parameter in net.named_parameters():
            parameter.data = total.pop(name).to(dtypes[name])
        save_snapshot(
            output.path,
            net,
            **metadata,
            ema=average_name(output.std),
            ema_std=output.std,
            reconstructed=True,
            profile_error=output.error,
        )


def load(average: Stored) -> tuple[torch.nn.Module, dict]:
    """(network, metadata shared by the run) of a stored average. Raises: UserError if it is not finite."""
    import torch

    from training.checkpoint import load_network

    net = load_network(average.path)
    for name, parameter in net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f'{average.path} has values in {name} that are not finite: training has diverged. Choose an '
                'earlier time with --outkimg.'
            )
    metadata = {name: value for name, value in net.metadata.items() if name not in OF_ONE_SNAPSHOT}
    return net, dict(metadata, nimg=average.nimg, kimg=average.nimg / 1e3)


def scaled(net: torch.nn.Module, weight: float) -> dict[str, torch.Tensor]:
    """weight · parameters, by name, in FP32 or better."""
    import torch

    return {
        name: parameter.data.to(torch.promote_types(parameter.dtype, torch.float32)) * weight
        for name, parameter in net.named_parameters()
    }


def add(
    average: Stored, last: torch.nn.Module, sums: list[dict[str, torch.Tensor]], weights: list[float]
) -> None:
    """Add weight · parameters of a stored average to each of the sums.

    Raises: UserError if its shapes differ from those of `last`, or anything that is not averaged: buffers,
        noise levels, settings.
    """
    import torch

    from training.checkpoint import numeric_attributes

    net, _ = load(average)
    shapes = [
        {name: parameter.shape for name, parameter in tensors}
        for tensors in (net.named_parameters(), sums[0].items())
    ]
    buffers = [dict(network.named_buffers()) for network in (net, last)]
    if not (
        shapes[0] == shapes[1]
        and numeric_attributes(net) == numeric_attributes(last)
        and buffers[0].keys() == buffers[1].keys()
        and all(torch.equal(buffer, buffers[1][name]) for name, buffer in buffers[0].items())
    ):
        raise UserError(
            f'{average.path} is of another run: shapes, constants or settings of its network differ. Give '
            'each run a folder of its own.'
        )
    for total, weight in zip(sums, weights):
        for name, parameter in net.named_parameters():
            total[name].add_(parameter.data, alpha=weight)


if __name__ == '__main__':
    main()
