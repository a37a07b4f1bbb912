"""Nothing lost, nothing silent: runs that are killed, stopped, and robbed of what they wrote."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import commands
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_again import EPOCHS, PHASES, Job, check_same, last_state, results, rows, wait_for
import tiny

from ssn_jax import config as config_lib, losses, metrics, pipeline, signals
from ssn_jax.training import checkpoint, loop, steps


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp('job'))


@pytest.fixture(scope='module')
def whole(job):
    """The workdir of a run that nothing has happened to."""
    job.finish(job.folder / 'whole')
    return job.folder / 'whole'


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_phase_ends_as_if_it_had_not_been(job, whole, tmp_path):
    """SIGKILL in feature extraction, an epoch, a checkpoint, a head's training, and the results.

    `scripts/soak.py` does it at any moments, and more often.
    """
    workdir, rng = tmp_path / 'killed', np.random.default_rng(0)
    for reached, seconds in PHASES.values():
        command = job.start(workdir)
        wait_for(reached, workdir, command)
        time.sleep(seconds * rng.random())
        command.process.kill()
        assert command.end() == -signal.SIGKILL
        assert not (workdir / 'results.json').exists()
        done = [int(row['epoch']) for row in rows(workdir)]
        assert done == list(range(1, len(done) + 1))
    job.finish(workdir)
    check_same(workdir, whole)


@pytest.mark.slow
def test_stopped_runs_save_what_they_have_and_nobody_else_gets_in(job, whole, tmp_path):
    """SIGHUP, Ctrl-C: within 10 s a checkpoint that was not due, and a line that says so."""
    workdir, rare = tmp_path / 'stopped', '--config.checkpoint.every=99'
    for number, name in ((signal.SIGHUP, 'SIGHUP'), (signal.SIGINT, 'SIGINT')):
        before = len(rows(workdir))
        command = job.start(workdir, rare)
        wait_for(lambda w, before=before: len(rows(w)) > before, workdir, command)
        if number == signal.SIGHUP:
            os.kill(command.process.pid, signal.SIGSTOP)  # It would be through before the second.
            second = job.start(workdir, rare)
            assert second.end() == 1
            assert f'error: {workdir} is in use by another run' in second.err
            os.kill(command.process.pid, signal.SIGCONT)
        began = time.time()
        os.kill(command.process.pid, number)
        assert command.end(20) == 128 + number and time.time() - began < 10
        epoch = len(rows(workdir))
        said = f'stopped by {name}: epoch {epoch} is saved in {workdir}, the same command goes on'
        assert said in command.err.splitlines()[-1]
        assert (workdir / 'checkpoints' / str(epoch)).is_dir()
    assert f'after epoch {epoch}' in job.finish(workdir, rare)
    check_same(workdir, whole)


BUSY = """
import jax, os, signal, threading
from ssn_jax import signals, terminal
jax.config.update('jax_platforms', 'cpu')

def busy():
    return jax.block_until_ready(jax.jit(lambda: jax.lax.while_loop(
        lambda i: i < 10, lambda i: 9 - i, 0))())

def train():
    with signals.held() as wait:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            wait(busy)
        except KeyboardInterrupt as e:
            os.kill(os.getpid(), signal.SIGTERM)  # Whoever is impatient does not spoil the saving.
            print('saved')
            raise type(e)('epoch 7 is saved.') from None

terminal.guard(train)
"""


def test_a_signal_does_not_wait_for_compiled_code(tmp_path):
    """An epoch is one compiled call; this one never ends."""
    (tmp_path / 'busy.py').write_text(BUSY)
    command = commands.start(tmp_path / 'busy', cwd=tmp_path)
    assert command.end(60) == 128 + signal.SIGTERM
    assert command.out == 'saved\n'
    assert command.err.splitlines() == ['', 'stopped by SIGTERM: epoch 7 is saved.']


def test_nohup_is_heeded(monkeypatch):
    """What ignores SIGHUP goes on when its terminal is gone."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raised(), signals.held():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize('arguments', ['--help', 'train --help', 'predict --help'])
