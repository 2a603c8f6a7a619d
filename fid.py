"""Measures of generated images: Fréchet inception distance (Heusel et al. 2017) and the others that papers
report."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import contextlib
import json
import os

import click

from dnnlib import EasyDict, cli
from dnnlib.util import check_other_file
from metrics.evaluation import (
    DEFAULT_NUM,
    Measures,
    check_detector_options,
    complete_references,
    how_many,
    load_detectors,
    look_at,
    make_folder,
    option_names,
    read_references,
    say,
    warn_about,
    write_json,
)
from sampling.options import sampling_arguments, sampling_options

NETWORK, DETECTOR, SPEED = 'Images of a network', 'Detector', 'Speed'


class SeedSet(cli.Seeds):
    """Seeds, with the words that name them."""

    def convert(self, value, param, ctx):
        return value if isinstance(value, tuple) else (value, super().convert(value, param, ctx))


def shared_options(command):
    """The options that `calc` and `ref` have in common."""
    for option in reversed(
        [
            cli.option(
                '--skip-bad',
                is_flag=True,
                help='Leave out images that cannot be read, or are unlike the first, and count them.',
            ),
            cli.option(
                '--seed',
                metavar='INT',
                type=cli.SEED,
                default=0,
                show_default=True,
                help='Of every random choice: subsets, resamples.',
            ),
            cli.option(
                '--detector',
                metavar='PATH|URL',
                type=cli.PATH,
                group=DETECTOR,
                help="TorchScript file: uint8 images [N, C, H, W] to features [N, D]; pytorch-fid's weights; dinov2 or dinov2:FOLDER. "
                f"{cli.PROGRAM}  [default: NVIDIA's Inception, downloaded once]",
            ),
            cli.option(
                '--dinov2',
                metavar='DIR',
                type=cli.PATH,
                group=DETECTOR,
                help="DINOv2 ViT-L/14 for fd_dinov2, as transformers' save_pretrained writes it.  [default: downloaded once]",
            ),
            cli.option(
                '--detector-sha256',
                metavar='HEX',
                group=DETECTOR,
                help='Digest that the detector file must have.',
            ),
            cli.option(
                '--batch',
                metavar='INT',
                type=cli.BATCH,
                default=64,
                show_default=True,
                group=SPEED,
                help='Images at a time, for each process.',
            ),
            cli.option(
                '--workers',
                metavar='INT',
                type=cli.SOME_WORKERS,
                default=4,
                show_default=True,
                group=SPEED,
                help='Threads that decode images, for each process.',
            ),
            cli.option(
                '--cache',
                metavar='DIR',
                type=cli.PATH,
                group=SPEED,
                help='Keep features here: what was stopped goes on, other measures of the same images '
                'start from them.',
            ),
        ]
    ):
        command = option(command)
    return command


@click.group(cls=cli.Group)
def main():
    """Fréchet inception distance (FID) of images, other measures of theirs, and the reference statistics that
    they need.

    \b
    Distance of 50,000 images, in 1 or 4 processes:
      python fid.py calc --images=samples --ref=fid-refs/imagenet-64x64.npz
      torchrun --standalone --nproc_per_node=4 fid.py calc --images=samples --ref=fid-refs/imagenet-64x64.npz
    \b
    Of a network, three times, as EDM reports it, without writing an image:
      python fid.py calc --network=network-snapshot-157698.pkl --ref=fid-refs/imagenet-64x64.npz \\
          --seeds=0-49999 --seeds=50000-99999 --seeds=100000-149999
    \b
    Reference statistics of a data set:
      python fid.py ref --data=datasets/imagenet-64x64.zip --dest=fid-refs/imagenet-64x64.npz

    The last line that `calc` writes to stdout is the bare number; everything else goes to stderr. Under
    torchrun put `--` before fid.py where you pass --num: recent ones take that for an option of their own.
    """


@main.command()
@cli.option(
    '--images',
    'paths',
    metavar='PATH',
    type=cli.PATH,
    multiple=True,
    help='Images to measure: a folder (with its subfolders), a zip, or an .npz or .npy of uint8 images. '
    'Several: each by itself.',
)
@cli.option(
    '--ref',
    metavar='PATH|URL',
    type=cli.PATH,
    help='Reference: statistics (.npz, .pkl), or the images themselves (folder, zip, array).',
)
@cli.option(
    '--metrics',
    'measures',
    metavar='LIST',
    type=Measures(),
    default='fid',
    show_default=True,
    help='What to compute, from one pass: fid, fid_inf, kid, precision, recall, density, coverage, is, '
    'fd_dinov2.',
)
@cli.option(
    '--num',
    metavar='INT',
    type=cli.Integer(min=2),
    help='Images to use: a random subset where there are more, an error where there are fewer.  [default: '
    f'{DEFAULT_NUM}]',
)
@cli.option(
    '--bootstrap',
    metavar='INT',
    type=cli.Integer(min=0, max=1_000_000),
    default=0,
    show_default=True,
    help='Resamples for a 95 % interval of the sampling noise (not the bias); each costs about one more '
    'distance. 0 for none.',
)
@cli.option(
    '--nearest-k',
    metavar='INT',
    type=cli.COUNT,
    help='Neighbor that sets the radius.  [default: 3 for precision and recall, 5 for density and coverage]',
)
@cli.option('--json', 'json_path', metavar='FILE', type=cli.PATH, help='Write the results to this file too.')
@shared_options
@cli.option(
    '--network',
    metavar='PKL|URL',
    type=cli.PATH,
    group=NETWORK,
    help='Snapshot whose images are measured, without writing them.',
)
@cli.option(
    '--seeds',
    'seed_sets',
    metavar='LIST',
    type=SeedSet(),
    multiple=True,
    group=NETWORK,
    help='Seeds of its images, as in 0-49999. Several: each by itself, then mean and minimum.',
)
@sampling_options(NETWORK)
def calc(paths, ref, measures, num, bootstrap, nearest_k, json_path, network, seed_sets, sampling, **options):
    """Measures of images, or of a network's, against a reference."""
    from metrics.measures import Comparison
    from metrics.uncertainty import check_enough_to_extrapolate

    options = EasyDict(options)
    check_usage(paths, ref, measures, num, bootstrap, nearest_k, network, seed_sets, sampling)
    check_detector_options(measures, options)
    with _processes() as is_main:
        make_folder(json_path)
        references = read_references(ref, measures)
        sources = (
            images_of_network(network, seed_sets, sampling, options.batch)
            if network
            else images_of_paths(paths, num or DEFAULT_NUM, options)
        )
        detectors = load_detectors(
            {measure.entry for measure in measures.values()}, sources[0].image_shape, options
        )
        if 'fid_inf' in measures:
            check_enough_to_extrapolate(min(map(len, sources)), detectors[measures['fid_inf'].entry].dim)
        references = complete_references(references, ref, measures, detectors, sources, options)
        results = {name: [] for name in measures}
        keep = any(m.features or (bootstrap and m.frechet) for m in measures.values())
        classes = {m.entry for m in measures.values() if m.classes}
        views = [
            look_at(source, detectors, options, keep, classes) for source in sources
        ]  # all before the main process compares: none waits for it
        for source, seen in zip(sources, views) if is_main else ():
            warn_about(source, next(iter(seen.values())), measures, detectors)
            for entry, detector in detectors.items():
                comparison = Comparison(
                    seen[entry], references.get(entry), detector.device, bootstrap, nearest_k, options.seed
                )
                for name, measure in measures.items():
                    if measure.entry == entry:
                        title = measure.title.format(detector.metric_name)
                        facts = facts_about(
                            title,
                            source,
                            seen[entry],
                            detector,
                            *((ref, comparison.reference) if measure.compares else ()),
                        )
                        results[name].append(measure.compute(comparison) | facts)
                        say(sentence(results[name][-1]))
        if is_main:
            summaries = {name: summary(found) for name, found in results.items()}
            write_json(json_path, summaries)
            click.echo(f'{summaries[next(iter(measures))]["value"]:.10g}')


