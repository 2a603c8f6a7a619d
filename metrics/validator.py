"""Fréchet distance and paired error of a network's samples, during training and for saved snapshots."""

from __future__ import annotations

import math
import os
import re
import time
from typing import TYPE_CHECKING

import click

from dnnlib import EasyDict, NotFinite, UserError, cli
from dnnlib.text import printable

if TYPE_CHECKING:
    from data.label_space import LabelSpace
    from metrics.pairs import Pairing
    from torch_utils.preemption import PreemptionHandler

SHOWN = 64  # most samples in a grid

# Of `samplers.sample`, besides solver and steps.
SAMPLING = ('order', 'afs', 'to_zero', 'discretization', 'sigmas')

LABEL_MODES = ('auto', 'uniform', 'dataset')


class LabelMode(click.ParamType):
    """auto | uniform | dataset | fixed:K."""

    name = 'mode'

    def convert(self, value, param, ctx):
        if value not in LABEL_MODES and not re.fullmatch('fixed:[0-9]{1,9}', value):
            self.fail(
                f'{cli.shown(value)} is not auto, uniform, dataset or fixed:K (K a class index)', param, ctx
            )
        return value


def label_chooser(mode: str, space: LabelSpace, dataset=None):
    """Labels of generated images, as a function for `generation.generate_batch`.

    `uniform`: over the classes that have images; `dataset`: labels of random training images; `fixed:K`:
    class K; `auto`: `dataset` if it has labels, else `uniform`.
    Raises: UserError if networks with these labels cannot be sampled this way.
    """
    from sampling import generation, label_choosers

    has_labels = dataset is not None and dataset.has_labels
    if mode.startswith('fixed:'):
        space.check_class(int(mode[6:]), f'label mode {mode}', 'the network')
        return generation.fixed_labels(int(mode[6:]))

    # Modes that need something that the data set does not have.
    if mode == 'dataset' and not has_labels:
        raise UserError(
            'label mode dataset needs labeled training data: train with --cond=1, or use uniform; of a '
            'snapshot, --labels=data'
        )
    if mode == 'uniform' and space.are_vectors and has_labels:
        raise UserError(
            f'label mode uniform is for classes, and the training set has {space}: use auto or dataset'
        )
    if mode == 'uniform' or not has_labels:
        return generation.uniform_over(space)
    return label_choosers.DrawnLabels(dataset.labels)


def read_reference(options: EasyDict, option_prefix: str = 'val_'):
    """Statistics of `ref`, or images of `ref_data` to compute them from; before anything else is loaded.

    Raises: UserError, naming the option, if they are missing or unusable, or another detector's.
    """
    from dnnlib.util import named
    from metrics.detectors import INCEPTION_URL
    from metrics.images import open_images
    from metrics.reference import check_before_download, load_reference
    from torch_utils import distributed

    with distributed.main_process_first(), named(f'--{option_prefix}{"ref" if options.ref else "ref_data"}'):
        if not options.ref:
            return open_images(options.ref_data)
        reference = load_reference(options.ref)
        check_before_download(reference, options.ref, options.detector or INCEPTION_URL)
        return reference


def sampler_of(options: EasyDict, net, steps: int | None) -> tuple[str, int, dict]:
    """Solver, steps and other options of sampling a network, by the options of a `Validator`.

    Raises: UserError if they do not fit the network.
    """
    from training import samplers

    # Records of older versions have none of these.
    given = {name: value for name in SAMPLING if (value := options.get(name)) is not None}
    if not given.get('afs'):
        given.pop('afs', None)  # not an option of students
    return *samplers.resolve(net, options.get('solver'), steps, **given), given


def check_sampler(options: EasyDict, net=None) -> None:
    """Check a chosen solver and its options; with a diffusion model, also its noise levels. Raises: UserError."""
    if any(options.get(name) not in (None, False) for name in ('solver', *SAMPLING)):
        sampler_of(options, net, options.steps)


def check_files(options: EasyDict, dataset) -> None:
    """Check reference, detector, labels and, if given, the solver of a diffusion model, downloading URLs.

    Raises: UserError, naming the option.
    """
    from dnnlib.util import named
    from metrics.detectors import load_detector
    from torch_utils import distributed

    check_sampler(options)

    read_reference(options)
    label_chooser(options.label, dataset.label_space, dataset)
    if options.detector:
        with distributed.main_process_first(), named('--val_detector'):
            load_detector(options.detector, 'cpu')


# ----------------------------------------------------------------------------
# The validator.


