"""``hpcmp data``: make token files from text, and check them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from ..errors import CheckFailed, DataError
from .common import parent

CLEAR = "\r\x1b[K"  # to the start of the terminal's line, and wipe it
EVERY = 0.5  # seconds between two lines of progress, at least

ABOUT = """\
Turn text files into one token file, the input of `hpcmp train`.

Every file is one document; folders are walked recursively, in order. Whole documents are held out for
evaluation, chosen by a hash of their name, so the choice stays when files are added. Files that are not UTF-8
text, or empty, are left out and counted. Memory stays at a few hundred megabytes whatever the size of the text;
the disk needs twice the output meanwhile. An interrupted run leaves no output; running the same command again
on the same files does nothing."""

EXAMPLES = """\
examples:
  # the source of Python's standard library: 12 MB, a second
  hpcmp data prepare $(python -c "import sysconfig; print(sysconfig.get_path('stdlib'))") \\
      --include '*.py' --exclude site-packages --exclude test --output python.h5

  # a subword vocabulary, as the Hugging Face tokenizers package stores it
  hpcmp data prepare books/ --include '*.txt' --tokenizer tokenizer.json --output books.h5

what comes out:
  an HDF5 file (h5dump reads it): /train/tokens and /valid/tokens, one integer a token; /train/documents and
  /valid/documents, where each document begins; the tokenizer itself; a digest of each array. Name it in the
  configuration of `hpcmp train`."""


def register(subparsers: Any) -> None:
    """Add ``hpcmp data`` and its actions."""
    about = "make token files from text, and check them"
    actions = subparsers.add_parser("data", help=about, description=about).add_subparsers(
        metavar="ACTION", required=True
    )
    raw = argparse.RawDescriptionHelpFormatter

    make = actions.add_parser(
        "prepare",
        help="text files to a token file",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=raw,
        parents=[parent],
    )
    make.add_argument("inputs", nargs="+", metavar="INPUT", help="a text file, or a folder of them")
    make.add_argument("--output", required=True, metavar="FILE", help="the token file to write, such as corpus.h5")
    make.add_argument(
        "--tokenizer", default="bytes", metavar="NAME", help='"bytes" (the default), or the path of a tokenizer.json'
    )
    make.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="in folders, take only files of this name ('*.py') or path ('docs/*.md'); may be given several times",
    )
    make.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="in folders, leave out files and whole folders of this name or path; may be given several times",
    )
    make.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the documents held out for evaluation (default 0.05)",
    )
    make.add_argument("--seed", type=int, default=0, help="another seed holds out other documents (default 0)")
    make.add_argument("--overwrite", action="store_true", help="replace FILE, whatever it is")
    make.set_defaults(run=run_prepare, show=show_prepare)

    check = actions.add_parser(
        "verify",
        help="read a token file whole and compare it with its digests",
        description="Read a token file whole and compare it with its digests: finds every flipped bit and cut-off end.",
        epilog="example:\n  hpcmp data verify corpus.h5",
        formatter_class=raw,
        parents=[parent],
    )
    check.add_argument("file", metavar="FILE", help="the token file")
    check.set_defaults(run=run_verify, show=show_verify)


def run_prepare(args: argparse.Namespace) -> dict[str, Any]:
    """``hpcmp data prepare``; the result is ``Prepared`` as a dictionary, and the seconds it took."""
    from ..data.prepare import prepare

    start = time.monotonic()
    terminal = sys.stderr.isatty()
    try:
        made = prepare(
            args.inputs,
            args.output,
            args.tokenizer,
            args.held_out,
            include=args.include,
            exclude=args.exclude,
            seed=args.seed,
            overwrite=args.overwrite,
            progress=_progress() if terminal else None,
        )
    finally:
        if terminal:
            print(CLEAR, end="", file=sys.stderr, flush=True)
    return {**made.as_dict(), "seconds": round(time.monotonic() - start, 3)}


def show_prepare(result: dict[str, Any]) -> str:
    """The result of ``hpcmp data prepare`` as text."""
    written = f"written in {result['seconds']:.1f} s"
    lines = [
        f"{result['output']}: {written if result['status'] == 'written' else 'already made from these files'}",
        f"  {result['tokens']:,} tokens ({result['tokenizer']}, vocabulary {result['vocabulary']:,}) from "
        f"{result['files']:,} files, {result['bytes']:,} bytes of text",
    ]
    for name, split in result["splits"].items():
        lines.append(f"  {name}  {split['documents']:>9,} documents  {split['tokens']:>15,} tokens")
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in result["skipped"].items() if count)
    lines.append(f"  left out: {left_out or 'nothing'}")
    return "\n".join(lines + [f"  note: {note}" for note in result["notes"]])


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    """``hpcmp data verify``; the result says what is in the file. A token file with damaged contents: CheckFailed."""
    from ..data.tokens import SPLITS, TokenFile

    with TokenFile(args.file) as file:
        try:
            file.verify()
        except DataError as error:
            raise CheckFailed(str(error)) from None
        return {
            "file": str(file.path),
            "status": "whole",
            "tokenizer": file.tokenizer_name,
            "vocabulary": file.vocabulary,
            "tokens": {name: len(file.split(name)) for name in SPLITS},
        }


def show_verify(result: dict[str, Any]) -> str:
    """The result of ``hpcmp data verify`` as text."""
    tokens = ", ".join(f"{count:,} tokens in {name}" for name, count in result["tokens"].items())
    return f"{result['file']}: whole; {tokens}; {result['tokenizer']}, vocabulary {result['vocabulary']:,}"


def _progress() -> Callable[[int, int], None]:
    """A line on the terminal that is written over."""
    start = shown = time.monotonic()

    def show(files: int, size: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= EVERY:
            shown = now
            rate = size / 1e6 / (now - start)
            line = f"{CLEAR}{files:,} files, {size / 1e6:,.0f} MB, {rate:,.1f} MB/s"
            print(line, end="", file=sys.stderr, flush=True)

    return show
