"""Convert checkpoints to and from snapshots, and describe their contents."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import json
import os

import click

from dnnlib import UserError, cli
from dnnlib.text import printable
from dnnlib.util import check_other_file

READERS, WRITERS = ['snapshot', 'openai', 'safetensors'], ['snapshot', 'safetensors', 'diffusers']
OPENAI = "Not recorded in OpenAI's files (--from=openai)"
URL_HELP = 'a path or an http(s) URL, optionally followed by #sha256= and 64 digits.'


class ConvertOrInfo(cli.Command):
    """The conversion, or the command `info` if the first argument is `info`."""

    def make_context(self, info_name, args, parent=None, **extra):
        if args[:1] == ['info']:
            return info.make_context(f'{info_name} info', args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx):
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_usage(self, ctx, formatter):
        super().format_usage(ctx, formatter)
        formatter.write_usage(f'{ctx.command_path} info', '[OPTIONS] FILE', prefix=' ' * len('Usage: '))


@click.command(cls=ConvertOrInfo)
@cli.argument('source', metavar='SRC', type=cli.PATH, help=f'Checkpoint to convert: {URL_HELP}')
@cli.argument(
    'dest',
    metavar='DST',
    type=cli.PATH,
    help='Output file, replaced if it exists; for diffusers a new folder. Appears only when complete.',
)
@cli.option('--from', 'reader', type=click.Choice(READERS), default='snapshot', help='Format of SRC.')
@cli.option(
    '--to',
    'writer',
    type=click.Choice(WRITERS),
    default='snapshot',
    help='Format of DST; diffusers writes a new folder.',
)
@cli.option(
    '--timesteps',
    type=cli.LEVELS,
    help='Number of noise levels of a consistency model, among which diffusers indexes the time points of '
    'multistep sampling: 40 for cd_*.pt, 201 for ct_imagenet64.pt, 151 for the other ct_*.pt.  [default: '
    "the snapshot's; 40]",
)
@cli.option(
    '--kind',
    type=click.Choice(['consistency', 'edm']),
    group=OPENAI,
    help='Consistency model (cd_*.pt, ct_*.pt) or diffusion model (edm_*.pt).  [default: consistency]',
)
@cli.option(
    '--resolution',
    type=cli.SIDE,
    group=OPENAI,
    help='Image resolution.  [default: derived from a coarsest level of 8x8, as in all published models]',
)
@cli.option(
    '--channels-per-head',
    type=cli.SIDE,
    group=OPENAI,
    help="Channels per attention head, OpenAI's num_head_channels.  [default: 64]",
)
@cli.option(
    '--heads',
    type=cli.SIDE,
    group=OPENAI,
    help="Number of attention heads at every level, OpenAI's num_heads, instead of --channels-per-head.",
)
@cli.option(
    '--attention-order',
    type=click.Choice(['qkv-first', 'heads-first']),
    group=OPENAI,
    help='Major order of the attention channels; heads-first for models trained without flash attention.  '
    '[default: qkv-first]',
)
@cli.option(
    '--key', metavar='NAME', group=OPENAI, help='Network to convert if the file holds several, such as ema.'
)
def main(source, dest, reader, writer, timesteps, **openai):
    """Convert the checkpoint SRC to DST, or describe FILE.

    Nothing in a file is executed. Without --from and --to, a snapshot is rewritten with only its network.

    \b
    OpenAI's weights as snapshots for generate.py and train.py:
      python convert.py --from=openai cd_imagenet64_l2.pt cd-imagenet64.pkl
      python convert.py --from=openai --kind=edm edm_imagenet64_ema.pt edm.pkl
    \b
    A snapshot as one safetensors file, and back:
      python convert.py --to=safetensors student.pkl student.safetensors
      python convert.py --from=safetensors student.safetensors student.pkl
    \b
    A student or a consistency model as a folder for diffusers:
      python convert.py --to=diffusers student.pkl student
      python convert.py --to=diffusers cd-imagenet64.pkl cd-imagenet64
    \b
    Contents of a snapshot, a training state, or any of the above:
      python convert.py info network-snapshot-157698.pkl
    """
    # Contradictions of options, before any file is opened.
    check_ending(dest, writer)
    if (reader, writer) != ('snapshot', 'snapshot'):
        check_other_file(source, dest, 'DST')
    openai = {name: value for name, value in openai.items() if value is not None}
    if openai and reader != 'openai':
        names = ', '.join(f'--{name.replace("_", "-")}' for name in openai)
        raise click.UsageError(f'{names}: only for --from=openai.')
    if 'heads' in openai and 'channels_per_head' in openai:
        raise click.UsageError('--heads and --channels-per-head exclude each other.')
    if timesteps and (openai.get('kind') == 'edm' or (reader != 'openai' and writer != 'diffusers')):
        raise click.UsageError(
            '--timesteps is for consistency models: with --from=openai, or with --to=diffusers.'
        )

    # Read, write, and say what was assumed.
    net = read(source, reader, **openai)
    if timesteps:
        net.metadata['num_timesteps'] = timesteps
    write(dest, net, writer)
    click.echo(printable(f'{dest}: {summary(net)}'))
    if writer == 'diffusers':
        from training.interchange.diffusers import steps_of_sampling

        click.echo(f'Sample it by diffusers.DiffusionPipeline with {steps_of_sampling(net)}.')
    if reader == 'openai' and (guessed := assumed(net, openai)):
        click.echo(
            printable(f'Assumed, because {source} does not record it: {guessed}. See --help to change this.')
        )


@click.command(cls=cli.Command)
@cli.argument('file', metavar='FILE', type=cli.PATH, help=f'Checkpoint: {URL_HELP}')
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
@cli.option(
    '--key',
    metavar='NAME',
    help="Network to describe if a file of OpenAI's weights holds several, such as ema.",
)
def info(file, as_json, key):
    """Describe a checkpoint: architecture, arguments, parameters, resolution, labels, objective, noise
    levels, kimg.

    FILE is a snapshot, a training state, a safetensors file from convert.py, or OpenAI's weights, recognized
    by its contents.
    """
    from training.interchange import describe

    # What kind of file it is.
    kind = recognize(file)
    if key is not None and kind != 'openai':
        raise UserError(f"--key={key} is for OpenAI's weights, and {file} is a {kind}: leave it out.")

    # Describe it; the settings that OpenAI's files lack are inferred from shapes of weights.
    if kind == 'training state':
        facts = describe.describe_state(file)
    elif kind == 'openai':
        from training.interchange.openai import inspect_openai

        net, guessed = inspect_openai(file, key)
        facts = dict(describe.describe(net), assumed=guessed)
    else:
        facts = describe.describe(read(file, kind))

    # Print.
    facts = dict(file=file, format=kind, **facts)
    click.echo(
        json.dumps(describe.printable(facts), indent=2, allow_nan=False)
        if as_json
        else describe.as_text(facts)
    )


def check_ending(dest: str, writer: str) -> None:
    """Raises: UsageError if DST ends as the files of another format than --to."""
    ending = os.path.splitext(dest)[1].lower()
    wanted = {'.safetensors': 'safetensors', '.pkl': 'snapshot'}.get(ending, writer)
    if wanted != writer:
        raise click.UsageError(
            f'{dest} ends in {ending}, but --to={writer} writes another format: add --to={wanted}, or choose '
            'another name.'
        )


def read(source: str, reader: str, **openai):
    """The network of a checkpoint in a format of READERS."""
    if reader == 'openai':
        from training.interchange.openai import load_openai

        return load_openai(source, **openai)

    # Name the right format if it is another one than --from.
    kind = recognize(source)
    if kind == 'training state':
        raise UserError(
            f'{source} is a training state, from which training resumes. Convert a network-snapshot-*.pkl of '
            'the same run.'
        )
    from training.checkpoint import load_network

    if kind != reader:
        # `recognize` takes unknown contents for a snapshot: look closer before naming a format.
        if kind == 'snapshot':
            from dnnlib import open_url
            from dnnlib.file_kind import describe_file

            with open_url(source) as file:
                what = describe_file(file.name)
            if what and what not in ('a network snapshot', 'a pickle'):
                raise UserError(f'{source} is {what}, not a {reader} file. Check the path and --from.')
            load_network(source)  # raises a better error if it is not a snapshot
        raise UserError(
            f'{source} is {"a PyTorch file" if kind == "openai" else f"a {kind}"}, not a {reader}. Use '
            f'--from={kind}.'
        )
    if reader == 'safetensors':
        from training.interchange.safetensors import load_safetensors

        return load_safetensors(source)
    return load_network(source)


def write(dest: str, net, writer: str) -> None:
    """Write a network in a format of WRITERS."""
    if writer == 'diffusers':
        from training.interchange.diffusers import save_diffusers

        save_diffusers(dest, net)
    elif writer == 'safetensors':
        from training.interchange.safetensors import save_safetensors

        save_safetensors(dest, net)
    else:
        from training.checkpoint import save_snapshot

        # The names of the arguments of `save_snapshot`.
        if reserved := {'path', 'net'} & net.metadata.keys():
            raise UserError(
                f'the metadata has entries named {", ".join(sorted(reserved))}, which are reserved in a '
                'snapshot'
            )
        save_snapshot(dest, net, **net.metadata)


def recognize(source: str) -> str:
    """Format of a file by its contents: one of READERS or 'training state'; 'snapshot' if unknown, because
    the reader of snapshots describes what it is instead.
    """
    import dnnlib
    from dnnlib.file_kind import describe_file
    from torch_utils.sealed_file import find_seal
    from training.saved_files import why_no_snapshot

    if os.path.isdir(source):
        raise UserError(f'{source} cannot be read: it {why_no_snapshot(source)}')

    # A PyTorch file is a training state if a checksum follows it; its entries would be known only after the
    # many names of a large network.
    with dnnlib.open_url(source) as file:
        _, checksum = find_seal(file)
        kind = describe_file(file.name) or ''
    if kind.startswith(('a training state of train.py', 'a PyTorch file (torch.save)', 'a damaged')):
        return 'training state' if checksum is not None else 'openai'
    return 'safetensors' if kind == 'a safetensors file' else 'snapshot'


def assumed(net, given: dict) -> str:
    """What a conversion of OpenAI's weights assumed, as text; '' if all of it was given."""
    phrases = dict(
        kind='a consistency model',
        resolution=f'images of {net.img_resolution}x{net.img_resolution}',
        channels_per_head='64 channels per attention head',
        attention_order='channels of attention ordered q, k, v first',
    )
    # The number of heads decides their width.
    if 'heads' in given:
        del phrases['channels_per_head']
    return ', '.join(phrase for name, phrase in phrases.items() if name not in given)


def summary(net) -> str:
    """A line about a network, by which to check its conversion."""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return (
        f'{type(net).__name__}, {net.img_resolution}x{net.img_resolution}x{net.img_channels}, '
        f'{net.label_dim or "no"} classes, {parameters:,} parameters, objective '
        f'{net.metadata.get("objective", "unknown")}'
    )


if __name__ == '__main__':
    main()
