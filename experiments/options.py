"""Options that the commands of experiments share."""

from __future__ import annotations

from dnnlib import cli
from dnnlib.options import Option

JOBS = Option('jobs', cli.SOME_WORKERS, 'Commands to run in parallel.', default=2, metavar='INT')
SCALE = Option(
    'scale',
    cli.SOME_FACTOR,
    'Factor for the number of training steps and, below 1, of samples. Small values give a meaningless table.',
    default=1.0,
    metavar='FLOAT',
)
