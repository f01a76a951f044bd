"""Text files to one token file: ``prepare``.

One pass over the text, in memory that does not grow with the corpus. The output appears under its name only when it
is complete, synced to disk and read back: a crash, a full disk or a kill leaves the previous file, or none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .corpus import SKIPPED, Corpus, Document, Skip, read
from .publish import publish
from .tokenizer import Tokenizer, digest, load_tokenizer
from .tokens import SPLITS, VERSION, TokenFile
from .writer import Spool, write

BATCH = 1 << 22  # bytes of text tokenised at once: many pieces for a tokenizer's threads, some 200 MB at work
SMALL = 10_000  # tokens in a split, below which the report says what sequences it can serve


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` made: ``status`` "written", or "unchanged" where the same file was already there.

    ``splits`` maps "train" and "valid" to their documents, tokens and bytes of text; ``skipped`` the reason to the
    number of files left out; ``notes`` are lines that the user should read.
    """

    output: str
    status: str
    tokenizer: str
    vocabulary: int
    files: int
    bytes: int
    tokens: int
    skipped: dict[str, int]
    splits: dict[str, dict[str, int]]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The same, as plain dictionaries for JSON."""
        return asdict(self)


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str | Path = "bytes",
    held_out: float = 0.05,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Tokenise the text files of ``inputs`` (files, and folders walked recursively) into the token file ``output``.

    A document goes to the held-out split if hash(seed, its name) / 2^64 < ``held_out``: whole documents, and the same
    ones when files are added or removed. ``include`` and ``exclude`` are the glob patterns of ``Corpus``, ``tokenizer``
    is what ``load_tokenizer`` takes, and ``progress(files, bytes)`` is called every few megabytes.

    Files that are not UTF-8 text, or empty, are left out and counted. If ``output`` exists and was made from the same
    files (names, sizes, times of change) with the same options, nothing is done; if it was made from others, InputError
    unless ``overwrite``. InputError, too, for anything wrong with the inputs; the output is then as it was before.
    """
    output = Path(output)
    if not 0 <= held_out < 1:
        raise InputError(f"the held-out share must be at least 0 and less than 1, not {held_out}")
    if not output.parent.is_dir():
        raise InputError(f"no folder {output.parent} for the output {output.name}")
    chosen = load_tokenizer(tokenizer)
    partial = output.with_name(output.name + ".partial")
    corpus = Corpus(inputs, include, exclude, skip=(output, partial))
    if any(Path(path).resolve() == output.resolve() for path in inputs):
        raise InputError(f"the output {output} is also an input")
    options = {"tokenizer": digest(chosen.definition), "held_out": held_out, "seed": seed, "version": VERSION}
    if output.exists() and not overwrite:
        return _unchanged(output, corpus, options)
    with publish(output, partial), ExitStack() as stack:
        spools = {name: stack.enter_context(Spool(output.parent, chosen)) for name in SPLITS}
        counts = _tokenise(corpus, options, chosen, spools, progress)
        if not spools["train"].documents:
            raise InputError(_no_text(counts, spools["valid"].documents, held_out))
        write(partial, chosen, counts, spools)
        with TokenFile(partial) as written:
            written.verify()
            return _report(written, output, "written", held_out)


class _Fingerprint:
    """Running digest of the options and of every file's name, size and time of change."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._hash = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=16)

    def add(self, document: Document) -> None:
        line = b"%b\0%d %d\n" % (os.fsencode(document.name), document.size, document.modified)
        self._hash.update(line)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _tokenise(
    corpus: Corpus,
    options: dict[str, Any],
    tokenizer: Tokenizer,
    spools: dict[str, Spool],
    progress: Callable[[int, int], None] | None,
) -> dict[str, int | str]:
    """Spool the tokens of every document, a few megabytes of text at once; the counts and the fingerprint."""
    fingerprint = _Fingerprint(options)
    counts = dict.fromkeys(("files", "bytes", *(f"skipped_{reason}" for reason in SKIPPED)), 0)

    def pieces() -> Iterator[tuple[Spool, bytes, bool]]:
        """(where it goes, text, whether the document ends here)"""
        for document in corpus:
            fingerprint.add(document)
            try:
                spool = spools["valid" if _is_held_out(document, options) else "train"]
                text = b""
                for piece in read(document):
                    if text:
                        yield spool, text, False
                    text = piece
                yield spool, text, True
            except Skip as skip:
                counts[f"skipped_{skip}"] += 1

    for batch in _batches(pieces()):
        for (spool, text, last), ids in zip(batch, tokenizer.encode_batch([text for _, text, _ in batch]), strict=True):
            spool.append(ids, text)
            if last:
                counts["files" if spool.end_document() else "skipped_empty"] += 1
        counts["bytes"] = sum(spool.bytes for spool in spools.values())
        if progress:
            progress(counts["files"], counts["bytes"])
    return {**counts, "inputs": fingerprint.hexdigest()}


def _batches(pieces: Iterator[tuple[Spool, bytes, bool]]) -> Iterator[list[tuple[Spool, bytes, bool]]]:
    """Pieces in order, in lists of about ``BATCH`` bytes."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_held_out(document: Document, options: dict[str, Any]) -> bool:
    name = str(options["seed"]).encode() + b"\0" + os.fsencode(document.name)
    return bool(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") < options["held_out"] * 2**64)


def _unchanged(output: Path, corpus: Corpus, options: dict[str, Any]) -> Prepared:
    """The report on an output that is already there, if it is what this call would make; InputError if not."""
    fingerprint = _Fingerprint(options)
    for document in corpus:
        fingerprint.add(document)
    advice = "give --overwrite to replace it, or another --output"
    try:
        with TokenFile(output) as existing:
            if existing.inputs == fingerprint.hexdigest():
                return _report(existing, output, "unchanged", options["held_out"])
    except InputError as error:
        raise InputError(f"{output} exists and is no good token file ({error}): {advice}") from None
    raise InputError(f"{output} exists and was made from other files or options: {advice}")


def _report(made: TokenFile, output: Path, status: str, held_out: float) -> Prepared:
    notes = []
    splits = {}
    for name in SPLITS:
        split = made.split(name)
        splits[name] = {"documents": split.documents, "tokens": len(split), "bytes": split.bytes}
        if not len(split) and held_out:
            notes.append(
                f"the {name} split is empty: documents are held out whole, so give more of them, a larger held-out "
                "share, or another seed"
            )
        elif 0 < len(split) < SMALL:
            notes.append(f"the {name} split is small: {len(split)} tokens, for sequences of {len(split) - 1} at most")
    return Prepared(
        output=str(output),
        status=status,
        tokenizer=made.tokenizer_name,
        vocabulary=made.vocabulary,
        files=made.counts["files"],
        bytes=made.counts["bytes"],
        tokens=sum(split["tokens"] for split in splits.values()),
        skipped={reason: made.counts[f"skipped_{reason}"] for reason in SKIPPED},
        splits=splits,
        notes=notes,
    )


def _no_text(counts: dict[str, int | str], held_out: int, share: float) -> str:
    if held_out:
        return (
            f"nothing is left to train on: all {held_out} documents fell into the held-out split (share {share}); "
            "documents are held out whole, so give more of them, a smaller share, or another seed"
        )
    left_out = ", ".join(f"{counts[f'skipped_{reason}']} {reason}" for reason in SKIPPED)
    return f"no text in the inputs (files left out: {left_out}); check the paths and the include and exclude patterns"
