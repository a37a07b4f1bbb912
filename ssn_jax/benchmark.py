"""Times of inference and training, this project's forms beside other implementations."""

import argparse
from collections.abc import Sequence
import functools
import importlib.util
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from ssn_jax import config as config_lib, predictor, synthesis
from ssn_jax.data import synthetic
from ssn_jax.errors import UserError
from ssn_jax.fused import engine, fold, forward
from ssn_jax.models import backbones, systems
from ssn_jax.report import published
from ssn_jax.training import steps

BATCHES = (1, 16)


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


def compile_ours(form: str, config, variables: tuple[dict, dict], images: np.ndarray):
    """A form's call on images of this shape, and the GFLOP of an image as XLA counts them.

    'fused' is what a finished run computes on this machine, 'xla' without OpenVINO, 'bfloat16' in
    that precision; 'direct' are the networks of `models/`.
    """
    network = systems.build_network(config)
    if form == 'direct':
        held, backbone = variables, backbones.BACKBONES[config.backbone.name]

        def run(held, images):
            layers = backbone.apply(held[0], backbone.normalise(images))
            logits, scores = network.apply(held[1], network.features(network.frozen(layers)))
            return scores, network.full_size_map(logits, images.shape[1:3])[..., 0]

        held, compiled = jax.device_put(held), jax.jit(run)
        counted = compiled.lower(held, images).cost_analysis()
        return lambda x: jax.device_get(compiled(held, x)), counted['flops'] / len(images) / 1e9
    config = config.copy_and_resolve_references()
    config.update(
        eval_batch_size=len(images),
        engine='xla' if form == 'xla' else 'auto',
        precision='bfloat16' if form == 'bfloat16' else 'float32',
    )
    model = predictor.Predictor(config, fold.fuse(*variables, network))
    # XLA counts the body of a loop once: the form without loops is counted.
    counted = jax.jit(functools.partial(forward.predict, one_by_one=False))
    counted = counted.lower(model.fused, images).cost_analysis()
    return model.logits, counted['flops'] / len(images) / 1e9


def compile_torch(config, variables: tuple[dict, dict], images: np.ndarray):
    """The same arithmetic in PyTorch: channels last, inference mode, eager."""
    torch, module = _torch_module(config, variables)

    def call(x):
        with torch.inference_mode():
            return [y.numpy() for y in module(torch.from_numpy(x))]

    return call


def compile_openvino(config, variables: tuple[dict, dict], images: np.ndarray):
    """The graph of the PyTorch module, compiled by OpenVINO for latency, in float32."""
    torch, module = _torch_module(config, variables)
    openvino = engine.import_openvino()

    with torch.inference_mode():
        model = openvino.convert_model(module, example_input=torch.from_numpy(images))
    model.reshape(list(images.shape))
    options = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.compile_model(model, 'CPU', options)
    return lambda x: [compiled([x])[i] for i in range(2)]


def _torch_module(config, variables):
    import torch

    from ssn_jax import torch_model

    network = systems.build_network(config)
    size = tuple(config.image_size)
    return torch, torch_model.build(config.backbone.name, *variables, network, size)


OTHERS = {'torch': compile_torch, 'openvino': compile_openvino}


def take_turns(calls: dict, images: np.ndarray, turns: int) -> dict[str, np.ndarray]:
    """Seconds of every call on `images`, (turns,) each; all run in every turn."""
    seconds = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            began = time.perf_counter()
            call(images)
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(s) for name, s in seconds.items()}