def test_who_reads_no_more_hears_no_complaint(arguments, tmp_path):
    """As of `ssn-jax ... | head -1`."""
    program = f'{sys.executable} -m ssn_jax {arguments} | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', program], capture_output=True, text=True, check=True)
    # argparse passes over it by itself.
    assert (int(done.stdout), done.stderr) in ((128 + signal.SIGPIPE, ''), (0, ''))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """in/ with 240 images, run/ to predict them with, and the table of a call that ended well."""
    folder = tmp_path_factory.mktemp('photos')
    tiny.fake_run(folder, threshold=-0.3)
    rng = np.random.default_rng(0)
    for i in range(240):
        file = folder / f'in/{i % 5}/{i:03d}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(file), rng.integers(0, 256, (64, 64, 3), np.uint8))
    command = predict(folder, folder / 'whole')
    assert command.end() == 0, command.err[-3000:]
    return folder, (folder / 'whole/predictions.csv').read_bytes()


def predict(folder, output, *flags):
    """Starts to predict `photos`."""
    return commands.start(
        *('predict', '--workdir', folder / 'run', '--input', folder / 'in', '--output', output),
        *('--no_overlays', '--config.eval_batch_size=4', *flags),
        cwd=folder,
        XDG_CACHE_HOME=str(folder / 'cache'),
    )


@pytest.mark.slow
def test_predictions_survive_every_end_and_are_gone_on_with(photos, tmp_path):
    """SIGKILL, SIGTERM and SIGHUP after some rows; meanwhile nobody else gets in."""
    folder, whole = photos
    table = tmp_path / 'out/predictions.csv'

    def written():
        return table.read_bytes().count(b'\n') if table.exists() else 0

    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
        before, command = written(), predict(folder, tmp_path / 'out')
        wait_for(lambda _, before=before: written() > max(before, 1), tmp_path, command)
        if number == signal.SIGHUP:
            os.kill(command.process.pid, signal.SIGSTOP)
            said = one_error(predict(folder, tmp_path / 'out'))
            assert f'{tmp_path}/out is in use' in said and 'choose another --output' in said
            os.kill(command.process.pid, signal.SIGCONT)
        os.kill(command.process.pid, number)
        assert command.end() == (-9 if number == signal.SIGKILL else 128 + number)
        assert before < written() < 241 and whole.startswith(table.read_bytes())
        if number != signal.SIGKILL:
            said = f'stopped by {number.name}: {written() - 1} predictions are in {table}, the same'
            assert said in command.err.splitlines()[-1]
    command = predict(folder, tmp_path / 'out')
    assert command.end() == 0 and '240 predictions are in' in command.out, command.err[-3000:]
    assert table.read_bytes() == whole


# --- Numbers --------------------------------------------------------------------------------------


def loss_of(terms_of):
    """A loss for `steps.make_step`; `terms_of` makes the terms of parameters and the batch."""

    def loss_fn(params, generator, batch_stats, batch, key, stop_map_gradient=True):
        terms = terms_of(sum(x.sum() for x in jax.tree.leaves(params)), batch['layers'][0].sum())
        terms = {'loss': sum(terms.values())} | terms
        return terms['loss'], (terms, batch_stats)

    return loss_fn


NOT_FINITE = {  # From the sum of all parameters and what step 4 of 6 alone sees as 1: the terms.
    'the loss (b)': lambda p, x: {'a': 1e-3 * p, 'b': jnp.log(1 - x)},
    'the loss (a, b)': lambda p, x: {'a': jnp.sqrt(-x), 'b': p * jnp.sqrt(-x)},
    # The root of 0 is 0, its slope infinite.
    'a gradient of the loss': lambda p, x: {'a': p * 1e-3, 'b': jnp.sqrt(0 * x * p) * (x > 0)},
}


@pytest.mark.parametrize(
    'what, on_host, longest',
    [(what, False, 16) for what in NOT_FINITE] + [('the loss (b)', place, 4) for place in (0, 1)],
)
def test_what_is_not_finite_is_told_by_step_and_term(what, on_host, longest, monkeypatch):
    loss = loss_of(NOT_FINITE[what])
    monkeypatch.setattr(losses, 'config_loss', lambda config, seeds_axis=None: loss)
    config = config_lib.default_config()
    state = steps.init_state(config, jax.random.key(0), 4)
    run = steps.make_epoch(config, 6, on_host=on_host, longest=longest)
    data, key = {'layers': (np.eye(1, 6, 3)[0],)}, jax.random.key(0)
    _, values = run(state, data, np.arange(6)[:, None], key)
    assert loop.describe_bad(values['bad']) == (3, what)
    _, values = run(state, data, np.array([[0, 1, 2, 4, 5, 0]]).T, key)
    assert loop.describe_bad(values['bad']) is None


