"""Predicts images with a trained run: scores, decisions, boxes and heat maps.

    python scripts/predict.py --workdir runs/NAME --input photos --output predictions

Exit status: 0, or 1 for a mistake that ended the command, or 2 if some images could not be read;
the others are predicted all the same.
"""

import argparse
import csv
import functools
import math
import pathlib
import sys

from ssn_jax import terminal
from ssn_jax.errors import UserError


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no probability above 0 and below 1')
    return value


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and predicts; returns the exit status."""
    parser = terminal.Parser(__doc__)
    terminal.add_run_arguments(parser, ('backbone.weights', 'eval_batch_size', 'precision'))
    parser.add_argument('--input', type=pathlib.Path, required=True, metavar='FILE_OR_FOLDER')
    parser.add_argument('--output', type=pathlib.Path, required=True, metavar='DIR')
    parser.add_argument(
        '--threshold',
        type=_probability,
        metavar='PROBABILITY',
        help="defective from this score on, instead of the run's own threshold",
    )
    parser.add_argument(
        '--max_pixels',
        type=int,
        default=2**27,
        help='a larger image is refused before it is decoded (%(default)s)',
    )
    parser.add_argument('--no_overlays', action='store_true', help='write the table only')
    arguments, overrides = terminal.parse(parser, argv)
    if arguments.max_pixels < 1:
        raise UserError(f'--max_pixels={arguments.max_pixels} cannot be used: at least 1.')
    terminal.log_to_stderr(arguments.quiet)
    # After the arguments, so that a wrong one is told at once.
    import tqdm

    from ssn_jax import predict_folder, predictor

    predict_folder.check_output(arguments.output)
    terminal.use_compilation_cache()
    run = predictor.open_run(arguments.workdir, arguments.checkpoint, overrides)
    threshold = arguments.threshold
    done, failed = predict_folder.predict(
        run,
        arguments.input,
        arguments.output,
        threshold and math.log(threshold / (1 - threshold)),
        arguments.max_pixels,
        not arguments.no_overlays,
        functools.partial(_progress, tqdm.tqdm, arguments.quiet),
    )
    if failed:
        print(f'{failed} of {done + failed} images could not be read.', file=sys.stderr)
    if not arguments.quiet:
        table = arguments.output / 'predictions.csv'
        with table.open(newline='', errors='surrogateescape') as f:
            defective = sum(row['decision'] == 'defective' for row in csv.DictReader(f))
        print(f'{done} predictions are in {table}: {defective} defective.')
    return 2 if failed else 0


def _progress(bar, quiet, paths, total):
    disable = quiet or not sys.stderr.isatty()  # A bar is for a terminal.
    return bar(paths, 'image', total=total, unit='image', disable=disable, smoothing=0.05)


if __name__ == '__main__':
    terminal.guard(lambda: sys.exit(main()))
