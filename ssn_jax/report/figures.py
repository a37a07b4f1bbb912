"""Figures of a run: where the model looked, how it learned and how well its scores decide.

Every function draws one file, `path`, writes it whole or not at all, and puts the given `title`,
which says what is seen, above it. No figure is pyplot's, so nothing global is touched and no
display is needed.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import itertools
import math
from pathlib import Path
import textwrap

import cv2
from matplotlib import cm, colors, cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from sklearn import metrics as sklearn_metrics

from ssn_jax import decision, files, metrics
from ssn_jax.data import defects
from ssn_jax.report import overlays as overlays_lib

# Okabe and Ito's palette, which colour-blind readers can tell apart.
NORMAL, DEFECTIVE, MUTED = '#0072B2', '#D55E00', '#666666'
PALETTE = cycler(color=(NORMAL, DEFECTIVE, '#009E73', '#CC79A7', '#E69F00', '#56B4E9', 'black'))
EVIDENCE = f'evidence (0.5: as much as {100 * decision.COLOURED:.0f} % of normal images have)'
DASHES, MARKERS = cycler(linestyle=('-', '--', ':')), cycler(marker=('o', 's', '^'))


@contextlib.contextmanager
def _figure(
    path: Path, title: str, width: float, height: float, layout: str = 'constrained'
) -> Iterator[Figure]:
    """A figure of about width x height inches that becomes the file `path` once it is drawn."""
    figure = Figure(figsize=(width, height), layout=layout)
    # About 12 characters of this size fit an inch.
    figure.suptitle(textwrap.fill(title, int(12 * width)), fontsize='medium')
    yield figure
    with files.replacing(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], bbox_inches='tight')


def _shorten(text: str, length: int) -> str:
    """Drops the middle of a long name: the folder and the number at its ends tell more."""
    tail = (length - 1) * 2 // 3
    return text if len(text) <= length else f'{text[: length - 1 - tail]}…{text[-tail:]}'


@contextlib.contextmanager
def _grid(
    path: Path, title: str, headings: Sequence[str], rows: Sequence[Sequence[tuple]], span: int
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Pictures of one size in rows and columns; yields the figure and its axes (rows, columns).

    Args:
        path: file to write.
        title: what is seen.
        headings: of the columns; one without a heading is a narrow gap.
        rows: of each column a picture (H, W, 3) or None, the text below it, and the text's colour.
        span: how many columns a text may be wide.
    """
    height, width = rows[0][0][0].shape[:2]
    scale = max(math.sqrt(3.2 / (height * width)), 1.4 / width)
    height, width = scale * height, scale * width  # Now in inches.
    shares = [1 if heading else 0.1 for heading in headings]
    size = width * sum(shares) + 1, (height + 0.25) * len(rows) + 0.7
    with _figure(path, title, *size, layout='compressed') as figure:
        axes = figure.subplots(len(rows), len(headings), squeeze=False, width_ratios=shares)
        for panel, (picture, text, colour) in zip(axes.flat, itertools.chain(*rows), strict=True):
            panel.set(xticks=[], yticks=[], frame_on=False)
            # About 13 characters of this size fit an inch, 12 bold ones.
            label = _shorten(text, int(13 * span * width))
            panel.set_xlabel(label, fontsize='small', color=colour, parse_math=False)
            if picture is not None:
                panel.imshow(picture)
        for panel, heading in zip(axes[0], headings, strict=True):
            panel.set_title(_shorten(heading, int(12 * width)), fontsize='small', weight='bold')
        yield figure, axes


def _outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image with its mask's outline; one that is small is enlarged, so that the line is fine."""
    side = math.sqrt(mask.size)
    factor = max(1, round(400 / side))
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    overlays_lib.outline(image, mask, max(1, round(factor * side / 160)))
    return image


