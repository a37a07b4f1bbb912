"""Every command of the README is run, on tiny data, so that none of them can rot."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import rule
import safetensors.numpy
import tiny

from ssn_jax import weights
from ssn_jax.models.supersimplenet import SuperSimpleNet

REPO = pathlib.Path(__file__).parents[1]
# What keeps a training short; the programs it compiles are kept for the next one.
SHORT = (
    '--config.epochs=1 --config.batch_size=4 --config.image_size=(48,48) --config.sparse=False '
    '--config.backbone.name=resnet18 --config.backbone.weights={data}/resnet18.safetensors '
    '--config.data.cache={data}/cache'
)
# Beginnings of commands, and what is added to them. A new command needs an entry here.
ADDED = {
    'python -m ssn_jax.main --config configs/': SHORT,
    'python scripts/sweep.py --config configs/': SHORT,
    'python scripts/import_torch.py --checkpoint weights.safetensors': SHORT,
    'python scripts/compare.py': '',
    'python scripts/evaluate.py --workdir runs/mod2': '',
    'python scripts/predict.py --workdir runs/mod2': '',
    'python scripts/export.py --workdir runs/mod2 --format onnx': '',
    'python scripts/export.py --workdir runs/mod2 --format stablehlo': '',
    'python scripts/report.py': '',
    'python scripts/benchmark.py --json': '--configs=mod1_a --turns=7 --nodirect',
}
# Not run here: the environment's own commands, and what tests/test_devices.py runs.
LEFT_OUT = re.compile(r'(make|\. \.venv|pip install)\b|.*--coordinator')
# Values that only make a command longer.
SHORTER = {'beta=0.5,0.1,0.05,0.0015': 'beta=0.5', 'seed=0,1,2': 'seed=0,1', 'seeds=5': 'seeds=2'}


def commands() -> list[str]:
    """The commands in the README's shell blocks, lines joined, without comments."""
    blocks = re.findall(r'```sh\n(.*?)```', (REPO / 'README.md').read_text(), re.DOTALL)
    text = re.sub(r'\s*\\\n\s*', ' ', ''.join(blocks))
    lines = [line.partition('  #')[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not LEFT_OUT.match(line)]


def test_every_command_is_known():
    unknown = [c for c in commands() if not c.startswith(tuple(ADDED))]
    assert not unknown, 'say in ADDED how these are to be run'
    unused = [start for start in ADDED if not any(c.startswith(start) for c in commands())]
    assert not unused


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """What the commands name, made tiny: data, weights, a checkpoint, photos."""
    data = folder / 'data'
    tiny.write_weights(data / 'resnet18.safetensors')
    tiny.write_data(data / 'mvtec_ad')
    for category in ('screw', 'bottle'):
        shutil.copytree(data / 'mvtec_ad' / 'nut', data / 'mvtec_ad' / category)
    root = folder / 'ROOT'
    shutil.copytree(data / 'mvtec_ad' / 'nut', root)
    shutil.copytree(root / 'test' / 'spot', root / 'train' / 'spot')
    for i in range(3):  # Names are unique below ground_truth.
        (root / 'train' / 'spot' / f'{i:03d}.png').rename(root / 'train' / 'spot' / f't{i}.png')
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        (data / 'KolektorSDD2' / split).mkdir(parents=True)
        for i in range(8):
            image, mask = rng.integers(90, 110, (48, 48, 3)), np.zeros((48, 48))
            if i % 2:
                mask[10:20, 10 + i : 30] = 255
                image[mask > 0] += 100
            for name, array in ((f'{i}.png', image), (f'{i}_GT.png', mask)):
                path = data / 'KolektorSDD2' / split / name
                assert cv2.imwrite(str(path), array.astype(np.uint8))
    template = rule.network(SuperSimpleNet(), 384)
    safetensors.numpy.save_file(
        {
            k: np.ascontiguousarray(v)
            for k, v in rule.by_torch_name(template, weights.head_name).items()
        },
        folder / 'weights.safetensors',
    )
    shutil.copytree(root / 'test' / 'good', folder / 'photos')
    return data


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    data = prepare(tmp_path)
    (tmp_path / 'configs').symlink_to(REPO / 'configs')
    (tmp_path / 'scripts').symlink_to(REPO / 'scripts')
    environment = os.environ | {
        'PYTHONPATH': str(REPO),
        'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
        'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'XDG_CACHE_HOME': str(tmp_path / 'user'),
    }
    seen = set()
    for command in commands():
        start = next(start for start in ADDED if command.startswith(start))
        command = re.sub(r"--config.image_size='.*?'", '', command)
        added = re.sub(r'(\(.*?\))', r"'\1'", ADDED[start].format(data=data))
        command = command.replace('/data/', f'{data}/').replace('=ROOT', f'={tmp_path}/ROOT')
        before, redirected, target = command.partition(' > ')
        command = f'{before} {added}{redirected}{target}'
        for long, short in SHORTER.items():
            command = command.replace(long, short)
        if command in seen:
            continue
        seen.add(command)
        done = subprocess.run(
            ['bash', '-c', command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f'{command}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}'
        first = tmp_path / 'runs' / 'mod2-mvtec_ad-screw-0'
        if first.exists() and not (tmp_path / 'runs' / 'mod2').exists():
            (tmp_path / 'runs' / 'mod2').symlink_to(first)
