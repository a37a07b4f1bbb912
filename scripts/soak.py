"""The long form of the fault tests: more of everything, and figures of what can be measured.

    python scripts/soak.py
    python scripts/soak.py --parts kills,signals --kills 100 --minutes 60

It ends after --minutes in any case, with what it has got to. Exit status 1 if a promise is broken.
"""

import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from ssn_jax import terminal

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests'))

import commands  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import runs_again  # noqa: E402
import tiny  # noqa: E402


def kills(folder: pathlib.Path, arguments, deadline: float) -> str:
    """SIGKILL at random moments of a training and of its parts, and the same command again."""
    job = runs_again.Job(folder)
    job.finish(folder / 'first')  # Compiles.
    began = time.time()
    job.finish(folder / 'whole')
    duration = time.time() - began
    rng, moments = np.random.default_rng(arguments.seed), []
    while len(moments) < arguments.kills and time.time() < deadline:
        workdir = folder / 'run'
        command = job.start(workdir)
        wheres = [None, *runs_again.PHASES]
        where = wheres[len(moments) % len(wheres)]
        if where:
            reached, seconds = runs_again.PHASES[where]
            runs_again.wait_for(reached, workdir, command)
            time.sleep(2 * seconds * rng.random())
        else:
            command.process.join(rng.uniform(0, duration))
        if not command.process.is_alive():  # Faster this time than the measured one.
            shutil.rmtree(workdir)
            continue
        command.process.kill()
        command.end()
        moments.append(phase(workdir))
        assert len(runs_again.rows(workdir)) in range(runs_again.EPOCHS + 1)
        runs_again.results(workdir) if (workdir / 'results.json').exists() else None
        job.finish(workdir)
        runs_again.check_same(workdir, folder / 'whole')
        shutil.rmtree(workdir)
    counts = ', '.join(f'{moments.count(m)} {m}' for m in dict.fromkeys(sorted(moments)))
    return f'{len(moments)} kills ({counts}): each run ended with the bits of the whole one'


def phase(workdir: pathlib.Path) -> str:
    """Where a run was, from what is in its folder."""
    if not (workdir / 'config.json').exists():
        return 'before it began'
    if list(workdir.glob('checkpoints/*tmp*')):
        return 'in a checkpoint'
    done = len(runs_again.rows(workdir))
    if not done:
        return 'in features or the first epoch'
    return 'in an epoch' if done < runs_again.EPOCHS else 'in evaluation and results'


def signals(folder: pathlib.Path, arguments, deadline: float) -> str:
    """SIGTERM at random moments of epochs that take seconds."""
    job = runs_again.Job(folder, size=128, train=32)
    flags = ['--config.image_size=(128, 128)', '--config.batch_size=8', '--config.epochs=99']
    flags += [f'--config={ROOT / "configs/mod1_a.py"}', '--config.checkpoint.every=99']
    rng, seconds, workdir = np.random.default_rng(arguments.seed), [], folder / 'run'
    while len(seconds) < arguments.signals and time.time() < deadline:
        before, began = len(runs_again.rows(workdir)), time.time()
        command = job.start(workdir, *flags)
        while len(runs_again.rows(workdir)) == before and time.time() - began < 300:
            assert command.process.is_alive(), command.err[-2000:]
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 10))
        began = time.time()
        os.kill(command.process.pid, signal.SIGTERM)
        assert command.end(60) == 128 + signal.SIGTERM, command.err[-2000:]
        seconds.append(time.time() - began)
        rows = runs_again.rows(workdir)
        assert f'epoch {len(rows)} is saved' in command.err.splitlines()[-1]
        assert runs_again.last_state(workdir)[0] == len(rows)
        assert seconds[-1] < 10
    took = [float(line.rsplit(',', 1)[1]) for line in open(workdir / 'train.csv').readlines()[1:]]
    return (
        f'{len(seconds)} times SIGTERM: ended with a checkpoint after '
        f'{min(seconds):.1f} to {max(seconds):.1f} s, where an epoch takes {np.median(took):.1f} s'
    )


def fuzz(folder: pathlib.Path, arguments, deadline: float) -> str:
    """tests/test_fuzz.py with more examples."""
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-W', 'ignore', ROOT / 'tests' / 'test_fuzz.py'],
        env=os.environ | {'SSN_JAX_FUZZ': str(arguments.examples)},
        timeout=max(deadline - time.time(), 1),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return f'4 times {arguments.examples} mutated files: used, or one line'


