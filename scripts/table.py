"""Measures the recommended recipes, and what each of their parts is worth, on several data sets.

    python scripts/table.py --sets mvtec_ad:MVTEC/bottle folder:AITEX/02 \
      --weights RESNET18.safetensors --workdir table

A set is data.name:FOLDER. The rows: configs/auto.py and configs/edge.py, each with --seeds seeds;
the nearest neighbour on the same features; and configs/edge.py without each of its parts, with one
seed. With --knowledge instead what defects in the training split add to both, and to the published
systems: none of them, labels, a tenth or half of their masks, all masks; with --few N the first N
of each kind by name are moved from the test split to training first. Every training is a command of
its own in a folder of its own; the same command goes on with what is missing, and --rows chooses
some. table.md has the metrics after the last epoch in percent, the minutes of the whole command and
the milliseconds of an image. Nothing else should run meanwhile.
"""

import argparse
import collections
import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

from ssn_jax import (
    benchmark,
    config as config_lib,
    data,
    evaluate,
    files,
    metrics,
    predictor,
    terminal,
)
from ssn_jax.data import layouts, splits
from ssn_jax.errors import UserError
from ssn_jax.fused import fold
from ssn_jax.models import grid as grid_lib, systems, weights
from ssn_jax.report import markup, page
from ssn_jax.training import features, product

# Of each row its config, and what differs from it.
ROWS = {
    'auto': ('auto', {}),
    'edge': ('edge', {}),
    'neighbours, ResNet18': ('auto', None),
    'neighbours, EfficientNet-Lite0': ('edge', None),
    'edge, nothing drawn': ('edge', {'drawn.count': 0, 'epochs': 450, 'supervision.kind': 'none'}),
    'edge, at any angle': ('edge', {'product.angle': 'any'}),
    'edge, at the same angle': ('edge', {'product.angle': 'same'}),
    'edge, at any place': ('edge', {'product.place': 'any'}),
    'edge, at the same place': ('edge', {'product.place': 'same'}),
    'edge, place without misplaced features': ('edge', {'misplaced': 0.0}),
    'edge, positions anywhere': ('edge', {'product_share': 0.0}),
    'edge, no hard normal positions': ('edge', {'hard_normal': 0.0}),
    'edge, the published loss': ('edge', {'map_loss': 'l1_focal'}),
    'edge, no average of weights': ('edge', {'optimizer.average': 0.0}),
    'edge, with layer1': ('edge', {'features.layers': '(1,2,3)'}),
}
_KNOWN = {
    'no defects': {'supervision.kind': 'none'},
    'labels': {'supervision.kind': 'labels'},
    '10 % of masks': {'supervision.kind': 'masks', 'supervision.mask_fraction': 0.1},
    '50 % of masks': {'supervision.kind': 'masks', 'supervision.mask_fraction': 0.5},
    'all masks': {'supervision.kind': 'masks', 'supervision.mask_fraction': 1.0},
}
# The same of --knowledge; the published systems on ResNet18 too.
KNOWLEDGE = {
    f'{base}, {x}': (base, known) for base in ('auto', 'edge') for x, known in _KNOWN.items()
}
_SMALL = {'backbone.name': 'resnet18'}
KNOWLEDGE |= {
    'Scenario A, no defects': ('mod1_a', {}),
    'GAP+CAM, labels': ('mod3', _SMALL),
    'SuperSimpleNet, labels': ('mixed', {'supervision.mask_fraction': 0.0} | _SMALL),
    'SuperSimpleNet, 10 % of masks': ('mixed', _SMALL),
    'SuperSimpleNet, 50 % of masks': ('mixed', {'supervision.mask_fraction': 0.5} | _SMALL),
    'SuperSimpleNet, all masks': ('supervised', _SMALL),
}


