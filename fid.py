"""Metrics of generated images: Fréchet inception distance (Heusel et al. 2017) and others in common use."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import contextlib
import json
import os

import click

from dnnlib import UserError, cli
from dnnlib.util import named, write_json
from metrics.evaluation import (
    DEFAULT_NUM,
    PAIRED_ERROR,
    Measures,
    check_detector_options,
    complete_references,
    features_of,
    how_many,
    load_detectors,
    log,
    make_folder,
    option_names,
    read_references,
    warn_about,
)
from metrics.options import LEAST_PER_CLASS, UNPAIRED, PairOptions, Resamples, feature_options, pair_options
from sampling.options import guidance_options, sampling_arguments, sampling_options
from training.guidance_options import UNGUIDED, GuidanceOptions
from training.saved_files import NETWORK_FILE

NETWORK = 'Images of a network'


class SeedSet(cli.Seeds):
    """Seeds, together with the text that was given."""

    def convert(self, value, param, ctx):
        return value if isinstance(value, tuple) else (value, super().convert(value, param, ctx))


@click.group(cls=cli.Group)
def main():
    """Compute the Fréchet inception distance (FID) and other metrics of images, and reference statistics.

    \b
    Distance of 50,000 images, in 1 or 4 processes:
      python fid.py calc --images=samples --ref=fid-refs/imagenet-64x64.npz
      torchrun --standalone --nproc_per_node=4 fid.py calc --images=samples --ref=fid-refs/imagenet-64x64.npz
    \b
    Three distances of a network, as EDM reports them, without writing images:
      python fid.py calc --network=network-snapshot-157698.pkl --ref=fid-refs/imagenet-64x64.npz \\
          --seeds=0-49999 --seeds=50000-99999 --seeds=100000-149999
    \b
    Reference statistics of a data set:
      python fid.py ref --data=datasets/imagenet-64x64.zip --dest=fid-refs/imagenet-64x64.npz

    `calc` prints the bare number to stdout, and everything else to stderr.
    Under torchrun, put `--` before fid.py if you pass --num: recent versions of torchrun have such an option
    too.
    """


@main.command()
@cli.option(
    '--images',
    'paths',
    type=cli.PATH,
    multiple=True,
    help='Images to evaluate: a folder (with subfolders), a zip, or an .npz or .npy of uint8 images. '
    'If repeated, each is evaluated by itself.',
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
    type=Measures(),
    default='fid',
    help='Metrics to compute in one pass: fid, fid_inf, kid, precision, recall, density, coverage, is, '
    'fd_dinov2; paired_error, which --pairs-with adds.',
)
@cli.option(
    '--num',
    '--num-images',
    'num',
    type=cli.TWO_IMAGES,
    help='Number of images: a random subset if there are more, an error if there are fewer.  [default: '
    f'{DEFAULT_NUM}]',
)
@cli.option(
    '--bootstrap',
    type=Resamples(),
    default=0,
    help='Resamples, 40 or more, for a 95 % interval of the sampling noise (not the bias), each as '
    'expensive as a distance; 0 disables the interval.',
)
@cli.option(
    '--bootstrap-strata',
    'strata',
    type=cli.COUNT,
    help='Number of classes, which the images are of in turn, as with --labels=balanced: each is resampled '
    'by itself.  [default: those of --network with --labels=balanced, else 1]',
)
@cli.option(
    '--nearest-k',
    type=cli.COUNT,
    help='Number of the neighbor that sets the radius of precision, recall, density and coverage.  '
    '[default: 3 for precision and recall, 5 for density and coverage]',
)
@cli.option('--json', 'json_path', type=cli.OUTPUT, help='Also write the results to this file.')
@feature_options()
@cli.option(
    '--network', type=NETWORK_FILE, group=NETWORK, help='Snapshot to evaluate without writing images.'
)
@cli.option(
    '--seeds',
    'seed_sets',
    type=SeedSet(),
    multiple=True,
    group=NETWORK,
    help='Seeds of the images of --network, such as 0-49999. If repeated, each set is evaluated by itself, '
    'followed by mean and minimum.',
)
@sampling_options(NETWORK)
@guidance_options()
@pair_options()
def calc(
    paths,
    ref,
    measures,
    num,
    bootstrap,
    strata,
    nearest_k,
    json_path,
    network,
    seed_sets,
    sampling,
    guidance,
    pairs,
    options,
):
    """Compute metrics of images, or of a network's samples, against a reference."""
    from metrics.pairs import describe_error, pairings_of
    from metrics.uncertainty import check_enough_to_extrapolate

    chosen = sampling | vars(guidance)
    check_pairs(paths, measures, seed_sets, pairs)
    # The paired error needs no features, and comes last unless it is listed.
    results = {name: [] for name in [*measures, *([PAIRED_ERROR] if pairs.pairs_with else [])]}
    measures = {name: measure for name, measure in measures.items() if measure}
    check_usage(paths, ref, measures, num, bootstrap, strata, nearest_k, network, seed_sets, chosen)
    check_detector_options(measures, options)
    with _processes() as is_main:
        # Everything that may be missing or wrong is found before the first batch.
        make_folder(json_path)
        references = read_references(ref, measures, options)
        sources = (
            images_of_network(network, seed_sets, sampling, options.batch, guidance, pairs)
            if network
            else images_of_paths(paths, num or DEFAULT_NUM, options)
        )
        for source in sources if strata else ():
            strata_of(source, len(source), strata)
        detectors = load_detectors(
            {measure.entry for measure in measures.values()}, sources[0].image_shape, options
        )
        if 'fid_inf' in measures:
            check_enough_to_extrapolate(min(map(len, sources)), detectors[measures['fid_inf'].entry].dim)
        references = complete_references(references, ref, measures, detectors, sources, options)
        pairings = []
        if pairs.pairs_with:
            labels = {name: sampling[name] for name in ('class_idx', 'labels')}
            pairings = pairings_of(sources, network, ref, references, labels, guidance, pairs, options)

        # Compute features on all processes; of all sets before any comparison, which only the main process
        # makes.
        # Mean and covariance are enough for most metrics; others need the features themselves.
        keep = any(m.features or (bootstrap and m.frechet) for m in measures.values())
        classes = {m.entry for m in measures.values() if m.classes}
        features = [features_of(source, detectors, options, keep, classes) for source in sources]
        for source, pairing in zip(sources, pairings):
            results[PAIRED_ERROR].append(pairing.error_of(source))
            log(describe_error(results[PAIRED_ERROR][-1]))

        # Compute metrics on the main process.
        for source, seen in zip(sources, features) if is_main else ():
            for first in list(seen.values())[:1]:
                warn_about(source, first, measures, detectors)
            of_classes = strata_of(source, first.stats.count, strata) if bootstrap else 1
            given = source, seen, references, ref, measures, detectors
            for name, result in compared(*given, bootstrap, of_classes, nearest_k, options.seed):
                results[name].append(result)
                log(sentence(result))

        # Write the results of all metrics; print that of the first.
        if is_main:
            summaries = {name: summary(found) for name, found in results.items()}
            if json_path is not None:
                write_json(json_path, summaries)
            click.echo(f'{summaries[next(iter(summaries))]["value"]:.10g}')


