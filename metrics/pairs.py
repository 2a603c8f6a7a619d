"""The paired error: how far a network's images are from those that a teacher makes of the same noise.

The ODE of a diffusion model maps every latent and label to one image. Distillation teaches that map, so that
a student is compared with its teacher image by image, which has a hundredth of a Fréchet distance's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.label_space import listed, space_of
from dnnlib import NotFinite, UserError
from dnnlib.util import named
from metrics import evaluation
from metrics.cache import FeatureCache
from metrics.calc import pixel_deviation, pixel_moments
from metrics.generated import GeneratedImages
from metrics.images import open_images
from metrics.options import GOOD_SOLVER, GOOD_STEPS, PAIRS, FeatureOptions, PairOptions
from metrics.reference import Reference, holds_statistics, recorded_deviation
from metrics.uncertainty import root_mean_interval
from sampling import generation
from torch_utils import distributed
from training import guidance, samplers
from training.checkpoint import load_network
from training.guidance_options import GuidanceOptions
from training.networks import encoders

QUANTILES = (0.05, 0.5, 0.95)
LEVELS = 127.5  # gray levels in a unit of [-1, 1]
TEACHERS_IMAGES = (
    "the teacher's images"  # what the deviation is of where no reference records that of the data
)


class Deviation(NamedTuple):
    """Standard deviation of all values of images in [-1, 1], and what images, for messages."""

    std: float
    of: str


class Pairing:
    """A teacher's images of seeds, with which those of other networks are compared.

    Each process computes those of its batches once, and keeps them in host memory as the network puts them out,
    before decoding, in FP64.

    Args:
        teacher: network, on its device.
        name: of the teacher, for messages.
        seeds: of the images.
        batch: images per evaluation of a network; a smaller last batch is padded.
        choose_labels: labels by seed, of both networks.
        solver, steps: how the teacher is sampled; None: see `good_sampler`.
        deviation: of the data; None takes that of the teacher's images.
        cache: folder in which the teacher's images are kept for other commands.
        labels: plain data that determine the labels of the seeds, for `cache`.
    Raises: UserError if the teacher cannot be sampled so, or adds noise while it is.
    """

    def __init__(
        self,
        teacher,
        name: str,
        seeds: Sequence[int],
        batch: int,
        choose_labels: generation.LabelChooser,
        solver: str | None = None,
        steps: int | None = None,
        deviation: Deviation | None = None,
        cache: str | None = None,
        labels: dict | None = None,
    ):
        self.teacher, self.name, self.seeds, self.batch = teacher, name, seeds, batch
        self.choose_labels, self.deviation = choose_labels, deviation
        self.solver, self.steps = good_sampler(teacher, solver, steps)
        check_deterministic(teacher, name, self.solver, self.steps)
        starts = range(0, len(seeds), batch)
        self.parts = [range(start, min(start + batch, len(seeds))) for start in starts]
        self._outputs: dict[int, Tensor] = {}  # by the first image of each batch, on the host
        self._cache = None
        if cache:
            facts = dict(
                network=guidance.model_digest(teacher),
                sampler=[self.solver, self.steps],
                labels=labels,
                seeds=list(seeds),
                batch=batch,
            )
            self._cache = FeatureCache(cache, 'paired-images', facts)

    @property
    def sampler(self) -> str:
        """`heun, 511 evaluations each`"""
        return guidance.describe(self.teacher, self.solver, self.steps)

    def error(
        self,
        net,
        name: str,
        advance: Callable[[int], object] = lambda count: None,
        stop: Callable[[], bool] | None = None,
        **arguments,
    ) -> dict | None:
        """The paired error of a network, computed by all processes together, the same on all.

        With x_i and y_i the images of network and teacher for seed i, in [-1, 1], decoded, but neither clamped
        nor rounded, e_i² is the mean of (x_i − y_i)² over an image's values, and with the data's standard
        deviation s over all values

            paired error = √(mean of e_i² over images) / s.

        Args:
            name: of the network, for messages.
            advance: called with the number of pairs, over all processes, that each step completes.
            stop: polled by all processes together; once it returns True, the result is None.
            arguments: solver, steps and options of `samplers.sample`.
        Returns: `value`; `interval`, of 95 %; `quantiles` of e_i / s over images, by percent; `num_images`;
            `deviation`, s, and `deviation_of`, what it is of.
        Raises: NotFinite, on all processes, if an image is not finite; UserError if the network's images have no
            pairs.
        """
        self.check(net, name, **arguments)
        encoder = encoders.encoder_of(net, next(net.parameters()).device)
        rank, processes = distributed.get_rank(), distributed.get_world_size()

        # Processes take batches round-robin. [n, 5] each: e_i², which images are finite, moments of y_i.
        found = {}
        for k in range(rank, len(self.parts), processes):
            part = self.parts[k]
            x = self._sample(net, part, **arguments)
            y = self._good(part).to(x.device)
            found[part.start] = compare(encoder, x, y)
            advance(sum(map(len, self.parts[k - rank : k - rank + processes])))
            # `stop` is collective: only in rounds in which every process has a batch.
            if stop and k - rank + processes <= len(self.parts) and stop():
                return None
        if stop and stop():
            return None

        # All processes have all rows, and so the same result.
        rows = {start: values.cpu() for start, values in found.items()}
        rows = {start: v for share in distributed.gather_objects(rows) for start, v in share.items()}
        squares, finite, good_is_finite, mean, square = (
            torch.cat([rows[part.start] for part in self.parts]).numpy().T
        )
        self._check_finite(name, finite)
        self._check_finite(f'{self.name} ({self.sampler})', good_is_finite)
        of_teacher = Deviation(float(np.sqrt(max(square.mean() - mean.mean() ** 2, 0))), TEACHERS_IMAGES)
        std, of = self.deviation or of_teacher
        return dict(summary(squares, std), deviation=std, deviation_of=of)

    def check(self, net, name: str, **arguments) -> None:
        """Raises: UserError if images of the network, sampled so, have no pairs."""
        check_pair(net, name, self.teacher, self.name)
        check_deterministic(net, name, **arguments)

    def error_of(self, source: GeneratedImages) -> dict:
        """The paired error of images of a network, and how it was found, for fid.py; with a progress bar on
        terminals. NotFinite ends all processes with one message."""
        with distributed.progress(total=len(self.seeds), unit='pair', leave=True) as bar:
            try:
                found = self.error(source.net, source.name, bar.update, **sampler_of(source))
            except NotFinite as error:
                distributed.fail_together(str(error))
        how = dict(solver=self.solver, steps=self.steps, sampler=self.sampler)
        return dict(
            found, name='Paired error', images=source.name, reference=self.name, reference_sampler=how
        )

    def _sample(self, net, part: range, **arguments) -> Tensor:
        """Outputs of a network for the seeds of a batch, [n, C, H, W] float64 on its device."""
        # Pad a smaller last batch: rounding may depend on the batch size.
        seeds = [self.seeds[i] for i in part]
        padded = seeds + seeds[-1:] * (self.batch - len(seeds))
        return generation.generate_latents(net, padded, self.choose_labels, **arguments)[: len(seeds)]

    def _good(self, part: range) -> Tensor:
        """The teacher's outputs for a batch: computed before, in the cache, or computed now."""
        if part.start not in self._outputs:
            cached = self._cache and self._cache.load(part, {'outputs'})
            if cached:
                outputs = torch.from_numpy(cached['outputs'])
            else:
                outputs = self._sample(self.teacher, part, solver=self.solver, steps=self.steps).cpu()
                if self._cache and outputs.isfinite().all():
                    self._cache.save(part, dict(outputs=outputs.numpy()))
            self._outputs[part.start] = outputs
        return self._outputs[part.start]

    def _check_finite(self, name: str, finite: np.ndarray) -> None:
        bad = [self.seeds[i] for i in np.flatnonzero(finite == 0)]
        if bad:
            raise NotFinite(
                f'{name}: {generation.nonfinite_seeds(bad, len(self.seeds))}. There is no paired error: the '
                'network is broken for these seeds, or overflows with these sampling options or in this '
                'precision.',
                nonfinite=len(bad),
            )


