"""The commands: `ssn-jax COMMAND ...`, or `python scripts/COMMAND.py ...` in a checkout.

What a command needs is imported after its flags are read, so that a wrong one is told at once.
"""

import argparse
import collections
from collections.abc import Callable
import csv
import functools
import io
import json
import pathlib
import sys

from ssn_jax import __version__, terminal
from ssn_jax.errors import UserError

_ON_EVALUATION = ('eval_batch_size', 'precision', 'engine')
# Of a config's data what says where images are, besides the root.
_WHERE = ('name', 'category', 'normal', 'normal_dir', 'normal_test_dir', 'defect_dir', 'mask_dir')
_DATA = ('data.root', 'data.cache', 'data.seed', *(f'data.{name}' for name in _WHERE))


def main(command: str | None = None) -> None:
    """Runs a command with the process's arguments; without a name, the one that they begin with."""
    argv = sys.argv[1:]
    if command is None:
        command, argv = (argv[0] if argv else '--help'), argv[1:]
    terminal.guard(lambda: _run(command, argv))


def _run(command, argv):
    if command in ('-h', '--help'):
        width = max(map(len, COMMANDS))
        firsts = {name: f.__doc__.splitlines()[0] for name, f in COMMANDS.items()}
        lines = [f'  {name:{width}s}  {first}' for name, first in firsts.items()]
        print('ssn-jax COMMAND [--help] [...]', '', *lines, sep='\n')
        return
    if command == '--version':
        print(f'ssn_jax {__version__}')
        return
    if command not in COMMANDS:
        raise UserError(f'no command {command!r}: there are {", ".join(COMMANDS)}.')
    sys.exit(COMMANDS[command](argv) or 0)


def _open(
    arguments: argparse.Namespace,
    overrides: dict,
    threshold: float | None = None,
    fpr: float | None = None,
):
    """The run that --workdir and --checkpoint name, as a `predictor.Predictor`."""
    from ssn_jax import predictor

    model = predictor.open_run(arguments.workdir, threshold, overrides, fpr)
    if arguments.checkpoint in (None, model.epoch):
        return model
    from ssn_jax import run
    from ssn_jax.training import checkpoint

    variables = checkpoint.read_variables(arguments.workdir, model.config, arguments.checkpoint)
    backbone = run.read_model(arguments.workdir).backbone
    return predictor.from_variables(
        *(model.config, backbone, variables, arguments.checkpoint, arguments.workdir),
        *(threshold, fpr),
    )


# --- Commands whose flags are those of a config (absl) --------------------------------------------


def train(argv: list[str]) -> None:
    r"""Trains a config, or goes on with it, and measures it on its test images.

    ssn-jax train --config auto --config.data.name=folder --config.data.root=ROOT \
      --workdir runs/mine

    --config names a config of the package (--config mod2) or a file of your own. The same command
    with the same --workdir goes on with a run that was stopped.

    ssn-jax train --extend runs/mine --config.data.root=NEW

    --extend teaches a finished run new images: docs/supervision.md.
    """
    from ssn_jax import main as main_lib

    main_lib.cli(argv, train.__doc__)


def sweep(argv: list[str]) -> None:
    """Trains every combination of some config values, and writes one table of all results.

    ssn-jax sweep --config mod2 --sweep noise.beta=0.5,0.05 --sweep seed=0,1,2 --workdir sweeps/beta

    Values are separated by commas; those with commas of their own stand in brackets:
    --sweep image_size='(256,256),(320,320)'. All other --config.FIELD=VALUE hold for every run. The
    same command goes on with what is missing. Exit status: 0; 2 if runs failed; 1 for a mistake.
    """
    from absl import flags

    from ssn_jax import main as main_lib

    name = 'sweep'
    flags.DEFINE_multi_string(name, [], 'FIELD=VALUE,VALUE,...: a config field and its values.')

    def run():
        from ssn_jax import sweep as sweep_lib

        return sweep_lib.main(flags.FLAGS)

    main_lib.cli(argv, sweep.__doc__, run, flags_of=(name,))


