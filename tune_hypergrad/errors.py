"""The one exception for what a person can get wrong."""


class InputError(ValueError):
    """Something the user passed cannot work; the message is one line with culprit and remedy."""
