"""Small helpers that know nothing of networks: errors, downloads, command lines."""
from dnnlib.util import EasyDict, UserError, open_url

__all__ = ['EasyDict', 'UserError', 'open_url']
