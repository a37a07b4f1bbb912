"""Draws the maps of several runs on the same defects, side by side.

    python scripts/compare.py runs/mod3 runs/mixed --output compare.png

The runs must share data set and image size; what is shown are defective test images, evenly
spread over the split.
"""

import pathlib

import numpy as np

from ssn_jax import cli, data, figures, files, runs, supervision
from ssn_jax.errors import UserError


def compare(workdirs: list[pathlib.Path], output: pathlib.Path, count: int) -> None:
    """Draws `count` defective test images and every run's map of them into `output`."""
    configs = [runs.read_config(workdir) for workdir in workdirs]
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
        logits, _ = runs.predict(runs.open_run(workdir), split.images)
        systems[name] = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    title = f'{dataset.category} ({"embedded data" if dataset.embedded else dataset.name})'
    figures.compare_maps(output, split.images, split.masks, systems, split.files, title)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and draws."""
    parser = cli.Parser(__doc__)
    parser.add_argument('runs', nargs='+', type=pathlib.Path, help="the runs' folders")
    parser.add_argument('--output', type=pathlib.Path, required=True, help='a .png to write')
    parser.add_argument('--count', type=int, default=6, help='defective images to show')
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise UserError(f'--count={arguments.count} can not be used: at least 1.')
    if arguments.output.suffix != '.png':
        raise UserError(f'--output={arguments.output} can not be used: it ends in .png.')
    files.check_output(arguments.output, '--output')
    compare(arguments.runs, arguments.output, arguments.count)


if __name__ == '__main__':
    cli.guard(main)
