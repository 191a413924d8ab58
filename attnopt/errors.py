"""Every error a user of attnopt can meet; each says what was, what was wanted, and what to do."""


class AttnoptError(Exception):
    """Base of all errors raised by attnopt."""


class OptionError(AttnoptError, ValueError):
    """An option is unknown or has a value that it cannot have."""


class ShapeError(AttnoptError, ValueError):
    """Tensors do not fit together: rank, size, dtype or device."""


class UnsupportedError(AttnoptError):
    """A valid request that this kernel, device or version cannot serve."""


class StrictError(AttnoptError):
    """`strict=True` and an attention-shaped site was left alone; the message names the site and the reason."""


class VerificationError(AttnoptError):
    """The rewritten program does not compute what the original does."""


class UnsafeFileError(AttnoptError):
    """Loading the file would, or could, run code that is inside it."""


class SourceError(AttnoptError):
    """A SOURCE given on the command line does not lead to a model."""


class MissingError(AttnoptError):
    """An optional package or a device is needed and is not there."""


class ReportError(AttnoptError, ValueError):
    """A text is not the JSON of a report, or of one that this version reads."""


class OutputError(AttnoptError):
    """A file cannot be written: it exists, it is the input, or the folder does not let us."""


class Blame:
    """A block that runs code of others: whatever it raises becomes an error of the given kind.

    doing: what was tried, the beginning of the message. todo: what the user can do about it.
    """

    def __init__(self, doing: str, todo: str = "", kind: type[AttnoptError] = SourceError) -> None:
        self.doing, self.todo, self.kind = doing, todo, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, AttnoptError):
            return
        raised = self.kind
        if isinstance(error, ImportError):
            raised = MissingError
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
        raise raised(f"{self.doing} failed: {said}{'; ' if self.todo else ''}{self.todo}") from error
