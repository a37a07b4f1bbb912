"""Measures a run's checkpoint again, on its own test split or on other data.

    python scripts/evaluate.py --workdir runs/NAME
    python scripts/evaluate.py --workdir runs/NAME --config.data.category=bottle --csv scores.csv

The metrics are printed in full, as results.json holds them (0..1), and in percent.
"""

import csv
import io
import pathlib

from ssn_jax import files, terminal


def evaluate(run, csv_file: pathlib.Path | None = None) -> dict:
    """Measures a run on the test split of its config's data.

    Args:
      run: an opened run.
      csv_file: receives the images' scores.

    Returns:
      'metrics' and 'undefined' as results.json has them, 'images' (their number), 'data' (what was
      measured on, in words), and 'decision' with the rates on these images, if there is one.
    """
    from ssn_jax import data, decision, evaluate as evaluate_lib, predictor

    config = run.config
    dataset = data.load(config.data, config.image_size, config.resize)
    test = dataset.test
    maps, scores = predictor.predict(run, test.images)
    values, undefined = evaluate_lib.evaluate(maps, scores, test)
    threshold = (run.decision or {}).get('threshold')
    if csv_file:
        table = io.StringIO()
        rows = csv.writer(table, lineterminator='\n')
        names = ['file', 'defect', 'label', 'score', 'probability', 'map_maximum', 'decision']
        rows.writerow(names)
        highest = maps.max((1, 2))
        for i, score in enumerate(scores):
            called = '' if threshold is None else decision.CLASSES[int(score >= threshold)]
            rows.writerow(
                [
                    *(test.files[i], test.defects[i], test.labels[i], score),
                    *(f'{decision.sigmoid(score):.6f}', highest[i], called),
                ]
            )
        files.write_output(csv_file, table.getvalue(), '--csv')
    chosen = None
    if threshold is not None:
        rates = decision.rates(scores, test.labels, threshold)
        chosen = run.decision | {f'test_{name}': value for name, value in rates.items()}
    where = f'{dataset.name} {dataset.category}' + ', embedded data' * dataset.embedded
    return {
        'metrics': values,
        'undefined': undefined,
        'decision': chosen,
        'images': len(scores),
        'data': where,
    }


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, measures and prints."""
    parser = terminal.Parser(__doc__)
    terminal.add_run_arguments(parser)
    parser.add_argument(
        '--csv', type=pathlib.Path, metavar='FILE', help="write the images' scores there"
    )
    arguments, overrides = terminal.parse(parser, argv)
    if arguments.csv:
        files.check_output(arguments.csv, '--csv')
    terminal.log_to_stderr(arguments.quiet)
    from ssn_jax import predictor
    from ssn_jax.report import text  # After the arguments, so that a wrong one is told at once.

    run = predictor.open_run(arguments.workdir, arguments.checkpoint, overrides)
    results = evaluate(run, arguments.csv)
    print(
        f'{run.config.name}, epoch {run.epoch}, seed {run.config.seed}, on {results["data"]}: '
        f'{results["images"]} test images'
    )
    lines = text.metric_lines(results['metrics'], results['undefined'])
    for line, value in zip(lines, results['metrics'].values(), strict=True):
        print(line if value is None else f'{line}   {value!r}')
    if results['decision']:
        print(f'  {text.decision_line(results["decision"])}')
    if arguments.csv and not arguments.quiet:
        print(f'The scores of the images are in {arguments.csv}.')


if __name__ == '__main__':
    terminal.guard(main)
