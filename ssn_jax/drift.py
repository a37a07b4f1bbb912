"""Whether the scores of production still are like those of the run's normal images.

A conformal test martingale (Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman, "Retrain or
not retrain: conformal test martingales for change-point detection", 2021). As long as new images
are like the known ones, each new score's rank among all before it is as likely as any other,
whatever came earlier. Capital that is bet against that grows to 1 / rate with a probability of at
most `rate`, ever (Ville's inequality). It is bet by the article's simple jumper; only, its rate of
jumping falls, so that a long time without a change costs less of the capital.
"""

import bisect
import math

import numpy as np

from ssn_jax.errors import UserError

# Bets on rising scores, on none in particular, and on falling ones.
_BETS = np.array([-1.0, 0.0, 1.0])
# As if so many images had been seen before: the rate of jumping begins at 0.01.
_SEEN = 100


class Watch:
    """Compares scores with those of normal images, one after the other.

    Attributes:
      rate: the probability of an alarm, ever, while nothing has changed.
      seen: how many scores were compared.
      noticed: whether they have changed.
    """

    def __init__(self, normal: np.ndarray, rate: float = 0.01):
        """Raises UserError if the rate is outside 0..1, or the scores (n,) are none or not finite.

        Args:
          normal: of normal images, by networks that never saw them.
          rate: above 0 and below 1.
        """
        if not 0 < rate < 1:
            raise UserError(f'a rate of false alarms of {rate} is none above 0 and below 1.')
        if not len(normal) or not np.isfinite(normal).all():
            raise UserError('drift is told from finite scores of normal images: there are none.')
        self.rate, self.seen, self.noticed = rate, 0, False
        self._known = sorted(map(float, normal))
        self._capital = np.full(3, 1 / 3)
        self._rng = np.random.default_rng(0)

    def update(self, score: float) -> bool:
        """Compares the next score; True for the one at which a change is noticed, once.

        Raises:
          ValueError: it is not finite.
        """
        score = float(score)
        if not math.isfinite(score):
            raise ValueError(f'a score of {score} says nothing of drift')
        if self.noticed:
            return False
        low, high = bisect.bisect_left(self._known, score), bisect.bisect_right(self._known, score)
        # The share that scores higher; its own place among equal ones is drawn.
        higher = len(self._known) - high
        p = (higher + self._rng.random() * (high - low + 1)) / (len(self._known) + 1)
        self._known.insert(high, score)
        jumping = 1 / (_SEEN + self.seen)
        self._capital = (1 - jumping) * self._capital + jumping * self._capital.mean()
        self._capital *= 1 + _BETS * (p - 0.5)
        self.seen += 1
        self.noticed = bool(self._capital.sum() >= 1 / self.rate)
        return self.noticed

    @property
    def fewest(self) -> int:
        """With fewer scores than this no change is noticed, however large."""
        return math.ceil(math.log(len(_BETS) / self.rate) / math.log(1.5))

    def __str__(self) -> str:
        """What is known by now, in words."""
        if not self.noticed:
            few = f', and fewer than {self.fewest} tell none' * (self.seen < self.fewest)
            return f'no change of the scores is noticed in {self.seen} images{few}'
        changed = 'risen: good images may be called defective'
        if self._capital[2] > self._capital[0]:
            changed = 'fallen: defects may be missed'
        return f'the scores of {self.seen} images show a change. They have {changed}'
