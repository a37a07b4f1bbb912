"""Ports PyTorch parameters, read from safetensors files, to this project's variables.

No pickle is ever loaded: a safetensors file holds arrays and nothing that can run.
"""

from collections.abc import Callable, Mapping
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
from ssn_jax.models import resnet

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

RANDOM = 'random (seed 0)'  # The origin of weights that were not learned.

# A classifier's file also holds what lies above the features; that is not an error.
_UNUSED = re.compile(r'layer4\.|fc\.|.*\.num_batches_tracked$')

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
    """The torchvision state_dict name of a backbone variable ('params', 'layer1_0', ...)."""
    return '.'.join(path[1:-1]).replace('_', '.') + '.' + _LEAVES[path[-1]]


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


def read_safetensors(
    path: str | pathlib.Path, flag: str = '--config.backbone.weights'
) -> dict[str, np.ndarray]:
    """Reads the safetensors file that `flag` names; UserError if it is missing or damaged."""
    try:
        return safetensors.numpy.load_file(pathlib.Path(path).expanduser())
    except FileNotFoundError:
        raise UserError(f'no weights file at {path}: set {flag} to a safetensors file.') from None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f'{path} is no readable safetensors file ({reason}): fetch it again.'
        ) from None


class HubError(UserError):
    """The hub's file is neither cached nor can it be fetched."""


def download(name: str) -> pathlib.Path:
    """The hub's weights file of a backbone, from the local cache or the network.

    Raises:
      HubError: it can not be had.
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
            path = huggingface_hub.hf_hub_download(**where)
    except Exception as e:  # The client raises network errors of several libraries.
        raise HubError(
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
    return jax.eval_shape(resnet.BACKBONES[name].init, jax.random.key(0), image)


def load_backbone(name: str, weights: str, allow_random: bool) -> tuple[dict, str]:
    """Variables of a frozen backbone.

    Args:
      name: a key of `resnet.BACKBONES`.
      weights: a safetensors file under torchvision's names; '' fetches the hub's.
      allow_random: without a file and without the hub, fall back to seeded random weights
        (embedded data only: the demo must run on a machine without network).

    Returns:
      The variables (params, batch_stats) and one line that says where they come from.

    Raises:
      UserError: there is no such backbone or file, or the file does not hold its weights.
    """
    if name not in resnet.BACKBONES:
        raise UserError(
            f'unknown backbone {name!r}: --config.backbone.name takes '
            f'{", ".join(sorted(resnet.BACKBONES))}.'
        )
    template = backbone_template(name)
    if not weights:
        try:
            weights = str(download(name))
            origin = f'{HUB[name][0]} ({HUB[name][2][:12]})'
        except HubError as e:
            if not allow_random:
                raise
            logging.warning('%s Going on with seeded random weights.', e)
            return random_backbone(name), RANDOM
    else:
        origin = weights
    return port(read_safetensors(weights), template, backbone_name, weights), origin


def random_backbone(name: str) -> dict:
    """Variables of a backbone as initialised, always the same."""
    model = resnet.BACKBONES[name]
    variables = model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    return jax.tree.map(np.asarray, variables)
