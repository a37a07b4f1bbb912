"""Bad input to every command: one line on stderr, exit status 1, and nothing left behind."""

import json
import os
import pickle
import shutil

import commands
import cv2
import numpy as np
import pytest
import safetensors.numpy
from test_import_torch import head_tensors
import tiny

from ssn_jax.models.systems import SuperSimpleNet

pytestmark = pytest.mark.usefixtures('small_programs')

MOD2 = commands.ROOT / 'configs' / 'mod2.py'
# Each command as it would succeed; a case adds to it, and the last of two equal flags counts.
COMMANDS = {
    'main': (
        'main --config {mod2} --quiet --workdir=new --config.data.root=data --config.epochs=1 '
        '--config.data.category=nut --config.data.cache=cache --config.image_size=(64,64) '
        '--config.backbone.weights=resnet18.safetensors --config.batch_size=4 '
        '--config.decision.parts=0'
    ),
    'import': (
        'import-torch --config {mod2} --quiet --workdir=new --weights=heads.safetensors '
        '--config.backbone.weights=resnet18.safetensors'
    ),
    'evaluate': 'evaluate --quiet --workdir=run --config.data.cache=cache',
    'predict': 'predict --quiet --workdir=run --input=photos --output=new',
    'export': 'export --quiet --workdir=run --format=stablehlo --output=new',
    'compare': 'compare run --output=new.png',
    'report': 'report run --output=new',
    'check': 'check data/nut',
    'benchmark': 'benchmark --configs=mod1_a',
    'sweep': 'sweep --config {mod2} --quiet --workdir=new',
}


class Evil:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self):
        return os.mkdir, ('unpickled',)


def write(name, content=b''):
    """A change to a world: a file's content is replaced."""

    def change(world):
        path = world / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = content(world) if callable(content) else content
        path.unlink(missing_ok=True)  # It is a link to the file that all worlds share.
        path.write_bytes(new)

    return change


def cut(name, share=0.6):
    """A file ends too early."""
    return write(
        name,
        lambda world: (world / name).read_bytes()[: int(share * (world / name).stat().st_size)],
    )


def gone(name):
    def change(world):
        path = world / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def loop(name):
    return lambda world: (world / name).symlink_to(world / name)


def cut_checkpoint(world):
    (world / 'run/checkpoints/1').rename(world / 'run/checkpoints/2')
    for path in (world / 'run/checkpoints/2').rglob('*'):
        if path.is_file():
            cut(path.relative_to(world))(world)


def with_config(name, **fields):
    """A run's config.json says something else."""

    def content(world):
        return json.dumps(json.loads((world / 'run/config.json').read_text()) | fields).encode()

    return write(name, content)


def nan_weights(world):
    tensors = safetensors.numpy.load_file(world / 'resnet18.safetensors')
    return safetensors.numpy.save(tensors | {'conv1.weight': tensors['conv1.weight'] * np.nan})


def encoded(suffix):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return cv2.imencode(suffix, image)[1].tobytes()


def empty(world):
    (world / 'empty').mkdir()


PICKLE = pickle.dumps(Evil())
IMAGE = 'data/nut/train/good/003.png'
FOLDER = '--config.data.name=folder --config.data.root=data/nut'
SIZED = '=main --config {mod2} --config.image_size='  # Given twice, a tuple grows.
MASKS = '--config.supervision.kind=masks'

# What ml_collections says of a config that returns nothing.
WARNED = ('WARNING: Logging before', 'warning: c.py:get_config() returned None')