def compare(encoder, x: Tensor, y: Tensor) -> Tensor:
    """[n, 5] float64 of outputs x, y [n, C, H, W]: mean of (x − y)², whether x and y are finite, means of y, y²."""
    # Gray levels are the last form before rounding and clamping, of pixels as of latents.
    ours, theirs = (encoder.decode_levels(outputs).double() / LEVELS for outputs in (x, y))
    finite = [
        generation.all_finite(outputs) & generation.all_finite(levels)
        for outputs, levels in ((x, ours), (y, theirs))
    ]
    average = lambda values: values.flatten(1).mean(dim=1)
    columns = [average((ours - theirs).square()), *finite, average(theirs), average(theirs.square())]
    return torch.stack([column.double() for column in columns], dim=1)


def summary(squares: np.ndarray, std: float) -> dict:
    """Paired error, interval and quantiles of e_i² [n], relative to a standard deviation.

    Raises: UserError if there is no deviation to compare with.
    """
    if not std > 0:
        raise UserError(
            'There is no paired error: all values of the images are equal, so that they have no deviation.'
        )
    low, high = root_mean_interval(squares)
    quantiles = np.quantile(np.sqrt(squares), QUANTILES) / std
    return dict(
        value=float(np.sqrt(squares.mean()) / std),
        interval=[low / std, high / std],
        quantiles={f'{100 * q:g}': float(value) for q, value in zip(QUANTILES, quantiles)},
        num_images=len(squares),
    )


