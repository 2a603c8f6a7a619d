"""Generate images or latents from a snapshot, one per seed."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import itertools
from collections.abc import Iterable, Iterator

import click

from dnnlib import cli
from dnnlib.text import printable
from dnnlib.util import named
from sampling.options import guidance_options, sampling_arguments, sampling_options
from training.saved_files import NETWORK_FILE

SPEED = 'Precision and performance'


# ----------------------------------------------------------------------------
# The command.


def check_destination(
    outdir: str | None, dest: str | None, subdirs: bool, as_latents: bool, strict: bool = False
) -> None:
    """Raises: click.UsageError."""
    if (outdir is None) == (dest is None):
        raise click.UsageError('Give either a folder with --outdir, or one file with --dest.')
    if dest is not None and not dest.endswith(('.npz', '.zip')):
        raise click.UsageError(f'--dest={dest} is neither a .npz nor a .zip file; --outdir takes a folder.')
    if dest is not None and (subdirs or as_latents or strict):
        option = '--subdirs' if subdirs else '--latents' if as_latents else '--strict-outdir'
        raise click.UsageError(f'{option} goes with --outdir.')


@click.command(cls=cli.Command)
@cli.option('--network', type=NETWORK_FILE, required=True, help='Snapshot to sample from.')
@cli.option(
    '--outdir', metavar='DIR', type=cli.PATH, help='Output folder for images named by seed, %06d.png.'
)
@cli.option(
    '--dest',
    type=cli.OUTPUT,
    help='Output file instead of --outdir: .npz for an array uint8 [N, H, W, C] and labels, or .zip for a '
    'data set.',
)
@cli.option(
    '--seeds',
    type=cli.Seeds(),
    default='0-63',
    help='Seeds of the images, such as 1,2,5-10; all different, below 2^32.',
)
@cli.option('--subdirs', is_flag=True, help='Write a subfolder per 1000 seeds.')
@cli.option(
    '--strict-outdir', is_flag=True, help='Fail if the folder holds images that these seeds do not overwrite.'
)
@cli.option(
    '--latents',
    'as_latents',
    is_flag=True,
    help='Write the outputs of the network without decoding them: float32 [C, H, W], %06d.npy.',
)
@cli.option(
    '--allow-nonfinite',
    is_flag=True,
    help='Also write images with NaN or infinite values, and warn of their seeds, instead of failing.',
)
@cli.option('--batch', type=cli.BATCH, default=64, help='Batch size per process.')
@cli.option(
    '--workers',
    type=cli.WORKERS,
    help='Processes that encode and write images, per generating process; with 0 it does so itself.  '
    '[default: half of the CPUs but one, at most 4]',
)
@sampling_options()
@guidance_options()
@cli.option(
    '--precision',
    type=click.Choice(['fp32', 'fp16', 'bf16']),
    group=SPEED,
    help="Arithmetic inside the network; fp16 requires a GPU.  [default: the snapshot's own]",
)
@cli.option(
    '--compile',
    'compiled',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=SPEED,
    help='Compile the network with torch.compile, on GPUs with CUDA graphs. The first batch takes minutes, '
    'others less time.',
)
@cli.option(
    '--channels_last',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=SPEED,
    help='Use the channels-last memory format inside the network.',
)
def main(
    network,
    outdir,
    dest,
    seeds,
    subdirs,
    strict_outdir,
    as_latents,
    allow_nonfinite,
    batch,
    workers,
    sampling,
    guidance,
    precision,
    compiled,
    channels_last,
):
    """Generate images from a snapshot. A student samples on its own grid; a teacher solves the
    probability-flow ODE.

    \b
    A student, 50,000 images on four GPUs:
      torchrun --standalone --nproc_per_node=4 generate.py --network=network-snapshot-157698.pkl \\
          --outdir=samples --seeds=0-49999 --batch=128 --steps=8
    \b
    A teacher by Heun's method with 256 steps, 511 network evaluations:
      python generate.py --network=edm-imagenet-64x64-cond-adm.pkl --outdir=out --steps=256
    \b
    A teacher that is guided by an unconditional one at the middle noise levels:
      python generate.py --network=teacher.pkl --outdir=out --guide=uncond.pkl --guidance=2 \\
          --guidance_interval=0.2,5

    An image depends only on its seed, not on the batch size or the number of processes.
    """
    from sampling import writers

    check_destination(outdir, dest, subdirs, as_latents, strict_outdir)
    destination = (
        writers.FileDestination(dest) if dest else writers.FolderDestination(outdir, subdirs, as_latents)
    )
    workers = writers.default_workers() if workers is None else workers
    with writers.WriterPool(workers) as pool:  # its processes start while torch is imported
        from sampling import generation
        from torch_utils import distributed
        from training import execution
        from training.checkpoint import load_network
        from training.guidance import describe, guided
        from training.networks import encoders

        # Everything that may be missing or wrong is found before the first batch.
        distributed.init()
        if outdir and strict_outdir:
            check_outdir(destination, seeds, strict=True)
        with distributed.main_process_first(), named('--network'):
            net = load_network(network, distributed.get_device())
            if not as_latents:  # loads the VAE
                encoders.encoder_of(net, distributed.get_device())
        net = guided(net, network, guidance)
        arguments = sampling_arguments(net, network, **sampling)
        generation.validate_arguments(net, **arguments)
        if outdir and not strict_outdir:  # not before an error
            check_outdir(destination, seeds, strict=False)

        # How to run the network.
        if precision:
            execution.in_precision(net, precision)
        ignored = channels_last and not execution.keeps_channels_last(net, compiled)
        if ignored and distributed.is_main():
            click.echo(f'Note: {execution.CHANNELS_LAST_IGNORED}', err=True)
        execution.run_with(net, channels_last=channels_last, compiled=compiled, cuda_graphs=True)

        # Generate.
        sampler = describe(net, **arguments)
        what = f'{len(seeds)} {"latents" if as_latents else "images"}'
        distributed.print0(f'Generating {what} to "{dest or outdir}" ({sampler})...')
        generate_all(net, seeds, batch, destination, pool, as_latents, arguments, compiled, allow_nonfinite)
        distributed.print0('Done.')
        distributed.shutdown()


# ----------------------------------------------------------------------------
# Generating and writing.


def check_outdir(destination, seeds: list[int], strict: bool) -> None:
    """Warn of images in the folder that these seeds do not overwrite: fid.py would measure them too.

    Raises: if `strict`, UserError on the main process and SystemExit on the others.
    """
    from torch_utils import distributed

    # The main process lists the folder.
    others = distributed.broadcast_object(destination.others(seeds) if distributed.is_main() else None)
    if not others:
        return

    # The numbers of other files, and the first names.
    found = '; '.join(
        f'{len(names)} {what} ({", ".join(names[:3])}{", ..." * (len(names) > 3)})'
        for what, names in others.items()
    )
    found = (
        f'--outdir={destination.path} holds other images than these seeds will write: {found}. '
        'fid.py and others read all images of a folder.'
    )
    if strict:
        distributed.fail_together(
            f'{found} Choose an empty folder, remove them, or leave out --strict-outdir.'
        )
    if distributed.is_main():
        click.echo(printable(f'Warning: {found} --strict-outdir refuses such a folder.'), err=True)


def generate_all(
    net,
    seeds: list[int],
    batch: int,
    destination,
    pool,
    as_latents: bool,
    arguments: dict,
    fill: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Generate every image and write it to its destination.

    While the network computes a batch, the previous one is copied from the device, encoded and written.

    Args:
        fill: pad a smaller last batch to the full size, for a network that is compiled for that size.
        allow_nonfinite: see `report_nonfinite`.
    """

    from sampling import generation
    from torch_utils import distributed

    # Labels are recorded in the order in which this process draws them.
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    labels = generation.RecordedLabels(arguments['choose_labels'])
    arguments = dict(arguments, choose_labels=labels)
    places, bad, removed = range(len(seeds)), [], 0
    try:
        if distributed.is_main():
            destination.begin()
        destination.parts = distributed.broadcast_object(destination.parts)

        # Start each batch of this process before the previous one is written.
        batches = list(generation.split_batches(places, batch, rank, world_size))
        seeds_of = lambda subset: [seeds[i] for i in subset]
        size = batch if fill else 0
        begun = (
            (subset, begin_batch(net, seeds_of(subset), as_latents, arguments, size)) for subset in batches
        )
        with distributed.progress(total=len(seeds), unit='img', leave=True) as bar:
            for subset, copy in one_ahead(begun):
                (values, finite), batch_seeds = copy.numpy(), seeds_of(subset)

                # Leave out non-finite images, and remove those that an earlier run wrote for the same seeds.
                nonfinite = list(itertools.compress(batch_seeds, ~finite))
                bad += nonfinite
                if nonfinite and not allow_nonfinite:
                    removed += destination.leave_out(nonfinite)
                    values, batch_seeds = values[finite], list(itertools.compress(batch_seeds, finite))
                destination.add(pool, values, batch_seeds, subset.start)
                # Other processes advance as far as this one, but for the last round.
                bar.update(min(len(subset) * world_size, len(seeds) - bar.n))
            pool.finish()

        # Gather from all processes which seeds are not finite, and the labels that were drawn.
        what = 'latents' if as_latents else 'images'
        report_nonfinite(bad, removed, len(seeds), destination, what, allow_nonfinite)
        # Labels come with the batches they belong to, because processes take turns.
        shares = distributed.gather_on_main((batches, labels.tolist()))
        if distributed.is_main():
            destination.complete(in_order(shares) if net.label_dim else None)
        distributed.barrier()
    finally:
        if distributed.is_main():
            destination.end()


