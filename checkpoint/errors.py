"""What can be wrong with a checkpoint. Torch-free, so that who started the ranks can tell it."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on every rank, naming the one at fault.

    Args:
        defect: it was the program: see the traceback of that rank.
    """

    def __init__(self, text: str, *, defect: bool = False) -> None:
        super().__init__(text)
        self.defect = defect


class BrokenCheckpointError(ValueError):
    """A checkpoint that must not be loaded; the message is the reason."""


class StorageBusyError(CheckpointError):
    """Nothing was taken: it was for storage alone, which still has an older one to write."""
