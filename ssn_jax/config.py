"""Every field a config has, with the published values; configs/*.py set what differs.

A config only sets values: the code branches on fields, never on a config's name.
"""

from collections.abc import Iterator
import json
import math
import pathlib

import ml_collections

from ssn_jax.errors import UserError

# Raised when an older run's config.json can no longer be understood.
VERSION = 1
# Fields of older runs that changed nothing in them.
_GONE = {'noise': ('shuffle_groups', 'shuffle_strength')}


def default_config() -> ml_collections.ConfigDict:
    """The published SuperSimpleNet, unsupervised, on ResNet18 (Scenario A)."""
    config = ml_collections.ConfigDict()
    config.version = VERSION
    config.name = 'mod1_a'  # The row of the results table.
    config.seed = 0  # Initialisation, data order, masks and noise follow from it.
    config.seeds = 1  # How many runs at once: seed, seed + 1, ..., each in its own folder.
    config.epochs = 300
    config.batch_size = 32  # Images per step, before they are doubled.
    config.image_size = (256, 256)  # Height, width in pixels, as the backbone sees them.
    config.resize = (0, 0)  # Resize to this, then cut image_size out of the middle; zeros: no cut.

    config.data = data = ml_collections.ConfigDict()
    data.name = 'mvtec_ad'  # mvtec_ad, synthetic, ksdd2 or folder.
    data.root = ''  # Folder of the real data set; '' uses the embedded set of the category.
    data.category = 'screw'
    data.cache = ''  # Folder for prepared records; '' is the user's cache folder.
    data.seed = 0  # Seed of the embedded set's images.

    config.backbone = backbone = ml_collections.ConfigDict()
    backbone.name = 'resnet18'  # resnet18, wide_resnet50_2 or efficientnet_lite0.
    # A .safetensors or .pt file; '': EfficientNet-Lite0's installed one, a ResNet's from the hub.
    backbone.weights = ''

    config.features = features = ml_collections.ConfigDict()
    features.layers = (2, 3)  # Of the backbone: (2, 3) (published), (1, 2, 3) or (1, 2).
    features.dtype = 'float32'  # What frozen features are kept in: float32 or bfloat16.
    features.place = 'auto'  # Where: device, host (sent a few steps at a time), auto: what fits.

    config.system = 'supersimplenet'  # supersimplenet, gap_cam or simplenet.
    config.adaptor = 'linear'  # linear (published) or conv (Scenario B).
    config.adapt_cls_features = False  # Does the classification head see adapted features?
    # What an image's score is: the classification head's, or the map's maximum, without that head.
    config.image_score = 'head'  # head (published) or map.
    config.positions = 0  # Of image_score=map: how many places an image a step; 0: all.
    # Of positions: share of a normal image's that lie on the product; 0: anywhere, all alike.
    config.product_share = 0.0
    config.map_loss = 'l1_focal'  # Of image_score=map: l1_focal (published) or cross_entropy.

    config.simplenet = simplenet = ml_collections.ConfigDict()
    simplenet.embedding = 1536  # Channels that a position's patches are averaged to.
    simplenet.hidden = 1024  # Width of the discriminator.

    config.supervision = supervision = ml_collections.ConfigDict()
    supervision.kind = 'none'  # none (normal images alone), labels, or masks of some defects.
    supervision.mask_fraction = 1.0  # Masks: of how many defective training images, 0..1.
    supervision.mask_count = -1  # Masks: their number instead; -1: the fraction counts.
    supervision.dilation = 7  # Masks: they grow by a square of so many pixels.
    supervision.distance_weight = 3.0  # Masks: the loss's weight in the middle of a defect,
    supervision.distance_power = 2.0  # and how steeply it falls to the edge.

    config.perlin = perlin = ml_collections.ConfigDict()
    perlin.threshold = 0.2  # Noise above it is anomalous; 0.6 in supervised training.
    perlin.empty = 0.5  # Probability of an empty mask.

    # Copies of each normal training image, turned by any angle: for products that lie at any angle.
    config.turned_copies = 0

    config.drawn = drawn = ml_collections.ConfigDict()
    drawn.copies = 0  # Of each normal image, turned ones too, with a defect drawn into them.
    drawn.seed = 0  # Where defects are drawn and how they look; and how copies are turned.

    config.noise = noise = ml_collections.ConfigDict()
    noise.kind = 'static'  # static (Gaussian) or learned (a generator).
    noise.unit = 'absolute'  # Of std, beta, shell: feature units; feature_std: each channel's own.
    noise.std = 0.015  # Standard deviation of static noise.
    noise.bounded = True  # Learned: beta * tanh(raw); False: raw (v1).
    noise.beta = 0.1  # Learned: the bound.
    noise.shell = (0.0, 0.0)  # Learned: least and largest root mean square instead of beta.
    noise.static_share = 0.0  # Learned: share of the positions that get static noise instead.
    noise.z_dim = 32  # Learned: channels of the random input; 0 for none (v1).
    noise.penalty = 10.0  # Learned: weight of mean(noise^2) in the generator's loss.
    noise.discriminator_steps = 3  # Learned: per generator step; 0: both players on every step.
    noise.learning_rate = 1e-4  # Learned: the generator's, AdamW without weight decay.

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.adaptor_learning_rate = 1e-4
    optimizer.adaptor_weight_decay = 1e-2
    optimizer.heads_learning_rate = 2e-4
    optimizer.heads_weight_decay = 1e-5
    optimizer.drops = (0.8, 0.9)  # Fractions of the epochs after which the rates drop
    optimizer.drop_factor = 0.4  # by this factor.
    optimizer.heads_decay_in_gradient = False  # Adam with L2 (SimpleNet) instead of AdamW.
    optimizer.clip_norm = 0.0  # Largest norm of the whole gradient; 0: any.
    optimizer.average = 0.0  # Decay per step of the averaged weights that are kept; 0: the last.

    config.decision = decision = ml_collections.ConfigDict()
    decision.holdout = 0.0  # Share of the training images kept aside to choose the threshold on.
    decision.fpr = 0.05  # Without defects in training: largest share of false alarms.

    config.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = 10  # Epochs between checkpoints; one is written at the end in any case.
    checkpoint.keep = 2  # How many are kept.

    # Of products on GPUs and TPUs: float32, or what is faster there, tensorfloat32 or bfloat16.
    config.precision = 'float32'
    # Train at the cost of what is new; False: the direct form, its equal (there is none of
    # image_score=map and of simplenet).
    config.sparse = True
    config.eval_batch_size = 8  # Test images per step and device.
    config.debug_nans = False  # Find the operation that makes a NaN or infinity; slow once it does.
    return config


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for values that no run can have."""

    def require(ok: bool, flag: str, rule: str) -> None:
        if not ok:
            value = config
            for part in flag.split('.'):
                value = value[part]
            raise UserError(f'--config.{flag}={value!r} cannot be used: {rule}.')

    known = dict(fields(default_config()))
    for name, _ in fields(config):
        if name not in known:
            raise UserError(f'{name} is no field of a config: ssn_jax/config.py lists them.')
    for flag in ('epochs', 'batch_size', 'eval_batch_size'):
        require(config[flag] >= 1, flag, 'it must be at least 1')
    size = config.image_size
    require(
        len(size) == 2 and all(isinstance(s, int) and 32 <= s <= 4096 for s in size),
        'image_size',
        'it is (height, width), each 32 to 4096 pixels',
    )
    names = ('resnet18', 'wide_resnet50_2', 'efficientnet_lite0')
    require(config.backbone.name in names, 'backbone.name', f'it is one of {", ".join(names)}')
    resize = config.resize
    require(
        len(resize) == 2
        and all(isinstance(r, int) for r in resize)
        and (not any(resize) or all(s <= r <= 4096 for s, r in zip(size, resize, strict=True))),
        'resize',
        f'it is (0, 0), or (height, width) from image_size={tuple(size)} to 4096 pixels',
    )
    for flag, value, values in (
        ('features.dtype', config.features.dtype, ('float32', 'bfloat16')),
        ('features.place', config.features.place, ('auto', 'device', 'host')),
        ('precision', config.precision, ('float32', 'tensorfloat32', 'bfloat16')),
    ):
        require(value in values, flag, f'it is one of {", ".join(values)}')
    choices = ((2, 3),) if config.system == 'simplenet' else ((2, 3), (1, 2, 3), (1, 2))
    rule = f'with --config.system={config.system} they are {" or ".join(map(str, choices))}'
    require(tuple(config.features.layers) in choices, 'features.layers', rule)
    systems = ('supersimplenet', 'gap_cam', 'simplenet')
    require(config.system in systems, 'system', f'it is one of {", ".join(systems)}')
    supervision = config.supervision
    kinds = {'supersimplenet': ('none', 'labels', 'masks'), 'gap_cam': ('none', 'labels')}
    kinds = kinds.get(config.system, ('none',))
    require(
        supervision.kind in kinds,
        'supervision.kind',
        f'with --config.system={config.system} it is {" or ".join(kinds)}',
    )
    require(
        0 <= supervision.mask_fraction <= 1,
        'supervision.mask_fraction',
        'it is a fraction of the defective training images, in 0..1',
    )
    require(supervision.mask_count >= -1, 'supervision.mask_count', 'it is a number of masks or -1')
    require(
        supervision.dilation >= 1 and supervision.dilation % 2,
        'supervision.dilation',
        'it is an odd number of pixels',
    )
    for field in ('distance_weight', 'distance_power'):
        flag = f'supervision.{field}'
        require(0 <= supervision[field] < math.inf, flag, 'it must be a number and not negative')
    for field in ('embedding', 'hidden'):
        require(config.simplenet[field] >= 1, f'simplenet.{field}', 'it must be at least 1')
    require(0 <= config.decision.holdout < 1, 'decision.holdout', 'it is a fraction below 1')
    require(0 <= config.decision.fpr <= 1, 'decision.fpr', 'it is a rate in 0..1')
    require(config.adaptor in ('linear', 'conv'), 'adaptor', 'it is linear or conv')
    noises = ('static',) if config.system == 'simplenet' else ('static', 'learned')
    rule = f'with --config.system={config.system} it is {" or ".join(noises)}'
    require(config.noise.kind in noises, 'noise.kind', rule)
    require(config.image_score in ('head', 'map'), 'image_score', 'it is head or map')
    require(
        config.image_score == 'head'
        or (config.system == 'supersimplenet' and config.adaptor == 'linear'),
        'image_score',
        'map is for --config.system=supersimplenet with --config.adaptor=linear',
    )
    kinds = ('l1_focal', 'cross_entropy')
    require(config.map_loss in kinds, 'map_loss', f'it is {" or ".join(kinds)}')
    require(
        config.map_loss == 'l1_focal' or config.image_score == 'map',
        'map_loss',
        'cross_entropy is for --config.image_score=map',
    )
    require(config.positions >= 0, 'positions', 'it must not be negative')
    require(
        config.positions == 0 or config.image_score == 'map',
        'positions',
        'some of the positions only are for --config.image_score=map: a classification head needs '
        'all of them',
    )
    share = config.product_share
    require(0 <= share <= 1, 'product_share', 'it is a share in 0..1')
    require(
        share == 0 or config.positions > 0,
        'product_share',
        'positions are chosen with --config.image_score=map and --config.positions above 0 only',
    )
    require(0 <= config.turned_copies <= 100, 'turned_copies', 'it is a number from 0 to 100')
    require(0 <= config.drawn.copies <= 100, 'drawn.copies', 'it is a number from 0 to 100')
    require(
        config.drawn.copies == 0 or config.system == 'supersimplenet',
        'drawn.copies',
        'drawn defects are for --config.system=supersimplenet',
    )
    require(
        config.drawn.copies == 0 or supervision.kind != 'labels',
        'drawn.copies',
        'the mask of a drawn defect is known, so with defects use --config.supervision.kind=masks',
    )
    require(0 <= config.drawn.seed < 2**32, 'drawn.seed', 'it must be in 0..2**32-1')
    units = ('absolute', 'feature_std')
    require(config.noise.unit in units, 'noise.unit', f'it is {" or ".join(units)}')
    shell = config.noise.shell
    require(
        len(shell) == 2
        and all(isinstance(s, float | int) for s in shell)
        and (not any(shell) or 0 < shell[0] <= shell[1] < math.inf),
        'noise.shell',
        'it is (0, 0), or (least, largest), both above 0 and rising',
    )
    require(0 <= config.noise.static_share <= 1, 'noise.static_share', 'it is a share in 0..1')
    require(0 <= config.optimizer.average < 1, 'optimizer.average', 'it is a decay below 1')
    for flag in ('std', 'beta', 'penalty', 'z_dim', 'learning_rate'):
        flag = f'noise.{flag}'
        group, field = flag.split('.')
        value = config[group][field]
        require(0 <= value < math.inf, flag, 'it must be a number and not negative')
    for field, value in config.optimizer.items():
        if field != 'drops':
            flag = f'optimizer.{field}'
            require(0 <= value < math.inf, flag, 'it must be a number and not negative')
    require(0 <= config.seed < 2**32, 'seed', 'it must be in 0..2**32-1')
    require(
        1 <= config.seeds <= 2**32 - config.seed,
        'seeds',
        'it is at least 1, and the last seed is at most 2**32-1',
    )
    if config.seeds > 1:  # They share their images, and what is known of them.
        require(
            config.decision.holdout == 0,
            'decision.holdout',
            'each seed holds other images out, so give each its own command, with --config.seeds=1',
        )
        require(
            supervision.kind != 'masks'
            or (supervision.mask_count == -1 and supervision.mask_fraction == 1),
            'seeds',
            'each seed would use the masks of other images, so give each its own command, with '
            '--config.seeds=1, or all of them --config.supervision.mask_fraction=1',
        )
    require(config.noise.discriminator_steps >= 0, 'noise.discriminator_steps', 'at least 0')
    require(-1 <= config.perlin.threshold < 1, 'perlin.threshold', 'it is in -1..1, and below 1')
    require(0 <= config.perlin.empty < 1, 'perlin.empty', 'it is a probability below 1')
    drops = config.optimizer.drops
    require(
        all(isinstance(d, float | int) and 0 < d <= 1 for d in drops)
        and list(drops) == sorted(drops),
        'optimizer.drops',
        'they are rising fractions of the epochs in 0..1',
    )
    require(config.checkpoint.every >= 1, 'checkpoint.every', 'it must be at least 1')
    require(config.checkpoint.keep >= 1, 'checkpoint.keep', 'it must be at least 1')


def fields(config: ml_collections.ConfigDict, prefix: str = '') -> Iterator[tuple[str, object]]:
    """Yields every field's name, group.field for those in groups, and its value."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


