"""A rank's way to the holder of its node."""

from dataclasses import dataclass
from pathlib import Path

from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.holder.client import HolderClient
from phalanx.checkpoint.holder.start import start_holder
from phalanx.checkpoint.nodes.node import Node


@dataclass(frozen=True, kw_only=True)
class NodeHolder:
    """Whose holders, and how they are used."""

    config: CheckpointConfig
    job: str
    """Name of the job's holders; the same at every start of the same run."""
    directory: str
    """Where the run saves, see `job.directory_of`; holders say it to who asks whose they are."""
    node: Node
    log_dir: Path | None
    """Where holders write what they have to say."""

    @property
    def slots(self) -> int:
        """Generations: the committed one, the next, and one that goes to storage meanwhile."""
        config = self.config
        return 3 if config.snapshot.every and (config.every or config.save_last) else 2

    @property
    def populated(self) -> int:
        """Generations whose memory is taken at once; the others take it when they are used."""
        return 2 if self.config.snapshot.every else 1

    @property
    def num_parity(self) -> int:
        """Nodes of a group that may be lost; checkpoints alone are not protected."""
        return self.config.snapshot.num_parity if self.config.snapshot.every else 0

    def start_holder(self) -> HolderClient:
        """This node's holder, started if there is none."""
        node = self.node
        log = self.log_dir and self.log_dir / f"holder{node.number}.log"
        start_holder(
            self.job,
            node.on_machine,
            directory=self.directory,
            linger_s=self.config.snapshot.linger_s,
            log=log,
        )
        return self.connect()

    def connect(self) -> HolderClient:
        """This node's holder.

        Raises:
            HolderGone: there is none.
        """
        return HolderClient.connect(self.job, self.node.on_machine)
