"""From options, data and teacher to the configuration of a run, plain data, which `training_loop` takes.

Options that contradict the files they name are `UserError`s here; `command_line` refuses options that
contradict each other.
"""

from __future__ import annotations

import dataclasses
import re

import click

from dnnlib import EasyDict, UserError
from dnnlib.options import options_of
from dnnlib.text import as_ranges
from dnnlib.util import named
from metrics.validator import SHOWN
from sampling import level_list
from training.architectures import ARCHITECTURES
from training.command_line import RUN, Options
from training.config import IN_STEPS, RunConfig
from training.guidance import GuidedDenoiser, unguided
from training.run_folder import planned_run_dir
from training.same_run import data_record
from training.snapshot_metadata import GUIDANCE
from training.starting_point import (
    check_differentiable,
    edm2_width,
    is_edm2,
    network_from_scratch,
    network_of_teacher,
)


def resolve_defaults(o: Options, dataset, teacher, earlier: dict | None) -> Options:
    """The options with all defaults that depend on other options, the data, the teacher or the resumed run.

    Args:
        o: options of a new or resumed run; its seed is known.
        earlier: configuration of the run that is resumed.
    Raises: UserError or click.UsageError if they do not go together.
    """
    if dataset.holds_latents and o.run.augment:
        raise UserError(
            f'--augment={o.run.augment:g} is for images, but --data={o.run.data} holds latents: leave it out.'
        )

    # Defaults.
    defaults = late_defaults(o, dataset, teacher)
    o = o.but(**{name: value for name, value in defaults.items() if name not in o.given})
    run = o.run
    if run.lr_schedule == 'sqrt' and not run.lr_decay:
        raise click.UsageError('--lr_schedule=sqrt needs --lr_decay=STEPS.')
    if run.lr_schedule != 'sqrt' and run.lr_decay:
        raise click.UsageError(f'--lr_decay is for --lr_schedule=sqrt, not {run.lr_schedule}.')
    if run.phema_snap is not None and not run.phema:
        raise click.UsageError('--phema_snap needs --phema.')

    # Options that follow from others. Latents take a decoder to show, which may be a download.
    shown = 0 if dataset.holds_latents else SHOWN
    o = o.but(
        sample_grid=shown if run.sample_grid is None else run.sample_grid,
        precision=run.arithmetic,
        ls=run.ls or ('dynamic' if run.arithmetic == 'fp16' else 1.0),
        phema_snap=run.snap if run.phema_snap is None else run.phema_snap,
        sigma_data=float(getattr(teacher, 'sigma_data', 0.5)),
    )
    if hasattr(o.own, 'classes'):
        known = dataset.label_space
        o = o.but(classes=as_ranges(known.with_images) if known.dim and not known.are_vectors else None)
    # Lengths in images follow from the batch and the duration, known by now.
    o = o.but(**lengths(o, earlier))

    # Checks of the objective's schedule, and the teacher's range of noise levels.
    if getattr(o.own, 'of_solution', 0) and o.run.augment:
        raise UserError(
            f"--augment={o.run.augment:g} changes images, and the teacher's stored solutions begin at "
            'noise: use --augment=0, or --target=hop.'
        )
    if o.objective.auxiliary and o.own.aux_ahead + 1 >= training_steps(o):
        raise UserError(
            f'--aux_ahead={o.own.aux_ahead}: of the {training_steps(o)} optimizer steps of this run none '
            'trains the student. Lower it, or raise --duration.'
        )
    if run.objective == 'ect':
        check_stages(o)
    if run.objective == 'tcm':
        check_truncation(o, teacher)
    if run.objective == 'ict':
        check_edges(o)
    if hasattr(o.own, 'sigma_min'):
        from training import samplers

        low, high = samplers.clip_range(teacher, o.own.sigma_min, o.own.sigma_max)
        o = o.but(sigma_min=low, sigma_max=high)
    return o


