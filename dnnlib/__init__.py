"""Helpers that know nothing of networks: options, errors, files, downloads."""

import dnnlib.interrupts  # noqa: F401  (first)

from dnnlib.downloads import open_url
from dnnlib.util import EasyDict, NotFinite, UserError

__all__ = ['EasyDict', 'NotFinite', 'UserError', 'open_url']
