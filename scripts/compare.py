"""Draws the maps of several runs on the same defects, side by side.

    python scripts/compare.py runs/mod3 runs/mixed --output compare.png

The runs must share data set and image size; what is shown are defective test images, evenly
spread over the split.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np

from ssn_jax import (
    checkpoint,
    config as config_lib,
    data,
    evaluate,
    figures,
    steps,
    supervision,
    weights,
)
from ssn_jax.errors import UserError
from ssn_jax.models import resnet


def predict_maps(workdir: pathlib.Path, config, images: np.ndarray, embedded: bool) -> np.ndarray:
    """Anomaly probabilities (N, H, W) of images by a run's newest checkpoint."""
    template = steps.init_state(
        config, jax.random.key(0), sum(resnet.CHANNELS[config.backbone.name][1:])
    )
    epoch, state = checkpoint.restore(
        checkpoint.open_manager(workdir, config.checkpoint.keep), template
    )
    if not epoch:
        raise UserError(f'{workdir} holds no checkpoint yet: let the run get to its first one.')
    variables, _ = weights.load_backbone(config.backbone.name, config.backbone.weights, embedded)
    predict = evaluate.make_predictor(steps.build_network(config), config.eval_batch_size)
    trained = {'params': state.params, 'batch_stats': state.batch_stats}
    maps, _ = predict(variables, trained, images)
    return 1 / (1 + np.exp(-np.clip(maps, -60, 60)))


def compare(workdirs: list[pathlib.Path], output: pathlib.Path, count: int) -> None:
    """Draws `count` defective test images and every run's map of them into `output`."""
    configs = [config_lib.from_json(workdir / 'config.json') for workdir in workdirs]

    datasets = [data.load(config.data, config.image_size, config.resize) for config in configs]
    dataset = datasets[0]
    for workdir, other in zip(workdirs, datasets, strict=True):
        if not np.array_equal(other.test.images, dataset.test.images):
            raise UserError(f'{workdir} and {workdirs[0]} differ in data set or image size.')
    defective = np.flatnonzero(dataset.test.labels)
    if not len(defective):
        raise UserError('the test split holds no defective image to compare maps of.')
    spread = np.linspace(0, len(defective) - 1, min(count, len(defective))).round().astype(int)
    split = supervision.take(dataset.test, defective[spread])
    systems = {}
    for workdir, config in zip(workdirs, configs, strict=True):
        name = config.name if config.name not in systems else workdir.name
        systems[name] = predict_maps(workdir, config, split.images, dataset.embedded)
    title = f'{dataset.category} ({"embedded data" if dataset.embedded else dataset.name})'
    figures.compare_maps(output, split.images, split.masks, systems, split.files, title)


def main() -> None:
    """Parses the command line; a user's mistake is one line and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=pathlib.Path, help="the runs' folders")
    parser.add_argument('--output', type=pathlib.Path, required=True, help='a .png to write')
    parser.add_argument('--count', type=int, default=6, help='defective images to show')
    arguments = parser.parse_args()
    try:
        compare(arguments.runs, arguments.output, arguments.count)
    except UserError as e:
        sys.exit(f'error: {e}')


if __name__ == '__main__':
    main()
