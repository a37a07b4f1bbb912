"""What scripts/gpu.sh leaves to Python: on what it runs, and the summary of what it has got to.

python scripts/gpu.py begin RESULTS SETTINGS
python scripts/gpu.py summary RESULTS
"""

import csv
import json
import os
import pathlib
import platform
import subprocess
import sys

import numpy as np

from ssn_jax import files, terminal
from ssn_jax.errors import UserError

# Of scores on the GPU from those on the CPU, in standard deviations of the scores: float32's
# rounding stays below it, and TensorFloat-32, which keeps 10 bits, does not.
ROUNDING = 1e-3


def begin(folder: pathlib.Path, settings: str) -> None:
    """Writes machine.json; UserError if there is no GPU, or the folder is of another one."""
    import jax
    import jaxlib

    from ssn_jax import run as run_lib

    device = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    if jax.default_backend() == 'cpu' and 'trial=0' in settings:
        raise UserError(
            f"JAX finds no GPU here ({device}): pip install 'ssn_jax[cuda]', or add --trial."
        )
    machine = {'device': device, 'settings': settings, 'driver': driver(), 'cpus': os.cpu_count()}
    machine |= {'python': platform.python_version(), 'jaxlib': jaxlib.__version__}
    before = run_lib.read_json(folder / 'machine.json') or machine
    for name in ('device', 'settings'):
        if before[name] != machine[name]:
            raise UserError(
                f'{folder} holds results of {name} {before[name]!r}, and this is '
                f'{machine[name]!r}: choose another folder.'
            )
    text = json.dumps(machine | run_lib.versions(), indent=2) + '\n'
    files.write(folder / 'machine.json', text)
    print(f'{device}, {settings}')


def driver() -> str | None:
    """The GPU driver's version, if nvidia-smi tells it."""
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split('\n')[0] or None


def summarise(folder: pathlib.Path) -> dict:
    """Everything that the complete steps have found, and how long each took, in seconds."""
    seconds = {}
    if (folder / 'steps.csv').exists():
        for name, _, took in csv.reader((folder / 'steps.csv').open()):
            seconds[name] = seconds.get(name, 0) + int(took)
    found = {'machine': json.loads((folder / 'machine.json').read_text()), 'seconds': seconds}
    for name in ('latency', 'against'):
        if (folder / f'{name}.out').exists():
            found[name] = json.loads((folder / f'{name}.out').read_text())
        elif (folder / f'{name}.skipped').exists():
            found[name] = (folder / f'{name}.skipped').read_text().strip()
    found['runs'] = {}
    for path in sorted(folder.glob('runs/*/results.json')):
        name = path.parent.name
        if (folder / f'{name}.out').exists():
            found['runs'][name] = run = json.loads(path.read_text())
            run['evaluated_again'] = evaluated_again(folder / f'{name}-float32.out', run['metrics'])
            run['off_cpu'] = off_cpu(folder, name)
    return found


def evaluated_again(path: pathlib.Path, metrics: dict) -> float | None:
    """The largest difference of the metrics that `ssn-jax evaluate` printed from results.json's."""
    if not path.exists():
        return None
    rows = [line.split() for line in path.read_text().splitlines()]
    printed = {row[0]: row[-1] for row in rows if row}
    known = {name: value for name, value in metrics.items() if value is not None}
    return max(abs(float(printed[name]) - value) for name, value in known.items())


def off_cpu(folder: pathlib.Path, run: str) -> dict[str, dict[str, float]]:
    """How far scores and maxima of maps are from the CPU's at most, by precision, in the CPU's std.

    {} if the CPU was not asked.
    """
    path = folder / f'{run}-float32-cpu.csv'
    if not path.exists():
        return {}
    expected, found = read_scores(path), {}
    for precision in ('float32', 'tensorfloat32', 'bfloat16'):
        path = folder / f'{run}-{precision}.csv'
        if path.exists():
            off = np.abs(read_scores(path) - expected).max(0) / expected.std(0)
            found[precision] = {'score': float(off[0]), 'map_maximum': float(off[1])}
    return found


def read_scores(path: pathlib.Path) -> np.ndarray:
    """Scores and maxima of the maps that `ssn-jax evaluate` wrote, (N, 2)."""
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row['score']), float(row['map_maximum'])] for row in rows])


def lines(found: dict) -> list[str]:
    """The summary for people."""
    text = [', '.join(f'{name} {value}' for name, value in found['machine'].items()), '']
    for name in ('latency', 'against'):
        document = found.get(name, 'not measured yet')
        if isinstance(document, str):
            text.append(f'{name}: {document.removeprefix(f"{name}: ")}')
            continue
        text.append(f'{name}:')
        for row in document['rows']:
            if 'ms' in row:
                text.append('  ' + ', '.join(f'{key} {value}' for key, value in row.items()))
    for name, run in found['runs'].items():
        text += ['', f'{name} ({run["backbone"]}, embedded data)' if run['embedded'] else name]
        text[-1] += f', {run["epochs"]} epochs in {run["train_seconds"]} s, '
        text[-1] += f'{found["seconds"].get(name)} s in all'
        for metric, value in run['metrics'].items():
            text.append(f'  {metric:12s} ' + ('-' if value is None else f'{100 * value:6.2f} %'))
        if run['evaluated_again'] is not None:
            text.append(f'  evaluated again on all devices: {run["evaluated_again"]:.1e} off')
        for precision, off in run['off_cpu'].items():
            text.append(
                f'  {precision} here, float32 on the CPU: scores {off["score"]:.1e}, '
                f'maps {off["map_maximum"]:.1e} standard deviations apart'
            )
        if 'float32' in run['off_cpu']:
            held = max(run['off_cpu']['float32'].values()) < ROUNDING
            text.append(f'  float32 is {"kept" if held else "NOT KEPT"} (bound {ROUNDING:g})')
    return text


def main(command: str, results: str, *settings: str) -> None:
    folder = pathlib.Path(results)
    if command == 'begin':
        begin(folder, *settings)
        return
    found = summarise(folder)
    text = '\n'.join(lines(found)) + '\n'
    files.write(folder / 'summary.json', json.dumps(found, indent=2) + '\n')
    files.write(folder / 'summary.txt', text)
    print(text)


if __name__ == '__main__':
    terminal.guard(lambda: main(*sys.argv[1:]))
