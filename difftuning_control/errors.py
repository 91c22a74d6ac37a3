"""What a user can put right: one sentence that says what was found, what was expected, and what to do."""


class UserError(ValueError):
    """A mistake in a recipe, in data or in a command. The command line prints its message and exits with code 2."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the weights are those of the last good step."""


class ChangedError(RuntimeError):
    """A run was verified and is not what it was."""


class GatesFailedError(RuntimeError):
    """A run was judged by the gates of its recipe and fails one; it is kept, and marked."""


def need(condition: bool, name: str, value: object, expected: str) -> None:
    """Refuse a value of a recipe.

    Raises:
        UserError: if the condition does not hold.
    """
    if not condition:
        raise UserError(f"{name} is {value}; expected {expected}.")
