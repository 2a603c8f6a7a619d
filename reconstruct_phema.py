"""Power-function averages of any width, after training, from those that were stored during it."""

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
MOST_WIDTHS = 280  # that three dots stand for: from 0.001 to 0.28, they differ in the third decimal
ROUGH = 0.05  # profile error from which an average is something else than what it is called
OF_ONE_SNAPSHOT = (
    'nimg',
    'kimg',
    'ema',
    'ema_std',
    'fid',
    'digest',
    'reconstructed',
    'profile_error',
)  # metadata that differs within a run
OF_A_MACHINE = ('path', 'cache')  # entries of dataset_kwargs that may change when a run resumes


class Widths(click.ParamType):
    """Widths, ascending: `0.05,0.1`; three dots go on evenly, so that `0.05,0.1,...,0.25` is [0.05, 0.1,
    0.15, 0.2, 0.25]."""

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
                f'{cli.shown(value)}: widths lie between 0.001 and 0.28 and differ in the third decimal, '
                'which names files',
                param,
                ctx,
            )
        return sorted(numbers)


def width(word: str) -> float:
    """Raises: ValueError where it is no number."""
    if not cli.NUMBER.fullmatch(word):
        raise ValueError(f'{word} is no number')
    return float(word)


def _between(words: list[str], dots: int) -> list[float]:
    """The numbers that three dots stand for; ValueError where their neighbors do not say."""
    if dots < 2:
        raise ValueError('two numbers must come first')
    first, second, last = (width(words[dots + offset]) for offset in (-2, -1, 1))
    step = second - first
    count = round((last - second) / step)
    if not 1 <= count <= MOST_WIDTHS or abs(second + count * step - last) > 1e-6:
        raise ValueError('the end must be some steps away')
    return [round(second + k * step, 9) for k in range(1, count)]


class FilePrefix(click.ParamType):
    """How names of files begin, without a folder."""

    name = 'prefix'

    def convert(self, value, param, ctx):
        if not value or os.path.basename(value) != value:
            self.fail(f'{value!r} is not how the name of a file begins', param, ctx)
        return value


@click.command(cls=cli.Command)
@cli.option(
    '--indir',
    metavar='DIR',
    type=cli.PATH,
    required=True,
    group=STORED,
    help='Folder of the run whose averages were stored.',
)
@cli.option(
    '--inprefix',
    metavar='STR',
    type=FilePrefix(),
    group=STORED,
    help='Use the files called STR-<kimg>-<width>.pkl.  [default: the one such name in the folder]',
)
@cli.option(
    '--instd',
    metavar='LIST',
    type=Widths(),
    group=STORED,
    help='Use these stored widths only.  [default: all]',
)
@cli.option(
    '--training_batch',
    metavar='INT',
    type=cli.BATCH,
    default=1024,
    show_default=True,
    group=STORED,
    help='Images a training step, for files that do not say how many images they have seen: the multiple '
    'that fits the name.',
)
@cli.option(
    '--outstd',
    metavar='LIST',
    type=Widths(),
    group=WANTED,
    help='Widths to reconstruct, as in 0.07,0.15 or 0.01,0.02,...,0.25.',
)
@cli.option(
    '--outkimg',
    metavar='KIMG',
    type=cli.SOME_KIMG,
    group=WANTED,
    help='Training time that they are of; averages must have been stored at it.  [default: the last]',
)
@cli.option(
    '--outdir', metavar='DIR', type=cli.PATH, group=WANTED, help='Where to write them.  [default: --indir]'
)
@cli.option(
    '--outprefix',
    metavar='STR',
    type=FilePrefix(),
    default='phema',
    show_default=True,
    group=WANTED,
    help='Call them STR-<kimg>-<width>.pkl.',
)
@cli.option('--skip', is_flag=True, group=WANTED, help='Leave alone outputs that exist.')
@cli.option(
    '--batch',
    metavar='INT',
    type=cli.COUNT,
    default=1,
    show_default=True,
    group=WANTED,
    help='Widths to sum up in one pass over the files. Memory holds one network more than that.',
)
@cli.option(
    '--list',
    'list_only',
    is_flag=True,
    help='Say what is stored, and with --outstd how well it would do. Writes nothing.',
)
def main(indir, inprefix, instd, training_batch, outstd, outkimg, outdir, outprefix, skip, batch, list_only):
    """Reconstruct power-function averages of the weights after training (EDM2, Section 3.2), of any width,
    from stored ones.

    \b
    Train with two widths, and store them often:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=run --nosubdir \\
          --data=data.zip --phema=0.05,0.10 --phema_snap=10
    \b
    See what is there, and how well a width can be had from it:
      python reconstruct_phema.py --indir=run --outstd=0.15 --list
    \b
    A sweep at the last stored time, into run/phema-<kimg>-<width>.pkl:
      python reconstruct_phema.py --indir=run --outstd=0.01,0.02,...,0.25 --batch=5

    A width is the standard deviation of an average's profile over training, as a share of the training so
    far: 0.10 sees mostly the last fifth. A reconstruction is a sum of the averages stored up to its time,
    with the weights that bring the sum of their profiles closest to the profile asked for. The distance that
    remains, relative to that profile, is printed as profile error. It shrinks where averages are stored more
    often, and with two widths instead of one.

    Reads snapshots of train.py and of EDM2. Nothing in a file is executed.
    """
    if not outstd and not list_only:
        raise click.UsageError('--outstd=LIST says which widths to reconstruct; --list only looks.')
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
# What is stored.


