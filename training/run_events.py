"""How a run begins and ends apart from its steps: its log, a run with nothing left to do, and the two ways to
stop early, by a signal and after too many skipped steps."""

from __future__ import annotations

import shlex

from torch_utils import distributed, elastic
from torch_utils.preemption import PreemptionHandler
from training import run_files, saved_files
from training.setup import Run


def nothing_to_do(run: Run) -> bool:
    """Whether a resumed run has seen all its images and done all that was due; logs why."""
    c, progress = run.c, run.progress
    if not run.resumed or progress.nimg < c.total_nimg or progress.due:
        return False
    seen, end = f'{c.resume} has seen {progress.nimg / 1e3:g} kimg', f'{c.total_nimg / 1e3:g} kimg'
    if c.stages:
        run.log(f'Nothing to do: {seen}, and this round ends at {end}.')
    else:
        run.log(
            f'Nothing to do: {seen}, and --duration={c.total_nimg / 1e6:g} ends the run at {end}. Give a '
            'longer --duration to go on.'
        )
    return True


def start_log(run: Run) -> None:
    """Begin statistics, W&B and TensorBoard, or resume them at the images seen."""
    c, progress = run.c, run.progress
    # A killed run may have recorded some of the evaluations that come again at this very point.
    redone = int(progress.due or not progress.begun)
    run.log.start(
        c.total_nimg,
        resumed_at=progress.nimg - redone if run.resumed else None,
        wandb=c.wandb and dict(c.wandb, id=progress.wandb_id),
        config=c,
        tensorboard=c.tensorboard,
    )
    progress.wandb_id = distributed.broadcast_object(run.log.wandb_id) or progress.wandb_id


def stop_here(run: Run, stop: PreemptionHandler, hosts: distributed.AsyncAllReduce) -> bool:
    """Save a state, even in the middle of a tick, and leave a note. Returns False: training is not
    finished."""
    c, progress, files, log = run.c, run.progress, run.files, run.log
    hosts.close()
    signal_name = next(name for name in distributed.gather_objects(stop.requested) if name)
    log(f'{signal_name}: stopping at {progress.nimg / 1e3:.1f} kimg.')

    # Save. If that fails, an older state is the one to resume from.
    saved = files.save_state(progress, progress.position())
    state = saved or run_files.newest_state(progress)
    if state:
        files.leave_note(signal_name, progress.nimg, state)
    log(
        f'{f"Saved {saved}" if saved else "The state could not be saved"}; '
        f'{f"--resume={files.run_dir} continues from {state}" if state else "there is none to resume from"}.'
    )
    if state:
        folder = saved_files.folder_of_rounds(files.run_dir) if c.stages else files.run_dir
        log(f'Resume by: {shlex.join([*elastic.launcher(), f"--resume={folder}"])}')
    log.close()
    return False


def give_up(run: Run, skipped: int) -> None:
    """End all processes after too many consecutive skips. Nothing is saved, so earlier states remain."""
    run.log.close(exit_code=1)
    newest = run_files.newest_state(run.progress)
    cure = f'resume from {newest}' if newest else 'start again'
    distributed.fail_together(
        f'{skipped} steps in a row had a loss or gradient that is not finite, up to '
        f'{run.progress.nimg / 1e3:.1f} kimg, and were skipped. Lower --lr, set --grad-clip, or use '
        f'--precision=bf16 or fp32, and {cure}.'
    )
