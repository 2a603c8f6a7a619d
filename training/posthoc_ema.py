"""Post-hoc EMA: find the power-function averages that a run stored, and reconstruct averages of other widths
as weighted sums of them (EDM2, Section 3.2).

The weights come from `phema.solve_posthoc_coefficients`. Snapshots of EDM2 are read too. Nothing in a file is
executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import tqdm

from dnnlib import UserError, open_url
from dnnlib.lazy import lazy_import
from torch_utils.restricted_pickle import MalformedPickle, persistent_object, plain, read_pickle

torch = lazy_import('torch')  # after the names of files have been looked at
checkpoint = lazy_import('training.checkpoint')
phema = lazy_import('training.phema')

# Metadata that differs between snapshots of a run, and entries of dataset_kwargs that a resume may change.
OF_ONE_SNAPSHOT = ('nimg', 'kimg', 'ema', 'ema_std', 'fid', 'digest', 'reconstructed', 'profile_error')
OF_A_MACHINE = ('path', 'cache')

# ----------------------------------------------------------------------------
# Stored averages.


class Stored(NamedTuple):
    """A stored average: the name and header of its file."""

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

    Args:
        inprefix: prefix of their files' names; None for any.
        instd: widths to use; None for all.
        training_batch: see `nimg_at`.
    Raises: UserError if there are none, one cannot be read, or they belong to several runs.
    """
    # Files named <prefix>-<kimg>[-<nimg>]-<width>.pkl.
    try:
        names = sorted(os.listdir(indir))
    except OSError as error:
        raise UserError(
            f'--indir={indir} cannot be listed: {error.strerror}. Name the folder of a run.'
        ) from error
    # As short as it can be, so that both numbers of <kimg>-<nimg> are the time's.
    prefix = re.escape(inprefix) if inprefix else '.+?'
    matches = filter(
        None, (re.fullmatch(rf'({prefix})-(\d+(?:-\d+)?)-(0\.\d{{3}})\.pkl', name) for name in names)
    )
    found = [read_stored(os.path.join(indir, match[0]), *match.groups(), training_batch) for match in matches]

    # Reconstructions may lie beside what they were made from; at 0 images there is nothing to average.
    stored = [average for average in found if average.nimg > 0 and not average.reconstructed]
    if not stored:
        raise UserError(
            f'{indir} holds no averages stored by training, '
            f'{inprefix or "network-snapshot"}-<kimg>-<width>.pkl. Name the folder of a run trained with '
            '--phema=0.05,0.10, or the prefix of its files with --inprefix.'
        )
    check_one_run(stored)

    # Select widths as file names write them, with three decimals.
    if instd:
        stored = [average for average in stored if f'{average.std:.3f}' in {f'{std:.3f}' for std in instd}]
        if missing := [
            f'{std:.3f}' for std in instd if f'{std:.3f}' not in {f'{average.std:.3f}' for average in stored}
        ]:
            raise UserError(f'--instd: {", ".join(missing)} is not stored in {indir}. --list shows what is.')
    return sorted(stored, key=lambda average: (average.nimg, average.std))