def compared(source, seen, references, ref, measures, detectors, bootstrap, strata, nearest_k, seed):
    """(name, result with the facts about it) of each measure of a source, detector by detector."""
    from metrics.measures import Comparison

    for entry, detector in detectors.items():
        given = seen[entry], references.get(entry), detector.device, bootstrap, strata, nearest_k, seed
        comparison = Comparison(*given)
        for name, measure in measures.items():
            if measure.entry != entry:
                continue
            title = measure.title.format(detector.metric_name)
            against = (ref, comparison.reference) if measure.compares else ()
            facts = facts_about(title, source, seen[entry], detector, *against)
            yield name, measure.compute(comparison) | facts


@main.command()
@cli.option(
    '--data',
    'path',
    type=cli.PATH,
    required=True,
    help='Data set: a folder (with subfolders), a zip, or an .npz or .npy of uint8 images.',
)
@cli.option('--dest', type=cli.OUTPUT, required=True, help='Output file (.npz).')
@cli.option(
    '--metrics',
    'measures',
    type=Measures('fid', 'fd_dinov2'),
    default='fid',
    help='Metrics to prepare for: fid, under the detector of --detector, and fd_dinov2.',
)
@cli.option(
    '--num',
    '--num-images',
    'num',
    type=cli.TWO_IMAGES,
    help='Size of a random subset to use.  [default: all images]',
)
@cli.option(
    '--features',
    type=cli.IMAGES,
    default=0,
    help='Also store the features of a random subset of this size, for kid, precision, recall, density and '
    'coverage.',
)
@feature_options()
def ref(path, dest, measures, num, features, options):
    """Compute reference statistics of a data set."""
    import numpy as np

    from metrics.calc import reference_of
    from metrics.images import open_images
    from metrics.reference import save_reference

    check_detector_options(measures, options)
    with _processes() as is_main:
        # Open data set and detectors; choose the images whose features are stored.
        with named('--data'):
            source = open_images(path, num, options.seed, options.skip_bad)
        make_folder(dest)
        detectors = load_detectors(measures, source.image_shape, options)
        # RandomState has the same stream in every version of NumPy.
        keep = np.random.RandomState(options.seed).permutation(len(source)) < features
        seen = features_of(source, detectors, options, keep=keep, pixels=True)

        # Write the statistics of all detectors to one file.
        if is_main:
            first = seen[next(iter(measures))]
            warn_about(source, first)
            save_reference(
                dest,
                {entry: reference_of(source, seen[entry], detector) for entry, detector in detectors.items()},
            )
            log(f'Statistics of {how_many(first.stats.count, source.total, first.skipped)} written to {dest}')


