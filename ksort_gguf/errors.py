"""Errors that a user can mend.

Texts name arguments in backticks, as `cache_type_k`; the command line says its flag in their place.
"""


class KsortError(Exception):
    """A problem with the user's input, in one line that names the file, key or argument and says what to do.

    field: the argument of the public API that is to blame, such as "cache_type_k", or None. The command line prints the
    text as ``error: <text>`` and exits with status 1, without a traceback.
    """

    def __init__(self, text: str, *, field: str | None = None):
        super().__init__(text)
        self.field = field


class CacheTypeError(KsortError):
    """A cache type, query type or block size that does not exist, or does not fit the model or the device."""


class PlanError(KsortError):
    """A plan that does not exist, cannot be made, or does not fit the model."""


class UnsupportedModelError(KsortError):
    """A model that holds what is not implemented: an architecture, a tensor or a key."""


class ContextError(KsortError):
    """More tokens than the context holds, or an impossible size of it."""


class DeviceError(KsortError):
    """A device that is not there, or cannot run this."""


class BusyError(KsortError):
    """A context that another thread is using."""
