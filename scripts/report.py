"""Makes one page of any number of runs, as Markdown and as a single HTML file.

    python scripts/report.py runs/* --output report

Runs that differ in their seed alone become one row. Beside them stand the published results.
"""

import pathlib

from ssn_jax import terminal
from ssn_jax.report import page


def main() -> None:
    """Parses the command line and writes the report."""
    parser = terminal.Parser(__doc__)
    parser.add_argument('runs', nargs='+', type=pathlib.Path, help="the runs' folders")
    parser.add_argument('--output', type=pathlib.Path, required=True, help='a folder to write')
    parser.add_argument(
        '--benchmark', type=pathlib.Path, help='output of scripts/benchmark.py --json'
    )
    arguments = parser.parse_args()
    page.write_report(arguments.runs, arguments.output, arguments.benchmark)
    print(f'The report is in {arguments.output}: report.html, report.md.')


if __name__ == '__main__':
    terminal.guard(main)
