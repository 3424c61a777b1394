"""The errors a user can cause, each of one sentence that says what is wrong and what to do, and two warnings."""


class KslPatchError(Exception):
    """Base class; the command line prints it as one line."""


class PatchError(KslPatchError):
    """A patch, or the file that should hold one, is not valid."""


class HubError(PatchError):
    """A patch cannot be had from the Hub, or not be put there."""


class BaseMismatchError(KslPatchError):
    """A patch belongs to another base, or a model is not one that a patch can sit on."""


class BankError(KslPatchError):
    """A patch does not fit the bank, or a slot is empty."""


class TicketError(KslPatchError):
    """No ticket can be drawn from the results at hand."""


class DataError(KslPatchError):
    """The sentence pairs cannot be read or are too few."""


class RunError(KslPatchError):
    """A build or a generation cannot be started or continued with what it was given."""


class OtherVocabularyWarning(UserWarning):
    """A tokenizer has a patch's tokens as they were in its training, and others not."""


class OtherBodyWarning(UserWarning):
    """A patch is on a model that has its base's rows and other weights beside them."""