def main() -> None:
    """Runs what is missing, and writes the table after each run."""
    parser = terminal.Parser('table', __doc__)
    parser.add_argument('--sets', nargs='+', required=True, metavar='NAME:FOLDER')
    parser.add_argument('--weights', required=True, metavar='FILE', help="ResNet18's")
    parser.add_argument('--workdir', type=terminal.path, required=True)
    parser.add_argument('--rows', nargs='+', choices=ROWS | KNOWLEDGE, metavar='ROW')
    parser.add_argument('--knowledge', action='store_true', help='the rows on what is known')
    parser.add_argument('--few', type=int, default=0, metavar='N', help='defects of each kind')
    parser.add_argument(
        '--fields', nargs='+', default=[], metavar='FIELD=VALUE', help='of all runs'
    )
    parser.add_argument('--seeds', type=int, default=3, help='of auto and edge (%(default)s)')
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or list(KNOWLEDGE if arguments.knowledge else ROWS)
    names = [pathlib.Path(one).name for one in arguments.sets]
    if len(set(names)) < len(names):
        raise UserError(f'--sets has {" ".join(names)}: the last folder is its name, once each.')
    for row in arguments.rows:
        for one in arguments.sets:
            several = row in KNOWLEDGE or row in ('auto', 'edge')
            for seed in range(arguments.seeds if several else 1):
                done = row_file(arguments.workdir, row, one, seed)
                if not done.exists():
                    print(f'{row} on {one}, seed {seed}', flush=True)
                    found = measure(row, one, seed, arguments, done.parent)
                    files.write(done, json.dumps(found))
                    files.write(arguments.workdir / 'table.md', table(arguments))


def row_file(workdir: pathlib.Path, row: str, one: str, seed: int) -> pathlib.Path:
    """What one run of a row has come to; it lies in the run's folder."""
    name = row.replace(', ', '-').replace(' ', '_')
    return workdir / name / pathlib.Path(one).name / f'seed-{seed}' / 'row.json'


def measure(row: str, one: str, seed: int, arguments, folder: pathlib.Path) -> dict:
    """Metrics, minutes of the whole command and, of a run, milliseconds of an image."""
    name, place = one.split(':', 1)[0], pathlib.Path(one.split(':', 1)[-1])
    base, changes = (ROWS | KNOWLEDGE)[row]
    if arguments.few:
        name, place = 'folder', few(place, arguments.workdir / 'few', arguments.few)
    given = {'data.name': name, 'seed': seed, 'drawn.seed': seed}
    given['data.root'] = str(place.parent if name == 'mvtec_ad' else place)
    given['data.category'] = place.name
    if base != 'edge':
        given['backbone.weights'] = arguments.weights
    began = time.perf_counter()
    if changes is None:
        folder.mkdir(parents=True, exist_ok=True)
        config = config_lib.load(base)
        config.update_from_flattened_dict(given)
        found = {'metrics': neighbours(config)}
    else:
        flags = [f'--config.{field}={value}' for field, value in (given | changes).items()]
        flags += [f'--config.{field}' for field in arguments.fields]
        command = [sys.executable, '-m', 'ssn_jax', 'train', '--config', base, '--quiet']
        if subprocess.run([*command, *flags, '--workdir', str(folder)]).returncode:
            raise UserError(f'{row} on {one} ended so: the same command goes on with it.')
        found = {'metrics': json.loads((folder / 'results.json').read_text())['metrics']}
    found['minutes'] = (time.perf_counter() - began) / 60
    if changes is not None:
        found['ms'] = milliseconds(folder)
    return found


def few(root: pathlib.Path, workdir: pathlib.Path, count: int) -> pathlib.Path:
    """Links a category whose training split also has some of its defects; returns its folder.

    Args:
      root: the category's, with train/good, test/DEFECT and masks.
      workdir: where the folder comes to lie, under the category's name.
      count: of defects of each kind, the first by name; the test split has the others.
    """
    target, seen = workdir / root.name, collections.Counter()
    for record in layouts.folder(root.resolve()).records:
        seen[record.split, record.defect] += 1
        split = record.split
        if record.defect != layouts.GOOD and seen[record.split, record.defect] <= count:
            split = 'train'
        wanted = {target / split / record.defect / record.image.name: record.image}
        if record.mask:
            wanted[target / 'ground_truth' / record.defect / record.mask.name] = record.mask
        for link, of in wanted.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(of)
    return target