class Stored(NamedTuple):
    """A stored average, by its file's name and header."""

    path: str
    prefix: str
    stem: str  # of its time in the names of files: <kimg>, or <kimg>-<nimg>
    nimg: int
    std: float
    facts: dict[str, str]  # what all snapshots of a run have in common
    reconstructed: bool


def find_stored(
    indir: str, inprefix: str | None, instd: list[float] | None, training_batch: int
) -> list[Stored]:
    """The averages that one run stored in a folder, ordered by time and width.

    Raises: UserError where there are none, one cannot be read, or they are of several runs.
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
    stored = [
        average for average in found if average.nimg > 0 and not average.reconstructed
    ]  # at 0 images there is nothing to average
    if not stored:
        raise UserError(
            f'{indir} holds no averages that training stored, '
            f'{inprefix or "network-snapshot"}-<kimg>-<width>.pkl. Name the folder of '
            "a run that was trained with --phema=0.05,0.10, or the beginning of its files' names with --inprefix."
        )
    check_one_run(stored)
    if instd:
        stored = [average for average in stored if f'{average.std:.3f}' in {f'{std:.3f}' for std in instd}]
        if missing := [
            f'{std:.3f}' for std in instd if f'{std:.3f}' not in {f'{average.std:.3f}' for average in stored}
        ]:
            raise UserError(
                f'--instd: {", ".join(missing)} was not stored in {indir}. --list says what is there.'
            )
    return sorted(stored, key=lambda average: (average.nimg, average.std))


def read_stored(path: str, prefix: str, stem: str, width: str, training_batch: int) -> Stored:
    """A stored average's header. The tensors are not read.

    A file without metadata of ours is taken for EDM2's, whose name has the width and the floor of kimg.
    Raises: UserError, naming the file, where it is damaged, hostile, or its time is unknown.
    """
    from torch_utils.restricted_pickle import MalformedPickle

    try:
        metadata, facts = read_header(path)
        if not {'nimg', 'ema_std'} & metadata.keys():
            metadata.update(nimg=nimg_at(int(stem.partition('-')[0]), training_batch), ema_std=float(width))
        nimg, std = metadata.get('nimg'), metadata.get('ema_std')
        if not (type(nimg) is int and type(std) is float and nimg >= 0 and 0.001 <= std <= 0.28):
            raise MalformedPickle(
                f'has a metadata entry that cannot be: nimg {nimg!r}, ema_std {std!r} (from 0.001 to 0.28)'
            )
    except MalformedPickle as error:
        raise UserError(
            f'{path} cannot be used as a stored average: it {error}. Copy it again, or take it out of the '
            'folder.'
        ) from error
    return Stored(path, prefix, stem, nimg, std, facts, bool(metadata.get('reconstructed')))


def read_header(path: str) -> tuple[dict, dict[str, str]]:
    """(metadata, what all snapshots of its run have in common) of a snapshot. Raises: MalformedPickle,
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
        raise MalformedPickle('has metadata or arguments that are none')
    facts = dict(
        network=class_name,
        arguments=plain(state.get('_init_args', ())),
        **{f'argument {name}': value for name, value in arguments.items()},
    )
    facts.update((f'data set {name}', value) for name, value in data.items() if name not in OF_A_MACHINE)
    facts.update((name, value) for name, value in metadata.items() if name not in OF_ONE_SNAPSHOT)
    return metadata, {name: repr(value) for name, value in facts.items()}


