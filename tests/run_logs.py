"""What a training loop tells its log, for tests of the log."""

from training.run_log import RunLog

CONFIG = dict(batch_size=64, loss=dict(S=8), phema_stds=[0.05])
TOTAL = 640


def tick(nimg, loss=None):
    """A tick's statistics as the training loop collects them."""
    return {
        'Loss/cd': dict(num=64, mean=nimg / 10 if loss is None else loss, std=0.25),
        'Progress/nimg': dict(num=1, mean=nimg, std=0),
        'Progress/kimg': dict(num=1, mean=nimg / 1e3, std=0),
    }


def evaluation(nimg, ema='ema', fid=2.5):
    return dict(kimg=nimg / 1e3, nimg=nimg, fid=fid, num_images=16, steps=8, nfe=8, ema=ema, seconds=0.5)


def train(log, *ticks, evaluated=()):
    """What the training loop does with its log."""
    for nimg in ticks:
        log.advance(nimg)
        log.stats(tick(nimg))
        if nimg in evaluated:
            log.evaluation(evaluation(nimg))
    log.advance(ticks[-1] + 64)


def offline(run_id=None):
    return dict(project='digits', entity=None, name=None, tags=['a', 'b'], mode='offline', id=run_id)


def begin(run_dir, options, **kwargs):
    log = RunLog(str(run_dir), enabled=True)
    log.start(TOTAL, wandb=options, config=CONFIG, **kwargs)
    return log
