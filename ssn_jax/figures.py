"""Figures of a run: where the model looked, how it learned and how well its scores decide.

Every function draws one file, writes it whole or not at all, and puts the given title above it.
Figures are made without pyplot, so nothing global is touched and no display is needed.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import os
import pathlib

from matplotlib import cm, colors, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
from sklearn import metrics as sklearn_metrics

from ssn_jax import files, metrics

# Okabe and Ito's palette, which colour-blind readers can tell apart.
NORMAL, DEFECTIVE, ACCENT, MUTED = '#0072B2', '#D55E00', '#009E73', '#666666'
PALETTE = (NORMAL, DEFECTIVE, ACCENT, '#CC79A7', '#E69F00', '#56B4E9', 'black')
DASHES = ('-', '--', ':')
MARKERS = ('o', 's', '^')

COLOURS = 'viridis'
DPI = 130
MARGIN = 0.12  # inches around everything
CAPTION = 0.22  # inches above a row of panels
TITLE = 0.42  # inches on top of a figure


@contextlib.contextmanager
def _figure(path: str | os.PathLike, title: str, width: float, height: float) -> Iterator[Figure]:
    """A figure of width x height inches that becomes the file `path` once it is drawn."""
    path = pathlib.Path(path)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor='white')
    # About 12 characters of size 10 fit an inch; a longer title gets smaller.
    size = min(10, 10 * 12 * (width - 2 * MARGIN) / max(len(title), 1))
    figure.suptitle(title, x=MARGIN / width, y=1 - 0.1 / height, ha='left', va='top', fontsize=size)
    yield figure
    with files.replacing(path) as draft:
        figure.savefig(draft, format=path.suffix[1:])


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the figure's upper left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def _write(figure: Figure, left: float, top: float, text: str, **style) -> None:
    """Text at a place given in inches from the figure's upper left corner."""
    w, h = figure.get_size_inches()
    figure.text(left / w, 1 - top / h, text, **{'fontsize': 7, 'va': 'top', **style})


def _shorten(text: str, length: int) -> str:
    """Drops the middle of a long name: the folder and the number at its ends tell more."""
    if len(text) <= length:
        return text
    tail = (length - 1) * 2 // 3
    return f'{text[: length - 1 - tail]}…{text[-tail:]}'


def _panel_size(height: int, width: int, area: float) -> tuple[float, float]:
    """Width and height in inches of a panel with an image's proportions and a given area."""
    return math.sqrt(area * width / height), math.sqrt(area * height / width)


