"""Train a diffusion model, or distill one into a multistep consistency model."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import contextlib
import os
import sys
from collections.abc import Iterator

import click

from dnnlib import UserError
from dnnlib.text import printable
from training import command_line
from training.command_line import Options, TrainCommand
from training.objectives import OBJECTIVES


@click.command(cls=TrainCommand)
@click.pass_context
def main(ctx, **_):
    """Train a diffusion model (a teacher), or distill a teacher into a student that samples in --S
    evaluations.

    \b
    A class-conditional DDPM++ teacher on 8 GPUs:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
          --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp
    \b
    An 8-step student of EDM's ImageNet-64 model:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
          --data=datasets/imagenet-64x64.zip --cond=1 --consistency=True \\
          --teacher=edm-imagenet-64x64-cond-adm.pkl --S=8 --batch-gpu=64 --fp16=True
    """
    # Options that contradict each other are reported before torch is imported.
    given, stored = command_line.given_and_stored(ctx)
    o = command_line.choose(given, stored)

    from torch_utils import distributed
    from torch_utils.preemption import EXIT_PREEMPTED

    distributed.init(o.run.init_timeout, o.run.train_timeout)
    for line in o.notes:
        distributed.print0(printable(line), file=sys.stderr)
    if not o.run.dry_run:
        from training import restart

        again = restart.go_on(o)
        if again.run.resume and not o.run.resume:
            changes = dict(val_overwrite=again.run.val_overwrite)
            again = command_line.resume(given, again.run.resume).but(**changes)
        o = again

    # One run, or the rounds of progressive distillation until one is preempted.
    finished = True
    with contextlib.ExitStack() as held:
        for run in runs(o, held):
            with contextlib.ExitStack() as lock:
                finished = train(run, lock)
            if not finished:
                break
    distributed.shutdown()
    if not finished:
        ctx.exit(EXIT_PREEMPTED)


def runs(o: Options, held: contextlib.ExitStack) -> Iterator[Options]:
    """The options of each run, in order: a single one, or the rounds of progressive distillation.

    Args:
        held: holds the lock of the folder of all rounds.
    Raises: UserError if rounds exist and --resume is not given, or the other way round.
    """
    if o.run.objective != 'pd':
        yield o
        return
    from torch_utils import distributed
    from training import configuration, restart, rounds, run_folder, run_lock, saved_files

    o = o.but(batch=o.run.batch or OBJECTIVES['pd'].defaults['batch'])
    run = o.run

    # The folder that contains those of the rounds.
    if run.resume:
        run_dir = saved_files.folder_of_rounds(run.resume)
    else:
        choose = run_folder.planned_run_dir if run.dry_run else run_folder.make_run_dir
        outdir_is_new = not os.path.lexists(run.outdir)
        run_dir = distributed.from_main(lambda: choose(o, configuration.open_dataset(run).name))
        if outdir_is_new and not run.dry_run:
            held.callback(run_folder.remove_if_empty, run.outdir)
        if not (run.nosubdir or run.dry_run):
            held.callback(run_folder.remove_if_empty, run_dir)
    if not run.dry_run:
        held.enter_context(run_lock.locked(run_dir, run.take_lock))
    begun = saved_files.round_folders(run_dir)
    if begun and not run.resume:
        raise UserError(
            f'--outdir={run.outdir} holds the rounds of an earlier run: resume it by --resume={run.outdir}, '
            'or choose another folder.'
        )
    if run.resume and not begun:
        raise UserError(
            f'--resume={run.resume} holds no rounds of a progressive distillation: give its run folder, or '
            'start a new run without --resume.'
        )

    # All rounds have one seed, which a resumed run takes from the first.
    if run.seed is None:
        o = o.but(seed=rounds.recorded_options(begun[0])['seed'] if begun else configuration.random_seed())
    if not run.dry_run:
        restart.remember(run_dir, o.run.seed, run.resume)
    for each in rounds.rounds(o, run_dir):
        yield each
        if run.dry_run:
            return


def train(o: Options, held: contextlib.ExitStack) -> bool:
    """Train one network, or print its configuration for --dry-run.

    Args:
        held: holds the lock of the run's folder.
    Returns: whether training is complete; False if it was preempted.
    """
    from torch_utils import distributed
    from training import configuration, restart, run_folder, run_lock, same_run, saved_files, starting_point
    from training.run_log import check_available

    # Lock the folder before a state is chosen: another process may be about to write one.
    if o.run.resume and not o.run.dry_run:
        held.enter_context(run_lock.locked(saved_files.folder_of(o.run.resume), o.run.take_lock))

    # What the run starts from: a training state, data, a teacher.
    state, earlier = None, None
    if o.run.resume:
        path, state = same_run.load_earlier(o.run.resume)
        o, earlier = o.but(resume=path), state['options']
    if o.run.seed is None:
        o = o.but(seed=earlier['seed'] if earlier else configuration.random_seed())
    with same_run.as_stored(o, 'data'):
        dataset = configuration.open_dataset(o.run)
    with same_run.as_stored(o, 'teacher'):
        teacher = starting_point.load_teacher(o, dataset) if o.teacher else None
    with same_run.as_stored(o, 'guide'):
        teacher = starting_point.guided_teacher(o, teacher)
    if o.run.transfer:
        o = starting_point.with_architecture(o, starting_point.load_transfer(o))
    elif earlier and earlier.get('transfer') and not teacher:
        o = starting_point.with_architecture(o, earlier['network'])

    # --budget becomes --duration.
    if o.run.budget:
        from training import budget

        o = budget.spend(o, dataset, teacher)

    # The configuration, and whether a resumed run is the same.
    o = configuration.resolve_defaults(o, dataset, teacher, earlier)
    c = configuration.configure(o, dataset, teacher)
    if earlier:
        about_data = same_run.check_same_data(o, c.dataset, earlier['dataset'], o.run.resume)
        if not o.run.resume_override:
            same_run.check_same_run(o, c, earlier)
        if about_data:
            distributed.print0(printable(about_data), file=sys.stderr)
    check_available(c.wandb, c.tensorboard)
    if getattr(o.own, 'lpips', None) or not o.run.dry_run:  # a dry run does not download them
        configuration.check_perceptual(c)
    if o.run.dry_run:
        from training import dry_run

        dry_run.show(o, c, dataset, teacher)
        return True

    # Create the folder only after everything that may be missing or wrong was checked.
    if c.validation:
        from metrics.validator import check_files

        check_files(c.validation, dataset)
    if not o.run.resume:
        c.run_dir = distributed.from_main(lambda: run_folder.make_run_dir(o, dataset.name))
        held.enter_context(run_lock.locked(c.run_dir, o.run.take_lock))
        distributed.from_main(lambda: run_folder.record_options(o, c))
    if o.run.objective != 'pd':  # `runs` does so in the folder of all rounds
        restart.remember(c.run_dir, o.run.seed, o.run.resume)

    from training.training_loop import training_loop

    with distributed.among_others():
        return training_loop(c, c.run_dir, dataset, teacher, state)


if __name__ == '__main__':
    main()
