"""Every command of README and docs/ is run, on tiny data, and every link leads somewhere."""

import glob
import pathlib
import re
import shlex
import shutil

import commands
import cv2
import numpy as np
import pytest
import rule
import safetensors.numpy
import tiny

from ssn_jax.models import weights
from ssn_jax.models.systems import SuperSimpleNet

# What keeps a training short.
SHORT = (
    '--config.epochs=1 --config.batch_size=4 --config.image_size=(64,64) --config.sparse=False '
    '--config.backbone.name=resnet18 --config.backbone.weights={data}/resnet18.safetensors '
    '--config.data.cache={data}/cache --config.decision.parts=0'
)
# Fewer images than the embedded ones, which another command takes.
REAL = '--config.data.root={data}/mvtec_ad --config.data.category=bottle'
# Beginnings of commands, and what is added to them. A new command needs an entry here.
ADDED = {
    'ssn-jax train --config edge': f'{SHORT} --config.drawn.count=8 --config.decision.parts=2',
    'ssn-jax train --extend': '--config.epochs=1',
    'ssn-jax check': '',
    'ssn-jax decide': '',
    'ssn-jax predict --workdir runs/mine': '',
    'ssn-jax train --config mod2 --config.seeds': f'{SHORT} {REAL}',
    'ssn-jax train --config mod2 --config.noise': f'{SHORT} {REAL}',
    'ssn-jax train --config mod2 --config.data': SHORT,
    'python -m ssn_jax.main --config configs/mod2.py': f'{SHORT} {REAL}',
    'ssn-jax sweep --config mod2': f'{SHORT} {REAL}',
    'ssn-jax train --config': SHORT,
    'ssn-jax import-torch --weights weights.safetensors': SHORT,
    'ssn-jax compare': '',
    'ssn-jax evaluate --workdir runs/mod2': '',
    'ssn-jax predict --workdir runs/mod2': '',
    'ssn-jax export --workdir runs/mine --format onnx': '',
    'ssn-jax export --workdir runs/mod2 --format onnx': '',
    'ssn-jax export --workdir runs/mod2 --format openvino': '',
    'ssn-jax export --workdir runs/mod2 --format stablehlo': '',
    'ssn-jax report': '',
    'ssn-jax benchmark --json': '--configs=auto --turns=7',
}
# Not run here: the environment's own commands, what takes an hour, and what tests/test_devices.py
# and test_gpu.py run.
LEFT_OUT = re.compile(r'(make|\. \.venv|pip install|scripts/gpu\.sh|python scripts/)\b|.*--coord')
# Values that only make a command longer.
SHORTER = {'beta=0.5,0.1,0.05,0.0015': 'beta=0.1', 'seed=0,1,2': 'seed=0,1', 'seeds=5': 'seeds=2'}


PAGES = [commands.ROOT / 'README.md', *sorted((commands.ROOT / 'docs').glob('*.md'))]


def lines() -> list[str]:
    """The commands in the pages' shell blocks, lines joined, without comments."""
    text = ''.join(page.read_text() for page in PAGES)
    blocks = re.findall(r'```sh\n(.*?)```', text, re.DOTALL)
    text = re.sub(r'\s*\\\n\s*', ' ', ''.join(blocks))
    found = [line.partition('  #')[0].strip() for line in text.splitlines()]
    return [line for line in found if line and not LEFT_OUT.match(line)]


def test_every_command_is_known():
    unknown = [line for line in lines() if not line.startswith(tuple(ADDED))]
    assert not unknown, 'say in ADDED how these are to be run'
    unused = [start for start in ADDED if not any(line.startswith(start) for line in lines())]
    assert not unused


@pytest.mark.parametrize('page', [*PAGES, commands.ROOT / 'CONTRIBUTING.md'], ids=lambda p: p.name)
def test_links_and_lengths(page):
    """Links within the project exist, their headings too; lines fit a terminal."""
    text = page.read_text()
    for target in re.findall(r'\]\(([^)]+)\)', text):
        if target.startswith('https://'):
            continue
        file, _, heading = target.partition('#')
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r'^#+ (.*)$', linked.read_text(), re.MULTILINE)
            assert heading in {re.sub(r'[^\w -]', '', t.lower()).replace(' ', '-') for t in titles}
    prose = [line for line in text.splitlines() if not line.startswith('|') and '](' not in line]
    assert all(len(line) <= 100 for line in prose), [x for x in prose if len(x) > 100]
    assert page.name != 'README.md' or len(text.splitlines()) <= 150


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """What the commands name, made tiny: data, weights, a checkpoint, images."""
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
    for split, count in (('train', 5), ('test', 4)):
        (data / 'KolektorSDD2' / split).mkdir(parents=True)
        for i in range(count):
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
    for name, shown in (('photos', 'good'), ('new_good_images', 'good'), ('known_defects', 'spot')):
        shutil.copytree(root / 'test' / shown, folder / name)
    for path in sorted((root / 'test').glob('*/*.png')):  # New ones, without masks.
        new = folder / 'NEW' / path.parent.name / path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(new), cv2.imread(str(path))[::-1])
    return data


def start(line: str, folder: pathlib.Path) -> None:
    """Runs a line as a shell in this folder does; it must end well."""
    typed, _, target = line.partition(' > ')
    typed = typed.replace('python -m ssn_jax.main ', 'ssn-jax main ')
    ssn_jax, program, *words = shlex.split(typed)
    assert ssn_jax == 'ssn-jax'
    words = [name for word in words for name in sorted(glob.glob(word, root_dir=folder)) or [word]]
    command = commands.start(
        *(program, *words),
        cwd=folder,
        PYTHONPATH=str(commands.ROOT),
        XDG_CACHE_HOME=str(folder / 'user'),
    )
    assert command.end() == 0, f'{line}\n{command.out[-500:]}\n{command.err[-2000:]}'
    if target:
        (folder / target).write_text(command.out)


# Commands that follow from each other, by what tells them; the last group is all the others.
GROUPS = {
    'own': ('runs/mine',),
    'defects': ('KolektorSDD2', 'mixed', 'compare', 'import-torch'),
    'several': ('beta-0.05', 'config.seeds', 'sweep'),
    'one': ('',),
}


@pytest.mark.slow
@pytest.mark.parametrize('group', GROUPS)
def test_every_command_runs(group, tmp_path):
    data = prepare(tmp_path)
    (tmp_path / 'configs').symlink_to(commands.ROOT / 'configs')
    seen = set()
    for line in lines():
        if group != next(g for g, words in GROUPS.items() if any(w in line for w in words)):
            continue
        added = next(text for begin, text in ADDED.items() if line.startswith(begin))
        added = re.sub(r'(\(.*?\))', r"'\1'", added.format(data=data))
        line = re.sub(r"--config.image_size='.*?'", '', line)
        line = line.replace('/data/', f'{data}/').replace('=ROOT', f'={tmp_path}/ROOT')
        before, redirected, target = line.partition(' > ')
        line = f'{before} {added}{redirected}{target}'
        for long, short in SHORTER.items():
            line = line.replace(long, short)
        if line not in seen:
            seen.add(line)
            start(line, tmp_path)
        first = tmp_path / 'runs' / 'mod2-mvtec_ad-screw-0'
        if first.exists() and not (tmp_path / 'runs' / 'mod2').exists():
            (tmp_path / 'runs' / 'mod2').symlink_to(first)
