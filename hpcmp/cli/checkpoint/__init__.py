"""``hpcmp checkpoint ACTION``: look at checkpoints, check, compare and convert them; a module an action."""

from __future__ import annotations

from typing import Any

from . import diff, exports, imports, listing, repack, show, verify


def register(subparsers: Any) -> None:
    """Add ``hpcmp checkpoint`` and its actions."""
    about = "look at checkpoints; check, compare and convert them"
    actions = subparsers.add_parser("checkpoint", help=about, description=about).add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    for action in (listing, show, verify, diff, repack, exports, imports):
        action.register(actions)