@main.command()
@cli.option(
    '--data',
    'path',
    metavar='PATH',
    type=cli.PATH,
    required=True,
    help='Data set: a folder (with its subfolders), a zip, an .npz or .npy of uint8 images.',
)
@cli.option('--dest', metavar='FILE', type=cli.PATH, required=True, help='The .npz to write.')
@cli.option(
    '--metrics',
    'measures',
    metavar='LIST',
    type=Measures('fid', 'fd_dinov2'),
    default='fid',
    show_default=True,
    help='Of which detectors: fid, the one of --detector, and fd_dinov2.',
)
@cli.option(
    '--num', metavar='INT', type=cli.Integer(min=2), help='Images to use, a random subset.  [default: all]'
)
@cli.option(
    '--features',
    metavar='INT',
    type=cli.Integer(min=0),
    default=0,
    show_default=True,
    help='Store the features of so many images too, a random subset: kid, precision, recall, density and '
    'coverage need them.',
)
@shared_options
def ref(path, dest, measures, num, features, **options):
    """Reference statistics of a data set."""
    import numpy as np

    from metrics.calc import reference_of
    from metrics.images import open_images
    from metrics.reference import save_reference

    options = EasyDict(options)
    check_detector_options(measures, options)
    check_other_file(path, dest, '--dest')
    with _processes() as is_main:
        source = open_images(path, num, options.seed, options.skip_bad)
        make_folder(dest)
        detectors = load_detectors(measures, source.image_shape, options)
        keep = np.random.RandomState(options.seed).permutation(len(source)) < features
        seen = look_at(source, detectors, options, keep=keep)
        if is_main:
            first = seen[next(iter(measures))]
            warn_about(source, first)
            save_reference(
                dest,
                {entry: reference_of(source, seen[entry], detector) for entry, detector in detectors.items()},
            )
            say(f'Statistics of {how_many(first.stats.count, source.total, first.skipped)} written to {dest}')


# ----------------------------------------------------------------------------
# What is measured, and against what.


