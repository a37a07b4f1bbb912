"""From scores to a decision: the threshold of a run, what it promises, and how rare a score is.

Images that a network was trained on get lower scores than new ones, and a threshold among them
gives more false alarms than it was meant to. So each training image is scored by a network that
never saw it (`ssn_jax/training/parts.py`), and of these scores the threshold is the conformal
quantile (Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005): as far as a
new normal image is one among them, each rank is as likely as any other.
"""

from collections.abc import Sequence
import csv
import dataclasses
import io

from absl import logging
import ml_collections
import numpy as np

from ssn_jax import metrics

# What a decision calls an image, by index.
CLASSES = ('normal', 'defective')
# Of the interval for the rate of false alarms that will be seen.
CONFIDENCE = 0.9
# How many times as far as by chance alone the rate that is seen of the head that is used varies
# around that of the parts' heads, in variance, at some rates (docs/decision.md, "What it holds").
_OF_PARTS = (0.05, 0.1, 0.2), (1.8, 2.7, 3.5)
# The share of normal images that have the middle of the colours anywhere.
COLOURED = 0.05


@dataclasses.dataclass(frozen=True)
class Scores:
    """Images and their scores, as scores.csv holds them.

    Attributes:
      part: of each image the number of the part of the training images that it lies in, and that
        the network that scored it never saw; 'train' if it did; 'test' of the test split.
      file: its path relative to the data set's root.
      defect: 'good' or the defect's name.
      label: int (N,), 0 normal and 1 defective.
      score: logits, float32 (N,).
      map_maximum: of the anomaly map, a logit, float32 (N,).
    """

    part: Sequence[str]
    file: Sequence[str]
    defect: Sequence[str]
    label: np.ndarray
    score: np.ndarray
    map_maximum: np.ndarray

    def of(self, split: str) -> 'Scores':
        """Those of a split: 'train', 'test' or 'new'."""
        splits = [part if part in ('test', 'new') else 'train' for part in self.part]
        return self.take(np.flatnonzero(np.array(splits) == split))

    def take(self, places: np.ndarray) -> 'Scores':
        """Some of them."""
        listed = ([x[i] for i in places] for x in (self.part, self.file, self.defect))
        return Scores(*listed, self.label[places], self.score[places], self.map_maximum[places])

    def normal(self) -> np.ndarray:
        """The scores of normal images."""
        return self.score[self.label == 0]

    def unseen(self) -> 'Scores':
        """Those of normal images that say what new ones get: new ones, or out of part."""
        new = self.of('new')
        known = new if len(new.score) else self.of('train')
        return known.take(np.flatnonzero((known.label == 0) & ('train' not in known.part)))

    def __add__(self, other: 'Scores') -> 'Scores':
        listed = ([*a, *b] for a, b in zip(self._listed(), other._listed(), strict=True))
        joined = (np.concatenate(x) for x in zip(self._arrays(), other._arrays(), strict=True))
        return Scores(*listed, *joined)

    def _listed(self):
        return self.part, self.file, self.defect

    def _arrays(self):
        return self.label, self.score, self.map_maximum

    def to_csv(self) -> str:
        """The text of scores.csv."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator='\n')
        rows.writerow([field.name for field in dataclasses.fields(self)])
        rows.writerows(zip(*self._listed(), *self._arrays(), strict=True))
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> 'Scores':
        """The way back; raises ValueError if something is missing, or is no number."""
        rows = csv.DictReader(io.StringIO(text))
        names = [field.name for field in dataclasses.fields(cls)]
        columns = list(zip(*([row[name] for name in names] for row in rows), strict=True))
        columns = columns or [()] * len(names)
        return cls(*columns[:3], np.array(columns[3], int), *map(np.float32, columns[4:]))


def decide(config: ml_collections.ConfigDict, scores: Scores) -> dict:
    """Chooses the threshold from which on an image is called defective; never on the test split.

    A run that has learned from real defects alone takes the largest TPR - FPR (Youden), any other
    the smallest threshold that keeps the rate of false alarms to `config.decision.fpr`.

    Args:
      config: the run's.
      scores: of the run; those of its training images are chosen on.

    Returns:
      What `by_rate` or `by_youden` does, and split and images (their number); of images that were
      trained on nothing is promised. If there is no threshold, threshold is None and `undefined`
      says why.
    """
    train = scores.of('train')
    # Beside drawn defects real ones are few, and may be of a few kinds alone.
    youden = config.supervision.kind != 'none' and not config.drawn.count
    name = 'train' if 'train' in train.part else 'out of part'
    where = {'split': name if youden else f'{name} (normal)'}
    where['images'] = len(train.label) if youden else int((train.label == 0).sum())
    try:
        if youden:
            return by_youden(train.score, train.label) | where
        chosen = by_rate(train.normal(), config.decision.fpr, of_parts=True) | where
        if name == 'train':  # Such scores promise nothing of new images.
            del chosen['promised'], chosen['interval']
        return chosen
    except ValueError as e:
        return {'threshold': None, 'undefined': str(e)} | where


def by_rate(normal: np.ndarray, fpr: float, of_parts: bool = False) -> dict:
    """The smallest threshold that keeps the rate of false alarms to what is asked for.

    A new normal image scores higher than the k-th highest of n with a probability of at most
    k / (n + 1). Which probability it is for these n scores, nobody knows; without ties it is
    Beta(k, n + 1 - k) distributed, and so is the rate that will be seen of many new images.

    Args:
      normal: scores (n,) of normal images by networks that never saw them.
      fpr: the rate, in 0..1.
      of_parts: whether these networks are not the one that is used: the interval is wider then.

    Returns:
      threshold (a logit, as the scores), probability (its sigmoid), method, fpr (of these images)
      and tpr (None), asked (the rate), promised (what so many images can promise, at least
      1 / (n + 1)), and interval: two rates between which the one that will be seen lies with a
      probability of `CONFIDENCE`.

    Raises:
      ValueError: there is no score, one is not finite, or the rate is outside 0..1.
    """
    scores = np.sort(np.asarray(normal))[::-1]
    if not scores.size or not np.isfinite(scores).all():
        raise ValueError('no threshold can be chosen: it takes finite scores of normal images')
    if not 0 <= fpr <= 1:
        raise ValueError(f'a rate of false alarms lies in 0..1, not at {fpr}')
    n = scores.size
    k = min(max(rank_of(fpr, n), 1), n)
    threshold = metrics.just_above(scores[k - 1])
    from scipy import stats  # Inference does without.

    tail = (1 - CONFIDENCE) / 2
    promised = k / (n + 1)
    spread = np.interp(promised, *_OF_PARTS) if of_parts else 1.0
    counts = k / spread, (n + 1 - k) / spread
    interval = [float(stats.beta.ppf(q, *counts)) for q in (tail, 1 - tail)]
    if 0 < fpr < promised:
        logging.warning(
            'A false-positive rate of at most %g is asked for, and %d normal images can promise '
            'none below %.2g, which it is: %.10g images could.',
            *(fpr, n, promised, np.ceil(1 / fpr - 1e-9) - 1),
        )
    return {
        'threshold': threshold,
        'probability': float(sigmoid(threshold)),
        'method': f'false-positive rate at most {fpr:g}',
        'tpr': None,
        'fpr': float(np.mean(scores >= threshold)),
        'asked': float(fpr),
        'promised': promised,
        'interval': interval,
    }


def rank_of(fpr: float, n: int) -> int:
    """The largest k with k / (n + 1) <= fpr."""
    # Dividing counts, not multiplying the rate: 0.29 * 100 falls short of 29.
    return int(np.count_nonzero(np.arange(1, n + 2) / (n + 1) <= fpr))


def by_youden(scores: np.ndarray, labels: np.ndarray, misses: float = 1.0) -> dict:
    """The threshold with the largest misses * TPR - FPR; with 1 that of Youden's index.

    Args:
      scores: (N,) of images by networks that never saw them.
      labels: (N,), 0 normal.
      misses: how many times as bad as a false alarm a missed defect is, both as rates.

    Returns:
      threshold (a logit), probability (its sigmoid), method, tpr and fpr (of these images).

    Raises:
      ValueError: a class is missing, or a score is not finite.
    """
    found = metrics.youden(scores, labels, misses)
    method = 'Youden' if misses == 1 else f'a missed defect as bad as {misses:g} false alarms'
    return found | {'probability': float(sigmoid(found['threshold'])), 'method': method}


def p_values(scores: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """How rare scores are among those of normal images.

    Args:
      scores: of any shape.
      normal: (n,), of images by networks that never saw them.

    Returns:
      Of the same shape, the share of n + 1 normal images, the one that is judged among them, that
      score at least as high: in 1 / (n + 1)..1. If it is normal, it is at most p with a probability
      of at most p.
    """
    below = np.searchsorted(np.sort(normal), scores, side='left')
    return (1 + len(normal) - below) / (1 + len(normal))


def evidence(logits: np.ndarray, maxima: np.ndarray) -> np.ndarray:
    """What a map is coloured by, the same in every picture and every run.

    Args:
      logits: of a map, or of several; of any shape.
      maxima: (n,) of the maps of normal images by networks that never saw them.

    Returns:
      Of the same shape, in 0..1: 0 up to the median of the maxima, 0.5 where `COLOURED` of them
      reach, 1 at twice that distance. Without any maxima the logits' sigmoid.
    """
    if not len(maxima):
        return sigmoid(logits)
    usual = float(np.median(maxima))
    rare = float(np.quantile(maxima, 1 - COLOURED, method='higher'))
    return ((logits - usual) / (2 * max(rare - usual, 1e-6))).clip(0, 1)


def rates(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float | None]:
    """True- and false-positive rate of scores (N,) and labels (N,); None where a class is empty."""
    called, defective = scores >= threshold, labels > 0
    return {
        name: float(called[members].mean()) if members.any() else None
        for name, members in (('tpr', defective), ('fpr', ~defective))
    }


def tested(chosen: dict, scores: Scores) -> dict:
    """A decision with what it does on the test split: test_tpr and test_fpr."""
    if chosen['threshold'] is None:
        return chosen
    test = scores.of('test')
    found = rates(test.score, test.label, chosen['threshold'])
    return chosen | {f'test_{name}': value for name, value in found.items()}


def recall_by_defect(scores: Scores, threshold: float) -> dict[str, dict]:
    """Of each kind of defect how many images there are, how many are found, and an interval.

    Returns:
      By the defect's name: images, found, and interval: between these two rates (Clopper and
      Pearson) the share that will be found lies with a confidence of `CONFIDENCE`.
    """
    kinds = {}
    for kind in sorted({d for d, label in zip(scores.defect, scores.label, strict=True) if label}):
        of = scores.score[np.array(scores.defect) == kind]
        found = int((of >= threshold).sum())
        kinds[kind] = {'images': len(of), 'found': found, 'interval': binomial(found, len(of))}
    return kinds


def binomial(count: int, n: int) -> list[float]:
    """The interval of Clopper and Pearson for a rate, `CONFIDENCE` of it, of `count` in `n`."""
    from scipy import stats  # Inference does without.

    found = stats.binomtest(count, n).proportion_ci(CONFIDENCE, 'exact')
    return [float(found.low), float(found.high)]


def sigmoid(logits):
    """The probabilities of logits, a number or an array of any shape."""
    return 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