def _show(axes: Axes, image: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Draws an image (H, W, 3) and the outline of its mask (H, W) if it has one."""
    axes.imshow(image, interpolation='antialiased')
    axes.set_axis_off()
    if mask is not None and np.any(mask):
        # A border of zeros closes the outline of a defect that touches the image's edge.
        y, x = (np.arange(-1, size + 1) for size in mask.shape)
        outline = axes.contour(x, y, np.pad(mask > 0, 1), levels=[0.5], colors='white')
        outline.set(
            linewidth=1.0, path_effects=[patheffects.withStroke(linewidth=2.4, foreground='black')]
        )
        axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))


def _scale(maps: np.ndarray) -> colors.Normalize:
    """The colour scale that spans the finite values of all the maps."""
    finite = maps[np.isfinite(maps)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    return colors.Normalize(low, high if high > low else low + 1e-3)


def _overlay(image: np.ndarray, heat: np.ndarray, scale: colors.Normalize) -> np.ndarray:
    """A map (H, W) in colour over the grey image (H, W, 3)."""
    # Little contrast is left to the image, lest its bright parts be taken for a high map.
    grey = 0.2 + 0.6 * image.astype(np.float32).mean(axis=-1, keepdims=True) / 255
    tint = cm.ScalarMappable(scale, COLOURS).to_rgba(np.ma.masked_invalid(heat))
    # Where the map is not a number, the bare image says so.
    alpha = 0.7 * tint[..., 3:]
    return (1 - alpha) * grey + alpha * tint[..., :3]


def _colour_bar(figure: Figure, axes: Axes, scale: colors.Normalize, label: str) -> None:
    bar = figure.colorbar(cm.ScalarMappable(scale, COLOURS), cax=axes)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)


def pick_best_worst(scores: np.ndarray, labels: np.ndarray, k: int) -> tuple[list[int], list[int]]:
    """Picks the images that the scores get most clearly right and most clearly wrong.

    A defective image is the better the higher its score, a normal one the lower; so no threshold
    is needed. Where a class has fewer than 2k images, they are shared out and none is shown twice.

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
    path: str | os.PathLike,
    images: np.ndarray,
    masks: np.ndarray | None,
    maps: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    title: str,
    k: int = 3,
) -> None:
    """Draws the best and the worst images of a test split: image, mask, map.

    Args:
        path: file to write.
        images: (N, H, W, 3) uint8, RGB; all of the split.
        masks: (N, H, W) non-zero where defective, or None if there are none.
        maps: (N, H, W) anomaly probability, 0..1; all share one colour scale.
        scores: (N,) anomaly probability of the images, 0..1.
        labels: (N,) non-zero for a defective image.
        names: N file names, for the captions.
        title: what is seen: system, category, whether embedded data.
        k: images of each class on either side.
    """
    sides = [
        side
        for side in zip(('best', 'worst'), pick_best_worst(scores, labels, k), strict=True)
        if side[1]
    ]
    shown = [i for _, side in sides for i in side]
    scale = _scale(maps[shown])
    width, height = _panel_size(*images.shape[1:3], area=1.8)
    block = 3 * width + 2 * 0.05
    rows = max(len(side) for _, side in sides)
    head = TITLE + 0.18
    row = CAPTION + height + 0.06
    total_width = max(len(sides) * (block + 0.25) + 0.75, 5.0)

    with _figure(path, title, total_width, head + rows * row + MARGIN) as figure:
        for column, (side, members) in enumerate(sides):
            left = MARGIN + column * (block + 0.25)
            _write(figure, left, TITLE, f'{side}: image, mask, map', fontsize=8, weight='bold')
            for line, i in enumerate(members):
                top = head + line * row
                kind = 'defective' if labels[i] else 'normal'
                note = f' · {kind} · {scores[i]:.3f}'
                # About 19 characters of this size fit an inch.
                name = _shorten(str(names[i]), max(int(19 * block) - len(note), 8))
                colour = DEFECTIVE if labels[i] else NORMAL
                _write(figure, left, top + 0.05, name + note, color=colour)
                mask = None if masks is None else masks[i]
                panels = (
                    (images[i], None),
                    (images[i], mask),
                    (_overlay(images[i], maps[i], scale), None),
                )
                for place, (picture, outline) in enumerate(panels):
                    axes = _place(
                        figure, left + place * (width + 0.05), top + CAPTION, width, height
                    )
                    _show(axes, picture, outline)
        bar_left = MARGIN + len(sides) * (block + 0.25) - 0.1
        axes = _place(figure, bar_left, head + CAPTION, 0.1, min(rows * row - CAPTION, 3.0))
        _colour_bar(figure, axes, scale, 'anomaly probability')


