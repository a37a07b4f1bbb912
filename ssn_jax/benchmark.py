"""Times of inference, of this project's networks and of those that anomalib has."""

import argparse
from collections.abc import Callable
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import time

import cv2
import jax
import numpy as np

from ssn_jax import config as config_lib, predictor
from ssn_jax.data import synthetic
from ssn_jax.errors import UserError
from ssn_jax.fused import engine, fold, forward
from ssn_jax.models import backbones, systems

PRECISIONS = ('float32', 'bfloat16', 'int8')

INSTALL = (
    'pip install torch==2.13.0, then pip install --no-deps anomalib==2.7.0 and what it imports '
    '(docs/inference.md, Times, has the line)'
)

# Compiles a form for a batch of images, uint8 (N, H, W, 3), and returns what is to be timed.
Compile = Callable[[np.ndarray], Callable[[], object]]


def embedded_images(n: int, size: tuple[int, int]) -> np.ndarray:
    """Procedurally drawn screws, uint8 (n, *size, 3)."""
    drawn = [synthetic.draw('screw', 'good', np.random.default_rng(i))[0] for i in range(n)]
    return np.stack([cv2.resize(x, size[::-1])[..., None].repeat(3, -1) for x in drawn])


def random_variables(config) -> tuple[dict, dict]:
    """Variables of backbone and network as initialised."""
    backbone, network = backbones.BACKBONES[config.backbone.name], systems.build_network(config)
    channels = backbones.feature_channels(config.backbone.name, config.features.layers)
    if config.system == 'simplenet':
        channels = config.simplenet.embedding
    keys = jax.random.split(jax.random.key(config.seed))
    return (
        jax.jit(backbone.init)(keys[0], np.zeros((1, 64, 64, 3), np.float32)),
        jax.jit(network.init)(keys[1], np.zeros((1, 8, 8, channels), np.float32)),
    )


def load_config(text: str):
    """The config that `CONFIG` or `CONFIG:BACKBONE` means.

    Raises:
      UserError: there is no such config or backbone.
    """
    name, _, backbone = text.partition(':')
    if name not in config_lib.built_in():
        known = ', '.join(config_lib.built_in())
        raise UserError(f'no config {name!r}: --configs takes names of {known}.')
    config, field = config_lib.load(name), config_lib.FIELDS['backbone.name']
    if backbone and not field.allows(backbone):
        raise UserError(f'--configs={text} cannot be used, its backbone: {field.rule}.')
    config.backbone.name = backbone or config.backbone.name
    if config.product.place == 'auto':
        config.product.place = 'same'  # The dearer one.
    return config


def our_forms(text: str, engines: list[str], precisions: list[str]) -> list[tuple[dict, Compile]]:
    """The rows of a config, an engine and a precision each, and what compiles them."""
    config = load_config(text)
    variables, size = random_variables(config), tuple(config.image_size)
    fused = fold.fuse(*variables, systems.build_network(config))
    # XLA counts the body of a loop once: the form without loops is counted.
    counted = jax.jit(functools.partial(forward.predict, one_by_one=False))
    counted = counted.lower(fused, np.zeros((1, *size, 3), np.uint8)).cost_analysis() or {}
    network = {
        'backbone': config.backbone.name,
        'image_size': list(size),
        'params': sum(x.size for v in variables for x in jax.tree.leaves(v['params'])),
        'gflop': counted['flops'] / 1e9 if 'flops' in counted else None,  # XLA has none on GPUs.
    }

    def compile_form(engine_name, precision, images):
        if precision == 'int8':
            from ssn_jax.fused import graph, quantise

            exact = graph.predictor(fused, config, any_size=True)
            coarse = quantise.quantise(exact, embedded_images(8, size))
            return functools.partial(engine.OpenVino(coarse, size, precision), images)
        own = config.copy_and_resolve_references()
        own.update(eval_batch_size=len(images), engine=engine_name, precision=precision)
        return functools.partial(predictor.Predictor(own, fused).logits, images)

    return [
        (
            {'name': text, 'engine': e, 'precision': p} | network,
            functools.partial(compile_form, e, p),
        )
        for e in engines
        for p in precisions
        if p != 'int8' or e == 'openvino'
    ]


def take_turns(calls: list[Callable], turns: int) -> np.ndarray:
    """Seconds of every call, (calls, turns); all run in every turn.

    Each is called twice and timed once, so that none pays for what the one before it left behind.
    """
    seconds = np.empty((len(calls), turns))
    for turn in range(turns):
        for i, call in enumerate(calls):
            call()
            began = time.perf_counter()
            call()
            seconds[i, turn] = time.perf_counter() - began
    return seconds