def describe_error(found: dict) -> str:
    """A result of `Pairing.error_of` as a sentence."""
    low, high = found['interval']
    quantiles = ', '.join(f'{percent} % {value:.3g}' for percent, value in found['quantiles'].items())
    return (
        f'{found["name"]} {found["value"]:.6g}, 95 % interval {low:.6g} to {high:.6g}; quantiles over images '
        f'{quantiles}: the first {found["num_images"]} images of {found["images"]}, against those of '
        f'{found["reference"]} ({found["reference_sampler"]["sampler"]}), over the deviation '
        f'{found["deviation"]:.4g} of {found["deviation_of"]}'
    )


# ----------------------------------------------------------------------------
# From options of a command to pairings.


def pairings_of(
    sources: list[GeneratedImages],
    network: str,
    ref: str | None,
    references: dict[str, Reference],
    labels: dict,
    guided_by: GuidanceOptions,
    pairs: PairOptions,
    options: FeatureOptions,
) -> list[Pairing]:
    """A pairing for each set of images of one network, all checked before any is sampled.

    Args:
        network: its name.
        ref, references: of fid.py, from which the deviation of the data comes.
        labels: values of --class and --labels.
    Raises: UserError if the network has no pairs with that of --pairs-with.
    """
    source, (name, solver, steps) = sources[0], pairs.pairs_with
    teacher = load_teacher(name, source.net, network, guided_by)
    deviation = data_deviation(ref, references, options)
    choose_labels = source.arguments['choose_labels']

    # What determines labels besides the seeds.
    facts = dict(class_idx=labels['class_idx'], **space_of(source.net).record())
    if labels['labels']:
        facts |= dict(labels=choose_labels.digest())
    made = []
    for each in sources:
        seeds = each.seeds[: pairs.pairs_num or PAIRS]
        made.append(
            Pairing(
                teacher,
                name,
                seeds,
                options.batch,
                choose_labels,
                solver,
                steps,
                deviation,
                options.cache,
                facts,
            )
        )
    made[0].check(source.net, network, **sampler_of(source))
    evaluation.log(f'Pairs with {name} ({made[0].sampler}).')
    return made


def sampler_of(source: GeneratedImages) -> dict:
    """How the images are sampled, without the labels."""
    return {key: value for key, value in source.arguments.items() if key != 'choose_labels'}


def load_teacher(name: str, net, network: str, o: GuidanceOptions):
    """The network of --pairs-with; a diffusion model is guided as the options say.

    Raises: UserError if it cannot be loaded or guided.
    """
    device = next(net.parameters()).device
    with named('--pairs-with'), distributed.main_process_first():
        teacher = load_network(name, device)
    teacher = guidance.guided(teacher, name, o)

    # A student of a guided teacher is compared with that.
    record = getattr(net, 'metadata', {})
    if record.get('guidance') is not None and guidance.sampled_in_steps(net) and o.guide is None:
        evaluation.log(
            f'Warning: {network} was distilled from a teacher that was guided (--guide={record.get("guide")} '
            f'--guidance={record["guidance"]:g}), and {name} is not: the paired error includes the '
            'difference. Add these options.'
        )
    return teacher