def compare_maps(
    path: str | os.PathLike,
    images: np.ndarray,
    masks: np.ndarray | None,
    systems: Mapping[str, np.ndarray],
    names: Sequence[str],
    title: str,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Draws several systems' maps of the same images side by side, one image a row.

    Each system has a colour scale of its own, since their probabilities mean different things:
    what compares is the place and the shape.

    Args:
        path: file to write.
        images: (N, H, W, 3) uint8, RGB; all are drawn.
        masks: (N, H, W) non-zero where defective, or None if there are none.
        systems: each system's name and its maps (N, H, W), anomaly probability, 0..1.
        names: N file names, for the captions.
        title: what is seen.
        notes: each system's N texts, which stand above its maps.
    """
    width, height = _panel_size(*images.shape[1:3], area=2.6)
    width = max(width, 1.0)
    row = CAPTION + height + 0.06
    head = TITLE + 0.18
    step = width + 0.08
    total_width = max(MARGIN + (1 + len(systems)) * step + MARGIN, 4.0)
    foot = 0.45

    with _figure(path, title, total_width, head + len(images) * row + foot) as figure:
        style = {'fontsize': 8, 'weight': 'bold'}
        _write(figure, MARGIN, TITLE, 'image and mask', **style)
        for line, image in enumerate(images):
            top = head + line * row
            room = width if notes else total_width - 2 * MARGIN
            name = _shorten(str(names[line]), int(19 * room))
            _write(figure, MARGIN, top + 0.05, name)
            axes = _place(figure, MARGIN, top + CAPTION, width, height)
            _show(axes, image, None if masks is None else masks[line])
        for column, (system, maps) in enumerate(systems.items(), 1):
            left, scale = MARGIN + column * step, _scale(maps)
            _write(figure, left, TITLE, _shorten(system, int(13 * width)), **style)
            for line, image in enumerate(images):
                top = head + line * row
                if notes:
                    _write(figure, left, top + 0.05, notes[system][line])
                axes = _place(figure, left, top + CAPTION, width, height)
                _show(axes, _overlay(image, maps[line], scale))
            axes = _place(figure, left, head + len(images) * row + 0.06, width, 0.08)
            bar = figure.colorbar(
                cm.ScalarMappable(scale, COLOURS), cax=axes, orientation='horizontal'
            )
            ends = [f'{scale.vmin:.2g}', f'{scale.vmax:.2g}']
            bar.set_ticks([scale.vmin, scale.vmax], labels=ends)
            for end, side in zip(bar.ax.get_xticklabels(), ('left', 'right'), strict=True):
                end.set_horizontalalignment(side)
            bar.ax.tick_params(labelsize=6, length=2)
            bar.outline.set_visible(False)


def _chart(figure: Figure, axes: Axes, xlabel: str, ylabel: str) -> Axes:
    """Dresses axes for curves: labels, a faint grid, and no box around them."""
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color='#DDDDDD', linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    return axes


def loss_curves(
    path: str | os.PathLike, history: Mapping[str, Sequence[float]], title: str
) -> None:
    """Draws each column of a training log over the epochs, in a panel and on a scale of its own.

    The scale is logarithmic where all values are positive and span more than two decades. Values
    that are not finite leave gaps and are counted above the panel.

    Args:
        path: file to write.
        history: columns by name, each with one value an epoch; a column `epoch`, if there is one,
            is the x axis, else epochs count from 1.
        title: what is seen.
    """
    columns = {name: np.asarray(x, np.float64) for name, x in history.items() if name != 'epoch'}
    count = max(len(columns), 1)
    across = min(count, 3)
    down = math.ceil(count / across)
    width, height = 2.7, 1.6
    total = (max(across * (width + 0.75) + 0.2, 5.0), TITLE + down * (height + 0.75) + 0.1)

    with _figure(path, title, *total) as figure:
        for place, (name, values) in enumerate(columns.items()):
            line, column = divmod(place, across)
            left, top = 0.65 + column * (width + 0.75), TITLE + 0.25 + line * (height + 0.75)
            axes = _chart(figure, _place(figure, left, top, width, height), 'epoch', '')
            epochs = np.asarray(history.get('epoch', np.arange(1, len(values) + 1)))
            finite = np.isfinite(values)
            # Few points, or points between gaps, are seen only as markers.
            lonely = finite & (np.convolve(finite, [1, 1, 1])[1:-1] == 1) if finite.size else finite
            marker = '.' if finite.sum() < 50 or lonely.any() else ''
            axes.plot(
                epochs, np.where(finite, values, np.nan), color=NORMAL, lw=1.2, marker=marker, ms=3
            )
            shown = values[finite]
            if shown.size and shown.min() > 0 and shown.max() > 100 * shown.min():
                axes.set_yscale('log')
            if epochs.size:
                pad = max(0.02 * (epochs[-1] - epochs[0]), 0.5)
                axes.set_xlim(epochs[0] - pad, epochs[-1] + pad)
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
            lost = f'  ({np.sum(~finite)} of {finite.size} not finite)' if not finite.all() else ''
            axes.set_title(
                name + lost, fontsize=8, loc='left', color=DEFECTIVE if lost else 'black'
            )


@contextlib.contextmanager
def _wide_chart(
    path: str | os.PathLike, title: str, xlabel: str, ylabel: str, entries: int
) -> Iterator[Axes]:
    """A chart of several systems; the `entries` that are drawn with a label are named below it."""
    height = TITLE + 3.5 + 0.16 * math.ceil(entries / 2)
    with _figure(path, title, 5.4, height) as figure:
        yield _chart(figure, _place(figure, 0.65, TITLE, 4.6, 2.9), xlabel, ylabel)
        style = {'fontsize': 7, 'frameon': False, 'ncols': 2, 'loc': 'lower left'}
        figure.legend(bbox_to_anchor=(0.08, 0.01), **style)


def compare_losses(
    path: str | os.PathLike, histories: Mapping[str, Mapping[str, Sequence[float]]], title: str
) -> None:
    """Draws the loss of several systems over their epochs; values that are not finite leave gaps.

    Args:
        path: file to write.
        histories: each system's name and its training log with the columns `epoch` and `loss`.
        title: what is seen.
    """
    with _wide_chart(path, title, 'epoch', 'loss', len(histories)) as axes:
        low, high = math.inf, -math.inf
        for i, (name, history) in enumerate(histories.items()):
            losses = np.asarray(history['loss'], np.float64)
            finite = losses[np.isfinite(losses)]
            low, high = min([low, *finite]), max([high, *finite])
            style = {'color': PALETTE[i % len(PALETTE)], 'ls': DASHES[i // len(PALETTE) % 3]}
            marker = '.' if len(losses) < 50 else ''
            losses = np.where(np.isfinite(losses), losses, np.nan)
            axes.plot(history['epoch'], losses, lw=1.2, marker=marker, ms=3, label=name, **style)
        if 0 < 100 * low < high:
            axes.set_yscale('log')
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)


def trade_off(
    path: str | os.PathLike,
    points: Mapping[str, tuple[float, float]],
    published: Mapping[str, tuple[float, float]],
    title: str,
    devices: tuple[str, str],
) -> None:
    """Draws accuracy against latency; up and to the left is better.

    Args:
        path: file to write.
        points: each system's name, its latency in ms and its I-AUROC in 0..1.
        published: the same of published systems.
        title: what is seen.
        devices: what the latencies of either were measured on; they are not comparable.
    """
    names = list(dict.fromkeys([*points, *published]))
    entries = len(points) + len(published)
    with _wide_chart(path, title, 'ms an image, batch 1', 'I-AUROC (%)', entries) as axes:
        sides = ((points, devices[0], True), (published, f'published, {devices[1]}', False))
        for side, device, filled in sides:
            for name, (ms, auroc) in side.items():
                colour = PALETTE[names.index(name) % len(PALETTE)]
                marker = MARKERS[names.index(name) // len(PALETTE) % len(MARKERS)]
                face = colour if filled else 'none'
                style = {'ls': '', 'marker': marker, 'ms': 7, 'color': colour, 'mfc': face}
                axes.plot([ms], [100 * auroc], label=f'{name} ({device})', **style)
        axes.margins(0.15)
        axes.set_xlim(left=0)


def over_setting(
    path: str | os.PathLike,
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    published: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    field: str,
) -> None:
    """Draws accuracy over the values of a config field, beside what is published for them.

    Args:
        path: file to write.
        lines: by name, the value, the I-AUROC in 0..1 and its standard deviation of each point.
        published: by name, the value and the I-AUROC of each point.
        title: what is seen.
        field: whose values they are.
    """
    entries = len(lines) + len(published)
    with _wide_chart(path, title, field, 'I-AUROC (%)', entries) as axes:
        values = [point[0] for points in lines.values() for point in points]
        if 0 < 10 * min(values) < max(values):
            axes.set_xscale('log')
        if len(set(values)) <= 8:
            axes.set_xticks(sorted(set(values)), labels=[f'{v:g}' for v in sorted(set(values))])
            axes.minorticks_off()
        for i, (name, points) in enumerate(lines.items()):
            x, mean, spread = np.transpose(points)
            style = {'color': PALETTE[i % len(PALETTE)], 'ls': DASHES[i // len(PALETTE) % 3]}
            style |= {'marker': 'o', 'ms': 4, 'lw': 1.2, 'capsize': 3}
            axes.errorbar(x, 100 * mean, 100 * spread, label=name, **style)
        for i, (name, points) in enumerate(published.items()):
            x, auroc = np.transpose(points)
            style = {'color': MUTED, 'ls': '', 'marker': MARKERS[i % len(MARKERS)], 'mfc': 'none'}
            axes.plot(x, 100 * auroc, ms=7, label=f'{name}, published', **style)


@contextlib.contextmanager
def _square_chart(path: str | os.PathLike, title: str, xlabel: str, ylabel: str) -> Iterator[Axes]:
    """A chart of two rates, each in 0..1."""
    with _figure(path, title, 4.6, 4.7) as figure:
        axes = _chart(figure, _place(figure, 0.65, TITLE + 0.1, 3.7, 3.7), xlabel, ylabel)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        yield axes
        axes.legend(fontsize=7, frameon=True, framealpha=0.9, edgecolor='none')


def pr_curve(path: str | os.PathLike, scores: np.ndarray, positive: np.ndarray, title: str) -> None:
    """Draws the precision-recall curve of images or, with maps and masks, of pixels.

    Args:
        path: file to write.
        scores: finite scores of any shape, (N,) or (N, H, W).
        positive: of the same shape, non-zero where defective.
        title: what is seen.

    Raises:
        ValueError: if a score is not finite or nothing is defective.
    """
    scores, positive = np.asarray(scores), np.asarray(positive) > 0
    if not np.isfinite(scores).all() or not positive.any():
        raise ValueError('a precision-recall curve takes finite scores and at least one defect')
    ranking = metrics.rank(scores, positive)
    hits = ranking.true_positives[::-1]
    precision = hits / (hits + ranking.false_positives[::-1])
    # Millions of pixels would make the same line out of a thousand of them.
    kept = np.unique(np.linspace(0, hits.size - 1, 1000).astype(int))
    share = positive.mean()
    with _square_chart(path, title, 'recall', 'precision') as axes:
        label = f'average precision {metrics.average_precision(ranking):.3f}'
        axes.step(hits[kept] / hits.size, precision[kept], color=NORMAL, lw=1.5, label=label)
        axes.axhline(share, color=MUTED, lw=1, ls='--', label=f'chance {share:.3g}')


def roc_curve(path: str | os.PathLike, scores: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Draws the ROC curve of the images and marks the Youden point on it.

    Args:
        path: file to write.
        scores: (N,) finite scores.
        labels: (N,) non-zero for a defective image.
        title: what is seen; it should name the split, since the point is chosen on it.

    Raises:
        ValueError: if a class is missing or a score is not finite.
    """
    scores, labels = np.asarray(scores), np.asarray(labels) > 0
    point = metrics.youden(scores, labels)
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, scores)
    with _square_chart(path, title, 'false-positive rate', 'true-positive rate') as axes:
        axes.plot(
            fpr, tpr, color=NORMAL, lw=1.5, label=f'AUROC {sklearn_metrics.auc(fpr, tpr):.3f}'
        )
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls='--', label='chance')
        rates = f'TPR {point["tpr"]:.3f}, FPR {point["fpr"]:.3f}'
        label = f'Youden: score ≥ {point["threshold"]:.4g}\n{rates}'
        axes.plot(
            point['fpr'], point['tpr'], 'o', color=DEFECTIVE, ms=7, label=label, clip_on=False
        )