def check_outputs(name: str, actual, expected) -> None:
    """Raises ValueError if a form computes something else; what is timed must be the same."""
    for a, b in zip(actual, expected, strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error < 1e-3:
            raise ValueError(f'{name} deviates from the fused form by {error:.1e}')


def measure(name: str, config, against: list[str], turns: int, forms: list[str]) -> dict:
    """Everything about one config; `forms` are this project's, fused among them."""
    variables = random_variables(config)
    count = sum(x.size for v in variables for x in jax.tree.leaves(v['params']))
    size = list(config.image_size)
    result = {
        'config': name,
        'image_size': size,
        'params': count,
        'forms': {f: {} for f in forms + against},
    }
    for batch in BATCHES:
        images, calls, expected = embedded_images(batch, tuple(config.image_size)), {}, None
        # The fused form first: the others are checked against it.
        for form in sorted(result['forms'], key=lambda form: form != 'fused'):
            row, began = result['forms'][form], time.perf_counter()
            if form in OTHERS:
                calls[form], gflop = OTHERS[form](config, variables, images), None
            else:
                calls[form], gflop = compile_ours(form, config, variables, images)
            output = calls[form](images)
            if batch == 1:
                row |= {'gflop': gflop, 'first_s': time.perf_counter() - began}
            expected = expected or output
            if form == 'bfloat16':
                pairs = zip(('score', 'map'), output, expected, strict=True)
                if batch > 1:
                    off = {name: np.abs(a - e).max() / np.std(e) for name, a, e in pairs}
                    row['deviation'] = {name: float(x) for name, x in off.items()}
            else:
                check_outputs(form, output, expected)
        times = take_turns(calls, images, turns if batch == 1 else max(7, turns // 2))
        for form, seconds in times.items():
            row = result['forms'][form]
            if batch == 1:
                row['ms'] = float(1e3 * np.median(seconds))
                row['ms_p95'] = float(1e3 * np.percentile(seconds, 95))
            else:
                row['images_per_s'] = float(batch / np.median(seconds))
            row[f'fused_is_faster_{batch}'] = float(np.median(seconds / times['fused']))
    return result


def format_table(results: list[dict]) -> str:
    """The results for people."""
    head = ('params', 'GFLOP', 'batch 1', '95 %', 'batch 16', 'first', 'fused is faster')
    lines = [
        f'{"config":14s}{"form":10s}' + ''.join(f'{h:>9s}' for h in head[:-1]) + f'  {head[-1]}'
    ]
    for r in results:
        rows = r['forms'] | {published.DEVICE: published.EFFICIENCY.get(r['config'], {})}
        for form, row in rows.items():
            shown = [
                (r['params'] / 1e6, '.1f') if form != published.DEVICE else (None, ''),
                (row.get('gflop'), '.1f'),
                (row.get('ms'), '.2f'),
                (row.get('ms_p95'), '.2f'),
                (row.get('images_per_s'), '.2f'),
                (row.get('first_s'), '.1f'),
            ]
            line = f'{r["config"]:14s}{form:10s}'
            line += ''.join(f'{"-":>9s}' if v is None else f'{v:9{f}}' for v, f in shown)
            ratios = [row.get(f'fused_is_faster_{b}') for b in BATCHES]
            line += '' if None in ratios else '  ' + ' / '.join(f'{x:.2f}x' for x in ratios)
            if 'deviation' in row:
                line += ''.join(f'  {k} {v:.1e} std off' for k, v in row['deviation'].items())
            lines.append(line)
    return '\n'.join(lines)


def measure_training(
    name: str, against: list[str], turns: int, batch: int, direct: bool = True
) -> dict:
    """Images per second of a config's training: the cheap form, the direct one, PyTorch's.

    PyTorch gets its masks for nothing and trains without the noise generator; the frozen features,
    which this project computes once in a run, are timed by themselves.
    """
    config = config_lib.load(name)
    config.batch_size = batch
    images = embedded_images(batch, tuple(config.image_size))
    variables = random_variables(config)
    network = systems.build_network(config)
    backbone = fold.fuse_backbone(variables[0])
    if engine.choose('auto') == 'openvino':
        from ssn_jax.fused import graph

        size, layers = tuple(config.image_size), tuple(config.features.layers)
        model = engine.OpenVino(graph.features(backbone, size, layers), size)
        extract = functools.partial(model, images)
    else:
        compiled = jax.jit(lambda v, x: network.frozen(forward.backbone(v, x)))
        extract = functools.partial(compiled, jax.device_put(backbone), images)
    layers = tuple(jnp.asarray(x) for x in extract())
    began = time.perf_counter()
    jax.block_until_ready(extract())
    extraction = time.perf_counter() - began
    channels = sum(x.shape[-1] for x in layers)
    order = np.arange(batch)[None]

    def ours(sparse):
        config.sparse = sparse
        epoch = steps.make_epoch(config, 1)
        state = [steps.init_state(config, jax.random.key(0), channels)]

        def call(turn):
            state[0], _ = jax.block_until_ready(
                epoch(state[0], {'layers': layers}, order, jax.random.key(turn))
            )

        return call

    calls = {'cheap': ours(True)} | ({'direct': ours(False)} if direct else {})
    if 'torch' in against:
        calls['torch'] = _torch_training(config, variables, images)
    seconds = {form: [] for form in calls}
    for turn in range(-2, turns):
        for form, call in calls.items():
            began = time.perf_counter()
            call(turn + 2)
            if turn >= 0:
                seconds[form].append(time.perf_counter() - began)
    forms = {
        form: {
            'images_per_s': float(batch / np.median(s)),
            'cheap_is_faster': float(np.median(np.array(s) / np.array(seconds['cheap']))),
        }
        for form, s in seconds.items()
    }
    return {'config': name, 'batch': batch, 'extract_s': extraction / batch, 'forms': forms}


def _torch_training(config, variables, images):
    torch, module = _torch_module(config, variables)
    from ssn_jax import torch_model

    module.train()
    module.backbone.eval()
    o, heads = config.optimizer, module.discriminator
    optimizer = torch.optim.AdamW(
        [
            {'params': module.feature_adaptor.parameters(), 'lr': o.adaptor_learning_rate},
            {'params': heads.parameters(), 'lr': o.heads_learning_rate, 'weight_decay': 1e-5},
        ]
    )
    masks = synthesis.make_masks(config)
    grid = tuple(s // 4 for s in config.image_size)
    images = torch.from_numpy(images)

    def call(turn):
        mask = np.array(masks(jax.random.key(turn), 2 * len(images), grid)).transpose(0, 3, 1, 2)
        torch_model.train_step(module, optimizer, images, torch.from_numpy(mask), config.noise.std)

    return call


def check(names: Sequence[str], against: Sequence[str], train: bool) -> None:
    """Raises UserError for what cannot be measured."""
    for other in against:
        if other not in OTHERS:
            raise UserError(f'--against={other} is unknown: it takes {", ".join(OTHERS)}.')
        for package in {'torch', other}:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"--against={other} needs {package}: pip install 'ssn_jax[bench]'.")
    for name in names:
        config = config_lib.load(name)
        if against and (config.image_score == 'map' or config.features.layers != (2, 3)):
            raise UserError(
                f'--against cannot measure {name}: the PyTorch module has a classification head '
                'and reads layers (2, 3).'
            )
        trained = config.system, config.supervision.kind, config.image_score
        if train and trained != ('supersimplenet', 'none', 'head'):
            raise UserError(
                f'--train measures unsupervised SuperSimpleNets with both heads: {name} is none.'
            )


def run(names: Sequence[str], against: Sequence[str], arguments: argparse.Namespace) -> dict:
    """Measures configs by the command's arguments, prints a table as it goes, and returns all."""
    device, results = f'{jax.device_count()} x {jax.devices()[0].device_kind}', []
    for name in names:
        if arguments.train:
            results.append(
                measure_training(
                    name, against, arguments.turns, arguments.batch, not arguments.no_direct
                )
            )
            lines = training_lines(results[-1])
        else:
            wanted = {'direct': not arguments.no_direct, 'xla': arguments.xla}
            wanted['bfloat16'] = arguments.bfloat16
            forms = [form for form, yes in (wanted | {'fused': True}).items() if yes]
            config = config_lib.load(name)
            config.backbone.name = arguments.backbone or config.backbone.name
            results.append(measure(name, config, list(against), arguments.turns, forms))
            lines = format_table(results[-1:]).splitlines()[min(len(results) - 1, 1) :]
        if not arguments.json:
            print('\n'.join(lines), flush=True)
    if arguments.train:
        return {'device': device, 'training': results}
    return {'device': device, 'published': published.EFFICIENCY, 'results': results}


def training_lines(result: dict) -> list[str]:
    """What `measure_training` found, for people."""
    once = f'frozen features once, {result["extract_s"]:.3f} s an image'
    lines = [f'{result["config"]}, batch {result["batch"]}: {once}']
    for form, row in result['forms'].items():
        ratio = f'{row["cheap_is_faster"]:.2f}x'
        lines.append(f'  {form:8s}{row["images_per_s"]:8.2f} images/s, cheap is faster by {ratio}')
    return lines
