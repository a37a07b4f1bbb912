"""Makes a run of a checkpoint of the published PyTorch SuperSimpleNet."""

import json
import pathlib
import re

from absl import flags, logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ssn_jax import config as config_lib, data, files, pipeline, precision, run as run_lib, terminal
from ssn_jax.errors import UserError
from ssn_jax.models import resnet, weights
from ssn_jax.report import text
from ssn_jax.training import checkpoint, steps

HINT = 'This project imports checkpoints of SuperSimpleNet and of its GAP+CAM variant.'
# The publication wraps torchvision's backbone twice, and saves it or leaves it out.
_WRAPPERS = re.compile(r'(feature_extractor\.)+')
_GENERATOR = 'noise_generator.'


def fit_config(
    config: ml_collections.ConfigDict, tensors: dict[str, np.ndarray], source: str
) -> ml_collections.ConfigDict:
    """The config with the backbone, adaptor, system and generator that the tensors have.

    Args:
      config: what the user asked for; left as it is.
      tensors: the checkpoint's, by name.
      source: their file, for error messages.

    Raises:
      UserError: no adaptor's projection is among them, or its width is no backbone's.
    """
    config = config.copy_and_resolve_references()
    names = {
        'linear': 'feature_adaptor.projection.weight',
        'conv': 'feature_adaptor.projection.0.weight',
    }
    found = [kind for kind, name in names.items() if name in tensors]
    if not found:
        some = ', '.join(sorted(tensors)[:3])
        raise UserError(
            f'{source} holds no {names["linear"]} (but {some or "nothing"}): it is no checkpoint '
            f'of SuperSimpleNet. {HINT}'
        )
    config.adaptor = found[0]
    shape = tensors[names[config.adaptor]].shape
    widths = {sum(channels[1:]): name for name, channels in resnet.CHANNELS.items()}
    if not shape or shape[0] not in widths:
        known = ', '.join(f'{name} {width}' for width, name in sorted(widths.items()))
        raise UserError(
            f'{source}: {names[config.adaptor]} has shape {shape}, the width of no backbone of '
            f'this project ({known}).'
        )
    config.backbone.name = widths[shape[0]]
    if config.supervision.kind == 'auto':
        config.supervision.kind = 'none'
    if any(name.startswith('discriminator.seg.') for name in tensors):
        config.system = 'supersimplenet'
    else:
        config.system = 'gap_cam'
        if config.supervision.kind == 'none':
            config.supervision.kind = 'labels'  # Nothing else teaches this system.
    # What a checkpoint of theirs cannot have.
    config.features.layers, config.image_score, config.positions = (2, 3), 'head', 0
    config.epochs = config.epochs or config_lib.FIELDS['epochs'].default
    config.map_loss, config.product_share, config.optimizer.average = 'l1_focal', 0.0, 0.0
    config.noise.kind, config.product.place = 'static', 'any'
    config.supervision.known = 0.0
    config.surroundings, config.hard_normal, config.drawn.count = (0, 0), 0.0, 0
    first = tensors.get(f'{_GENERATOR}model.0.weight')
    if first is not None and first.ndim == 4:
        config.noise.kind = 'learned'
        config.noise.z_dim = max(first.shape[1] - shape[0], 0)
        config.noise.bounded = config.noise.z_dim > 0  # v2 brought both.
    return config


def port_state(
    config: ml_collections.ConfigDict, tensors: dict[str, np.ndarray], step: int, source: str
) -> steps.TrainState:
    """The train state of a checkpoint's tensors (without its backbone), the optimiser's fresh.

    Raises:
      UserError: names the tensors that are missing, superfluous or misshapen.
    """
    channels = sum(resnet.CHANNELS[config.backbone.name][1:])
    state = steps.init_state(config, jax.random.key(config.seed), channels)
    players = [('params', state.params), ('batch_stats', state.batch_stats)]
    template = dict(players)
    if state.generator:
        template['params'] = template['params'] | {_GENERATOR: state.generator}
    ported = weights.port(tensors, template, _name, source, HINT)
    generator = ported['params'].pop(_GENERATOR, {})
    fresh = {'params': ported['params'], 'batch_stats': ported['batch_stats']}
    return jax.tree.map(
        jnp.asarray, state.replace(step=np.asarray(step, np.int32), generator=generator, **fresh)
    )