def late_defaults(o: Options, dataset, teacher) -> dict[str, object]:
    """{option: default} of options that depend on the objective or the network."""
    objective, teacher = o.objective, unguided(teacher)

    # EDM2's networks.
    edm2 = {}
    if is_edm2(o, teacher):
        edm2 = objective.edm2_defaults(edm2_width(o, teacher), dataset.holds_latents)
    if limit := edm2.pop('max_dropout_resolution', None):
        levels = o.run.cres or ARCHITECTURES['edm2']['channel_mult']
        edm2['dout_resolutions'] = [
            res for i in range(len(levels)) if (res := dataset.resolution >> i) <= limit
        ]

    # In a run that is shorter than usual; what a resumed run has stored is among what is given. The rounds of
    # progressive distillation are as long as --stage_steps says.
    usual = objective.defaults | edm2
    duration = usual.get('duration') or objective.own_defaults['stage_steps'] * usual['batch'] / 1e6
    share = o.run.duration / duration if 'duration' in o.given else 1
    defaults = scaled(usual, min(share, 1))
    if o.stored:  # a resumed run without it has dropout everywhere
        defaults.pop('dout_resolutions', None)
    if dataset.holds_latents:
        defaults['augment'] = 0.0
    if (o.run.lr_schedule if 'lr_schedule' in o.given else defaults['lr_schedule']) != 'sqrt':
        defaults.pop('lr_decay', None)
    return defaults


def scaled(defaults: dict[str, object], share: float) -> dict[str, object]:
    """The defaults for a run of this share, up to 1, of the usual length: ramp and average take the same share of
    it as usual."""
    names = [option.name for option in RUN.values() if option.scales and defaults.get(option.name)]
    return defaults | {name: defaults[name] * share for name in names if share < 1}


def lengths(o: Options, earlier: dict | None) -> dict[str, float]:
    """The objective's lengths in images: from options in optimizer steps, the resumed run, or by default."""
    found = {}
    recorded = (earlier or {}).get('loss') or {}
    fields = {field.name for field in dataclasses.fields(o.own)}
    for steps, (name, unit) in IN_STEPS.items():
        if not {name, steps} <= fields:
            continue
        # The option, given in steps or already in images; the resumed run; the default.
        if (count := getattr(o.own, steps)) is not None:
            value = count * o.run.batch / unit
        elif getattr(o.own, name) is not None:
            continue
        else:
            value = recorded.get(name, default_length(o, steps) / unit)
        found[name] = round(value) if unit == 1 else value
    return found | (dict(batch_size=o.run.batch) if 'batch_size' in fields else {})


