"""The one error that the commands show as a line, without a traceback."""


class LabError(Exception):
    """What failed, why, and what to do: one line for the user."""