def import_torch(argv: list[str]) -> None:
    r"""Makes a run of a checkpoint of the published PyTorch SuperSimpleNet.

    ssn-jax import-torch --weights weights.safetensors --config baseline \
      --config.data.root=/data/mvtec_ad --config.data.category=bottle --workdir runs/published

    Backbone, adaptor and system follow from the tensors; all else is the config's, whose fields are
    flags as they are of `train`. --evaluate measures the run at once, as `train` would.
    """
    from absl import flags

    from ssn_jax import main as main_lib

    flags.DEFINE_string('weights', None, 'The published checkpoint: .safetensors, .pt or .pth.')
    flags.DEFINE_integer('step', 0, 'Batches that it was trained for, if that is known.')
    flags.DEFINE_bool('evaluate', False, 'Measure it and choose its threshold at once.')

    def run():
        from ssn_jax import import_torch as import_lib

        import_lib.main(flags.FLAGS)

    interrupted = 'if the run was written, evaluate measures it, else begin anew.'
    names = ('weights', 'step', 'evaluate')
    main_lib.cli(argv, import_torch.__doc__, run, interrupted, names)


# --- Commands on a run ----------------------------------------------------------------------------


def predict(argv: list[str]) -> int:
    """Predicts images with a trained run: scores, decisions, boxes and heat maps.

    ssn-jax predict --workdir runs/mine --input photos --output predictions

    The same command goes on where it was stopped. Exit status: 0, or 1 for a mistake that ended the
    command, or 2 if some images could not be read, or some pictures could not be written; all
    others are there all the same.
    """
    parser = terminal.Parser('predict', predict.__doc__)
    terminal.add_run_arguments(parser, _ON_EVALUATION)
    add, rate = parser.add_argument, _above_0_below_1('rate')
    add('--input', type=terminal.path, required=True, metavar='FILE_OR_FOLDER')
    add('--output', type=terminal.path, required=True, metavar='DIR')
    probability = _above_0_below_1('probability')
    about = "defective from this score on, instead of the run's own threshold"
    add('--threshold', type=probability, metavar='PROBABILITY', help=about)
    about = "of false alarms, to choose the threshold for, instead of the run's own"
    add('--fpr', type=rate, metavar='RATE', help=about)
    about = 'a larger image is refused before it is decoded (%(default)s)'
    add('--max_pixels', type=int, default=2**27, help=about)
    add('--no_overlays', action='store_true', help='draw no overlays')
    about = (
        'say once if the scores, in the order of file names, differ from those of the '
        "run's normal images; RATE of false alarms (%(const)s)"
    )
    names = '--watch-drift', '--watch_drift'
    add(*names, type=rate, nargs='?', const=0.01, metavar='RATE', help=about)
    about = 'write maps too, as PNG of 16 bits (the default) or .npy, and masks of the regions'
    add('--maps', nargs='?', const='png', choices=('png', 'npy'), help=about)
    arguments, overrides = terminal.parse(parser, argv)
    if arguments.max_pixels < 1:
        raise UserError(f'--max_pixels={arguments.max_pixels} cannot be used: at least 1.')
    if arguments.fpr is not None and arguments.threshold is not None:
        raise UserError('--fpr chooses the threshold that --threshold names: give one of both.')
    terminal.log_to_stderr(arguments.quiet)
    import tqdm

    from ssn_jax import predict_folder

    predict_folder.check_output(arguments.output)
    terminal.use_compilation_cache()
    model = _open(arguments, overrides, arguments.threshold, arguments.fpr)
    watch = model.watch_drift(arguments.watch_drift) if arguments.watch_drift else None
    hidden = arguments.quiet or not sys.stderr.isatty()  # A bar is for a terminal.
    bar = functools.partial(tqdm.tqdm, desc='image', unit='image', smoothing=0.05, disable=hidden)
    done, failed = predict_folder.predict(
        model,
        arguments.input,
        arguments.output,
        arguments.max_pixels,
        not arguments.no_overlays,
        bar,
        watch,
        arguments.maps,
    )
    table, unwritten = (arguments.output / x for x in ('predictions.csv', 'unwritten.csv'))
    if failed:
        print(f'{failed} of {done + failed} images could not be read.', file=sys.stderr)
    if unwritten.exists():
        print(f'Some pictures could not be written: {unwritten} names them.', file=sys.stderr)
    if not arguments.quiet:
        with table.open(newline='', encoding='utf-8', errors='surrogateescape') as f:
            called = collections.Counter(row['decision'] for row in csv.DictReader(f))
        total, defective = called.total(), called['defective']
        print(f'{total} predictions are in {table}: {defective} defective.')
        if watch and not watch.noticed:  # Else it was told already.
            print(f'Drift: {watch}.')
    return 2 if failed or unwritten.exists() else 0