def predictions(folder: pathlib.Path, arguments, deadline: float) -> str:
    """Many images: memory and throughput on the way."""
    workdir, total = tiny.fake_run(folder), arguments.images
    draw_images(folder / 'photos', total)
    words = ['--workdir', workdir, '--input', folder / 'photos', '--output', folder / 'out']
    command = commands.start('predict', *words, cwd=folder, XDG_CACHE_HOME=str(folder / 'cache'))
    track = []
    while command.process.is_alive():
        assert time.time() < deadline, f'no end in time, after {track[-1:]}'
        shown = re.findall(rf'(\d+)/{total} ', command.err)
        used = usage(command.process.pid)
        if used and shown and int(shown[-1]):
            track.append((int(shown[-1]), *used, time.time()))
        time.sleep(0.25)
    assert command.end() == 0, command.err[-2000:]
    assert len((folder / 'out/predictions.csv').read_text().splitlines()) == total + 1
    done, memory, busy, at = (np.array(x, float) for x in zip(*track, strict=True))
    steady = done > total / 10
    slope = np.polyfit(done[steady], memory[steady], 1)[0] * 1000
    ends = [np.searchsorted(done, total * k / 5) for k in (1, 2, 3, 4)]
    rates = [', '.join(f'{r:.0f}' for r in total / 5 / np.diff(x[ends])) for x in (busy, at)]
    return (
        f'{total} images: {memory[steady].mean():.0f} MB, slope {slope:+.3f} MB per 1000 images, '
        f'from {memory[steady][0]:.0f} to {memory[-1]:.0f} MB; images in the second, third and '
        f'fourth fifth: {rates[0]} a second of processor time, {rates[1]} a second'
    )


def usage(pid: int) -> tuple[float, float] | None:
    """A process's resident memory in MB and processor time in seconds; None once it has ended."""
    try:
        fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
    held = pages * os.sysconf('SC_PAGE_SIZE') / 1e6
    return (held, ticks / os.sysconf('SC_CLK_TCK')) if held else None


def together(folder: pathlib.Path, arguments, deadline: float) -> str:
    """Processes that predict with one run at once."""
    workdir, count = tiny.fake_run(folder), arguments.processes
    draw_images(folder / 'photos', 200)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in workdir.rglob('*')}
    began = [
        commands.start(
            *('predict', '--workdir', workdir, '--input', folder / 'photos', '--quiet'),
            *('--output', folder / f'out-{i}'),
            cwd=folder,
            XDG_CACHE_HOME=str(folder / 'cache'),
        )
        for i in range(count)
    ]
    for command in began:
        assert command.end(max(deadline - time.time(), 1)) == 0, command.err[-2000:]
        assert command.err == ''
    tables = {(folder / f'out-{i}/predictions.csv').read_text() for i in range(count)}
    assert len(tables) == 1 and len(tables.pop().splitlines()) == 201
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in workdir.rglob('*')}
    return f'{count} processes at once, 200 images each: the same tables, the run untouched'


def draw_images(folder: pathlib.Path, count: int) -> None:
    """Noise of 64x64 pixels; every hundredth image is a new one."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        if i % 100 == 0:
            encoded = cv2.imencode('.png', rng.integers(0, 255, (64, 64, 3), np.uint8))[1]
        (folder / f'{i:06d}.png').write_bytes(encoded.tobytes())


PARTS = {f.__name__: f for f in (kills, signals, fuzz, predictions, together)}


def main() -> int:
    """Parses the command line, runs the parts and says what they found; the exit status."""
    parser = terminal.Parser('soak', __doc__)
    parser.add_argument('--parts', default=','.join(PARTS), help='some of %(default)s')
    parser.add_argument('--minutes', type=float, default=60, help='at most so long (%(default)s)')
    parser.add_argument('--kills', type=int, default=30)
    parser.add_argument('--signals', type=int, default=5)
    parser.add_argument('--examples', type=int, default=5000, help='of each fuzz test')
    parser.add_argument('--images', type=int, default=20_000, help='to predict')
    parser.add_argument('--processes', type=int, default=8, help='that predict at once')
    parser.add_argument('--seed', type=int, default=0)
    arguments = parser.parse_args()
    wrong = set(arguments.parts.split(',')) - set(PARTS)
    if wrong:
        parser.error(f'--parts={arguments.parts}: there is no {min(wrong)}')
    deadline, broken = time.time() + 60 * arguments.minutes, 0
    for name in arguments.parts.split(','):
        began = time.time()
        with tempfile.TemporaryDirectory(prefix='soak-') as folder:
            os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{folder}/compiled'
            try:
                found = PARTS[name](pathlib.Path(folder), arguments, deadline)
            except (AssertionError, subprocess.TimeoutExpired) as e:
                found, broken = f'BROKEN: {e}', broken + 1
            for child in multiprocessing.active_children():  # None, unless something is broken.
                child.kill()
                child.join()
        print(f'{name}, {time.time() - began:.0f} s: {found}', flush=True)
    return 1 if broken else 0


if __name__ == '__main__':
    terminal.guard(lambda: sys.exit(main()))