def check_usage(paths, ref, measures, num, bootstrap, nearest_k, network, seed_sets, sampling) -> None:
    """UsageError where options contradict each other or lack one another."""
    if bool(paths) == bool(network):
        raise click.UsageError('Give either --images or --network.')
    if bool(network) != bool(seed_sets):
        raise click.UsageError('--network and --seeds belong together: give both, or --images.')
    if paths and (idle := [name for name, value in sampling.items() if value not in (None, False)]):
        raise click.UsageError(
            f'{option_names(idle)}: the images of --images are made already; this is for --network.'
        )
    if network and num is not None:
        raise click.UsageError('--num is for --images; how many images a network makes is said by --seeds.')
    if ref is None and (needy := [name for name, measure in measures.items() if measure.compares]):
        raise click.UsageError(f'--ref is missing, and {", ".join(needy)} compare with a reference.')
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise click.UsageError('The same --images are given twice.')
    if sum(len(seeds) for _, seeds in seed_sets) > cli.MAX_NUMBERS:
        raise click.UsageError(f'--seeds: more than {cli.MAX_NUMBERS:,} in all.')
    if cli.repeated(seed for _, seeds in seed_sets for seed in seeds):
        raise click.UsageError('Some seeds are given twice; the same images again say nothing new.')
    if bootstrap and not measures.keys() & {'fid', 'fd_dinov2'}:
        raise click.UsageError('--bootstrap is for fid and fd_dinov2.')
    if nearest_k and not measures.keys() & {'precision', 'recall', 'density', 'coverage'}:
        raise click.UsageError('--nearest-k is for precision, recall, density and coverage.')


def images_of_paths(paths, num: int, options) -> list:
    """A source of each path."""
    from metrics.images import open_images

    return [open_images(path, num, options.seed, options.skip_bad) for path in paths]


def images_of_network(network: str, seed_sets, sampling: dict, batch: int) -> list:
    """A source of each set of seeds."""
    from metrics.generated import GeneratedImages
    from torch_utils import distributed
    from training.checkpoint import load_network, network_digest

    with distributed.main_process_first():
        net = load_network(network, distributed.get_device())
    arguments = sampling_arguments(net, network, **sampling)
    settings = {
        name: value for name, value in sampling.items() if name != 'labels'
    }  # a file of which may change
    identity = f'{network_digest(net, net.metadata)} {json.dumps(settings, sort_keys=True)}'
    identity += f' labels {arguments["choose_labels"].digest()}' if sampling['labels'] else ''
    given = ''.join(
        f', {option_names([name])}={value}' for name, value in sampling.items() if value not in (None, False)
    )
    return [
        GeneratedImages(
            net, seeds, batch, name=f'{network}, seeds {text}{given}', identity=identity, **arguments
        )
        for text, seeds in seed_sets
    ]


# ----------------------------------------------------------------------------
# What is said about it.


def facts_about(title: str, source, seen, detector, ref=None, reference=None) -> dict:
    """Where a value comes from, for the JSON file; `reference` only where it was compared with one."""
    facts = dict(
        name=title,
        images=source.name,
        num_images=seen.stats.count,
        total_images=source.total,
        skipped=seen.skipped,
        copies=seen.copies,
        detector=detector.name,
        detector_digest=detector.digest,
    )
    return facts | (
        dict(reference=ref, reference_images=reference.num_images) if reference is not None else {}
    )


def sentence(found: dict) -> str:
    """A result for people."""
    noise = (
        [f'95 % interval {found["interval"][0]:.6g} to {found["interval"][1]:.6g}']
        if 'interval' in found
        else []
    )
    noise += [f'{name} {found[name]:.2g}' for name in ('error', 'std') if found.get(name) is not None]
    against = f', against {found["reference"]}' if 'reference' in found else ''
    count = found.get('reference_features') or found.get('reference_images')
    of = f' ({count} images)' if count else ''
    images = how_many(found['num_images'], found['total_images'], found['skipped'])
    return (
        f'{found["name"]} {found["value"]:.6g}{"".join(f", {part}" for part in noise)}: {images} of '
        f'{found["images"]}, detector {found["detector"]}{against}{of}'
    )


def summary(found: list[dict]) -> dict:
    """The result for a measure: of one set of images its own, of several their mean, their minimum and
    each."""
    if len(found) == 1:
        return found[0]
    values = [result['value'] for result in found]
    mean, minimum = sum(values) / len(values), min(values)
    custom = (
        ' (EDM reports the minimum of three)' if found[0]['name'] == 'FID' else ''
    )  # of other measures the minimum may be the worst
    say(f'{found[0]["name"]} of {len(values)} sets: mean {mean:.6g}, minimum {minimum:.6g}{custom}')
    return dict(value=mean, mean=mean, minimum=minimum, sets=found)


@contextlib.contextmanager
def _processes():
    """Join the other processes, if there are some; yields whether this is the one that reports."""
    from torch_utils import distributed

    distributed.init()
    yield distributed.is_main()
    distributed.shutdown()


if __name__ == '__main__':
    main()
