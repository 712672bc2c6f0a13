"""The one exception that means 'the user can fix this'."""


class KsortError(Exception):
    """A problem with the user's input, in one line that names the file, key or flag and says what to do.

    The command line prints it as ``error: <text>`` and exits with status 1, without a traceback.
    """