# By command: what is typed after it (alone, if it starts with =), what the error must hold (a text
# or several), and what happens before. What is wrong with data, tests/test_data.py has.
CASES = {
    'main': [
        ('--config.perlin.threshold=nan', '--config.perlin.threshold=nan'),
        ('--config.perlin.threshold=1.0', '--config.perlin.threshold=1.0'),
        ('--config.noise.learning_rate=-1', '--config.noise.learning_rate=-1.0'),
        ('=main', 'no config: add --config configs/mod2.py'),
        ('=main --config.epochs=3', 'no config: add --config configs/mod2.py'),
        ('=main --config', '--config'),
        ('=main --config.epochs=3 --config {mod2}', '--config.epochs=3'),
        ('=main --config {mod2} --workdir', '--workdir'),
        ('--config=missing.py', "no config file at 'missing.py'"),
        ('=main --config missing.py --config.epochs=3', "no config file at 'missing.py'"),
        ('--config .', "no config file at '.'"),
        ('--config=c.py', ('c.py cannot be used as a config', 'line 1'), write('c.py', b'x = = 1')),
        ('=main --config=c.py', ('c.py cannot', 'get_config'), write('c.py')),
        ('=main --config=c.py', 'no ConfigDict', write('c.py', b'def get_config(): return 3')),
        ('=main --config=c.py', 'no ConfigDict', write('c.py', b'def get_config(): pass')),
        ('--config=c.py', 'no way', write('c.py', b'def get_config(): raise OSError("no way")')),
        ('--config=c.py', 'way', write('c.py', b'def get_config(): raise ValueError("no\\nway")')),
        ('--config c.py', ('c.py', 'no_such_module'), write('c.py', b'import no_such_module')),
        ('--config.qqq 1', ('no config field --config.qqq', 'ssn-jax train --help')),
        ('--config.noise.bta=1', 'did you mean noise.beta'),
        ('--config.noise=3', ('no config field --config.noise:', 'noise.beta')),
        ('--config.epochs=0', '--config.epochs=0 cannot be used'),
        ('--config.epochs=many', ('--config.epochs=many', '--config.FIELD=VALUE')),
        ('--config.epochs=2.5', '--config.epochs=2.5'),
        ('--config.noise.beta=x', '--config.noise.beta=x'),
        ('--config.noise.bounded=maybe', '--config.noise.bounded=maybe'),
        (f'{SIZED}(8,8)', 'each at least 32'),
        (f'{SIZED}(5000,5000)', '16777216 pixels'),
        (f'{SIZED}(64,)', '--config.image_size=(64,)'),
        (f"{SIZED}('a','b')", '--config.image_size='),
        ('--config.image_size=__import__("os").mkdir("unpickled")', '--config.image_size'),
        ('--config.noise.beta=nan', '--config.noise.beta=nan'),
        ('--config.optimizer.drops=(0.9,0.1)', 'rising fractions'),
        ("--config.optimizer.drops=('x',)", '--config.optimizer.drops='),
        ('--config.optimizer.clip_norm=-1', '--config.optimizer.clip_norm=-1.0'),
        ('--config.product_share=0.5', '--config.positions above 0'),
        ('--config.turned_copies=-1', 'a number from 0 to 100'),
        ('--config.product.angle=some', 'one of same, any, auto'),
        ('--config.product.place=same', 'another than any is for --config.image_score=map'),
        ('--config.epochs=0', 'for --config.drawn.count other than 0'),
        ('--config.seed=-1', '--config.seed=-1'),
        ('--config.seeds=0', '--config.seeds=0'),
        ('--config.resize=(32,32)', '--config.resize=(32, 32)'),
        ('--config.resize=(32,300)', '--config.resize=(32, 300)'),
        ('--config.system=ssn', "--config.system='ssn'"),
        ('--config.supervision.kind=mask', "--config.supervision.kind='mask'"),
        ('--config.supervision.mask_fraction=1.5', '--config.supervision.mask_fraction=1.5'),
        ('--config.supervision.mask_fraction=-0.1', '--config.supervision.mask_fraction=-0.1'),
        ('--config.supervision.mask_fraction=nan', '--config.supervision.mask_fraction=nan'),
        ('--config.supervision.mask_count=-2', '--config.supervision.mask_count=-2'),
        ('--config.supervision.dilation=4', '--config.supervision.dilation=4'),
        ('--config.decision.parts=1', '--config.decision.parts=1'),
        ('--config.decision.group=-1', '--config.decision.group=-1'),
        ('--config.surroundings=(6,2)', '--config.surroundings=(6, 2)'),
        ('--config.decision.fpr=2', '--config.decision.fpr=2.0'),
        ('--config.data.root=nowhere', ('nowhere: no such folder', '--config.data.root')),
        ('--config.data.root=', ('--config.data.category=nut', 'screw')),
        ('--config.data.category=bolt', ("no category 'bolt'", '--config.data.category from: nut')),
        (f'{FOLDER} --config.supervision.kind=labels', ('no defective image', 'train/DEFECT')),
        (
            f'{FOLDER} {MASKS} --config.supervision.mask_count=2',
            ('only 0',),
            write('data/nut/train/spot/a.png', encoded('.png')),
        ),
        ('--config.data.name=ksdd2', 'KolektorSDD2 has train/ID.png'),
        ('--config.data.cache=resnet18.safetensors', 'name another folder with --config.data.cach'),
        ('--config.backbone.name=resnet19', ('resnet19', 'resnet18')),
        ('--config.backbone.weights=missing', ('no weights file at missing', '--config.backbone')),
        ('--config.backbone.weights=data', 'data is no readable safetensors or PyTorch file'),
        (f'--config.backbone.weights={IMAGE}', f'{IMAGE} is no readable safetensors or'),
        ('', 'no readable safetensors or PyTorch file', cut('resnet18.safetensors')),
        ('', 'conv1.weight holds NaN', write('resnet18.safetensors', nan_weights)),
        ('', 'cannot be read as tensors alone', write('resnet18.safetensors', PICKLE)),
        ('--config.backbone.name=wide_resnet50_2', ('missing: layer1.0.', '--config.backbone.w')),
        ('--config.supervision.kind=labels', ('no defective image', '--config.supervision.kind')),
        (MASKS, ('holds no defective image', '--config.supervision.kind')),
        ('--workdir=resnet18.safetensors', 'is a file, no folder: choose another --workdir'),
        ('--workdir=resnet18.safetensors/run', ('resnet18.safetensors', '--workdir')),
        ('--workdir=data', ('data is not empty and holds no run', '--workdir')),
        ('--workdir=run', ('run holds a run of another config', 'different: name', '--workdir')),
        ('--workdir=run', 'run/config.json is no config', write('run/config.json', b'{"version')),
        ('--workdir=run', 'written by a newer', write('run/config.json', b'{"version": 1000}')),
        ('--flagfile=missing', 'Unable to open flagfile'),
        ('--log_dir=logs', ('--log_dir is not used', 'log.txt')),
        ('--epochs=3', ('epochs', '--config.FIELD=VALUE')),
        ('runs/a', "unexpected argument 'runs/a'"),
        ('--process_id=1', 'several processes need'),
        ('--coordinator=a --num_processes=2 --process_id=0', 'no HOST:PORT'),
        ('', f'{IMAGE[5:]}: does not decode', write(IMAGE, b'no image')),
        ('', 'a.jpg: does not decode', write(f'{IMAGE}.a.jpg', encoded('.jpg')[:-500])),
        ('', 'x.png: cannot be read', loop('data/nut/test/good/x.png')),
    ],
    'import': [
        ('--weights=', 'no checkpoint: add --weights'),
        ('--workdir=', 'no folder for the run: add --workdir'),
        ('--weights=missing.safetensors', 'no weights file at missing.safetensors'),
        ('--weights=missing.pt', 'no weights file at missing.pt'),
        (f'--weights={IMAGE}', 'no readable safetensors or PyTorch file'),
        ('--weights=resnet18.safetensors', 'it is no checkpoint of SuperSimpleNet'),
        ('--weights=p.safetensors', 'as tensors alone', write('p.safetensors', PICKLE)),
        ('--weights=p.pt', 'p.pt cannot be read as tensors alone', write('p.pt', PICKLE)),
        ('--workdir=run', 'run holds a run already'),
        ('--workdir=data', ('data is not empty', '--workdir')),
        ('--workdir=resnet18.safetensors/run', ('resnet18.safetensors', '--workdir')),
        ('--step=-1', '--step=-1 is negative'),
        ('--config.seeds=2', '--config.seeds=2'),
        ('--evaluate --config.data.root=nowhere', 'nowhere: no such folder'),
    ],
    'evaluate': [
        ('=evaluate', 'required: --workdir'),
        ('--workdir=nowhere', 'nowhere is no folder'),
        ('--workdir=data', 'data/config.json does not exist: this folder is no run'),
        ('', 'run/config.json is no config', write('run/config.json', b'[1]')),
        ('', '--config.epochs=0 cannot be used', with_config('run/config.json', epochs=0)),
        ('', 'is no config of ssn_jax', with_config('run/config.json', epochs='many')),
        ('', 'model.safetensors is damaged', cut('run/model.safetensors')),
        ('--checkpoint=2', 'cannot be restored', cut_checkpoint),
        ('', 'run/decision.json cannot be read', write('run/decision.json', b'{')),
        ('--checkpoint=99', 'no checkpoint of epoch 99: it has 1'),
        ('--checkpoint=x', "invalid int value: 'x'"),
        (
            '--config.epochs=3',
            ('epochs belongs to training: this command takes', '--config.data.name'),
        ),
        ('--config.qqq=3', '--config.qqq is no config field'),
        ('--config.eval_batch_size=0', '--config.eval_batch_size=0'),
        ('--config.eval_batch_size=x', 'eval_batch_size'),
        ('--config.data.root=nowhere', ('nowhere: no such folder', '--config.data.root')),
        ('--config.backbone.weights=missing', 'backbone.weights belongs to training'),
        ('', 'nut/test: holds no images; put them into', gone('data/nut/test')),
        ('--output=data', 'data is a folder: --output names a file'),
        ('--output=resnet18.safetensors/x.csv', 'cannot be written to: choose another --output'),
    ],
    'predict': [
        ('=predict --workdir=run', 'required: --input'),
        ('--input=nowhere', 'nowhere does not exist: --input'),
        ('--input=run/config.json', 'could not be read'),
        ('--input=run', 'holds no images'),
        ('--output=data', 'data is not empty: choose another --output'),
        ('--output=resnet18.safetensors', 'is a file, no folder'),
        ('--threshold=2', "'2' is no probability above 0 and below 1"),
        ('--max_pixels=0', '--max_pixels=0 cannot be used'),
        ('--config.data.root=x', '--config.data.root belongs to training'),
        ('', 'set --threshold=PROBABILITY', gone('run/decision.json')),
    ],
    'export': [
        ('=export --workdir=run --format=onnx', 'required: --output'),
        ('--format=tf', "invalid choice: 'tf'"),
        ('--config.epochs=3', '--config.epochs belongs to training'),
        ('--config.epoch=3', '--config.epoch is no config field'),
        ('y', "unexpected argument 'y'"),
        ('--checkpoint=9', 'no checkpoint of epoch 9: it has 1'),
        ('--output=data', 'data is a folder: --output names a file'),
        ('--output=resnet18.safetensors/x', 'cannot be written to: choose another --output'),
        ('--workdir=nowhere', 'nowhere is no folder'),
    ],
    'compare': [
        ('=compare --output=new.png', 'required: runs'),
        ('=compare nowhere --output=new.png', 'nowhere is no folder'),
        ('--count=0', '--count=0'),
        ('--output=new.xyz', '--output=new.xyz'),
        ('--output=data.png', 'data.png is a folder', lambda w: (w / 'data.png').mkdir()),
    ],
    'report': [
        ('=report --output=new', 'required: runs'),
        ('', 'run holds no results.json'),
        ('=report nowhere --output=new', 'nowhere/config.json does not exist'),
        ('', 'results that cannot be read', write('run/results.json', b'{')),
        ('', "lacks 'data'", write('run/results.json', b'{}')),
        ('--output=data', 'data exists and holds other files'),
        ('--benchmark=missing', 'holds no results.json'),
    ],
    'sweep': [  # tests/test_sweep.py has what is wrong with the axes.
        ('', 'nothing to sweep: add --sweep'),
        ('--sweep=noise.bta=1', 'noise.bta'),
        ('--sweep=noise.beta=1,nan', 'noise.beta'),
        ('--sweep=noise.std=1,2 --config.noise.std=1', '--config.noise.std'),
        ('--sweep=epochs=0', '--config.epochs=0'),
        ('--sweep=seed=0 --workdir=', 'add --workdir'),
        ('--sweep=seed=0 --workdir=data', 'data'),
        ('--sweep=seed=0 --distributed', '--distributed is for a single run'),
        ('--sweep=seed=0 --num_processes=2', '--num_processes'),
    ],
    'check': [
        ('=check', 'required: ROOT'),
        ('=check nowhere', 'nowhere: no such folder'),
        ('=check empty', 'empty: the folder is empty', empty),
        ('=check run', 'run/train/good: does not exist'),
        ('=check data --category=bolt', "no category 'bolt'"),
        ('--name=imagenet', '--config.data.name=imagenet: no such data set'),
        ('--config.epochs=3', '--config.epochs belongs to training'),
        ('--normal_dir=nowhere', 'data/nut/nowhere: no such folder'),
        ('--sheet=new.jpg', '--sheet=new.jpg cannot be used'),
        ('--sheet=data.png', 'data.png is a folder', lambda w: (w / 'data.png').mkdir()),
        ('--masks=resnet18.safetensors', 'is a file, no folder: choose another --masks'),
    ],
    'benchmark': [
        ('--turns=1', '--turns=1 is too few'),
        ('--configs=mod9', "no config 'mod9'"),
        ('--against=keras', "--against: invalid choice: 'keras'"),
        ('--configs=auto:vgg', '--configs=auto:vgg cannot be used'),
        ('--configs=,', '--configs: at least one name'),
        ('--precisions=float8', '--precisions=float8 is unknown'),
        ('--batches=1,x', '--batches'),
        ('--batches=0', '--batches'),
        ('--qqq', 'qqq'),
        ('mod1_a', 'unrecognized arguments: mod1_a'),
    ],
}


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    """A finished run, data, weights and photos: with them each command would succeed."""
    folder = tmp_path_factory.mktemp('template')
    tiny.fake_run(folder)
    tiny.write_data(folder / 'data')
    heads = head_tensors(SuperSimpleNet(), 384)
    safetensors.numpy.save_file(heads, folder / 'heads.safetensors')
    shutil.copytree(folder / 'data/nut/test/good', folder / 'photos')
    return folder