@pytest.mark.slow
def test_a_run_stops_where_its_numbers_do(job, whole, tmp_path):
    """Parameters that are finite still; the same command then finds the operation."""
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns('4', '*.json'))
    shutil.copy(whole / 'config.json', workdir)
    epoch, state = last_state(workdir)
    assert epoch == EPOCHS - 1
    huge = state.replace(params=jax.tree.map(lambda x: x * 1e30, state.params))
    shutil.rmtree(workdir / 'checkpoints')
    checkpoint.save(checkpoint.open_manager(workdir, 2), epoch, huge)
    lines = (whole / 'train.csv').read_text().splitlines(keepends=True)
    (workdir / 'train.csv').write_text(''.join(lines[:EPOCHS]))

    def error(*flags):
        command = job.start(workdir, *flags)
        assert command.end() == 1 and 'Traceback' not in command.err
        [said] = [line for line in command.err.splitlines() if line.startswith('error: ')]
        assert len(rows(workdir)) == epoch and not (workdir / 'results.json').exists()
        return said

    assert re.fullmatch(
        rf'error: epoch {EPOCHS}, step 1 of 2 \(seed 0\): the loss \(.*map_l1.*\) became NaN or '
        rf'infinite; the last good checkpoint is {workdir}/checkpoints/{epoch}\. The same command '
        r'with --config.debug_nans=True finds the operation\.',
        error(),
    )
    said = error('--config.debug_nans=True')
    assert re.search(r'encountered in \w+.*/ssn_jax/\w+(/\w+)?\.py, line \d+: ', said), said


@pytest.mark.slow
def test_images_without_content_and_a_test_split_of_one_class(job, tmp_path):
    """Black, constant and saturated images, masks that fill them; then normal ones alone."""
    levels = {'train/good': (0, 0, 90, 90, 255, 255), 'test/good': (0, 90, 255)}
    for folder, values in (levels | {'test/spot': (0, 90, 255)}).items():
        for i, value in enumerate(values):
            write_image(tmp_path / 'data/nut' / folder / f'{i}.png', value)
            if folder == 'test/spot':
                write_image(tmp_path / 'data/nut/ground_truth/spot' / f'{i}_mask.png', 255)
            write_image(
                tmp_path / 'data/bolt' / folder.replace('spot', 'good') / f'{i}a.png', value
            )
    workdir, data = tmp_path / 'run', f'--config.data.root={tmp_path / "data"}'
    job.finish(workdir, data)
    assert all(np.isfinite(float(v)) for row in rows(workdir) for v in row.values())
    found = results(workdir)
    # Masks of more than half of an image say nothing.
    assert found['doubts']['large mask'] == 3
    places = {'P-AUROC', 'AUPRO', 'AP-loc'}
    assert found['undefined'] == dict.fromkeys(places, 'no defective image has a mask')
    assert all((v is None) == (name in places) for name, v in found['metrics'].items())
    assert all(0 <= v <= 1 for v in found['metrics'].values() if v is not None)
    assert np.isfinite(found['decision']['threshold'])

    other = commands.start(
        *('evaluate', '--workdir', workdir, data, '--config.data.category=bolt'),
        cwd=tmp_path,
    )
    assert other.end() == 0, other.err[-3000:]
    for name in metrics.METRICS:
        [line] = [line for line in other.out.splitlines() if line.split()[0] == name]
        assert re.search('no defective image( has a mask)?$', line)
    assert 'test TPR unknown, test FPR' in other.out


@pytest.mark.slow
def test_one_training_image_and_a_batch_of_more(job, tmp_path):
    shutil.copytree(job.folder / 'data/nut', tmp_path / 'nut')
    for file in list((tmp_path / 'nut/train/good').iterdir())[1:]:
        file.unlink()
    job.finish(
        *(tmp_path / 'run', f'--config.data.root={tmp_path}', '--config.batch_size=32'),
        '--config.epochs=2',
    )
    assert [float(row['loss']) > 0 for row in rows(tmp_path / 'run')] == [True, True]
    assert all(0 <= v <= 1 for v in results(tmp_path / 'run')['metrics'].values())


