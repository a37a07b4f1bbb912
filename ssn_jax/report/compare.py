"""The maps of several runs on the same test images, side by side."""

import os
import pathlib

import numpy as np

from ssn_jax import data, decision, evaluate, predictor, run as run_lib
from ssn_jax.data import splits
from ssn_jax.errors import UserError
from ssn_jax.report import figures


def pick_spread(split: data.Split, count: int) -> np.ndarray:
    """Places of `count` defective images, evenly spread over a split."""
    defective = np.flatnonzero(split.labels)
    if not len(defective):
        raise UserError('the test split holds no defective image to compare maps of.')
    return defective[
        np.linspace(0, len(defective) - 1, min(count, len(defective))).round().astype(int)
    ]


def pick_failures(split: data.Split, count: int, model: predictor.Predictor) -> list[int]:
    """Places of what a model gets most wrong: half of `count` are defects, half normal images.

    Of an odd count the one more is a defect.
    """
    scores, _ = evaluate.predict(model, split.images)
    _, worst = figures.pick_best_worst(scores, split.labels, -(-count // 2))
    return worst[:count]


def compare(
    workdirs: list[pathlib.Path], output: pathlib.Path, count: int, select: str = 'spread'
) -> None:
    """Draws `count` test images and every run's map of them into `output`, a .png."""
    configs = [run_lib.with_white(run_lib.read_config(workdir)) for workdir in workdirs]
    datasets = [
        data.load(config.data, config.image_size, config.resize, need='test') for config in configs
    ]
    dataset = datasets[0]
    for workdir, other in zip(workdirs, datasets, strict=True):
        if not np.array_equal(other.test.images, dataset.test.images):
            raise UserError(f'{workdir} and {workdirs[0]} differ in data set or image size.')
    if select == 'spread':
        chosen = pick_spread(dataset.test, count)
    else:
        chosen = pick_failures(dataset.test, count, predictor.open_run(workdirs[0]))
    split = splits.take(dataset.test, chosen)
    names = [config.name for config in configs]
    shared = os.path.commonpath([workdir.absolute() for workdir in workdirs])
    systems, notes = {}, {}
    for workdir, name in zip(workdirs, names, strict=True):
        model = predictor.open_run(workdir)
        scores, logits = evaluate.predict(model, split.images)
        system = name if names.count(name) == 1 else os.path.relpath(workdir, shared)
        systems[system] = decision.sigmoid(logits)
        notes[system] = [note(score, model.threshold) for score in scores]
    title = f'{dataset.category} ({"embedded data" if dataset.embedded else dataset.name})'
    if select == 'failures':
        title += f', worst of {next(iter(systems))}'
    figures.compare_maps(output, split.images, split.masks, systems, split.files, title, notes)


def note(score: float, threshold: float | None) -> str:
    """A score logit as a probability, and what it is called if there is a threshold."""
    text = f'{decision.sigmoid(score):.3f}'
    return text if threshold is None else f'{text} · {decision.CLASSES[int(score >= threshold)]}'