def tree(folder):
    """What there is, but prepared data: paths, and of files their size and time."""
    found = {}
    for path in folder.rglob('*'):
        if not {'cache', '__pycache__'} & set(path.relative_to(folder).parts):
            state = path.lstat()
            found[path] = None if path.is_dir() else (state.st_size, state.st_mtime_ns)
    return found


@pytest.mark.slow
def test_bad_input_is_one_line_and_leaves_nothing(template, tmp_path):
    assert sum(map(len, CASES.values())) >= 60 and CASES.keys() == COMMANDS.keys()
    failures, running = [], []

    def check(case, world, before, command):
        words = (case[2],) if isinstance(case[2], str) else case[2]
        code = command.end(120)
        lines = [x for x in command.err.splitlines() if not x.startswith(WARNED)]
        expected = 2 if case[2] == 'could not be read' else 1
        problems = [
            *(['status'] if code != expected else []),
            *(['stdout'] if command.out else []),
            *(['lines'] if [line[:7] for line in lines] != ['error: '] and code != 2 else []),
            *([w for w in words if w not in command.err]),
            *(['traceback'] if 'Traceback' in command.err else []),
            *(['left behind'] if code != 2 and tree(world) != before else []),
            *(['half'] if list(world.rglob('*incomplete*')) + list(world.rglob('*.tmp')) else []),
        ]
        if problems:
            new = [p.name for p in tree(world) if p not in before]
            failures.append(
                (case[:3], problems, code, new, command.out[-300:], command.err[-1500:])
            )
        shutil.rmtree(world)

    cases = [(name, *case) for name, members in CASES.items() for case in members]
    for number, case in enumerate(cases):
        name, typed, _, *change = case
        world = tmp_path / str(number)
        shutil.copytree(template, world, copy_function=os.link)
        config = (world / 'run/config.json').read_text().replace(str(template), str(world))
        write('run/config.json', config.encode())(world)
        for spoil in change:
            spoil(world)
        base = typed[1:] if typed.startswith('=') else f'{COMMANDS[name]} {typed}'
        before = tree(world)
        words = base.replace('{mod2}', str(MOD2)).split()
        running.append((case, world, before, commands.start(*words, cwd=world)))
        if len(running) > 1:
            check(*running.pop(0))
    for rest in running:
        check(*rest)
    assert not failures, '\n\n'.join(map(str, failures))
