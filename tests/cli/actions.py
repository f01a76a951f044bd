"""The actions of ``hpcmp checkpoint``, called in this process."""

from __future__ import annotations

import json
from typing import Any

from hpcmp.cli import checkpoint, common


def call(*words: Any) -> tuple[dict[str, Any], str]:
    """The result of ``hpcmp checkpoint WORDS``, and its text."""
    top = common.Parser()
    checkpoint.register(top.add_subparsers(required=True))
    args = top.parse_args(["checkpoint", *map(str, words)])
    result = args.run(args)
    assert json.loads(common.to_json(result))
    return result, args.show(result)