def _name(path: tuple[str, ...]) -> str:
    """The published name of a variable of either player."""
    return weights.head_name(tuple(part for part in path if part != _GENERATOR))


def import_checkpoint(
    config: ml_collections.ConfigDict, path: pathlib.Path, workdir: pathlib.Path, step: int = 0
) -> ml_collections.ConfigDict:
    """Writes a run whose last epoch is a published checkpoint.

    Args:
      config: the run's; `epochs` is when the checkpoint was made.
      path: a .safetensors, .pt or .pth file.
      workdir: receives config.json, checkpoints/, model.safetensors and imported.json. It appears
        whole or not at all.
      step: batches that the checkpoint was trained for.

    Returns:
      The config as it was written.

    Raises:
      UserError: the file or the folder is of no use.
    """
    if config.seeds != 1:
        raise UserError(f'--config.seeds={config.seeds}: a checkpoint is of one seed, leave it 1.')
    if (workdir / 'config.json').exists():
        raise UserError(f'{workdir} holds a run already: choose another --workdir.')
    run_lib.check_workdir(config, workdir)
    tensors = weights.read(path, '--weights')
    named = {
        _WRAPPERS.sub('', name, count=1): value
        for name, value in tensors.items()
        if _WRAPPERS.match(name)
    }
    config = fit_config(config, tensors, str(path))
    config_lib.validate(config)
    if named and config.backbone.weights:
        raise UserError(
            f'{path} holds the backbone that it was trained with: leave '
            '--config.backbone.weights out.'
        )
    if named:
        template = weights.backbone_template(config.backbone.name)
        source = f'{path} (feature_extractor)'
        backbone = weights.port(named, template, weights.backbone_name, source, HINT)
        origin = str(path)
    else:
        backbone, origin = weights.load_backbone(
            config.backbone.name, config.backbone.weights, allow_random=False
        )
    heads = {name: value for name, value in tensors.items() if not _WRAPPERS.match(name)}
    state = port_state(config, heads, step, str(path))
    about = {'checkpoint': str(path), 'sha256': files.digest(path)}
    about |= {'backbone': weights.digest(backbone), 'weights': origin}

    with files.writing(workdir, '--workdir'), files.replacing(workdir) as drafted:
        drafted.mkdir()
        (drafted / 'config.json').write_text(config_lib.to_json(config))
        (drafted / 'imported.json').write_text(json.dumps(about, indent=2) + '\n')
        try:
            run_lib.write_model(drafted, run_lib.Model(backbone, state.variables(), config.epochs))
            with checkpoint.open_manager(drafted, config.checkpoint.keep) as manager:
                checkpoint.save(manager, config.epochs, state)
        except UserError as e:  # Of a part that cannot be written, by its name in the draft.
            reason = str(e).replace(str(drafted), str(workdir)).partition(': ')[0]
            raise UserError(f'{reason}: nothing was imported.') from None
    return config


def main(values: flags.FlagValues) -> None:
    """Imports, and measures if that is asked for, by the parsed flags."""
    if not values.weights:
        raise UserError('no checkpoint: add --weights weights.safetensors.')
    if not values.workdir:
        raise UserError('no folder for the run: add --workdir runs/NAME.')
    if values.step < 0:
        raise UserError(f'--step={values.step} is negative: it is a number of batches.')
    terminal.set_up_log(values.quiet)
    config_lib.validate(values.config)
    precision.check(values.config)
    workdir, path = terminal.path(values.workdir).absolute(), terminal.path(values.weights)
    if values.evaluate:  # What is wrong with the data is told before anything is written.
        data.load(
            values.config.data, values.config.image_size, values.config.resize, values.config.fit
        )
    config = import_checkpoint(values.config, path, workdir, values.step)
    logging.info('Imported %s, %s, adaptor %s', config.system, config.backbone.name, config.adaptor)
    if values.evaluate:
        results = pipeline.train_and_evaluate(config, workdir, values.tensorboard, values.quiet)
        print(text.format_table(results))
    print(f'The run is in {workdir}.')