def _above_0_below_1(what: str) -> Callable[[str], float]:
    """What reads such a number of a flag; `what` it is."""

    def read(text):
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 1:
            raise argparse.ArgumentTypeError(f'{text!r} is no {what} above 0 and below 1')
        return value

    return read


def decide(argv: list[str]) -> None:
    """Chooses a finished run's threshold anew, without training.

    ssn-jax decide --workdir runs/mine --fpr 0.01
    ssn-jax decide --workdir runs/mine --images new_good_images
    ssn-jax decide --workdir runs/mine --defects known_defects --misses 10

    --images: the threshold is chosen on these good images instead of the training images, as after
    a change of light or lens. --defects: it is chosen with known defects, so that --misses * TPR -
    FPR is largest. The command that trained the run, given again, goes back to its own choice.
    """
    parser = terminal.Parser('decide', decide.__doc__)
    add = parser.add_argument
    add('--workdir', type=terminal.path, required=True, metavar='RUN', help="the run's folder")
    about = "of false alarms (that of the run's config)"
    add('--fpr', type=_above_0_below_1('rate'), metavar='RATE', help=about)
    add('--images', type=terminal.path, metavar='DIR', help='new good images')
    add('--defects', type=terminal.path, metavar='DIR', help='images of known defects')
    about = 'how many false alarms a missed defect weighs, both as rates (%(default)s)'
    add('--misses', type=float, default=1.0, metavar='NUMBER', help=about)
    arguments = parser.parse_args(argv)
    if arguments.defects and arguments.fpr is not None:
        raise UserError('--fpr and --defects are two ways to choose: give one of both.')
    if not 0 < arguments.misses < float('inf'):
        raise UserError(f'--misses={arguments.misses} cannot be used: it is above 0.')
    for flag in ('images', 'defects'):
        folder = getattr(arguments, flag)
        if folder and not folder.exists():
            raise UserError(f'--{flag}={folder} does not exist: it names a folder of images.')
    terminal.log_to_stderr()
    terminal.use_compilation_cache()
    from ssn_jax import decide as decide_lib
    from ssn_jax.report import text

    chosen = decide_lib.decide(
        *(getattr(arguments, x) for x in ('workdir', 'fpr', 'images', 'defects', 'misses'))
    )
    print(text.decision_line(chosen))