def score_histogram(
    path: str | os.PathLike,
    scores: np.ndarray,
    labels: np.ndarray,
    title: str,
    threshold: float | None = None,
) -> None:
    """Draws how the scores of normal and of defective images are distributed.

    Args:
        path: file to write.
        scores: (N,) scores; those that are not finite are left out.
        labels: (N,) non-zero for a defective image.
        title: what is seen.
        threshold: from which score on an image is called defective, if that is decided.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) > 0
    finite = np.isfinite(scores)
    scores, labels = scores[finite], labels[finite]
    edges = np.histogram_bin_edges(scores, bins=min(max(scores.size // 3, 10), 40))
    with _figure(path, title, 5.4, 3.4) as figure:
        axes = _chart(figure, _place(figure, 0.6, TITLE + 0.3, 4.6, 2.2), 'score', 'images')
        groups = ('normal', ~labels, NORMAL, '//'), ('defective', labels, DEFECTIVE, None)
        for name, members, colour, hatch in groups:
            style = {
                'facecolor': (*colors.to_rgb(colour), 0.35),
                'edgecolor': colour,
                'hatch': hatch,
            }
            label = f'{name} ({members.sum()})'
            axes.hist(scores[members], edges, histtype='stepfilled', label=label, **style)
        if threshold is not None:
            axes.axvline(
                threshold, color='black', lw=1.2, ls='--', label=f'threshold {threshold:.4g}'
            )
        axes.yaxis.get_major_locator().set_params(integer=True)
        place = {'loc': 'lower left', 'bbox_to_anchor': (0, 1), 'ncols': 3, 'borderaxespad': 0.2}
        axes.legend(fontsize=7, frameon=False, **place)