# ----------------------------------------------------------------------------
# Sources of images.


def check_usage(
    paths, ref, measures, num, bootstrap, strata, nearest_k, network, seed_sets, sampling
) -> None:
    """Raises: UsageError if options contradict or lack each other."""
    # Existing images, or those of a network.
    if bool(paths) == bool(network):
        raise click.UsageError('Give either --images or --network.')
    if bool(network) != bool(seed_sets):
        raise click.UsageError('--network and --seeds belong together: give both, or --images.')
    if paths and (unused := [name for name, value in sampling.items() if value not in (None, False)]):
        raise click.UsageError(
            f'{option_names(unused)}: applies to --network, not to the existing images of --images.'
        )
    if network and num is not None:
        raise click.UsageError('--num is for --images; for --network, --seeds sets the number of images.')
    if ref is None and (comparing := [name for name, measure in measures.items() if measure.compares]):
        raise click.UsageError(f'--ref is missing: {", ".join(comparing)} needs a reference to compare with.')

    # Sets must differ; the type of --seeds can only check each by itself.
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise click.UsageError('--images: the same path is given twice.')
    if sum(len(seeds) for _, seeds in seed_sets) > cli.MAX_NUMBERS:
        raise click.UsageError(f'--seeds: more than {cli.MAX_NUMBERS:,} in all.')
    if cli.repeated(seed for _, seeds in seed_sets for seed in seeds):
        raise click.UsageError('--seeds: some seeds are given twice.')

    # Options of particular metrics.
    if bootstrap and not measures.keys() & {'fid', 'fd_dinov2'}:
        raise click.UsageError('--bootstrap is for fid and fd_dinov2.')
    if strata and not bootstrap:
        raise click.UsageError('--bootstrap-strata is for --bootstrap: give the number of resamples.')
    if nearest_k and not measures.keys() & {'precision', 'recall', 'density', 'coverage'}:
        raise click.UsageError('--nearest-k is for precision, recall, density and coverage.')


def strata_of(source, count: int, given: int | None) -> int:
    """The number of classes that --bootstrap resamples by themselves, of `count` usable images of a source.

    Raises: UserError if the given number does not suit the images.
    """
    strata = given or source.strata or 1
    if strata == 1 or not (problem := why_not_by_class(source, count, strata)):
        return strata
    if given:
        raise UserError(f'--bootstrap-strata={given}: {problem}, or leave the option out.')
    # Resampled as if drawn, the interval is too wide and not too narrow.
    log(f'Note: the interval is that of drawn classes, and too wide: {problem}.')
    return 1


def why_not_by_class(source, count: int, strata: int) -> str | None:
    """Why `count` images of a source are not resampled as `strata` classes in turn, and the cure; None if they may be."""
    # A missing image shifts the classes of all that follow.
    if missing := source.total - count:
        return (
            f'{missing} of {source.total} images are left out, so that not all classes come in turn; give '
            f'--num={source.total}'
        )
    # The classes of a network's images are known, those of files only by their labels.
    if source.strata not in (None, strata):
        kind = f'{source.strata} classes in turn' if source.strata > 1 else 'no classes in turn'
        return f'the images of {source.name} are of {kind}; give --labels=balanced'
    classes = None if source.strata else source.classes()
    if classes is not None and (classes[strata:] != classes[:-strata]).any():
        return f'by their labels, the images of {source.name} are not of {strata} classes in turn; sample them with --labels=balanced'
    # Of one image a class, all resamples are the same.
    if count < strata * LEAST_PER_CLASS:
        return f'{count} images are fewer than {LEAST_PER_CLASS} of each class; give more'
    return None


