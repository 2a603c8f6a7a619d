"""The networks. The source of each module is embedded in snapshots, so it imports nothing of this project but
persistence."""

from training.networks.edm import *  # noqa: F403
from training.networks.edm import __doc__ as __doc__
