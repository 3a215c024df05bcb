"""The exceptions whose text is meant for the user: entry points print it without a traceback."""


class UserError(ValueError):
    """A wrong value, file or launch: the text names the value, the rule and the way out."""


class AgreedError(UserError):
    """A `UserError` that every rank raises alike: it is printed once."""