def evaluate(argv: list[str]) -> None:
    """Measures a run again, on its own test images or on other data.

    ssn-jax evaluate --workdir runs/NAME
    ssn-jax evaluate --workdir runs/NAME --config.data.category=bottle --output scores.csv

    The metrics are printed in full, as results.json holds them (0..1), and in percent.
    """
    parser = terminal.Parser('evaluate', evaluate.__doc__)
    terminal.add_run_arguments(parser, (*_DATA, *_ON_EVALUATION))
    parser.add_argument(
        '--output', type=terminal.path, metavar='FILE', help="write the images' scores there (csv)"
    )
    arguments, overrides = terminal.parse(parser, argv)
    from ssn_jax import files

    if arguments.output:
        files.check_output(arguments.output, '--output')
    terminal.log_to_stderr(arguments.quiet)
    from ssn_jax import data, decision, evaluate as evaluate_lib, metrics, run as run_lib
    from ssn_jax.data import splits
    from ssn_jax.report import text

    model = _open(arguments, overrides)
    config = model.config
    seen = run_lib.with_white(config).data, config.image_size, config.resize, config.fit
    dataset = data.load(*seen, need='test')
    test = dataset.test
    scores, maps = evaluate_lib.predict(model, test.images)
    values, undefined = evaluate_lib.evaluate(scores, maps, test)
    where = f'{dataset.name} {dataset.category}' + ', embedded data' * dataset.embedded
    print(
        f'{config.name}, epoch {model.epoch}, seed {config.seed}, on {where}: '
        f'{len(scores)} test images'
    )
    began = run_lib.read_origin(arguments.workdir)
    if began and began.data['test'] != dataset.fingerprints['test']:
        print("  These are other images or masks than those of the run's own test split.")
    for line, value in zip(text.metric_lines(values, undefined), values.values(), strict=True):
        print(line if value is None else f'{line}   {value!r}')
    if model.threshold is not None:
        rates = decision.rates(scores, test.labels, model.threshold)
        chosen = model.decision | {f'test_{name}': value for name, value in rates.items()}
        print(f'  {text.decision_line(chosen)}')
    if not arguments.output:
        return
    table = io.StringIO()
    rows = csv.writer(table, lineterminator='\n')
    rows.writerow(['file', 'defect', 'label', 'score', 'p_value', 'map_maximum', 'decision'])
    rare, maxima = [''] * len(scores), metrics.maximum(maps, splits.valid(test))
    if model.normal.size:
        rare = [f'{p:.6f}' for p in decision.p_values(scores, model.normal)]
    for i, score in enumerate(scores):
        known = test.files[i], test.defects[i], test.labels[i], score
        called = ''
        if model.threshold is not None:
            called = decision.CLASSES[int(score >= model.threshold)]
        rows.writerow([*known, rare[i], maxima[i], called])
    files.write_output(arguments.output, table.getvalue(), '--output')
    if not arguments.quiet:
        print(f'The scores of the images are in {arguments.output}.')


def export(argv: list[str]) -> None:
    """Writes a run's predictor, preprocessing included, to one portable file.

    ssn-jax export --workdir runs/NAME --format onnx --output screw.onnx
    ssn-jax export --workdir runs/NAME --format stablehlo --output screw.zip
    ssn-jax export --workdir runs/NAME --format openvino --output screw.xml
    """
    parser = terminal.Parser('export', export.__doc__)
    terminal.add_run_arguments(parser, ('precision',))
    parser.add_argument('--format', choices=('onnx', 'openvino', 'stablehlo'), required=True)
    parser.add_argument('--opset', type=int, help='of onnx (17)')
    parser.add_argument('--output', type=terminal.path, required=True, metavar='FILE')
    arguments, overrides = terminal.parse(parser, argv)
    if arguments.format == 'openvino' and arguments.output.suffix != '.xml':
        raise UserError(f'--output={arguments.output} cannot be used: it ends in .xml.')
    if arguments.opset and arguments.format != 'onnx':
        raise UserError(f'--opset is of --format onnx: {arguments.format} has none.')
    terminal.log_to_stderr(arguments.quiet)
    from ssn_jax import export as export_lib

    model = _open(arguments, overrides)
    export_lib.write(model, arguments.format, arguments.output, arguments.opset)
    if not arguments.quiet:
        written = [arguments.output]
        written += [arguments.output.with_suffix('.bin')] * (arguments.format == 'openvino')
        size = sum(path.stat().st_size for path in written) / 1e6
        print(f'Epoch {model.epoch} of {model.workdir} is in {arguments.output} ({size:.1f} MB).')


# --- Commands on several runs ---------------------------------------------------------------------


