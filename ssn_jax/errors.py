"""The one exception that stands for a mistake of the person at the keyboard."""


class UserError(Exception):
    """A mistake that the user can put right.

    The message is a single line that says what is wrong, in which file or flag, and what to do.
    `terminal.guard` prints it and exits with status 1, without a traceback.
    """
