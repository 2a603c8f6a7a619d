"""EasyDict, the error that users see, and files by path or URL."""
from __future__ import annotations


class UserError(Exception):
    """An input that cannot be used. The message is one line or two that name the cause and the cure.

    Command lines (`dnnlib.cli.Command`) print it as `Error: ...` and exit with status 1, without a traceback.
    """


class EasyDict(dict):
    """A dict whose string keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value

    def __delattr__(self, name):
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None