def data_deviation(
    ref: str | None, references: dict[str, Reference], options: FeatureOptions
) -> Deviation | None:
    """The deviation of the data behind --ref; None without a reference, or if it does not record that.

    Args:
        references: by entry, as far as they are loaded.
    """
    if ref is None:
        return None
    std = next((each.pixel_std for each in references.values() if each.pixel_std is not None), None)
    if std is None:
        with named('--ref'):
            std = recorded_deviation(ref) if holds_statistics(ref) else deviation_of_images(ref, options)
    if std is None:
        evaluation.log(
            f'Note: {ref} does not record the standard deviation of its images, so that of '
            f'{TEACHERS_IMAGES} is used; fid.py ref records it.'
        )
    return None if std is None else Deviation(std, ref)


def deviation_of_images(path: str, options: FeatureOptions) -> float:
    """Standard deviation of all values of the images at a path, in [-1, 1]; processes share the work."""
    source = open_images(path, None, options.seed, options.skip_bad)
    parts = list(
        generation.split_batches(
            range(len(source)), options.batch, distributed.get_rank(), distributed.get_world_size()
        )
    )
    moments = [pixel_moments(images).sum(dim=0) for _, images, _ in source.stream(parts, options.workers)]
    shares = distributed.gather_objects(torch.stack(moments).sum(dim=0) if moments else torch.zeros(3).long())
    return pixel_deviation(torch.stack(shares))


# ----------------------------------------------------------------------------
# Which networks and samplers have pairs.


def good_sampler(net, solver: str | None, steps: int | None) -> tuple[str, int]:
    """The solver and steps of a teacher's good images: by default Heun's with 511 evaluations; of a student or a
    consistency model its own. Raises: UserError if they do not apply."""
    if guidance.sampled_in_steps(net) is None:
        solver, steps = solver or GOOD_SOLVER, steps or GOOD_STEPS
    return samplers.resolve(net, solver, steps)


def check_deterministic(
    net, name: str, solver: str | None = None, steps: int | None = None, **options
) -> None:
    """Raises: UserError if sampling adds noise after the first, so that an image has no pair."""
    drawn = []

    def randn_like(x):
        drawn.append(x.shape)
        return torch.zeros_like(x)

    # The sampler itself tells, by sampling one pixel from the identity.
    pixel = torch.zeros(1, net.img_channels, 1, 1)
    denoiser = generation.IdentityDenoiser(net)
    samplers.sample(denoiser, pixel, solver=solver, steps=steps, randn_like=randn_like, **options)
    if drawn:
        solver, _ = samplers.resolve(net, solver, steps, **options)
        cure = dict(cm='sample it in one step, or ', ancestral='').get(solver, 'leave S_churn out, or ')
        raise UserError(
            f'{name} is sampled with noise that is drawn on the way, so its images are not a function of '
            f'latent and label, and have no pairs: {cure}leave the paired error out.'
        )


def check_pair(net, name: str, teacher, teacher_name: str) -> None:
    """Raises: UserError, naming what differs, unless both networks make the same kind of images and labels."""
    # Size and labels.
    ours, theirs = space_of(net), space_of(teacher)
    sizes = [(each.img_resolution, each.img_channels) for each in (net, teacher)]
    if sizes[0] != sizes[1] or ours.differs(theirs):
        describe = lambda size, labels: f'{size[0]}x{size[0]}x{size[1]} with {labels}'
        raise UserError(
            f'{name} makes images of {describe(sizes[0], ours)}, and {teacher_name} of '
            f'{describe(sizes[1], theirs)}: they have no pairs. Give the teacher that it was distilled from.'
        )
    # Of a class that it has never seen, the teacher makes noise.
    if untaught := sorted({*theirs.absent} - {*ours.absent}):
        raise UserError(
            f'{teacher_name} has seen no images of classes {listed(untaught)}, of which {name} makes '
            'images: give the teacher that it was distilled from.'
        )
    # Latents of two encoders are not comparable.
    records = [each.metadata.get('encoder') for each in (net, teacher)]
    if records[0] != records[1]:
        decoders = [record['class_name'] if record else 'pixels' for record in records]
        raise UserError(
            f'{name} makes what {decoders[0]} decodes, and {teacher_name} what {decoders[1]} decodes'
            f'{" with other arguments" * (decoders[0] == decoders[1])}: they have no pairs. Give the '
            'teacher that it was distilled from.'
        )