def training_steps(o: Options) -> int:
    """Optimizer steps of the run."""
    return -(-total_images(o) // o.run.batch)


def total_images(o: Options) -> int:
    """--duration in images."""
    return max(round(o.run.duration * 1e6), 1)


def default_length(o: Options, option: str) -> float:
    """Default of an option of `IN_STEPS`, in images.

    T rises over half of the run, and a grid grows over all of it. ECT goes through as many stages as suit its
    q, the last of which may be shorter. The tangent of continuous-time models is warmed up over a tenth, and at
    most as in their paper.
    """
    if option == 'T_anneal_steps':
        return o.run.duration * 1e6 / 2
    if option == 'schedule_steps':
        return training_steps(o) * o.run.batch
    if option == 'tangent_warmup':
        return min(training_steps(o) // 10, 10_000) * o.run.batch
    if o.run.objective != 'ect':
        return 0
    from training.objectives import time_schedules as times

    return -(-training_steps(o) // times.tuning_stages(o.own.q)) * o.run.batch


def check_stages(o: Options) -> None:
    """Raises: UserError if ECT has so many stages that in the last one its two times are equal."""
    import torch

    from training.objectives import time_schedules as times

    # The two times are closest in the last stage.
    try:
        times.earlier_time(
            torch.ones(1),
            times.tuning_stage((training_steps(o) - 1) * o.run.batch, o.own.stage_nimg),
            o.own.q,
        )
    except ValueError as error:
        raise UserError(f'--stage_steps, --q: {error}.') from error


def check_perceptual(c: EasyDict) -> None:
    """Raises: UserError if the loss compares images by LPIPS, without its weights, or with latents."""
    if c.loss.get('cm_loss') != 'lpips':
        return
    from metrics import lpips
    from torch_utils import distributed

    if c.network.kwargs['img_channels'] not in (1, 3):
        raise UserError('--cm_loss=lpips compares images, not latents: use --cm_loss=pseudo_huber.')
    with distributed.main_process_first():
        lpips.load(c.loss.lpips, 'cpu')


def check_truncation(o: Options, teacher) -> None:
    """Raises: UserError if TCM has no times to train at, or too small a batch for its boundary."""
    import torch

    from training import samplers
    from training.objectives import time_schedules as times

    # The dividing time.
    low, high = samplers.clip_range(teacher, o.own.sigma_min, o.own.sigma_max)
    if not low < o.own.dividing_t < high:
        raise UserError(
            f'--dividing_t={o.own.dividing_t:g} does not lie between the noise levels {low:g} and {high:g}.'
        )

    # The batch.
    try:
        times.boundary_count(o.run.batch, o.own.boundary_share)
    except ValueError as error:
        raise UserError(
            f'--batch={o.run.batch}, --boundary_share={o.own.boundary_share:g}: {error}.'
        ) from error

    # The distribution of times.
    try:
        times.truncated_log_student_times(
            torch.zeros(1), o.own.dividing_t, high, o.own.student_scale, o.own.student_df
        )
    except ValueError as error:
        raise UserError(
            f'--student_scale={o.own.student_scale:g}, --student_df={o.own.student_df:g}: {error}.'
        ) from error


def check_edges(o: Options) -> None:
    """Raises: UserError if iCT would draw no edge of its grid."""
    from training import consistency_ops as ops
    from training.objectives import time_schedules as times

    # The first grid: later ones are finer, between the same levels.
    try:
        times.lognormal_edge_probabilities(
            ops.karras_sigmas(o.own.s0 + 1, o.own.sigma_min, o.own.sigma_max, o.own.rho),
            o.own.P_mean,
            o.own.P_std,
        )
    except ValueError as error:
        raise UserError(f'--P_mean={o.own.P_mean:g}, --P_std={o.own.P_std:g}: {error}.') from error


def averages_to_evaluate(run: RunConfig) -> list[str]:
    """The averages that --val_emas names: `ema`, `phema-0.050`, ..."""
    from training.phema import average_name

    # Averages by the words that name them.
    known = {'ema': 'ema', **{f'{std:.3f}': average_name(std) for std in run.phema or []}}
    if run.val_emas == 'all':
        return list(known.values())

    # Widths may be written in several ways: .05, 0.05, phema-0.050.
    names = []
    for word in (run.val_emas or 'ema').split(','):
        number = re.fullmatch(r'(?:phema-)?(0?\.[0-9]{1,9})', word.strip())
        name = known.get(f'{float(number[1]):.3f}' if number else word.strip())
        if name is None or name in names:
            raise click.UsageError(
                f'--val_emas={run.val_emas}: {word!r} is not one more of {", ".join(known)}. (Widths are '
                'those of --phema.)'
            )
        names.append(name)
    return names


def random_seed() -> int:
    """A random seed, equal on all processes."""
    import random

    from torch_utils import distributed

    return distributed.broadcast_object(random.SystemRandom().randrange(1 << 31))


def open_dataset(run: RunConfig):
    """The training set. Raises: UserError if --cond needs labels that are missing."""
    from data.dataset import ImageFolderDataset
    from torch_utils import distributed

    # Every loader process of this machine keeps its own.
    copies = max(run.workers, 1) * distributed.get_local_world_size()
    with named('--data'):
        return ImageFolderDataset(
            run.data,
            use_labels=run.cond,
            max_size=run.max_images,
            xflip=run.xflip,
            cache=run.cache,
            copies=copies,
        )


def configure(o: Options, dataset, teacher) -> EasyDict:
    """The configuration: what --dry-run prints, training_options.json records and `training_loop` takes."""
    from torch_utils import distributed
    from training.checkpoint import network_digest
    from training.networks import encoders

    # The batch is divisible.
    run, own, processes = o.run, o.own, distributed.get_world_size()
    rank_batch = run.batch // processes
    if run.batch % processes or (run.batch_gpu and rank_batch % min(run.batch_gpu, rank_batch)):
        parts = f'equal parts of --batch-gpu={run.batch_gpu}' if run.batch_gpu else 'equal parts'
        raise click.UsageError(
            f'--batch={run.batch} cannot be split into {parts} on {processes} process(es).'
        )

    # Levels of sampling lie in the range of noise levels; that of a student's only step may be its upper end.
    for name in ('mid_t', 'sigma_init'):
        if (level := getattr(own, name, None)) is None:
            continue
        if not own.sigma_min < level <= own.sigma_max or (name == 'mid_t' and level == own.sigma_max):
            raise UserError(
                f'--{name}={level:g} does not lie between the noise levels {own.sigma_min:g} and '
                f'{own.sigma_max:g} of the network.'
            )

    # Data, network, loss.
    c = EasyDict(objective=run.objective, teacher=o.teacher, total_nimg=total_images(o))
    guidance, teacher = guidance_record(o, teacher), unguided(teacher)
    c.teacher_digest = network_digest(teacher, {}) if teacher is not None else None
    c.update(guidance)
    c.dataset = data_record(o, dataset)
    encoder, channels = encoders.for_dataset(dataset, teacher)
    c.encoder = encoders.record_of(encoder)
    if teacher is not None:
        c.network = network_of_teacher(o, teacher)
    else:
        c.network = network_from_scratch(o, dataset, channels)
    check_differentiable(o, c.network)
    c.sampling = EasyDict({name: getattr(own, name) for name in own.sampling}) or None
    c.loss = loss_record(o, teacher)

    # Options that are recorded as they are or in another unit.
    for option in RUN.values():
        if option.key and '.' not in option.key:
            value = getattr(run, option.name)
            c[option.key] = value if option.unit == 1 or value is None else value * option.unit

    # Options that are recorded in another form, and groups.
    c.update(
        betas=[run.beta1, run.beta2],
        eps=1e-8,
        lr_ref_nimg=(run.lr_decay or 0) * run.batch,
        loss_scaling=None if run.ls == 'dynamic' else run.ls,
        ema_rampup_ratio=run.ema_rampup or None,
        phema_stds=run.phema or [],
        stages=o.stages,
    )
    c.validation = validation_record(run) if run.val else None
    tags = [tag.strip() for tag in (run.wandb_tags or '').split(',') if tag.strip()]
    c.wandb = group_record(run, 'wandb', tags=tags) if run.wandb else None
    c.run_dir = planned_run_dir(o, dataset.name)
    return c


def guidance_record(o: Options, teacher) -> dict[str, object]:
    """How the teacher is guided, and the digest of its guide; None without --guide.

    In later rounds of progressive distillation as in the first, whose student the teacher descends from.
    """
    record = {}
    if isinstance(teacher, GuidedDenoiser):
        record = dict(teacher.record(), guide_digest=teacher.guide_digest())
    elif o.stages and o.stages[0][0] != o.own.S:
        record = teacher.metadata
    return {name: record.get(name) for name in GUIDANCE}


def loss_record(o: Options, teacher) -> EasyDict:
    """The options of the loss, as they are recorded."""
    from training.objectives import loss_diffusion

    values = {name: getattr(o.own, name) for name in (*o.objective.options, 'sigma_data')}
    # Options that older versions lack are recorded only if they are used, so that their runs still resume.
    later = {name for name, option in options_of(type(o.own)).items() if option.later}
    unchanged = {name for name in later if values[name] == o.objective.options[name]}
    values = {name: value for name, value in values.items() if name not in unchanged}
    # Teachers have several losses: record which, with the options that it has.
    if o.objective.loss:
        return EasyDict(values)
    kind = 'edm2' if is_edm2(o, teacher) else o.run.precond or 'edm'
    known = loss_diffusion.DEFAULTS[kind].keys() & {'P_mean', 'P_std'} | later - unchanged
    return EasyDict(kind=kind, **{name: values[name] for name in sorted(known)})


def validation_record(run) -> EasyDict:
    """The options of evaluations in training. Searched levels bring their solver along, because a record has only
    the numbers."""
    found = group_record(run, 'validation', emas=averages_to_evaluate(run))
    # Off by default, which is not to contradict a file of levels.
    completed = level_list.complete(dict(found, afs=found.afs or None))
    return EasyDict(completed, afs=bool(completed['afs']))


def group_record(run, group: str, **others) -> EasyDict:
    """The options that are recorded under `group`, by their names there."""
    options = [option for option in RUN.values() if option.key and option.key.startswith(f'{group}.')]
    # Options that older versions lack are recorded only if they are used.
    used = [option for option in options if not option.later or getattr(run, option.name) != option.default]
    return EasyDict({option.key.partition('.')[2]: getattr(run, option.name) for option in used}, **others)