def identity(config: ml_collections.ConfigDict) -> dict:
    """What makes a run itself, as field -> value: a rerun in its workdir must agree on it.

    Where records are cached and features kept, how often checkpoints are written, how many images
    are evaluated at a time and what is looked for changes no result; files may be spelled as one
    likes.
    """
    unimportant = ('checkpoint.every', 'checkpoint.keep', 'eval_batch_size', 'data.cache')
    unimportant += ('debug_nans', 'features.place')
    flat = {name: value for name, value in fields(config) if name not in unimportant}
    for field in ('data.root', 'backbone.weights'):
        flat[field] = flat[field] and str(pathlib.Path(flat[field]).expanduser().resolve())
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as readable JSON with a fixed order of fields."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(path: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads a run's config.json; fields added since it was written take their default.

    Raises:
      UserError: there is none, or it cannot be understood.
    """
    try:
        values = json.loads(path.read_text())
        if values['version'] > VERSION:
            raise UserError(
                f'{path} was written by a newer ssn_jax (config version {values["version"]}, '
                f'this one knows {VERSION}): update ssn_jax.'
            )
        for group, names in _GONE.items():
            for name in names:
                values.get(group, {}).pop(name, None)
        config = default_config()
        config.update(_tuples(values))
        defaults = dict(fields(default_config()))
        for name, value in fields(config):
            if name not in defaults:
                raise ValueError(f'{name} is no field of it')
            if not _alike(value, defaults[name]):
                raise ValueError(f'{name} cannot be {value!r}')
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f'{path} does not exist: this folder is no run of ssn_jax.') from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = ' '.join(str(e).split())
        raise UserError(f'{path} is no config of ssn_jax ({reason}): delete the run.') from None


def _alike(value, default) -> bool:
    """Whether a value is of a field's type; all tuples are of numbers."""
    if isinstance(default, tuple) and isinstance(value, tuple):
        return all(type(v) in (int, float) for v in value)
    return type(value) is type(default)


def _tuples(values):
    if isinstance(values, dict):
        return {k: _tuples(v) for k, v in values.items()}
    return tuple(values) if isinstance(values, list) else values
