"""`phalanx verify`: prove that a layout computes what one process computes."""

from phalanx.train.verify.compare import VerifyReport
from phalanx.train.verify.run import layouts, verify

__all__ = ["VerifyReport", "layouts", "verify"]