def write_image(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), np.full((32, 32, 3), value, np.uint8))


def test_a_loss_that_grows_is_reported(caplog):
    history = {'loss': [0.5, 3.0, 82.0], 'seconds': [1.0] * 3}
    assert pipeline.loss_grew(history)
    assert 'from 0.5 to 82' in caplog.text
    assert not pipeline.loss_grew(history | {'loss': [0.5, 82.0, 0.9]})
    assert pipeline.loss_grew({}) is None


# --- The disk -------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of its own in memory, and `remount(options)`; room for one checkpoint."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(*arguments):
        done = subprocess.run(['mount', *arguments, folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'file systems cannot be mounted here: {done.stderr.strip()}')

    if shutil.which('mount') is None:
        pytest.skip('there is no mount')
    mount('-t', 'tmpfs', '-o', 'size=56m', 'tmpfs')
    yield folder, lambda options: mount('-o', f'remount,{options}')
    subprocess.run(['umount', '-l', folder], check=True)


def one_error(command):
    """The only error of a command that ended with status 1."""
    assert command.end() == 1, command.err[-3000:]
    assert 'Traceback' not in command.err, command.err[-3000:]
    [said] = [line for line in command.err.splitlines() if line.startswith('error: ')]
    return said


@pytest.mark.slow
def test_a_full_and_a_read_only_disk(job, whole, disk, tmp_path):
    """What was written stays, the run goes on when there is room; whoever only reads, can."""
    folder, remount = disk
    workdir = folder / 'run'
    said = one_error(job.start(workdir))
    assert 'checkpoints/2 cannot be written' in said and 'o space left' in said, said
    assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['1']
    remount('size=200m')
    assert 'after epoch 1' in job.finish(workdir)
    check_same(workdir, whole)

    remount('ro')
    assert f'{workdir} is not writable: choose another --workdir' in one_error(job.start(workdir))
    arguments = ['predict', '--workdir', workdir, '--input', job.folder / 'data/nut/test/good']
    arguments += ['--quiet', '--output']
    cached = {'cwd': tmp_path, 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    said = one_error(commands.start(*arguments, folder / 'out', **cached))
    assert 'is not writable: choose another --output' in said
    reader = commands.start(*arguments, tmp_path / 'out', **cached)
    assert (reader.end(), reader.err) == (0, '')
    assert len((tmp_path / 'out/predictions.csv').read_text().splitlines()) == 4


@pytest.mark.slow
def test_predictions_on_a_full_disk_keep_whole_rows(photos, disk):
    (folder, whole), (full, remount) = photos, disk
    remount('size=500k')
    said = one_error(predict(folder, full / 'out', '--maps=npy'))
    assert re.search(rf'{full}/out cannot be written \(No space left on device\): make room', said)
    table = full / 'out/predictions.csv'
    content = table.read_bytes()
    assert whole.startswith(content) and content.endswith(b'\n') and content.count(b'\n') > 9
    remount('size=99m')
    command = predict(folder, full / 'out', '--maps=npy')
    assert command.end() == 0, command.err[-3000:]
    assert table.read_bytes() == whole
    assert len(list((full / 'out/maps').rglob('*.npy'))) == 240


@pytest.mark.slow
def test_a_damaged_checkpoint_is_noticed_and_made_again(job, whole, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    (workdir / 'results.json').unlink()
    newest = workdir / 'checkpoints' / str(EPOCHS)
    file = max((p for p in newest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    log = job.finish(workdir)
    assert re.search(rf'warning: the checkpoint {newest} cannot be restored \(.*going on', log)
    assert f'after epoch {EPOCHS - 1}' in log
    check_same(workdir, whole)
    assert (workdir / 'checkpoints' / f'{EPOCHS}.damaged').is_dir()
    (workdir / 'train.csv').write_text('epoch,loss\n1,half a li')
    assert f'{workdir}/train.csv is damaged' in one_error(job.start(workdir))
    rows = ''.join(f'{epoch},0.5\n' for epoch in range(1, EPOCHS + 1))
    (workdir / 'train.csv').write_text(f'epoch,loss,seconds\n{rows}')
    assert f'{workdir}/train.csv is damaged' in one_error(job.start(workdir))
