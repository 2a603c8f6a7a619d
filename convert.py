"""Checkpoints in and out: other formats to snapshots, snapshots to other formats, and what is in a file."""
from __future__ import annotations

import json

import click

from dnnlib import UserError, cli

READERS, WRITERS = ['snapshot', 'openai', 'safetensors'], ['snapshot', 'safetensors', 'diffusers']
OPENAI = "OpenAI's consistency_models"


class ConvertOrInfo(cli.Group):
    """`info` is a command; whatever else follows `convert.py` belongs to the conversion."""

    def parse_args(self, ctx, args):
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ['files', *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx, formatter):
        self.commands['files'].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=ConvertOrInfo, options_metavar='[OPTIONS]', subcommand_metavar='SRC DST | info FILE')
def main():
    """Convert the checkpoint SRC to DST, or say what is in a FILE. SRC and FILE are paths or http(s) URLs.

    \b
    Weights that OpenAI published, as a snapshot for generate.py or train.py:
      python convert.py --from=openai cd_imagenet64_l2.pt cd-imagenet64.pkl
      python convert.py --from=openai --kind=edm edm_imagenet64_ema.pt teacher.pkl
    \b
    A snapshot as one safetensors file, and back; a converted consistency model as a folder for diffusers:
      python convert.py --to=safetensors network-snapshot-157698.pkl student.safetensors
      python convert.py --from=safetensors student.safetensors student.pkl
      python convert.py --to=diffusers cd-imagenet64.pkl cd-imagenet64
    \b
    What is in a checkpoint:
      python convert.py info network-snapshot-157698.pkl --json

    Nothing in a file is executed. DST appears when it is complete. Without --from and --to a snapshot is rewritten with its network alone.
    """


@main.command('files', hidden=True)
@click.argument('source', metavar='SRC')
@click.argument('dest', metavar='DST')
@cli.option('--from', 'reader', type=click.Choice(READERS), default='snapshot', show_default=True, help='What SRC is.')
@cli.option('--to', 'writer', type=click.Choice(WRITERS), default='snapshot', show_default=True, help='What DST shall be; diffusers: a new folder.')
@cli.option('--kind', type=click.Choice(['consistency', 'edm']), group=OPENAI,
            help='Consistency model (cd_*.pt, ct_*.pt) or diffusion model (edm_*.pt). The files do not tell.  [default: consistency]')
@cli.option('--resolution', type=click.IntRange(min=1), metavar='INT', group=OPENAI,
            help='Image resolution, which the files do not tell.  [default: the coarsest level is taken to be 8x8, as in all that were published]')
def files(source, dest, reader, writer, kind, resolution):
    """Convert the checkpoint SRC to DST."""
    if reader != 'openai' and (kind or resolution):
        raise click.UsageError('--kind and --resolution are for --from=openai only.')
    net = read(source, reader, kind or 'consistency', resolution)
    write(dest, net, writer)
    click.echo(f'{dest}: {summary(net)}')


@main.command()
@click.argument('file', metavar='FILE')
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
def info(file, as_json):
    """Say what is in a checkpoint: a snapshot, a safetensors file of ours, or weights of OpenAI's."""
    from training.interchange import describe
    reader = recognise(file)
    net = read(file, reader, kind='edm')
    if reader == 'openai':
        net.metadata['objective'] = None  # the file does not tell
    facts = dict(file=file, format=reader, **describe.describe(net))
    click.echo(json.dumps(describe.printable(facts), indent=2, allow_nan=False) if as_json else describe.as_text(facts))


def read(source: str, reader: str, kind: str = 'consistency', resolution: int | None = None):
    """The network of a checkpoint in one of the formats READERS."""
    if reader == 'openai':
        from training.interchange.openai import load_openai
        return load_openai(source, kind, resolution)
    if reader == 'safetensors':
        from training.interchange.safetensors import load_safetensors
        return load_safetensors(source)
    from training.checkpoint import load_network
    return load_network(source)


def write(dest: str, net, writer: str) -> None:
    """Write a network in one of the formats WRITERS."""
    if writer == 'diffusers':
        from training.interchange.diffusers import save_diffusers
        save_diffusers(dest, net)
    elif writer == 'safetensors':
        from training.interchange.safetensors import save_safetensors
        save_safetensors(dest, net)
    else:
        from training.checkpoint import save_snapshot
        if reserved := {'path', 'net'} & net.metadata.keys():
            raise UserError(f'the metadata has entries named {", ".join(sorted(reserved))}, which a snapshot has no room for')
        save_snapshot(dest, net, **net.metadata)


def recognise(source: str) -> str:
    """The format of a file, one of READERS, by its first bytes: a zip archive is a PyTorch file, a JSON object after its length is safetensors."""
    import dnnlib
    with dnnlib.open_url(source) as file:
        start = file.read(9)
    if start[:4] == b'PK\x03\x04':
        return 'openai'
    return 'safetensors' if start[8:] == b'{' else 'snapshot'


def summary(net) -> str:
    """One line for people to check a conversion by."""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return (f'{type(net).__name__}, {net.img_resolution}x{net.img_resolution}x{net.img_channels}, {net.label_dim or "no"} classes, '
            f'{parameters:,} parameters, objective {net.metadata.get("objective", "unknown")}')


if __name__ == '__main__':
    main()