def report(argv: list[str]) -> None:
    """Makes one page of any number of runs, as Markdown and as a single HTML file.

    ssn-jax report runs/* --output report

    Runs that differ in their seed alone become one row. Beside them stand the published results.
    """
    parser = terminal.Parser('report', report.__doc__)
    add, about = parser.add_argument, 'a folder to write'
    add('runs', nargs='+', type=terminal.path, help="the runs' folders")
    add('--output', type=terminal.path, required=True, metavar='DIR', help=about)
    add('--benchmark', type=terminal.path, metavar='FILE', help='output of benchmark --json')
    arguments = parser.parse_args(argv)
    terminal.log_to_stderr()
    from ssn_jax.report import page

    page.write_report(arguments.runs, arguments.output, arguments.benchmark)
    print(f'The report is in {arguments.output}: report.html, report.md.')


def compare(argv: list[str]) -> None:
    """Draws the maps of several runs on the same test images, side by side.

    ssn-jax compare runs/mod3 runs/mixed --output compare.png
    ssn-jax compare runs/before runs/after --select failures --output failures.png

    The runs must share data set and image size. What is shown are defective images, evenly spread
    over the split, or what the first run gets most wrong: defects with the lowest scores, then
    normal images with the highest. Below each map stand the image's score (a probability) and the
    run's decision.
    """
    parser = terminal.Parser('compare', compare.__doc__)
    add, which = parser.add_argument, ('spread', 'failures')
    add('runs', nargs='+', type=terminal.path, help="the runs' folders")
    add('--output', type=terminal.path, required=True, metavar='FILE', help='a .png to write')
    add('--count', type=int, default=6, help='images to show')
    add('--select', choices=which, default='spread', help='which images to show')
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != '.png':
        raise UserError(f'--output={arguments.output} cannot be used: it ends in .png.')
    if arguments.count < 1:
        raise UserError(f'--count={arguments.count} cannot be used: at least 1.')
    from ssn_jax import files

    files.check_output(arguments.output, '--output')
    terminal.log_to_stderr()
    from ssn_jax.report import compare as compare_lib

    compare_lib.compare(arguments.runs, arguments.output, arguments.count, arguments.select)
    print(f'The maps are in {arguments.output}.')


# --- Commands on none -----------------------------------------------------------------------------


def check(argv: list[str]) -> int:
    """Reads a folder of images as training would, and says what is doubtful about it.

    ssn-jax check ROOT
    ssn-jax check ROOT --sheet sheet.png --masks masks

    Prints what it finds by split and class, every doubt in a line that names the file, and the
    command that trains on the folder. Exit status: 0, or 1 if training would end with an error.
    """
    parser = terminal.Parser('check', check.__doc__)
    add = parser.add_argument
    add('root', type=terminal.path, metavar='ROOT', help='the folder of the data set')
    add('--sheet', type=terminal.path, metavar='FILE', help='a .png: images with masks outlined')
    add('--masks', type=terminal.path, metavar='DIR', help='receives masks as read: FILE.png')
    add('--json', action='store_true', help='print one JSON object instead of the table')
    from ssn_jax import config as config_lib

    for name in _WHERE:
        flag, about = f'data.{name}', config_lib.FIELDS[f'data.{name}'].about
        names = f'--{name}', f'--config.{flag}'
        add(*names, dest=f'config.{flag}', metavar='VALUE', help=about)
    for flag, kind in {'data.masks': str, 'data.range': float, 'image_size': _size}.items():
        about = config_lib.FIELDS[flag].about
        add(f'--config.{flag}', dest=f'config.{flag}', type=kind, metavar='VALUE', help=about)
    arguments, overrides = terminal.parse(parser, argv)
    from ssn_jax import files

    if arguments.sheet:
        if arguments.sheet.suffix != '.png':
            raise UserError(f'--sheet={arguments.sheet} cannot be used: it ends in .png.')
        files.check_output(arguments.sheet, '--sheet')
    if arguments.masks:
        files.check_folder(arguments.masks, '--masks')
    terminal.log_to_stderr()
    from ssn_jax import check as check_lib

    config = config_lib.load(check_lib.CONFIG)
    config.data.update(root=str(arguments.root), name='', category='')
    config.update_from_flattened_dict(overrides)
    config_lib.validate(config)
    check_lib.choose_layout(config.data)
    found = check_lib.check(config, arguments.masks, arguments.sheet)
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(check_lib.report(config, found))
    for error in found.errors.values():
        print(f'error: {error}', file=sys.stderr)
    return int(bool(found.errors))


