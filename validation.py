"""Evaluate saved snapshots, in the format that training writes."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import os

import click

from dnnlib import EasyDict, UserError, cli
from dnnlib.util import named
from metrics.options import PAIRS, pair_options
from metrics.validator import LabelMode, Validator, read_reference
from sampling.level_list import complete
from sampling.options import GENERAL, OF_ODE, guidance_options
from training.saved_files import NETWORK_FILE


@click.command(cls=cli.Command)
@cli.option(
    '--network',
    'networks',
    type=NETWORK_FILE,
    multiple=True,
    required=True,
    help='Snapshot to evaluate; may be repeated.',
)
@cli.option(
    '--ref', metavar='NPZ|URL', type=cli.PATH, required=True, help='Reference statistics, made by fid.py ref.'
)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    default='.',
    help='Folder whose metrics-val.jsonl gets a line per snapshot.',
)
@cli.option(
    '--detector',
    metavar='PATH|URL',
    type=cli.PATH,
    help=f"TorchScript feature detector. {cli.PROGRAM}  [default: NVIDIA's Inception]",
)
@cli.option(
    '--num', '--num-images', 'num', type=cli.TWO_IMAGES, default=50000, help='Number of images to generate.'
)
@cli.option('--batch', type=cli.BATCH, default=64, help='Batch size per process.')
@cli.option('--seed', type=cli.SEED, default=0, help='Seed of the first image.')
@cli.option('--steps', type=cli.STEPS, help="Number of sampling steps.  [default: the snapshot's own]")
@OF_ODE['solver']
@OF_ODE['order']
@OF_ODE['afs']
@OF_ODE['to_zero']
@OF_ODE['discretization']
@OF_ODE['sigmas']
@cli.option(
    '--label', type=LabelMode(), default='auto', help='Class labels: uniform or fixed:K (auto means uniform).'
)
@GENERAL['labels']
@guidance_options()
@pair_options()
def main(networks, ref, outdir, detector, guidance, pairs, **options):
    """Evaluate saved snapshots and append lines to metrics-val.jsonl as training does.

    Under torchrun, processes share the work.
    """
    from data.label_space import space_of
    from metrics.pairs import load_teacher
    from torch_utils import distributed
    from training.checkpoint import load_network
    from training.guidance import guided, sampled_in_steps
    from training.guidance_options import UNGUIDED
    from training.run_log import METRICS, append_lines, json_line

    num_pairs = check_usage(options, pairs)

    # Reference and folder are checked before anything is loaded.
    distributed.init()
    options = complete(options)
    # The validator of training, without a data set or a folder of images.
    options = EasyDict(
        options,
        ref=ref,
        ref_data=None,
        detector=detector,
        dump_images_dir=None,
        overwrite=False,
        pairs=num_pairs,
    )
    read_reference(options, option_prefix='')
    try:
        os.makedirs(outdir, exist_ok=True)
        append_lines(os.path.join(outdir, METRICS), '')
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be written to: {error.strerror}') from error

    # One validator serves all snapshots. Those with non-finite images are reported after all are evaluated.
    device, validator, problems = distributed.get_device(), None, []
    for network in networks:
        with distributed.main_process_first(), named('--network'):
            net = load_network(network, device)
        # Beside its teacher, a student is not what is guided.
        of_teacher = pairs.pairs_with and sampled_in_steps(net)
        net = guided(net, network, UNGUIDED if of_teacher else guidance)
        if validator is None:
            teacher = None
            if pairs.pairs_with:
                name, *sampler = pairs.pairs_with
                teacher = load_teacher(name, net, network, guidance), name, *sampler
            shape = [net.img_channels, net.img_resolution, net.img_resolution]
            validator = Validator(
                options,
                None,
                outdir,
                device,
                shape,
                space_of(net),
                net.metadata.get('encoder'),
                option_prefix='',
                teacher=teacher,
            )
        validator.check_pairs(net, network)

        # Evaluate, print and append the record.
        record = validator.run(net, nimg=net.metadata.get('nimg', 0), ema=net.metadata.get('ema', 'ema'))
        problems += [f'{network}: {record["problem"]}'] if 'problem' in record else []
        if distributed.is_main():
            click.echo(json_line(record))
            try:
                append_lines(os.path.join(outdir, METRICS), json_line(record) + '\n')
            except OSError as error:
                raise UserError(
                    f'{METRICS} in --outdir={outdir} cannot be written: {error.strerror}'
                ) from error
    if problems:
        distributed.fail_together(*problems)
    distributed.shutdown()


def check_usage(options, pairs):
    """The number of pairs. Raises: click.UsageError for options that contradict each other."""
    if options['labels'] and options['label'] != 'auto':
        raise click.UsageError('--label and --labels exclude each other.')
    cli.check_seeds(options['seed'], options['num'], '--seed', '--num')
    if pairs.pairs_num and not pairs.pairs_with:
        raise click.UsageError('--pairs-num needs --pairs-with=PKL, the teacher.')
    num_pairs = pairs.pairs_num or min(PAIRS, options['num'])
    cli.check_seeds(options['seed'], num_pairs, '--seed', '--pairs-num')
    return num_pairs


if __name__ == '__main__':
    main()