def _tint(
    images: np.ndarray, maps: np.ndarray, fixed: bool
) -> tuple[list[np.ndarray], cm.ScalarMappable]:
    """The maps over their images, and the scale of their colours: 0..1, or what they span."""
    finite = maps[np.isfinite(maps)]
    low, high = (0.0, 1.0) if fixed or not finite.size else (finite.min(), finite.max())
    high = high if high > low else low + 1e-3
    tinted = [overlays_lib.tint(*pair, low, high) for pair in zip(images, maps, strict=True)]
    return tinted, cm.ScalarMappable(colors.Normalize(low, high), 'viridis')


def drawn_defects(
    path: Path,
    images: Sequence[np.ndarray],
    product: Mapping[str, str],
    title: str,
    seed: int = 0,
    real: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> None:
    """Defects of each kind as training draws them, outlined, on images of the run.

    Args:
        path: file to write.
        images: N normal ones of one shape, uint8 RGB (H, W, 3).
        product: `config.product`: what of it decides which kinds there are.
        title: what is seen.
        seed: of places and looks.
        real: as of `defects.draw`.
    """
    cells = []
    for i, kind in enumerate([*defects.kinds_of(product), *['real'] * bool(len(real))]):
        drawn = []
        for row in range(2):
            rng = np.random.default_rng([seed, defects.PICTURE, i, row])
            image, other = (images[j] for j in rng.integers(len(images), size=2))
            if kind == 'real':
                of = real[rng.integers(len(real))]
                drawn.append(_outline(*defects.transplant(image, *of, product, rng)))
            else:
                drawn.append(_outline(*defects.draw_one(image, other, kind, rng)))
        cells.append((np.concatenate(drawn), kind, 'black'))
    contact_sheet(path, cells, title, columns=-(-len(cells) // 2))


def contact_sheet(
    path: Path, cells: Sequence[tuple[np.ndarray, str, str]], title: str, columns: int = 6
) -> None:
    """Draws pictures (H, W, 3) of one size, each with the text below it and the text's colour."""
    cells = [*cells, *[(None, '', 'black')] * (-len(cells) % columns)]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    with _grid(path, title, [' '] * columns, rows, 1):
        pass


def pick_best_worst(scores: np.ndarray, labels: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    """Picks the images that the scores get most clearly right and most clearly wrong.

    A defective image is the better the higher its score, a normal one the lower; so no threshold is
    needed. Where a class has fewer than 2k images, they are shared out and none is shown twice.

    Args:
        scores: (N,) score of each image; one that is not finite counts as wrong.
        labels: (N,) non-zero for a defective image.
        k: how many images of each class to pick on either side.

    Returns:
        Places of the best images (at most k defective, then at most k normal), the most confident
        of each class first; and of the worst, likewise.
    """
    scores = np.asarray(scores, np.float64)
    best, worst = [], []
    for defective in (True, False):
        members = np.flatnonzero((np.asarray(labels) > 0) == defective)
        goodness = scores[members] if defective else -scores[members]
        goodness = np.where(np.isfinite(scores[members]), goodness, -np.inf)
        ranked = members[np.argsort(-goodness, kind='stable')].tolist()
        half = math.ceil(len(ranked) / 2)
        best += ranked[: min(k, half)]
        worst += ranked[half:][::-1][:k]
    return best, worst


def overlays(
    path: Path,
    images: np.ndarray,
    masks: np.ndarray,
    maps: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    title: str,
    evidence: bool = False,
) -> None:
    """Draws the best and the worst images of a test split: image, mask, map.

    Args:
        path: file to write.
        images: (N, H, W, 3) uint8, RGB; all of the split.
        masks: (N, H, W) non-zero where defective.
        maps: (N, H, W) anomaly probability, 0..1; all share one colour scale, which spans those
            that are shown.
        scores: (N,) anomaly probability of the images, 0..1.
        labels: (N,) non-zero for a defective image.
        names: N file names, for the captions.
        title: what is seen: system, category, whether embedded data.
        evidence: `maps` is what `decision.evidence` says, and colours span 0..1.
    """
    best, worst = pick_best_worst(scores, labels, 3)
    sides = {'best': best, 'worst': worst} if worst else {'best': best}
    shown = best + worst
    tinted, scale = _tint(images[shown], maps[shown], evidence)

    def panels(i):
        if i is None:
            return [(None, '', MUTED)] * 4
        kind, colour = ('defective', DEFECTIVE) if labels[i] else ('normal', NORMAL)
        text = f'{names[i]} · {kind} · {scores[i]:.3f}'
        pictures = images[i], _outline(images[i], masks[i]), tinted[shown.index(i)], None
        return list(zip(pictures, ('', text, '', ''), [colour] * 4, strict=True))

    headings = [text for name in sides for text in (f'{name}: image', 'mask', 'map', '')]
    lines = itertools.zip_longest(*sides.values())
    rows = [list(itertools.chain(*map(panels, line))) for line in lines]
    with _grid(path, title, headings, rows, span=3) as (figure, axes):
        style = {'pad': 0.02, 'shrink': 0.6, 'aspect': 8 * len(rows)}
        label = EVIDENCE if evidence else 'anomaly probability'
        figure.colorbar(scale, ax=axes, label=label, **style)


def compare_maps(
    path: Path,
    images: np.ndarray,
    masks: np.ndarray,
    systems: Mapping[str, np.ndarray],
    names: Sequence[str],
    title: str,
    notes: Mapping[str, Sequence[str]],
    evidence: bool = False,
) -> None:
    """Draws several systems' maps of the same images side by side, one image a row.

    Where maps are probabilities, each system has a colour scale of its own, since they mean
    different things: what compares is the place and the shape. Images, masks, names and `evidence`
    are as in `overlays`, and all are drawn; by a system's name, `systems` holds its maps (N, H, W),
    0..1, and `notes` N texts to go below them.
    """
    columns, scales = [zip(map(_outline, images, masks), names, strict=True)], []
    for system, maps in systems.items():
        tinted, scale = _tint(images, maps, evidence)
        columns.append(zip(tinted, notes[system], strict=True))
        scales.append(scale)
    rows = [[(*panel, 'black') for panel in row] for row in zip(*columns, strict=True)]
    with _grid(path, title, ['image and mask', *systems], rows, span=1) as (figure, axes):
        style = {'location': 'bottom', 'pad': 0.02, 'shrink': 0.9, 'panchor': False}
        for column, scale in zip(axes.T[1:], scales, strict=True):
            bar = figure.colorbar(scale, ax=column, ticks=scale.get_clim(), format='%.2g', **style)
            for end, side in zip(bar.ax.get_xticklabels(), ('left', 'right'), strict=True):
                end.set_horizontalalignment(side)


def _dress(axes: Axes, xlabel: str = '', ylabel: str = '') -> Axes:
    """Dresses axes for curves: labels, colours, a faint grid, and no box around them."""
    axes.set(xlabel=xlabel, ylabel=ylabel, prop_cycle=DASHES * PALETTE, axisbelow=True)
    axes.grid(color='#DDDDDD', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    return axes


@contextlib.contextmanager
def _chart(path: Path, title: str, xlabel: str, ylabel: str) -> Iterator[Axes]:
    """A chart whose labelled contents are named below it."""
    with _figure(path, title, 6.4, 4.8) as figure:
        axes = _dress(figure.subplots(), xlabel, ylabel)
        yield axes
        labels = axes.get_legend_handles_labels()[1]
        columns = 2 if max(map(len, labels)) < 40 else 1
        # Outside of the figure, which is cut to what is drawn: this leaves room for any number.
        figure.legend(loc='upper center', bbox_to_anchor=(0.5, 0), ncols=columns, frameon=False)


def _plot_epochs(axes: Axes, history: Mapping[str, Sequence[float]], name: str, **style) -> None:
    """Plots a column of a training log over the epochs; what is not finite leaves gaps."""
    values = np.asarray(history[name], np.float64)
    finite = np.isfinite(values)
    # Few points, or points between gaps, are seen only as markers.
    marker = '.' if finite.sum() < 50 or not finite.all() else ''
    epochs = history.get('epoch', np.arange(1, len(values) + 1))
    axes.plot(epochs, np.where(finite, values, np.nan), marker=marker, **style)
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    axes.set_yscale('log' if drawn.size and 0 < 100 * drawn.min() < drawn.max() else 'linear')
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)


def loss_curves(path: Path, history: Mapping[str, Sequence[float]], title: str) -> None:
    """Draws each column of a training log over the epochs, in a panel and on a scale of its own.

    The scale is logarithmic where all values are positive and span more than two decades. Values
    that are not finite leave gaps and are counted above the panel. Without a column `epoch`,
    epochs count from 1.
    """
    columns = [name for name in history if name != 'epoch']
    across = min(max(len(columns), 1), 3)
    down = math.ceil(len(columns) / across)
    with _figure(path, title, max(4 * across, 5), max(3 * down, 3)) as figure:
        for place, name in enumerate(columns, 1):
            axes = _dress(figure.add_subplot(down, across, place), 'epoch')
            _plot_epochs(axes, history, name)
            lost = np.count_nonzero(~np.isfinite(np.asarray(history[name], np.float64)))
            note = f'  ({lost} of {len(history[name])} not finite)' if lost else ''
            colour = DEFECTIVE if lost else 'black'
            axes.set_title(name + note, loc='left', fontsize='medium', color=colour)


def compare_losses(
    path: Path, histories: Mapping[str, Mapping[str, Sequence[float]]], title: str
) -> None:
    """Draws the loss of several systems, by name, over their epochs, as `loss_curves` does."""
    with _chart(path, title, 'epoch', 'loss') as axes:
        for name, history in histories.items():
            _plot_epochs(axes, history, 'loss', label=name)


def trade_off(
    path: Path,
    points: Mapping[str, tuple[float, float]],
    published: Mapping[str, tuple[float, float]],
    title: str,
    devices: tuple[str, str],
) -> None:
    """Draws accuracy against latency; up and to the left is better.

    Both `points` and `published` hold a system's latency in ms and I-AUROC in 0..1 by its name, and
    `devices` says what either's latencies were measured on; they are not comparable.
    """
    names = dict.fromkeys([*points, *published])
    styles = dict(zip(names, itertools.cycle(MARKERS * PALETTE), strict=False))
    sides = (points, devices[0], {}), (published, f'published, {devices[1]}', {'mfc': 'none'})
    with _chart(path, title, 'ms an image, batch 1', 'I-AUROC (%)') as axes:
        for side, device, face in sides:
            for name, (ms, auroc) in side.items():
                style = {'ls': '', 'ms': 8, **styles[name], **face}
                axes.plot([ms], [100 * auroc], label=f'{name} ({device})', **style)
        axes.margins(0.15)
        axes.set_xlim(left=0)


def over_setting(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    published: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    field: str,
) -> None:
    """Draws accuracy over the values of a config field, beside what is published for them.

    By name, `lines` holds the value, the I-AUROC in 0..1 and its standard deviation of each point,
    `published` the value and the I-AUROC.
    """
    values = sorted({point[0] for points in lines.values() for point in points})
    with _chart(path, title, field, 'I-AUROC (%)') as axes:
        if 0 < 10 * values[0] < values[-1]:
            axes.set_xscale('log')
        if len(values) <= 8:
            axes.set_xticks(values, labels=[f'{v:g}' for v in values])
            axes.minorticks_off()
        for name, points in lines.items():
            x, mean, spread = np.transpose(points)
            axes.errorbar(x, 100 * mean, 100 * spread, label=name, marker='o', ms=5, capsize=3)
        for (name, points), marker in zip(published.items(), itertools.cycle(MARKERS)):
            x, auroc = np.transpose(points)
            style = {'color': MUTED, 'ls': '', 'mfc': 'none', 'ms': 8, **marker}
            axes.plot(x, 100 * auroc, label=f'{name}, published', **style)


def pr_curve(path: Path, scores: np.ndarray, positive: np.ndarray, title: str) -> None:
    """Draws the precision-recall curve of images or, with maps and masks, of pixels.

    Scores are of any shape, (N,) or (N, H, W), and `positive` of the same, non-zero where
    defective. Raises ValueError if a score is not finite or nothing is defective.
    """
    scores, positive = np.asarray(scores), np.asarray(positive) > 0
    if not np.isfinite(scores).all() or not positive.any():
        raise ValueError('a precision-recall curve takes finite scores and at least one defect')
    ranking = metrics.rank(scores, positive)
    # Millions of pixels would make the same line out of a thousand of them.
    kept = np.unique(np.linspace(0, ranking.order.size - 1, 1000).astype(int))
    hits, share = ranking.true_positives[kept], positive.mean()
    precision, recall = hits / (hits + ranking.false_positives[kept]), hits / ranking.order.size
    curve = sklearn_metrics.PrecisionRecallDisplay(precision, recall, prevalence_pos_label=share)
    with _figure(path, title, 5, 5) as figure:
        axes = _dress(figure.subplots())
        curve.plot(
            axes,
            name=f'average precision {metrics.average_precision(ranking):.3f}',
            plot_chance_level=True,
            chance_level_kw={'color': MUTED, 'label': f'chance {share:.3g}'},
        )
        axes.legend()  # Where it hides the least.


def roc_curve(path: Path, scores: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Draws the ROC curve of images, scores (N,) and labels (N,), and marks the Youden point on it.

    The title should name the split, since the point is chosen on it. Raises ValueError if a class
    is missing or a score is not finite.
    """
    scores, labels = np.asarray(scores), np.asarray(labels) > 0
    point = metrics.youden(scores, labels)
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, scores)
    rates = f'TPR {point["tpr"]:.3f}, FPR {point["fpr"]:.3f}'
    label = f'Youden: score ≥ {point["threshold"]:.4g}\n{rates}'
    with _figure(path, title, 5, 5) as figure:
        axes = _dress(figure.subplots())
        style = {'color': DEFECTIVE, 'ls': '', 'marker': 'o', 'ms': 8, 'zorder': 3}
        axes.plot(point['fpr'], point['tpr'], label=label, clip_on=False, **style)
        sklearn_metrics.RocCurveDisplay(fpr=fpr, tpr=tpr).plot(
            axes,
            name=f'AUROC {sklearn_metrics.auc(fpr, tpr):.3f}',
            plot_chance_level=True,
            chance_level_kw={'color': MUTED, 'label': 'chance'},
        )


def score_histogram(
    path: Path, scores: np.ndarray, labels: np.ndarray, title: str, threshold: float | None = None
) -> None:
    """Draws how the scores (N,) of normal and of defective images are distributed.

    Those that are not finite are left out; `labels` (N,) is non-zero for a defective image, and
    `threshold` is from which score on an image is called defective, if that is decided.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) > 0
    finite = np.isfinite(scores)
    scores, labels = scores[finite], labels[finite]
    edges = np.histogram_bin_edges(scores, bins=min(max(scores.size // 3, 10), 40))
    with _chart(path, title, 'score', 'images') as axes:
        groups = ('normal', ~labels, NORMAL, '//'), ('defective', labels, DEFECTIVE, None)
        for name, members, colour, hatch in groups:
            style = {'facecolor': (colour, 0.35), 'edgecolor': colour, 'hatch': hatch}
            label = f'{name} ({members.sum()})'
            axes.hist(scores[members], edges, histtype='stepfilled', label=label, **style)
        if threshold is not None:
            axes.axvline(threshold, color='black', ls='--', label=f'threshold {threshold:.4g}')
        axes.yaxis.get_major_locator().set_params(integer=True)
