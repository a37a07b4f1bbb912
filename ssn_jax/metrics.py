"""The seven metrics of a test split, and the thresholds that turn scores into decisions.

Everything here is exact (no binning) and in plain NumPy. All metrics follow from how often each
positive's score is reached by positives and by negatives, so one sort of the negatives serves
AUROC, average precision and AUPRO alike; of ten million pixels only the few anomalous ones keep
their identity.
"""

from typing import NamedTuple

import numpy as np
from skimage import measure

METRICS = ('I-AUROC', 'AP-det', 'P-AUROC', 'AUPRO', 'AP-loc', 'seg-I-AUROC', 'seg-AP-det')

# Beyond this false-positive rate a map is of no use to an inspector (Bergmann et al., 2021).
AUPRO_LIMIT = 0.3


class Ranking(NamedTuple):
    """How P positives stand among each other and among the negatives, by ascending score.

    Attributes:
        order: (P,) places of the positives in row-major order of the input, by ascending score.
        true_positives: (P,) positives that score at least as high; the positive itself included.
        false_above: (P,) negatives that score higher.
        false_positives: (P,) negatives that score at least as high.
        negatives: number of negatives.
    """

    order: np.ndarray
    true_positives: np.ndarray
    false_above: np.ndarray
    false_positives: np.ndarray
    negatives: int


def rank(scores: np.ndarray, positive: np.ndarray) -> Ranking:
    """Ranks positives among negatives; all metrics below read their counts from here.

    Args:
        scores: finite scores of any shape; higher means more anomalous.
        positive: bool, of the same shape.
    """
    # A plain sort of float32 is four times faster than an argsort, and searching sorted values for
    # sorted values stays in the cache. This is where the seconds are won.
    negatives = np.sort(scores[~positive])
    positives = scores[positive]
    order = np.argsort(positives)
    positives = positives[order]
    return Ranking(
        order=order,
        true_positives=positives.size - np.searchsorted(positives, positives, 'left'),
        false_above=negatives.size - np.searchsorted(negatives, positives, 'right'),
        false_positives=negatives.size - np.searchsorted(negatives, positives, 'left'),
        negatives=negatives.size,
    )


def _areas(ranking: Ranking, limit: float) -> np.ndarray:
    """Area under each positive's own ROC curve up to a false-positive rate, over that rate.

    A single positive's curve is 0 until the negatives above it are passed, rises linearly over the
    negatives that tie with it, and is 1 from there on. Trapezoidal curves of many positives are
    weighted means of these, and so are their areas.

    Args:
        ranking: see `rank`.
        limit: false-positive rate, in (0, 1].

    Returns:
        (P,) areas in 0..1, by ascending score.
    """
    start = ranking.false_above / ranking.negatives
    width = (ranking.false_positives - ranking.false_above) / ranking.negatives
    risen = np.clip(limit - start, 0, width)
    triangle = np.divide(risen**2, 2 * width, out=np.zeros_like(width), where=width > 0)
    return (triangle + np.maximum(limit - start - width, 0)) / limit


def auroc(ranking: Ranking) -> float:
    """Area under the ROC curve; a tie counts one half."""
    return float(_areas(ranking, 1.0).mean())


def average_precision(ranking: Ranking) -> float:
    """Average precision: the precision at each positive's score, averaged over the positives."""
    hits = ranking.true_positives
    return float(np.mean(hits / (hits + ranking.false_positives)))


def aupro(ranking: Ranking, regions: np.ndarray, limit: float = AUPRO_LIMIT) -> float:
    """Area under the per-region-overlap curve, up to a false-positive rate, over that rate.

    Every region has the same weight, however small (Bergmann et al., "The MVTec Anomaly Detection
    Dataset", IJCV 2021).

    Args:
        ranking: of pixels; see `rank`.
        regions: (P,) region of each anomalous pixel, as `label_regions` returns it.
        limit: false-positive rate at which the integration ends.
    """
    sizes = np.bincount(regions)
    weights = 1 / (np.count_nonzero(sizes) * sizes[regions[ranking.order]])
    return float(weights @ _areas(ranking, limit))


def label_regions(masks: np.ndarray) -> np.ndarray:
    """Numbers the 8-connected regions of bool masks (N, H, W).

    Returns:
        (P,) the region of each of the P anomalous pixels, in row-major order. No number is used in
        two images: scars on two parts are two scars.
    """
    regions, count = [np.empty(0, int)], 0
    for mask in masks[masks.any(axis=(1, 2))]:
        labelled, found = measure.label(mask, connectivity=2, return_num=True)
        regions.append(labelled[mask] + count)
        count += found
    return np.concatenate(regions)


def _comparable(scores: np.ndarray) -> np.ndarray:
    """Scores as float32 if they are that already, else as float64, which holds all other types."""
    scores = np.asarray(scores)
    return scores if scores.dtype == np.float32 else scores.astype(np.float64)


