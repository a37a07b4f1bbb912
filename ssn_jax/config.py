"""Every field a config has: its published value, what it may be, and what it is for.

configs/*.py set what differs. A config only sets values: the code branches on fields, never on a
config's name.
"""

from collections.abc import Callable, Iterator
import dataclasses
import difflib
import importlib.util
import itertools
import json
import math
import pathlib

import ml_collections

from ssn_jax.errors import UserError

# Raised when older runs mean something else: 2, with image_score=map the smoothed map's maximum.
VERSION = 2
# Fields of older runs that changed nothing in them, or only their training.
_GONE = {
    'noise': ('shuffle_groups', 'shuffle_strength', 'shell', 'static_share'),
    'drawn': ('copies', 'large'),
    'decision': ('holdout',),
}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config.

    Attributes:
      default: its value where a config does not set it.
      about: what it is for, one line.
      allows: whether a value of its type can be used, whatever other fields are.
      rule: in words, what `allows` allows.
    """

    default: object
    about: str
    allows: Callable[[object], bool] = lambda value: True
    rule: str = ''


def _one_of(*names: str) -> tuple:
    return lambda value: value in names, f'it is one of {", ".join(names)}'


def _whole(least: int, most: int | None = None) -> tuple:
    if most is None:
        return lambda value: value >= least, f'it must be at least {least}'
    return lambda value: least <= value <= most, f'it is a number from {least} to {most}'


def _size(value) -> bool:
    whole = len(value) == 2 and all(isinstance(v, int) and v >= 0 for v in value)
    return whole and value[0] * value[1] <= 2**24


_SEED = (lambda value: 0 <= value < 2**32, 'it must be in 0..2**32-1')
_SHARE = (lambda value: 0 <= value <= 1, 'it is a share in 0..1')
_BELOW_1 = (lambda value: 0 <= value < 1, 'it is a share below 1')
_AMOUNT = (lambda value: 0 <= value < math.inf, 'it must be a number and not negative')

FIELDS = {
    'version': Field(VERSION, 'Of the fields.'),
    'name': Field('mod1_a', 'The row of the results table.'),
    'seed': Field(0, 'Initialisation, data order, masks and noise follow from it.', *_SEED),
    'seeds': Field(
        1,
        'How many runs at once: seed, seed + 1, ..., each in its own folder.',
        *_whole(1),
    ),
    'epochs': Field(
        300,
        'How often all training images are shown; 0, with drawn defects: found, as many as their '
        'number and the product need.',
        *_whole(0),
    ),
    'extend': Field('', 'Set by --extend: the folder of the run that this one goes on from.'),
    'epochs_before': Field(
        0, 'Set by --extend: how many of the epochs are of that run.', *_whole(0)
    ),
    'batch_size': Field(32, 'Images per step, before they are doubled.', *_whole(1)),
    'image_size': Field(
        (256, 256),
        'Height, width in pixels, as the backbone sees them.',
        lambda value: _size(value) and min(value) >= 32,
        'it is (height, width), each at least 32 and together at most 16777216 pixels',
    ),
    'resize': Field(
        (0, 0),
        'Resize to this, then cut image_size out of the middle; zeros: no cut.',
        _size,
        'it is (0, 0), or (height, width) of together at most 16777216 pixels',
    ),
    'fit': Field(
        'squash',
        'Images of another aspect ratio: squash, or pad (grey beside them, none of it in maps).',
        *_one_of('squash', 'pad'),
    ),
    # --- Data -------------------------------------------------------------------------------------
    'data.name': Field('mvtec_ad', 'mvtec_ad, synthetic, ksdd2 or folder.'),
    'data.root': Field('', "Folder of the real data set; '': the embedded set of the category."),
    'data.category': Field('screw', 'Of MVTec AD, or of the embedded sets.'),
    'data.normal': Field(
        'good,ok,normal',
        "Names of the folder of normal images, besides good, in any case; all others are defects'.",
    ),
    'data.normal_dir': Field(
        '', "Folder of normal training images, from data.root; '': train/good below it."
    ),
    'data.normal_test_dir': Field('', 'With it: folder of normal test images.'),
    'data.defect_dir': Field('', 'With it: folder of defects to test on, or of a folder for each.'),
    'data.mask_dir': Field(
        '', "Folder of masks, with the names of the images; '': ground_truth, masks, ..."
    ),
    'data.added': Field(
        '', 'Folders of more training images, separated by commas; each as it is for --extend.'
    ),
    'data.cache': Field('', "Folder for prepared records; '': in the user's cache folder."),
    'data.seed': Field(0, "Seed of the embedded set's images."),
    'data.range': Field(
        0.0,
        'The value of white in images of more than 8 bits; 0: found, the highest of as many bits '
        'as the training images have.',
        *_AMOUNT,
    ),
    'data.masks': Field(
        'auto',
        'How masks are resized: nearest (published); region: half of a pixel, and none vanishes; '
        "auto: region of a 'folder'.",
        *_one_of('auto', 'nearest', 'region'),
    ),
    # --- What is frozen ---------------------------------------------------------------------------
    'backbone.name': Field(
        'resnet18',
        'resnet18, wide_resnet50_2 or efficientnet_lite0.',
        *_one_of('resnet18', 'wide_resnet50_2', 'efficientnet_lite0'),
    ),
    'backbone.weights': Field(
        '',
        "A .safetensors or .pt file; '': EfficientNet-Lite0's installed one, a ResNet's from the "
        'Hugging Face hub.',
    ),
    'features.layers': Field((2, 3), 'Of the backbone: (2, 3) (published), (1, 2, 3) or (1, 2).'),
    'features.dtype': Field(
        'float32',
        'What frozen features are kept in: float32 or bfloat16.',
        *_one_of('float32', 'bfloat16'),
    ),
    'features.place': Field(
        'auto',
        'Where: device, host (sent a few steps at a time), auto: what fits.',
        *_one_of('auto', 'device', 'host'),
    ),
    # --- The network ------------------------------------------------------------------------------
    'system': Field(
        'supersimplenet',
        'supersimplenet, gap_cam or simplenet.',
        *_one_of('supersimplenet', 'gap_cam', 'simplenet'),
    ),
    'adaptor': Field(
        'linear', 'linear (published) or conv (Scenario B).', *_one_of('linear', 'conv')
    ),
    'adapt_cls_features': Field(False, 'Does the classification head see adapted features?'),
    'image_score': Field(
        'head',
        "An image's score: the classification head's (published), or, without it, the map's "
        'maximum: map.',
        *_one_of('head', 'map'),
    ),
    'positions': Field(
        0, 'Of image_score=map: how many places an image a step; 0: all.', *_whole(0)
    ),
    'product_share': Field(
        0.0,
        "Of positions: share of a normal image's that lie on the product, where that is an object; "
        '0: anywhere, all alike.',
        *_SHARE,
    ),
    'surroundings': Field(
        (0, 0),
        'Of positions: more of them lie beside the defects, from so many to so many of the feature '
        'grid away, and are normal; (0, 0): none.',
        lambda value: len(value) == 2 and (tuple(value) == (0, 0) or 0 <= value[0] < value[1]),
        'it is two numbers of positions, the second larger than the first, or (0, 0)',
    ),
    'hard_normal': Field(
        0.0,
        'Of image_score=map: what the strongest positions of normal images weigh together; all '
        'other normal ones together weigh 1.',
        *_AMOUNT,
    ),
    'map_loss': Field(
        'l1_focal',
        'Of image_score=map: l1_focal (published) or cross_entropy.',
        *_one_of('l1_focal', 'cross_entropy'),
    ),
    'simplenet.embedding': Field(
        1536, "Channels that a position's patches are averaged to.", *_whole(1)
    ),
    'simplenet.hidden': Field(1024, 'Width of the discriminator.', *_whole(1)),
    # --- What teaches it --------------------------------------------------------------------------
    'supervision.kind': Field(
        'none',
        'none (normal images alone), labels, masks of some defects, or auto: what there is.',
    ),
    'supervision.mask_fraction': Field(
        1.0,
        'Masks: of how many defective training images, 0..1.',
        lambda value: 0 <= value <= 1,
        'it is a fraction of the defective training images, in 0..1',
    ),
    'supervision.mask_count': Field(
        -1,
        'Masks: their number instead; -1: the fraction counts.',
        lambda value: value >= -1,
        'it is a number of masks or -1',
    ),
    'supervision.known': Field(
        0.0,
        'Of image_score=map, with real defects beside drawn ones: the share, in 0..1, of an output '
        'that learns real ones above all; 0: there is none; -1: found, n / (n + 10) for n of them.',
        lambda value: value == -1 or 0 <= value <= 1,
        'it is in 0..1, or -1',
    ),
    'supervision.dilation': Field(
        7,
        'Masks: they grow by a square of so many pixels.',
        lambda value: value >= 1 and value % 2,
        'it is an odd number of pixels',
    ),
    'supervision.distance_weight': Field(
        3.0, "Masks: the loss's weight in the middle of a defect.", *_AMOUNT
    ),
    'supervision.distance_power': Field(
        2.0, 'Masks: how steeply that weight falls to the edge.', *_AMOUNT
    ),
    'perlin.threshold': Field(
        0.2,
        'Noise above it is anomalous; 0.6 in supervised training.',
        lambda value: -1 <= value < 1,
        'it is in -1..1, and below 1',
    ),
    'perlin.empty': Field(0.5, 'Probability of an empty mask.', *_BELOW_1),
    'product.angle': Field(
        'same',
        'How the product lies in the images: same, at any angle, or auto: found from them.',
        *_one_of('same', 'any', 'auto'),
    ),
    'product.place': Field(
        'any',
        'Its place: the same, any, or auto; with the same the head is told where a position is.',
        *_one_of('same', 'any', 'auto'),
    ),
    'product.surface': Field(
        'object',
        'What the images show: an object and what is around it, a texture, or auto.',
        *_one_of('object', 'texture', 'auto'),
    ),
    'misplaced': Field(
        0.5,
        'With product.place=same: weight of normal features that are said to lie elsewhere, as a '
        'fourth kind of anomaly.',
        *_AMOUNT,
    ),
    'turned_copies': Field(
        5,
        'With product.angle=any: copies of each normal training image, turned by any angle.',
        *_whole(0, 100),
    ),
    'drawn.count': Field(
        0,
        'Images with a defect drawn into them; normal ones, turned ones too, take turns. '
        '-1: 2,500, or 7,500 with product.angle=any.',
        *_whole(-1, 10**6),
    ),
    'drawn.seed': Field(
        0, 'Where defects are drawn and how they look; and how copies are turned.', *_SEED
    ),
    'noise.kind': Field('static', 'static (Gaussian) or learned (a generator).'),
    'noise.unit': Field(
        'absolute',
        "Of std and beta: absolute (feature units) or feature_std (each channel's own).",
        *_one_of('absolute', 'feature_std'),
    ),
    'noise.std': Field(0.015, 'Standard deviation of static noise.', *_AMOUNT),
    'noise.bounded': Field(True, 'Learned: beta * tanh(raw); False: raw (v1).'),
    'noise.beta': Field(0.1, 'Learned: the bound.', *_AMOUNT),
    'noise.z_dim': Field(32, 'Learned: channels of the random input; 0 for none (v1).', *_AMOUNT),
    'noise.penalty': Field(
        10.0, "Learned: weight of mean(noise^2) in the generator's loss.", *_AMOUNT
    ),
    'noise.discriminator_steps': Field(
        3, 'Learned: per generator step; 0: both players on every step.', *_whole(0)
    ),
    'noise.learning_rate': Field(
        1e-4, "Learned: the generator's, AdamW without weight decay.", *_AMOUNT
    ),
    # --- How it learns ----------------------------------------------------------------------------
    'optimizer.adaptor_learning_rate': Field(1e-4, 'AdamW.', *_AMOUNT),
    'optimizer.adaptor_weight_decay': Field(1e-2, 'AdamW.', *_AMOUNT),
    'optimizer.heads_learning_rate': Field(2e-4, 'AdamW.', *_AMOUNT),
    'optimizer.heads_weight_decay': Field(1e-5, 'AdamW.', *_AMOUNT),
    'optimizer.drops': Field(
        (0.8, 0.9),
        'Fractions of the epochs after which the rates drop.',
        lambda value: (
            all(isinstance(v, int | float) and 0 < v <= 1 for v in value)
            and list(value) == sorted(value)
        ),
        'they are rising fractions of the epochs in 0..1',
    ),
    'optimizer.drop_factor': Field(0.4, 'By what they drop.', *_AMOUNT),
    'optimizer.heads_decay_in_gradient': Field(False, 'Adam with L2 (SimpleNet) instead of AdamW.'),
    'optimizer.clip_norm': Field(0.0, 'Largest norm of the whole gradient; 0: any.', *_AMOUNT),
    'optimizer.average': Field(
        0.0,
        'Decay per step of the averaged weights that are kept; 0: the last.',
        lambda value: 0 <= value < 1,
        'it is a decay below 1',
    ),
    # --- The decision, and how a run goes ---------------------------------------------------------
    'decision.parts': Field(
        3,
        'The threshold is chosen on scores by heads, one a part, that never saw that part of the '
        'training images; 0: on images that were trained on.',
        lambda value: value == 0 or 2 <= value <= 20,
        'it is 0, or a number of parts in 2..20',
    ),
    'decision.group': Field(
        0,
        'So many training images that follow each other by name lie in one part, as those of one '
        'piece; 0: near-copies do.',
        *_whole(0),
    ),
    'decision.fpr': Field(
        0.05,
        'Without defects in training: largest share of false alarms.',
        lambda value: 0 <= value <= 1,
        'it is a rate in 0..1',
    ),
    'checkpoint.every': Field(
        10, 'Epochs between checkpoints; one is written at the end in any case.', *_whole(1)
    ),
    'checkpoint.keep': Field(2, 'How many are kept.', *_whole(1)),
    'precision': Field(
        'float32',
        'Of products: float32, or what is faster on some hardware: bfloat16, on GPUs and TPUs '
        'tensorfloat32 too. A finished run alone: int8, or auto: the fastest that leaves scores '
        'as they are.',
        *_one_of('float32', 'tensorfloat32', 'bfloat16', 'int8', 'auto'),
    ),
    'engine': Field(
        'auto',
        'What infers on a CPU: openvino, xla, or auto: OpenVINO where it is installed.',
        *_one_of('auto', 'openvino', 'xla'),
    ),
    'sparse': Field(
        True,
        'Train at the cost of what is new; False: the direct form, its equal (there is none of '
        'image_score=map and of simplenet).',
    ),
    'eval_batch_size': Field(8, 'Test images per step and device.', *_whole(1)),
    'debug_nans': Field(
        False, 'Find the operation that makes a NaN or infinity; slow once it does.'
    ),
}


def check_name(name: str) -> None:
    """Raises UserError, with what may have been meant, unless a field has this name."""
    if name in FIELDS:
        return
    near = [field for field in FIELDS if field.startswith(f'{name}.')]
    near = near or difflib.get_close_matches(name, FIELDS, 3)
    hint = f'did you mean {", ".join(near)}?' if near else 'ssn-jax train --help lists them.'
    raise UserError(f'no config field --config.{name}: {hint}')


def built_in() -> dict[str, pathlib.Path]:
    """The configs of the package by name: configs/*.py of a checkout."""
    here = pathlib.Path(__file__).parent
    folder = next((f for f in (here / 'configs', here.parent / 'configs') if f.is_dir()), here)
    return {file.stem: file for file in sorted(folder.glob('[!_]*.py')) if folder != here}


def find(name: str) -> str:
    """The path of a config that --config names: by its path, or by its name in the package."""
    path = pathlib.Path(name).expanduser()
    return str(path if path.is_file() else built_in().get(name, path))


def load(name: str) -> ml_collections.ConfigDict:
    """A config of the package, by its name."""
    spec = importlib.util.spec_from_file_location(name, built_in()[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def default_config() -> ml_collections.ConfigDict:
    """The published SuperSimpleNet, unsupervised, on ResNet18 (Scenario A)."""
    config = ml_collections.ConfigDict()
    for name, field in FIELDS.items():
        group, _, last = name.rpartition('.')
        if group and group not in config:
            config[group] = ml_collections.ConfigDict()
        (config[group] if group else config)[last] = field.default
    return config


def _together(config: ml_collections.ConfigDict) -> Iterator[tuple[bool, str, str]]:
    """What fields may be beside others: whether they are, a field to change, and the rule."""
    system, supervision, of_map = config.system, config.supervision, config.image_score == 'map'
    values = dict(fields(config))
    with_system = f'with --config.system={system} it is'
    yield (
        not any(config.resize)
        or all(s <= r for s, r in zip(config.image_size, config.resize, strict=True)),
        'resize',
        f'it is (0, 0), or (height, width) from image_size={tuple(config.image_size)} on',
    )
    yield (
        config.fit == 'squash' or not any(config.resize),
        'fit',
        'nothing is cut from padded images, so it is for --config.resize=(0, 0)',
    )
    layers = ((2, 3),) if system == 'simplenet' else ((2, 3), (1, 2, 3), (1, 2))
    yield (
        tuple(config.features.layers) in layers,
        'features.layers',
        f'{with_system} {" or ".join(map(str, layers))}',
    )
    kinds = {'supersimplenet': ('none', 'labels', 'masks'), 'gap_cam': ('none', 'labels')}
    kinds = kinds.get(system, ('none',)) + ('auto',) * (config.drawn.count != 0)
    yield supervision.kind in kinds, 'supervision.kind', f'{with_system} {" or ".join(kinds)}'
    noises = ('static',) if system == 'simplenet' else ('static', 'learned')
    yield config.noise.kind in noises, 'noise.kind', f'{with_system} {" or ".join(noises)}'
    yield (
        not of_map or (system == 'supersimplenet' and config.adaptor == 'linear'),
        'image_score',
        'map is for --config.system=supersimplenet with --config.adaptor=linear',
    )
    for name in ('map_loss', 'surroundings', 'hard_normal', 'supervision.known', 'product.place'):
        usual = FIELDS[name].default
        rule = f'another than {usual} is for --config.image_score=map'
        yield of_map or values[name] == usual, name, rule
    yield (
        config.positions == 0 or of_map,
        'positions',
        'some of the positions only are for --config.image_score=map: a classification head needs '
        'all of them',
    )
    yield (
        config.product_share == 0 or config.positions > 0,
        'product_share',
        'positions are chosen with --config.image_score=map and --config.positions above 0 only',
    )
    yield (
        config.drawn.count == 0 or system == 'supersimplenet',
        'drawn.count',
        'drawn defects are for --config.system=supersimplenet',
    )
    yield (
        config.drawn.count != 0 or config.epochs > 0,
        'epochs',
        'it must be at least 1; 0, to be found, is for --config.drawn.count other than 0',
    )
    yield (
        config.seeds <= 2**32 - config.seed,
        'seeds',
        'it is at least 1, and the last seed is at most 2**32-1',
    )
    # Several seeds share their images, and what is known of them.
    yield (
        config.seeds == 1
        or supervision.kind not in ('masks', 'auto')
        or (supervision.mask_count == -1 and supervision.mask_fraction == 1),
        'seeds',
        'each seed would use the masks of other images, so give each its own command, with '
        '--config.seeds=1, or all of them --config.supervision.mask_fraction=1',
    )


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for values that no run can have."""
    values = dict(fields(config))
    for name in values.keys() - FIELDS.keys():
        raise UserError(f'{name} is no field of a config: ssn-jax train --help lists them.')
    for name in FIELDS.keys() - values.keys():
        raise UserError(
            f'the config lacks {name}: get_config() begins with ssn_jax.config.default_config().'
        )
    alone = ((field.allows(values[name]), name, field.rule) for name, field in FIELDS.items())
    for ok, name, rule in itertools.chain(alone, _together(config)):
        if not ok:
            raise UserError(f'--config.{name}={values[name]!r} cannot be used: {rule}.')


def fields(config: ml_collections.ConfigDict, prefix: str = '') -> Iterator[tuple[str, object]]:
    """Yields every field's name, group.field for those in groups, and its value."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


def identity(config: ml_collections.ConfigDict) -> dict:
    """What makes a run itself, as field -> value: a rerun in its workdir must agree on it.

    Where files are and features kept, what infers, how often checkpoints are written, how many
    images are evaluated at a time and what is looked for changes no result (but for rounding), and
    the rate that is asked for only moves the threshold; data and weights are told by their content
    (`run.check_origin`).
    """
    unimportant = ('checkpoint.every', 'checkpoint.keep', 'eval_batch_size', 'data.cache')
    unimportant += ('data.root', 'backbone.weights', 'debug_nans', 'features.place', 'engine')
    unimportant += ('decision.fpr', 'data.normal', 'data.normal_dir', 'data.normal_test_dir')
    unimportant += ('data.defect_dir', 'data.mask_dir', 'data.added', 'extend')
    if config.supervision.kind not in ('masks', 'auto'):  # Then they are measured with alone.
        unimportant += ('data.masks',)
    return {name: value for name, value in fields(config) if name not in unimportant}


def training_precision(config: ml_collections.ConfigDict) -> str:
    """The precision of training and of the features that it reads."""
    return 'float32' if config.precision in ('int8', 'auto') else config.precision


def product_share(config: ml_collections.ConfigDict) -> float:
    """`config.product_share`, or 0 where the product fills the image."""
    return config.product_share if config.product.surface == 'object' else 0.0


def with_found(config: ml_collections.ConfigDict, found: dict) -> ml_collections.ConfigDict:
    """A config that was asked for, with the fields that its run has found for itself."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(found)
    return config


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
        if values['version'] < 2 and values.get('image_score') == 'map':
            raise UserError(
                f'{path} is of an older ssn_jax, whose scores were maxima of the map before it is '
                'smoothed: its threshold would be wrong now. Train it again, in a new --workdir.'
            )
        values['version'] = VERSION
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
        raise UserError(
            f'{path} is no config of ssn_jax ({reason}): restore it; if a newer ssn_jax wrote it, '
            'update ssn_jax.'
        ) from None


def _alike(value, default) -> bool:
    """Whether a value is of a field's type; all tuples are of numbers."""
    if isinstance(default, tuple) and isinstance(value, tuple):
        return all(type(v) in (int, float) for v in value)
    return type(value) is type(default)


def _tuples(values):
    if isinstance(values, dict):
        return {k: _tuples(v) for k, v in values.items()}
    return tuple(values) if isinstance(values, list) else values