def measure(forms: list[tuple[dict, Compile]], batch: int, turns: int) -> list[dict]:
    """The rows of forms with their times on `batch` images, taken by turns.

    A row gets `batch`, `ms` (the median), `ms_p95` and `faster`: how many times as fast as it each
    of our networks is at its precision, in the first of our engines, the median of the ratios of
    all turns. What cannot be had, such as a model that OpenVINO does not convert, has `failed`, the
    reason, instead.
    """
    rows, timed, calls, ours = [], [], [], {}
    for row, compile_form in forms:
        row = row | {'batch': batch}
        rows.append(row)
        try:
            if row['precision'] == 'bfloat16' and not _has_bfloat16():
                raise UserError('this processor has no bfloat16')
            call = compile_form(embedded_images(batch, tuple(row['image_size'])))
            call()
        except Exception as e:  # What fails in others' models is known to them alone.
            if 'published' not in row and not isinstance(e, UserError):
                raise
            row['failed'] = str(e).strip().partition('\n')[0] or type(e).__name__
            continue
        if 'published' not in row:
            ours.setdefault((row['precision'], row['name']), len(calls))
        timed.append(row)
        calls.append(call)
    seconds = take_turns(calls, turns)
    for row, own in zip(timed, seconds, strict=True):
        row['ms'] = float(1e3 * np.median(own))
        row['ms_p95'] = float(1e3 * np.percentile(own, 95))
        row['faster'] = {
            name: float(np.median(own / seconds[i]))
            for (precision, name), i in ours.items()
            if precision == row['precision']
        }
    return rows


@functools.cache
def _has_bfloat16():
    """Whether the processor computes in bfloat16, as far as OpenVINO is there to tell."""
    return engine.choose('auto') != 'openvino' or engine.has_bfloat16()


def machine() -> str:
    """What the times are of: the device, and the versions of what computes."""
    kind, cpus = jax.devices()[0].device_kind, pathlib.Path('/proc/cpuinfo')
    name = f'{jax.device_count()} x {kind}'
    found = re.search(r'^model name\s*: (.*)', cpus.read_text(), re.M) if cpus.exists() else None
    if found and kind == 'cpu':
        name = f'{found[1].strip()}, {len(os.sched_getaffinity(0))} cores'
    packages = [p for p in ('jax', 'openvino', 'torch', 'anomalib') if importlib.util.find_spec(p)]
    return f'{name}; ' + ', '.join(f'{p} {importlib.metadata.version(p)}' for p in packages)


def table(rows: list[dict]) -> list[str]:
    """Rows as lines for people, a head first."""
    names = list(dict.fromkeys(row['name'] for row in rows if 'published' not in row))
    widths = [9] * 7 + [max(len(name), 7) + 2 for name in names]
    first = max(len(row['name']) for row in rows) + 2

    def line(name, engine, precision, cells):
        cells = ''.join(f'{cell:>{width}s}' for cell, width in zip(cells, widths, strict=True))
        return f'{name:{first}s}{engine:10s}{precision:8s}' + cells

    head = ['M params', 'GFLOP', 'I-AUROC', 'AUPRO', 'batch', 'ms', '95 %', *names]
    lines = [line('', 'engine', 'precision', head)]
    for row in rows:
        of, faster = row.get('published', {}), row.get('faster', {})
        values = [
            (row['params'], 1e-6, '.1f'),
            (row.get('gflop'), 1, '.1f'),
            *((of.get(metric), 100, '.1f') for metric in ('I-AUROC', 'AUPRO')),
            (row['batch'], 1, 'd'),
            *((row.get(time), 1, '.2f') for time in ('ms', 'ms_p95')),
            *((faster.get(name), 1, '.2f') for name in names),
        ]
        cells = ['-' if v is None else f'{v * scale:{f}}' for v, scale, f in values]
        failed = f'  {row["failed"]}' if 'failed' in row else ''
        lines.append(line(row['name'], row['engine'], row['precision'], cells) + failed)
    return lines


def run(arguments: argparse.Namespace) -> dict:
    """Measures what the command asks for, and prints a table unless it asks for JSON.

    Raises:
      UserError: a config is unknown, or anomalib is asked for and not installed.
    """
    for name in arguments.configs:
        load_config(name)
    if arguments.against:
        needed = 'anomalib', 'torch', 'timm'
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'--against=anomalib needs {", ".join(missing)}: {INSTALL}.')
    if 'int8' in arguments.precisions and (
        importlib.util.find_spec('nncf') is None or engine.choose('auto') != 'openvino'
    ):
        raise UserError(
            "--precisions=int8 needs OpenVINO on a CPU, and nncf: pip install 'ssn_jax[int8]'."
        )
    engines = dict.fromkeys([engine.choose('auto'), *(['xla'] if arguments.xla else [])])
    forms = [
        form
        for name in arguments.configs
        for form in our_forms(name, list(engines), arguments.precisions)
    ]
    if arguments.against:
        from ssn_jax import peers

        forms += peers.forms(arguments.precisions)
    rows = []
    for batch in arguments.batches:
        turns = arguments.turns if batch == 1 else max(7, arguments.turns // 2)
        rows += measure(forms, batch, turns)
        if not arguments.json:
            print('\n'.join(table(rows[-len(forms) :])), flush=True)
    if not arguments.json:
        print(machine())
    return {'machine': machine(), 'rows': rows}
