"""Writes a run's predictor, preprocessing included, to one portable file.

python scripts/export.py --workdir runs/NAME --format onnx --output screw.onnx
python scripts/export.py --workdir runs/NAME --format stablehlo --output screw.zip
"""

import pathlib

from ssn_jax import terminal


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and writes the file."""
    parser = terminal.Parser(__doc__)
    terminal.add_run_arguments(parser, ('backbone.weights',))
    parser.add_argument('--format', choices=('stablehlo', 'onnx'), required=True)
    parser.add_argument('--output', type=pathlib.Path, required=True, metavar='FILE')
    arguments, overrides = terminal.parse(parser, argv)
    terminal.log_to_stderr(arguments.quiet)
    from ssn_jax import (
        export,
        predictor,  # After the arguments, so that a wrong one is told at once.
    )

    run = predictor.open_run(arguments.workdir, arguments.checkpoint, overrides)
    export.write(run, arguments.format, arguments.output)
    if not arguments.quiet:
        size = arguments.output.stat().st_size / 1e6
        print(f'Epoch {run.epoch} of {run.workdir} is in {arguments.output} ({size:.1f} MB).')


if __name__ == '__main__':
    terminal.guard(main)