def check_pairs(paths, measures, seed_sets, pairs: PairOptions) -> None:
    """Raises: UsageError if options of the paired error contradict or lack each other."""
    if not pairs.pairs_with:
        wants = [f'--metrics={PAIRED_ERROR}'] * (PAIRED_ERROR in measures)
        wants += ['--pairs-num'] * (pairs.pairs_num is not None)
        if wants:
            raise click.UsageError(f'{wants[0]} needs --pairs-with=PKL, the teacher.')
        return
    if paths:
        raise click.UsageError(
            '--pairs-with is for --network: files do not say of which seeds and labels their images are.'
        )
    for text, seeds in seed_sets:
        if len(seeds) < (pairs.pairs_num or 2):
            raise click.UsageError(
                f'--seeds={text} are {len(seeds)}, fewer than the {pairs.pairs_num or 2} pairs: give more '
                f'seeds{", or a smaller --pairs-num" * bool(pairs.pairs_num)}.'
            )


def images_of_paths(paths, num: int, options) -> list:
    """An image source for each path."""
    from metrics.images import open_images

    with named('--images'):
        return [open_images(path, num, options.seed, options.skip_bad) for path in paths]


def images_of_network(
    network: str,
    seed_sets,
    sampling: dict,
    batch: int,
    guidance: GuidanceOptions = UNGUIDED,
    pairs: PairOptions = UNPAIRED,
) -> list:
    """An image source for each set of seeds."""
    from metrics.generated import GeneratedImages
    from torch_utils import distributed
    from training.checkpoint import load_network
    from training.guidance import guided, model_digest, sampled_in_steps

    # The main process downloads, the others read its file.
    with distributed.main_process_first(), named('--network'):
        net = load_network(network, distributed.get_device())
    # Beside its teacher, a student is not what is guided.
    if pairs.pairs_with and sampled_in_steps(net):
        guidance = UNGUIDED
    net = guided(net, network, guidance)
    arguments = sampling_arguments(net, network, **sampling)

    # The cache is keyed by what determines the images; files of labels and guides by their contents.
    settings = {name: value for name, value in sampling.items() if name != 'labels'}
    identity = f'{model_digest(net)} {json.dumps(settings, sort_keys=True)}'
    identity += f' labels {arguments["choose_labels"].digest()}' if sampling['labels'] else ''
    # Messages and results name the options that were given.
    chosen = sampling | vars(guidance)
    given = ''.join(
        f', {option_names([name])}={value}' for name, value in chosen.items() if value not in (None, False)
    )
    return [
        GeneratedImages(
            net, seeds, batch, name=f'{network}, seeds {text}{given}', identity=identity, **arguments
        )
        for text, seeds in seed_sets
    ]


# ----------------------------------------------------------------------------
# Results.


def facts_about(title: str, source, seen, detector, ref=None, reference=None) -> dict:
    """Provenance of a value, for the JSON file; `ref` and `reference` for a metric that compares."""
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
    """A result as a sentence."""
    # The uncertainty: a bootstrap interval, or the error or spread that the metric itself has.
    noise = (
        [f'95 % interval {found["interval"][0]:.6g} to {found["interval"][1]:.6g}']
        if 'interval' in found
        else []
    )
    noise += [f'{name} {found[name]:.2g}' for name in ('error', 'std') if found.get(name) is not None]
    # The reference, and how many of its images or features took part.
    against = f', against {found["reference"]}' if 'reference' in found else ''
    count = found.get('reference_features') or found.get('reference_images')
    of = f' ({count} images)' if count else ''
    images = how_many(found['num_images'], found['total_images'], found['skipped'])
    return (
        f'{found["name"]} {found["value"]:.6g}{"".join(f", {item}" for item in noise)}: {images} of '
        f'{found["images"]}, detector {found["detector"]}{against}{of}'
    )


def summary(found: list[dict]) -> dict:
    """The result of a metric: of a single set, or else the mean, the minimum and the results of all sets."""
    if len(found) == 1:
        return found[0]
    values = [result['value'] for result in found]
    mean, minimum = sum(values) / len(values), min(values)

    # Papers report the minimum of FID only; the minimum of a score is its worst value.
    custom = ' (EDM reports the minimum of three)' if found[0]['name'] == 'FID' else ''
    log(f'{found[0]["name"]} of {len(values)} sets: mean {mean:.6g}, minimum {minimum:.6g}{custom}')
    return dict(value=mean, mean=mean, minimum=minimum, sets=found)


@contextlib.contextmanager
def _processes():
    """Initialize and shut down torch.distributed; yields whether this is the main process."""
    from torch_utils import distributed

    distributed.init()
    yield distributed.is_main()
    distributed.shutdown()


if __name__ == '__main__':
    main()