def nimg_at(kimg: int, training_batch: int) -> int:
    """Images seen by a snapshot of EDM2, whose name has the floor of kimg: the first whole number of training
    steps that it can mean."""
    from torch_utils.restricted_pickle import MalformedPickle

    nimg = -(-kimg * 1000 // training_batch) * training_batch
    if nimg // 1000 != kimg:
        raise MalformedPickle(
            f'does not say how many images it has seen, and no multiple of --training_batch={training_batch} '
            f'is at {kimg} kimg'
        )
    return nimg


def check_one_run(stored: list[Stored]) -> None:
    """Raises UserError where averages are of several runs, as far as their headers tell, or two claim the
    same width and time."""
    prefixes = sorted({average.prefix for average in stored})
    if len(prefixes) > 1:
        raise UserError(
            f'{os.path.dirname(stored[0].path)} holds averages under several names: {", ".join(prefixes)}. '
            'Choose by --inprefix.'
        )
    told, places = (
        {},
        {},
        # By whom: a fact first, and a width at a time. What one does not tell, as older versions do not, cannot
        # contradict
    )
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
                f'{average.nimg:,} images. Take the one out that is not of this run.'
            )


def table(stored: list[Stored], indir: str) -> str:
    """Which widths are stored, how often, and from when to when."""
    lines = [f'Stored in {indir}:', '  width  snapshots  kimg']
    for std in sorted({average.std for average in stored}):
        times = [average.nimg / 1e3 for average in stored if average.std == std]
        lines.append(
            f'  {std:.3f}  {len(times):9}  {times[0]:g}' + (f' to {times[-1]:g}' if len(times) > 1 else '')
        )
    return '\n'.join(lines)


def stored_until(stored: list[Stored], kimg: float | None) -> list[Stored]:
    """Those up to a time, which must be one at which averages were stored: the end of a profile is where it
    is highest, and nothing else has it. `kimg` is exact, or the whole number in the names of files; None for
    the last time."""
    if kimg is None:
        return stored
    times = sorted({average.nimg for average in stored})
    matching = [nimg for nimg in times if nimg == round(kimg * 1e3)] or [
        nimg for nimg in times if nimg // 1000 == kimg
    ]
    if len(matching) != 1:
        near = sorted(matching or sorted(times, key=lambda nimg: abs(nimg - kimg * 1e3))[:2])
        problem = (
            'stands for several times; give the decimals of'
            if matching
            else 'is no time at which averages were stored; the nearest are'
        )
        raise UserError(f'--outkimg={kimg:g} {problem} {" or ".join(f"{nimg / 1e3:g}" for nimg in near)}.')
    return [average for average in stored if average.nimg <= matching[0]]


# ----------------------------------------------------------------------------
# What is wanted.