class Validator:
    """Evaluates networks against one reference, on all processes together.

    Args:
        options: ref or ref_data, detector, steps, num, batch, seed, label, dump_images_dir, overwrite (as
            train.py's --val_* options), and optionally labels, as --labels of generate.py, solver and SAMPLING.
        dataset: training set whose labels `--val_label` may follow, or None.
        run_dir: folder of metrics-val.jsonl.
        device: where networks and detector run.
        image_shape, space: [C, H, W] and labels of the networks.
        encoder: arguments of `encoders.build`, which decodes their outputs to pixels.
        option_prefix: prefix of option names in messages: `val_` in train.py.
        teacher: for the paired error, (network, its name, solver, steps), the last two as of `pairs.Pairing`, and
            `options.pairs` images of it; None for none.
    Raises: UserError for an unusable reference, detector, VAE, label mode or folder, before the first
        evaluation.
    """

    def __init__(
        self,
        options: EasyDict,
        dataset,
        run_dir: str,
        device,
        image_shape: list[int],
        space: LabelSpace,
        encoder: dict | None = None,
        option_prefix: str = 'val_',
        teacher: tuple | None = None,
    ):
        import torch

        from dnnlib.util import named
        from metrics.detectors import INCEPTION_URL, load_detector
        from metrics.reference import check_same_detector
        from torch_utils import distributed
        from training.networks import encoders

        # Detector and reference stay loaded for all evaluations.
        self.options, self.dataset, self.run_dir, self.device = options, dataset, run_dir, device
        reference = read_reference(options, option_prefix)
        with distributed.main_process_first():
            # One image through decoder and detector shows their shapes, and that both work.
            pixels = encoders.build(encoder, device).decode(torch.zeros([1, *image_shape], device=device))
            with named(f'--{option_prefix}detector'):
                self.detector = load_detector(options.detector or INCEPTION_URL, device)
            self.detector(pixels)  # sets `dim`
        if options.ref:
            self.reference = reference
            check_same_detector(self.reference, self.detector, options.ref, list(pixels.shape[1:]))
        else:
            self.reference = self._reference_of(reference)

        # Labels and the folder of images.
        if not options.get('labels'):
            label_chooser(options.label, space, dataset)
        dump = options.dump_images_dir
        if dump and os.path.isdir(dump) and os.listdir(dump) and not options.overwrite:
            raise UserError(
                f'{dump} holds images of an earlier run: add --val_overwrite=1, or choose another folder'
            )
        distributed.barrier()  # all processes check the folder before any writes
        self.pairing = self._pairing_with(*teacher) if teacher else None

    def _pairing_with(self, teacher, name: str, solver: str | None, steps: int | None) -> Pairing:
        """Images of the teacher, made at the first evaluation, with the seeds and labels of the others."""
        from metrics.pairs import Deviation, Pairing
        from torch_utils import distributed

        seeds = range(self.options.seed, self.options.seed + self.options.pairs)
        # Computed from images, only the main process knows it.
        std = distributed.broadcast_object(self.reference.pixel_std)
        return Pairing(
            teacher,
            name,
            seeds,
            self.options.batch,
            self._label_chooser(teacher),
            solver,
            steps,
            None if std is None else Deviation(std, self.options.ref or self.options.ref_data),
        )

    def check_pairs(self, net, name: str = 'the network', steps: int | None = -1) -> None:
        """Raises: UserError if the network, with its metadata, has no pairs. `steps`: as for `run`."""
        if self.pairing:
            solver, steps, sampling = sampler_of(
                self.options, net, self.options.steps if steps == -1 else steps
            )
            self.pairing.check(net, name, solver=solver, steps=steps, **sampling)

    def _reference_of(self, source):
        from metrics.calc import compute_features, reference_of

        seen = compute_features(source, {'': self.detector}, self.options.batch, pixels=True)['']
        return reference_of(source, seen, self.detector)

    def run(
        self,
        net,
        nimg: int,
        ema: str,
        steps: int | None = -1,
        metadata: dict | None = None,
        stop: PreemptionHandler | None = None,
    ) -> dict | None:
        """Evaluate `options.num` images of `net`.

        Args:
            steps: sampling steps; None for the network's default, -1 for `options.steps`.
            metadata: snapshot metadata for a network in training, such as its noise levels.
            stop: if requested on any process, the evaluation is abandoned on all and the result is None.
        Returns: a line of metrics-val.jsonl, `{"kimg", "nimg", "fid", ...}`. If images or features are not
            finite, `fid` is None, and the line has `problem` and their number, `nonfinite` or
            `nonfinite_features`; if only images of pairs are not, `paired_error` is None.
        """
        from metrics.calc import compute_features
        from metrics.frechet import frechet_distance
        from training import guidance, samplers

        # What is sampled.
        start = time.monotonic()
        if metadata is not None:
            net.metadata = metadata
        if steps == -1:
            solver, steps, sampling = sampler_of(self.options, net, self.options.steps)
            chosen = bool(sampling or self.options.get('solver'))
        else:
            (solver, steps), sampling, chosen = samplers.resolve(net, None, steps), {}, False

        # The distance; non-finite values are a result, not the end of training.
        fid, paired, failure = None, self.pairing and {}, {}
        try:
            seen = compute_features(
                self._images(net, solver, steps, sampling, nimg, ema),
                {'': self.detector},
                self.options.batch,
                stop=stop and stop.anywhere,
            )
            # Abandoned, by all processes together.
            if seen is None:
                return None
            stats = seen[''].stats
            fid = frechet_distance(stats.mu, stats.sigma, self.reference.mu, self.reference.sigma)
            if self.pairing:
                how = dict(solver=solver, steps=steps, **sampling)
                paired = self.pairing.error(net, 'the network', stop=stop and stop.anywhere, **how)
                if paired is None:
                    return None
        except NotFinite as error:
            failure = dict(error.counts, problem=str(error))
        return dict(
            kimg=nimg / 1e3,
            nimg=nimg,
            fid=fid,
            num_images=self.options.num,
            steps=steps,
            nfe=samplers.evaluations(solver, steps, **sampling)
            + guidance.guide_evaluations(net, solver, steps, **sampling),
            ema=ema,
            **(dict(sampling=dict(solver=solver, **sampling)) if chosen else {}),
            **(dict(guidance=net.record()) if isinstance(net, guidance.GuidedDenoiser) else {}),
            **(self._paired_entries(paired) if self.pairing else {}),
            seconds=round(time.monotonic() - start, 3),
            **failure,
        )

    def _paired_entries(self, found: dict) -> dict:
        """The entries of a line about the paired error; `found` is empty where it failed."""
        return dict(
            paired_error=found.get('value'),
            paired_interval=found.get('interval'),
            paired_quantiles=found.get('quantiles'),
            num_pairs=self.options.pairs,
            paired_with=dict(solver=self.pairing.solver, steps=self.pairing.steps),
        )

    def _label_chooser(self, net):
        from data.label_space import space_of
        from sampling.label_choosers import choose

        if self.options.get('labels'):
            return choose(net, 'the network', labels=self.options.labels)
        space = space_of(net) if self.dataset is None else self.dataset.label_space
        return label_chooser(self.options.label, space, self.dataset)

    def sample_grid(self, net, nimg: int, ema: str) -> str | None:
        """Write the first images that `run` evaluates as `fakes-<nimg>-<ema>.png`, small ones enlarged.

        Returns: its path; None except on the main process. Raises: NotFinite if an image is not finite;
        UserError if the file cannot be written.
        """
        from sampling import generation
        from torch_utils import distributed

        if not distributed.is_main():
            return None

        # Sample in the same batches as `run`.
        # About 512 pixels wide, of `SHOWN` images at most.
        columns = min(max(512 // net.img_resolution, 2), math.isqrt(SHOWN))
        solver, steps, sampling = sampler_of(self.options, net, self.options.steps)
        choose = self._label_chooser(net)
        seeds = range(self.options.seed, self.options.seed + columns**2)
        batches = [
            generation.generate_checked(net, batch, choose, solver, steps, **sampling)
            for batch in generation.split_batches(seeds, self.options.batch)
        ]
        picture = generation.image_grid(generation.finite_images(batches, seeds), columns)
        path = os.path.join(self.run_dir, f'fakes-{nimg:09d}-{ema}.png')
        generation.save_picture(picture, path)
        return path

    def _images(self, net, solver: str, steps: int, sampling: dict, nimg: int, ema: str):
        from metrics.generated import GeneratedImages
        from sampling.writers import FolderDestination
        from torch_utils import distributed

        # Images of an earlier evaluation stay in the folder: warn.
        choose = self._label_chooser(net)
        seeds = range(self.options.seed, self.options.seed + self.options.num)
        folder = self.options.dump_images_dir and os.path.join(
            self.options.dump_images_dir, f'{nimg:09d}-{ema}'
        )
        if folder and distributed.is_main() and (others := FolderDestination(folder).others(seeds)):
            print(
                printable(
                    f'Warning: {folder} holds {sum(map(len, others.values()))} images of an earlier '
                    'evaluation: a metric of the folder would include them.'
                )
            )
        return GeneratedImages(
            net, seeds, self.options.batch, choose, solver, steps, name='the network', dump=folder, **sampling
        )