def _size(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.strip('()').split(','))


def benchmark(argv: list[str]) -> None:
    """Measures inference with random weights, beside anomalib's models if asked.

    ssn-jax benchmark --configs edge,auto,mod1_a,baseline --against anomalib

    Speed does not depend on the weights. All that is compared runs in this process, by turns.
    Copies from and to the host are included, and of our networks what comes before them: they are
    given uint8 images, anomalib's normalised floats.

    M params: backbone and network. GFLOP: of one image, counted by XLA.
    I-AUROC, AUPRO: published means over MVTec AD's categories (docs/inference.md says by whom).
    ms, 95 %: median and 95th percentile of a whole batch.
    Last columns: how many times as fast as the row that config is, at the row's precision, in
    OpenVINO where it is installed, else in XLA; the median over the turns.
    """
    parser = terminal.Parser('benchmark', benchmark.__doc__)
    add = parser.add_argument
    every = 'edge,auto,mod1_a,mod1_b,baseline,mod3,simplenet'
    about = 'of the package, CONFIG or CONFIG:BACKBONE (%(default)s)'
    add('--configs', type=_names, default=every, metavar='NAMES', help=about)
    add('--against', choices=('anomalib',), help='measure its models at 256x256 too')
    precisions = 'float32 (the default), bfloat16, int8 (of ours alone)'
    add('--precisions', type=_names, default='float32', metavar='NAMES', help=precisions)
    add('--batches', type=_numbers, default='1,16', metavar='NUMBERS', help='(%(default)s)')
    add('--turns', type=int, default=15, help='at batch 1; half of them at others (%(default)s)')
    add('--xla', action='store_true', help='measure ours without OpenVINO too')
    add('--json', action='store_true', help='print one JSON document instead of the table')
    arguments = parser.parse_args(argv)
    if arguments.turns < 7:
        raise UserError(f'--turns={arguments.turns} is too few for a median: 7 or more.')
    terminal.log_to_stderr(quiet=True)
    from ssn_jax import benchmark as benchmark_lib

    for precision in arguments.precisions:
        if precision not in benchmark_lib.PRECISIONS:
            known = ', '.join(benchmark_lib.PRECISIONS)
            raise UserError(f'--precisions={precision} is unknown: it takes {known}.')
    results = benchmark_lib.run(arguments)
    if arguments.json:
        print(json.dumps(results, indent=2))


def _names(text: str) -> list[str]:
    found = [name for name in text.split(',') if name]
    if not found:
        raise argparse.ArgumentTypeError('at least one name')
    return found


def _numbers(text: str) -> list[int]:
    if not all(word.isdecimal() and int(word) > 0 for word in text.split(',')):
        raise argparse.ArgumentTypeError(f'{text!r} are no numbers from 1 on')
    return [int(word) for word in text.split(',')]


def demo(argv: list[str]) -> None:
    """Trains on images that come with the code, and inspects others of them.

    ssn-jax demo

    Runs the two commands that anyone would run on images of their own, on drawn ball bearings: 150
    good ones to learn from, and 100 to inspect. Which of those are defective is looked at only to
    count, at the end.
    """
    parser = terminal.Parser('demo', demo.__doc__)
    default = pathlib.Path('runs/demo')
    parser.add_argument('--workdir', type=terminal.path, default=default, help='(%(default)s)')
    arguments = parser.parse_args(argv)
    from ssn_jax import demo as demo_lib

    demo_lib.demo(arguments.workdir)


COMMANDS = {
    'train': train,
    'predict': predict,
    'decide': decide,
    'evaluate': evaluate,
    'export': export,
    'report': report,
    'compare': compare,
    'sweep': sweep,
    'import-torch': import_torch,
    'check': check,
    'benchmark': benchmark,
    'demo': demo,
}