def plan(inputs: list[Stored], stds: list[float], outdir: str, prefix: str) -> list[EasyDict]:
    """What to write: path, std, the inputs' weights, and the profile error, of each width at the time of the
    last input."""
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
    """Say how close each profile comes to the one asked for, and what would bring it closer. `selected`: more
    widths may be stored."""
    click.echo(f'From {len(inputs)} of them, at {inputs[-1].nimg / 1e3:g} kimg:')
    for output in outputs:
        click.echo(f'  {output.std:.3f}  profile error {100 * output.error:.2g} %')
    rough = [f'{output.std:.3f}' for output in outputs if output.error > ROUGH]
    if rough:
        widths = sorted({f'{average.std:.3f}' for average in inputs})
        cures = [
            f'widths closer to {" and ".join(widths)}',
            *(['all that is stored, without --instd'] if selected else []),
            f'in the next run a smaller --phema_snap{"" if len(widths) > 1 else ", and two widths"}',
        ]
        click.echo(
            f'Warning: {", ".join(rough)} can be had roughly only, with a profile error above '
            f'{100 * ROUGH:g} %. What helps: {"; ".join(cures)}.'
        )


def prepare(outputs: list[EasyDict], outdir: str) -> None:
    """Make the folder. Raises UserError where it cannot be written to, or a file that is in the way is no
    reconstruction."""
    from torch_utils.restricted_pickle import MalformedPickle

    for output in outputs:
        try:
            replaceable = not os.path.lexists(output.path) or read_header(output.path)[0].get('reconstructed')
        except (MalformedPickle, UserError):
            replaceable = False
        if not replaceable:
            raise UserError(
                f'{output.path} exists and is no reconstruction, so it stays. Choose another --outprefix or '
                '--outdir, or --skip.'
            )
    try:
        os.makedirs(outdir, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be made: {error.strerror}') from error
    if not os.access(outdir, os.W_OK):
        raise UserError(f'--outdir={outdir} cannot be written to.')


# ----------------------------------------------------------------------------
# The sums.


def write_all(inputs: list[Stored], outputs: list[EasyDict], batch: int) -> None:
    """Reconstruct `batch` outputs in one pass over the inputs, then the next ones."""
    import tqdm

    passes = [outputs[first : first + batch] for first in range(0, len(outputs), batch)]
    with tqdm.tqdm(
        total=len(passes) * len(inputs), unit='snapshot', disable=None, dynamic_ncols=True, leave=False
    ) as bar:
        for part in passes:
            reconstruct(inputs, part, bar.update)


def reconstruct(inputs: list[Stored], outputs: list[EasyDict], advance=lambda: None) -> None:
    """Write the sums of the inputs' parameters with each output's weights, in one pass over the inputs.

    Sums are in FP32, whose rounding the inputs have already; half-precision parameters go into FP32 and come
    out as they were. In memory are the sums and one input, and while a file is written, the sums and its
    bytes.
    """
    from training.checkpoint import save_snapshot
    from training.phema import average_name

    *others, last = inputs
    net, metadata = load(last)
    dtypes = {name: parameter.dtype for name, parameter in net.named_parameters()}
    sums = [scaled(net, output.weights[-1]) for output in outputs]
    for parameter in net.parameters():  # their memory is the next input's
        parameter.data = parameter.data.new_empty(0)
    advance()
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
    """(network, metadata without what is the average's own) of a stored average. Raises: UserError for
    parameters that are not finite."""
    import torch

    from training.checkpoint import load_network

    net = load_network(average.path)
    for name, parameter in net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f'{average.path} has values in {name} that are not finite. Training had diverged; --outkimg '
                'can name a time before.'
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

    Raises: UserError where it has other tensors than `last`, or other values in what is not averaged:
        buffers, noise levels, switches.
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
            f'{average.path} is not of the run of the others: shapes, constants or settings of its network '
            'differ. Give each run a folder of its own.'
        )
    for total, weight in zip(sums, weights):
        for name, parameter in net.named_parameters():
            total[name].add_(parameter.data, alpha=weight)


if __name__ == '__main__':
    main()