def neighbours(config, tenth: int = 10) -> dict:
    """The metrics of the nearest neighbour on the features that a config reads.

    As PatchCore (Roth et al., CVPR 2022) with a random tenth of the patches: the distance of each
    position's features, at layer2's grid and averaged over 3x3, to the nearest of normal images;
    the map is smoothed as ours is, and the score is its maximum.
    """
    dataset = data.load(config.data, config.image_size, config.resize, config.fit)
    backbone, _ = weights.load_backbone(config.backbone.name, config.backbone.weights, False)
    run = features.extractor(
        config, systems.build_network(config), fold.fuse_backbone(backbone), config.image_size
    )

    def patches(images):
        layers = [np.asarray(features.restore(x), np.float32) for x in run(images)]
        return np.asarray(grid_lib.upscale_pool(tuple(layers), scale=1))

    parts = range(0, len(dataset.train.labels), 16)
    normal = dataset.train.images[dataset.train.labels == 0]
    rows = np.concatenate(
        [x.reshape(-1, x.shape[-1]) for x in (patches(normal[i : i + 16]) for i in parts) if len(x)]
    )
    rng = np.random.default_rng(config.seed)
    bank = rows[rng.choice(len(rows), len(rows) // tenth, replace=False)]
    maps = []
    for image in dataset.test.images:
        asked = patches(image[None])[0]
        distances, _ = product.nearest_of(bank[None], asked.reshape(1, -1, asked.shape[-1]))
        maps.append(distances.reshape(asked.shape[:2]))
    maps = np.stack(maps)[..., None].astype(np.float32)
    maps = np.asarray(grid_lib.full_size_map(maps, config.image_size))[..., 0]
    peaks = metrics.maximum(maps, splits.valid(dataset.test))
    return evaluate.evaluate(peaks, maps, dataset.test)[0]


def milliseconds(folder: pathlib.Path, turns: int = 60) -> float:
    """The median time of one image of the run's size."""
    model = predictor.open_run(folder)
    image = np.zeros((1, *model.config.image_size, 3), np.uint8)
    return 1e3 * float(np.median(benchmark.take_turns([lambda: model.logits(image)], turns)))


def table(arguments: argparse.Namespace) -> str:
    """What there is, a line for each row and set and one for its mean, in Markdown."""
    lines = [
        f'| row | set | {" | ".join(metrics.METRICS)} | minutes | ms |',
        '|---|---' + '|---' * (len(metrics.METRICS) + 2) + '|',
    ]
    for row in ROWS | KNOWLEDGE:
        means = []
        for one in arguments.sets:
            places = [
                row_file(arguments.workdir, row, one, seed) for seed in range(arguments.seeds)
            ]
            runs = [json.loads(file.read_text()) for file in places if file.exists()]
            if not runs:
                continue
            values = [[run['metrics'][name] for run in runs] for name in metrics.METRICS]
            means.append(values)
            cells = [page.mean_and_spread(x, 100) for x in values]
            cells.append(f'{statistics.mean(run["minutes"] for run in runs):.1f}')
            ms = [run['ms'] for run in runs if 'ms' in run]
            cells.append(f'{statistics.median(ms):.1f}' if ms else '–')
            lines.append(f'| {row} | {pathlib.Path(one).name} | {" | ".join(cells)} |')
        if len(means) == len(arguments.sets):
            cells = [_mean_of_means(x) for x in zip(*means, strict=True)]
            lines.append(f'| {row} | mean | {" | ".join(cells)} | | |')
    return '\n'.join(lines) + '\n'


def _mean_of_means(values):
    """Over sets, of a metric's values of each seed; none where a set has none."""
    if any(None in x for x in values):
        return markup.NOTHING
    return f'{100 * statistics.mean(map(statistics.mean, values)):.1f}'


if __name__ == '__main__':
    terminal.guard(main)