def one_ahead(items: Iterable) -> Iterator:
    """The items, each yielded after the next one has been made."""
    before = None
    for item in items:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


def report_nonfinite(bad: list[int], removed: int, count: int, destination, what: str, allow: bool) -> None:
    """Report the seeds, of all processes, whose images are not finite.

    Args:
        bad: seeds of such images in this process.
        removed: number of their files from an earlier run that this process removed.
        count: number of all images.
        allow: whether these images were written nevertheless.
    Raises: unless `allow`, UserError on the main process and SystemExit on the others.
    """
    from sampling import generation
    from torch_utils import distributed

    shares = distributed.gather_objects((bad, removed))
    bad, removed = [seed for share, _ in shares for seed in share], sum(number for _, number in shares)
    if not bad:  # gathered, so that all processes fail together
        return
    found = generation.nonfinite_seeds(bad, count, what)
    if not allow:
        distributed.fail_together(
            f'{found}. {destination.without(len(bad), removed)} Try --precision=fp32 or other sampling '
            f'options; if that does not help, the network is broken for these {what}. --allow-nonfinite '
            'writes them nevertheless.'
        )
    if distributed.is_main():
        click.echo(f'Warning: {found}. Written nevertheless (--allow-nonfinite).', err=True)


def begin_batch(net, seeds: list[int], as_latents: bool, arguments: dict, at_least: int = 0):
    """Start to compute a batch and to copy it to the host.

    Args:
        at_least: pad the batch to this size by repeating the last seed; the result is cut to the seeds.
    Returns: a `HostCopy` of uint8 [N, H, W, C], or of latents float32 [N, C, H, W], and of [N] bool, which of
        them are finite.
    """
    from sampling import generation

    padded = [*seeds, *seeds[-1:] * (at_least - len(seeds))]
    if as_latents:
        values, finite = generation.checked_latents(generation.generate_latents(net, padded, **arguments))
    else:
        images, finite = generation.generate_checked(net, padded, **arguments)
        # [N, H, W, C], as image files have it.
        values = images.permute(0, 2, 3, 1)
    return generation.HostCopy(values[: len(seeds)].contiguous(), finite[: len(seeds)])


def in_order(shares: list[tuple[list[range], list]]) -> list:
    """All labels in the order of the seeds, from (batches of indices, labels) of each process."""
    by_index = {
        index: label for batches, labels in shares for index, label in zip(itertools.chain(*batches), labels)
    }
    return [by_index[index] for index in sorted(by_index)]


if __name__ == '__main__':
    main()
