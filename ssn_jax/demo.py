"""The demo: two commands that anyone would run on images of their own, on drawn ball bearings."""

import csv
import pathlib
import shlex
import shutil
import subprocess
import sys

from ssn_jax.data import layouts, synthetic

CATEGORY = 'bearing'
TRAIN = f'ssn-jax train --config edge --config.data.category={CATEGORY} --workdir {{workdir}}'
PREDICT = (
    'ssn-jax predict --workdir {workdir} --input {workdir}/images --output {workdir}/predictions'
)


def write_images(folder: pathlib.Path) -> None:
    """Writes the test images of the embedded bearings as files, folder/DEFECT/NUMBER.png."""
    for record in synthetic.records(CATEGORY, seed=0):
        if record.split == 'test':
            file = folder / record.defect / pathlib.Path(record.file).name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(record.image)


def run(command: str) -> None:
    """Shows a command and runs it."""
    print(f'\n$ {command}', flush=True)
    words = shlex.split(command)
    status = subprocess.run([sys.executable, '-m', 'ssn_jax', *words[1:]]).returncode
    if status:
        sys.exit(status)


def count(table: pathlib.Path) -> str:
    """What predictions.csv found of each kind of defect, and how many false alarms there are."""
    with table.open(newline='') as f:
        rows = list(csv.DictReader(f))
    lines, found = [], {}
    for row in rows:
        found.setdefault(row['file'].split('/')[0], []).append(row['decision'] == 'defective')
    good = found.pop(layouts.GOOD)
    for kind, called in found.items():
        lines.append(f'  {kind:14s} found {sum(called):2d} of {len(called)}')
    every = sum(map(len, found.values()))
    hits = sum(map(sum, found.values()))
    lines.append(f'  {"all defects":14s} found {hits:2d} of {every} ({100 * hits / every:.0f} %)')
    share = 100 * sum(good) / len(good)
    lines.append(
        f'  {"false alarms":14s}       {sum(good):2d} of {len(good)} good images ({share:.1f} %)'
    )
    return '\n'.join(lines)


def demo(workdir: pathlib.Path) -> None:
    """Trains, predicts and counts; a finished run is only measured again."""
    quoted = shlex.quote(str(workdir))
    run(TRAIN.format(workdir=quoted))
    for name in ('images', 'predictions'):
        shutil.rmtree(workdir / name, ignore_errors=True)
    write_images(workdir / 'images')
    run(PREDICT.format(workdir=quoted))
    predictions = workdir / 'predictions'
    print(f'\nOf the {CATEGORY}s that it had never seen:')
    print(count(predictions / 'predictions.csv'))
    print('\nTwo pictures to open:')
    print(f'  {workdir}/figures/overlays.png, the clearest and the hardest test images')
    print(f'  {predictions}/overlays/missing_ball/000.png.jpg, one of the predictions')