def evaluate(
    scores: np.ndarray,
    maps: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray,
    has_mask: np.ndarray,
    valid: np.ndarray | None = None,
) -> tuple[dict[str, float | None], dict[str, str]]:
    """All seven metrics of a test split.

    I-AUROC and AP-det are of the scores, seg-I-AUROC and seg-AP-det of each map's maximum; P-AUROC,
    AP-loc and AUPRO are of the pixels of all images that have a mask.

    Args:
        scores: (N,) score of each image; higher means more anomalous, in any monotone unit.
        maps: (N, H, W) score of each pixel, likewise.
        labels: (N,) non-zero for a defective image.
        masks: (N, H, W) non-zero where an image is defective.
        has_mask: (N,) whether the image's mask is known; a normal image's is, and is empty.
        valid: (N, H, W) which pixels count, some of each image; None: all.

    Returns:
        values: the metrics, 0..1, by the names and in the order of `METRICS`; None if undefined.
        reasons: for each metric that is None, why.
    """
    scores, maps = _comparable(scores), _comparable(maps)
    labels, masks, has_mask = (np.asarray(x) > 0 for x in (labels, masks, has_mask))
    if valid is not None:
        masks &= valid
    counts = {x.shape for x in (scores, labels, has_mask)} | {maps.shape[:1]}
    if len(counts) > 1 or maps.ndim != 3 or maps.shape != masks.shape:
        raise ValueError(
            f'scores {scores.shape}, maps {maps.shape}, labels {labels.shape}, masks {masks.shape} '
            f'and has_mask {has_mask.shape} do not describe the same images'
        )

    values: dict[str, float | None] = dict.fromkeys(METRICS)
    reasons = {}

    peaks = maximum(maps, valid)
    for prefix, source, what in (('', scores, 'scores'), ('seg-', peaks, 'maps')):
        names = [f'{prefix}I-AUROC', f'{prefix}AP-det']
        if not labels.any():
            reasons |= dict.fromkeys(names, 'no defective image')
        elif labels.all():
            reasons |= dict.fromkeys(names, 'no normal image')
        elif not np.isfinite(source).all():
            reasons |= dict.fromkeys(names, f'non-finite {what}')
        else:
            ranking = rank(source, labels)
            values |= zip(names, (auroc(ranking), average_precision(ranking)), strict=True)

    names = ['P-AUROC', 'AP-loc', 'AUPRO']
    maps, masks = maps[has_mask], masks[has_mask]
    regions = label_regions(masks)
    if valid is not None:
        maps, masks = maps[valid[has_mask]], masks[valid[has_mask]]
    if not masks.any():
        reasons |= dict.fromkeys(names, 'no defective image has a mask')
    elif masks.all():
        reasons |= dict.fromkeys(names, 'no normal pixel')
    elif not np.isfinite(maps).all():
        reasons |= dict.fromkeys(names, 'non-finite maps')
    else:
        ranking = rank(maps, masks)
        overlap = aupro(ranking, regions)
        values |= zip(names, (auroc(ranking), average_precision(ranking), overlap), strict=True)
    return values, reasons


def maximum(maps: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """The maximum (N,) of each map (N, H, W) over the pixels that are `valid`; None: all."""
    return maps.max((1, 2)) if valid is None else maps.max((1, 2), where=valid, initial=-np.inf)


def youden(scores: np.ndarray, labels: np.ndarray, misses: float = 1.0) -> dict[str, float]:
    """The threshold with the largest TPR - FPR (Youden, "Index for rating diagnostic tests", 1950).

    An image is called defective when its score reaches the threshold. Among equally good thresholds
    the one with the fewest false positives wins; if none beats chance, nothing is called defective.

    Args:
        scores: (N,) finite scores.
        labels: (N,) non-zero for a defective image.
        misses: a factor on the TPR.

    Returns:
        threshold, in the unit of the scores; tpr and fpr, its rates on these images.

    Raises:
        ValueError: if a class is missing or a score is not finite.
    """
    scores, labels = _comparable(scores), np.asarray(labels) > 0
    if not np.isfinite(scores).all():
        raise ValueError('no threshold can be chosen: non-finite scores')
    if labels.all() or not labels.any():
        raise ValueError('no threshold can be chosen: it takes normal and defective images')
    ranking = rank(scores, labels)
    defective, normal = labels.sum(), ranking.negatives
    # In integers, since 2/3 - 1/3 and 1/3 - 0 must tie. Last maximum: highest score, fewest alarms.
    gain = misses * (ranking.true_positives * normal) - ranking.false_positives * defective
    best = gain.size - 1 - np.argmax(gain[::-1])
    if gain[best] <= 0:
        return {'threshold': just_above(scores.max()), 'tpr': 0.0, 'fpr': 0.0}
    return {
        'threshold': float(scores[labels][ranking.order[best]]),
        'tpr': float(ranking.true_positives[best] / defective),
        'fpr': float(ranking.false_positives[best] / normal),
    }


def just_above(score: np.floating) -> float:
    """The next larger number of the score's own precision, so that it survives a comparison."""
    return float(np.nextafter(score, np.inf, dtype=score.dtype))
