"""A stop that is asked for, on any rank."""

from __future__ import annotations

import numpy as np

from ..comm.mesh import Mesh


class Stop:
    """Whether this rank asks for the end of the run, why, and whether it is for good: the job is not to be run again
    then. reason: at last that of the whole run."""

    def __init__(self) -> None:
        self.reason = "finished"
        self.asked = self.final = False

    def ask(self, reason: str, requeue: bool) -> None:
        """Ask for it; safe in a signal handler."""
        self.reason, self.asked, self.final = reason, True, self.final or not requeue

    def asked_anywhere(self, mesh: Mesh) -> bool:
        """Whether any rank has asked by now. Collective; between hosts, whatever their GPUs do."""
        return bool(mesh[Mesh.axes].all_reduce(np.array([float(self.asked)])).wait()[0])

    def agree(self, mesh: Mesh) -> None:
        """The reason is that of the first rank that has asked, and it is for good if any rank says so. Collective."""
        reasons = mesh.gather_objects((self.reason, self.final) if self.asked else ("", False))
        self.reason = next((reason for reason, _ in reasons if reason), "asked to stop")
        self.final = any(final for _, final in reasons)
