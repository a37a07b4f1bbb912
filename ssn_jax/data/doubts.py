"""What is doubtful about the files of a data set, though they can be read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from absl import logging


@dataclass(frozen=True)
class Doubt:
    """Something about a file that its owner should know.

    Attributes:
      file: path relative to the data set's root.
      reason: what is wrong with it, how it is read, and what to do.
    """

    file: str
    reason: str


def in_both(train: Mapping[str, bytes], test: Mapping[str, bytes]) -> list[Doubt]:
    """The test images that are training images too.

    Args:
      train: digests of what the training images' files hold, by file.
      test: likewise of the test images.
    """
    trained = {content: file for file, content in train.items()}
    found = [file for file, content in test.items() if content in trained]
    if not found:
        return []
    reason = (
        f'is in training and in test ({len(found)} test images are; {found[0]} is the file '
        f'{trained[test[found[0]]]}): its score says nothing, remove one of both'
    )
    return [Doubt(file, reason) for file in found]


def log(doubts: Iterable[Doubt]) -> None:
    """Logs what is doubtful, a line for each reason with the files that it holds for."""
    by_reason = {}
    for doubt in doubts:
        by_reason.setdefault(doubt.reason, []).append(doubt.file)
    for reason, files in by_reason.items():
        more = f' and {len(files) - 1} more' if len(files) > 1 else ''
        logging.warning('%s%s: %s', files[0], more, reason)
