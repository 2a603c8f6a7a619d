"""Helpers that know nothing of networks: options, errors, files, downloads."""

import dnnlib.interrupts  # noqa: F401  (first)

from dnnlib.downloads import open_url
from dnnlib.util import EasyDict, NotFinite, UserError, WrongOptions

__all__ = ['EasyDict', 'NotFinite', 'UserError', 'WrongOptions', 'open_url']