def read_stored(path: str, prefix: str, stem: str, width: str, training_batch: int) -> Stored:
    """Read the header of a stored average, without its tensors.

    A file without our metadata is treated as EDM2's, whose name has the width and the floor of kimg.
    Raises: UserError, naming the file, if it is damaged or hostile, or its time is unknown.
    """
    try:
        metadata, facts = read_header(path)
        # EDM2's snapshots have no such entries; their names have them, rounded.
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
    """(metadata, facts that are equal in all snapshots of a run). Raises: MalformedPickle, UserError."""
    # Nothing in the file is executed: its objects are read as plain data.
    with open_url(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        snapshot = read_pickle(file, stop=size)
    network = persistent_object(snapshot.get('ema')) if isinstance(snapshot, dict) else None
    if network is None:
        raise MalformedPickle('holds no network named ema')
    class_name, state = network
    # How the network was built, what it was trained on, and what training says of it.
    entries = state.get('_init_kwargs'), snapshot.get('dataset_kwargs'), snapshot.get('metadata')
    arguments, data, metadata = (plain(entry or {}) for entry in entries)
    if (
        not all(isinstance(entry, dict) for entry in (arguments, data, metadata))
        or {'path', 'net'} & metadata.keys()
    ):
        raise MalformedPickle('has malformed metadata or arguments')

    # Class and arguments of the network, the data set, the training, each as text.
    facts = dict(
        network=class_name,
        arguments=plain(state.get('_init_args', ())),
        **{f'argument {name}': value for name, value in arguments.items()},
    )
    # Paths differ between machines, and EMA widths between snapshots: neither tells runs apart.
    facts.update((f'data set {name}', value) for name, value in data.items() if name not in OF_A_MACHINE)
    facts.update((name, value) for name, value in metadata.items() if name not in OF_ONE_SNAPSHOT)
    return metadata, {name: repr(value) for name, value in facts.items()}


def nimg_at(kimg: int, training_batch: int) -> int:
    """Images seen by an EDM2 snapshot, whose name has the floor of kimg: the first multiple of the batch size
    that fits. Raises: MalformedPickle if there is none."""
    # The ceiling of kimg · 1000 in units of batches.
    nimg = -(-kimg * 1000 // training_batch) * training_batch
    if nimg // 1000 != kimg:
        raise MalformedPickle(
            'does not record how many images it has seen, and no multiple of '
            f'--training_batch={training_batch} is at {kimg} kimg'
        )
    return nimg


def check_one_run(stored: list[Stored]) -> None:
    """Raises: UserError if headers differ between runs, or two averages have the same width and time."""
    prefixes = sorted({average.prefix for average in stored})
    if len(prefixes) > 1:
        raise UserError(
            f'{os.path.dirname(stored[0].path)} holds averages under several names: {", ".join(prefixes)}. '
            'Choose one with --inprefix.'
        )

    # Compare with the first average that has the same fact, or the same width and time. A missing fact is no
    # contradiction: older versions record fewer.
    with_fact, at_place = {}, {}
    for average in stored:
        for name, fact in sorted(average.facts.items()):
            other = with_fact.setdefault(name, average)
            if other.facts[name] != fact:
                raise UserError(
                    f'{other.path} and {average.path} belong to different runs: {name} is '
                    f'{other.facts[name][:80]} there and {fact[:80]} here. Give each run a folder of its own.'
                )
        other = at_place.setdefault((f'{average.std:.3f}', average.nimg), average)
        if other is not average:
            raise UserError(
                f'{other.path} and {average.path} are both the average of width {average.std:.3f} after '
                f'{average.nimg:,} images. Remove the one that does not belong to this run.'
            )


def stored_until(stored: list[Stored], kimg: float | None) -> list[Stored]:
    """The averages up to a time at which some were stored: a profile is highest at its end, which no earlier
    average covers.

    `kimg`: exact, or the integer in file names; None for the last time.
    """
    if kimg is None:
        return stored

    # The exact time has precedence over times that share its integer part.
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
# Reconstructed averages.


class Output(NamedTuple):
    """An average to reconstruct: its file, width, weights of the inputs, and profile error."""

    path: str
    std: float
    weights: list[float]
    error: float


def plan(inputs: list[Stored], stds: list[float], outdir: str, prefix: str) -> list[Output]:
    """Outputs at the time of the last input, one per width."""
    # Coefficients of each output over the inputs, and how far the profiles are from the wanted ones.
    in_nimg, in_std = [average.nimg for average in inputs], [average.std for average in inputs]
    out_nimg = [inputs[-1].nimg] * len(stds)
    weights = phema.solve_posthoc_coefficients(in_nimg, in_std, out_nimg, stds)
    errors = phema.posthoc_error(in_nimg, in_std, out_nimg, stds, weights)
    return [
        Output(
            path=os.path.join(outdir, f'{prefix}-{inputs[-1].stem}-{std:.3f}.pkl'),
            std=std,
            weights=column.tolist(),
            error=float(error),
        )
        for std, column, error in zip(stds, weights.T, errors)
    ]


def prepare(outputs: list[Output], outdir: str) -> None:
    """Create the folder. Raises: UserError if it is not writable, or an output would replace other files."""
    for output in outputs:
        try:
            # Only reconstructions are replaced, never what training stored.
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


def write_all(inputs: list[Stored], outputs: list[Output], batch: int) -> None:
    """Reconstruct the outputs, `batch` of them per pass over the inputs."""
    passes = [outputs[first : first + batch] for first in range(0, len(outputs), batch)]
    total = len(passes) * len(inputs)
    with tqdm.tqdm(total=total, unit='snapshot', disable=None, dynamic_ncols=True, leave=False) as bar:
        for subset in passes:
            reconstruct(inputs, subset, bar.update)


def reconstruct(inputs: list[Stored], outputs: list[Output], advance: Callable[[], object]) -> None:
    """Write the weighted sums of the inputs' parameters for all outputs, in one pass over the inputs.

    Sums are in FP32, or the precision of the inputs if that is higher. Memory holds the sums and one input
    or, while a file is written, the sums and its bytes.

    Args:
        advance: called after each input.
    """
    # Start from the last input, which also provides buffers and metadata.
    *others, last = inputs
    net, metadata = load(last)
    # As stored, so that the output has the input's precision.
    dtypes = {name: parameter.dtype for name, parameter in net.named_parameters()}
    sums = [scaled(net, output.weights[-1]) for output in outputs]

    # Free the parameters' memory for the next input; the network stays, to be saved with other parameters.
    for parameter in net.parameters():
        parameter.data = parameter.data.new_empty(0)
    advance()

    # Add the other inputs.
    for i, average in enumerate(others):
        add(average, net, sums, [output.weights[i] for output in outputs])
        advance()

    # Save. `pop` frees each sum as its parameter takes over.
    for output, total in zip(outputs, sums):
        for name, parameter in net.named_parameters():
            parameter.data = total.pop(name).to(dtypes[name])
        checkpoint.save_snapshot(
            output.path,
            net,
            **metadata,
            ema=phema.average_name(output.std),
            ema_std=output.std,
            reconstructed=True,
            profile_error=output.error,
        )


def load(average: Stored) -> tuple[torch.nn.Module, dict]:
    """(network, metadata of the run) of a stored average. Raises: UserError if it has non-finite values."""
    net = checkpoint.load_network(average.path)
    for name, parameter in net.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f'{average.path} has values in {name} that are not finite: training has diverged. Choose an '
                'earlier time with --outkimg.'
            )
    metadata = {name: value for name, value in net.metadata.items() if name not in OF_ONE_SNAPSHOT}
    return net, dict(metadata, nimg=average.nimg, kimg=average.nimg / 1e3)


def scaled(net: torch.nn.Module, weight: float) -> dict[str, torch.Tensor]:
    """weight · parameters, by name, in FP32 or higher precision."""
    return {
        # FP16 parameters would lose the small terms of a long sum.
        name: parameter.data.to(torch.promote_types(parameter.dtype, torch.float32)) * weight
        for name, parameter in net.named_parameters()
    }


def add(
    average: Stored, last: torch.nn.Module, sums: list[dict[str, torch.Tensor]], weights: list[float]
) -> None:
    """Add weight · parameters of a stored average to each of the sums.

    Raises: UserError unless its shapes agree with those of `last`, and everything that is not averaged:
        buffers, noise levels, settings.
    """
    # Headers do not show everything: compare shapes and what is not averaged.
    net, _ = load(average)
    shapes = [
        {name: parameter.shape for name, parameter in tensors}
        for tensors in (net.named_parameters(), sums[0].items())
    ]
    buffers = [dict(network.named_buffers()) for network in (net, last)]
    if not (
        shapes[0] == shapes[1]
        and checkpoint.numeric_attributes(net) == checkpoint.numeric_attributes(last)
        and buffers[0].keys() == buffers[1].keys()
        and all(torch.equal(buffer, buffers[1][name]) for name, buffer in buffers[0].items())
    ):
        raise UserError(
            f'{average.path} belongs to another run: shapes, constants or settings of its network differ. '
            'Give each run a folder of its own.'
        )

    # In place: memory holds one set of parameters besides the sums.
    for total, weight in zip(sums, weights):
        for name, parameter in net.named_parameters():
            total[name].add_(parameter.data, alpha=weight)
