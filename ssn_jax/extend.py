"""Teaching a finished run: it goes on, with new images beside those that it has learned from.

`ssn-jax train --extend RUN --config.data.root=NEW` makes a run of its own. Its config is RUN's,
with what RUN has found, with NEW in `data.added` and with more epochs; its training begins with
RUN's last state. Everything else is done as for any other run.
"""

import pathlib

import ml_collections
import numpy as np

from ssn_jax import config as config_lib, data, decision, evaluate, predictor, run as run_lib
from ssn_jax.data import Split, records, splits
from ssn_jax.errors import UserError

# Fields that may differ from those of the run that is extended.
_FREE = ('epochs', 'precision', 'engine', 'features.place', 'eval_batch_size', 'debug_nans')
_FREE += ('decision.parts', 'decision.group', 'decision.fpr', 'checkpoint.every')
_FREE += ('checkpoint.keep', 'data.root', 'data.cache', 'data.added', 'supervision.kind')
# What is compared, besides the rates at the threshold.
METRICS = ('I-AUROC', 'AUPRO', 'AP-loc')


def config_of(
    run: pathlib.Path, given: dict, old_root: str | None = None
) -> ml_collections.ConfigDict:
    """The config of a run that goes on from another one.

    Args:
      run: the folder of that one.
      given: values of fields by 'group.field'. `data.root`, which must be there, is the folder of
        the new images, `epochs` how many are added (a quarter of the run's, if it is not there),
        and `data.added` where those are now that were added to the run before.
      old_root: where the images are now that the run has learned from; None: where they were.

    Raises:
      UserError: the run is not finished, or damaged; a folder is not there; or a field cannot
        differ from the run's.
    """
    if not run.is_dir():
        raise UserError(f'{run} is no folder: --extend names that of a finished run.')
    own = run_lib.read_config(run)  # Of several seeds it says which there are.
    run_lib.read_run(run)
    run_lib.read_model(run)
    if (run / 'imported.json').exists():
        raise UserError(f'{run} was imported, and not trained here: --extend cannot go on with it.')
    if data.is_embedded(own.data):
        raise UserError(
            f'{run} learned from images that are drawn by the code: --extend needs your own.'
        )
    for name, value in given.items():
        if name not in _FREE:
            raise UserError(
                f'--config.{name}={value} cannot be used with --extend, which keeps what {run} has '
                'been trained with: leave it out, or train anew.'
            )
    new, more = given.get('data.root', ''), given.get('epochs', max(1, round(own.epochs / 4)))
    if not new:
        raise UserError('--extend needs new images: name their folder with --config.data.root.')
    if not pathlib.Path(new).expanduser().is_dir():
        raise UserError(f'{new}: no such folder; check --config.data.root')
    if ',' in new:
        raise UserError(f'{new}: a comma separates folders, so rename it')
    if more < 1:
        raise UserError(f'--config.epochs={more} cannot be used: at least 1 is added to the run.')
    config = config_lib.with_found(run_lib.with_white(own), given)
    config.epochs, config.epochs_before = own.epochs + more, own.epochs
    config.data.root = old_root or own.data.root
    config.data.added = ','.join(filter(None, [*config.data.added.split(','), new]))
    # The run's own weights, which its folder holds.
    config.backbone.weights = ''
    config.extend = str(run)
    root = pathlib.Path(config.data.root).expanduser()
    if not root.is_dir():
        raise UserError(
            f'{run} learned from images in {root}, which is no folder any more: name the one where '
            'they are now with --old_root.'
        )
    return config


def check(config: ml_collections.ConfigDict, train: Split) -> None:
    """Raises UserError if defects were added to the training images that a run leaves out."""
    if config.supervision.kind != 'none' or not train.labels[_new(config, train)].any():
        return
    instead = 'add normal images alone, or train anew with --config edge or --config auto'
    if config.drawn.count:
        instead = 'add --config.supervision.kind=auto'
    raise UserError(
        f'{config.data.added.split(",")[-1]} holds defects, and {config.extend} does not learn '
        f'from real ones (--config.supervision.kind=none): {instead}.'
    )


def _new(config, split) -> np.ndarray:
    """The places of the images that the last folder has added to a training split."""
    last = config.data.added.count(',') + 1
    return np.flatnonzero([records.added_by(file) == last for file in split.files])


def compare(
    config: ml_collections.ConfigDict, split: Split, results: dict, scores: decision.Scores
) -> dict:
    """What a run that went on from another one has gained and lost.

    Args:
      config: the run's.
      split: its training images.
      results: as results.json holds them; measured on its test images.
      scores: as scores.csv holds them.

    Returns:
      run: the one that it went on from; before and after: by name metrics and the rates at the
      threshold, on the test images, None where undefined; before is None if those are other images
      now; new: by class of the images that were added their number (`images`), how many of them
      are called defective `before` and `after`, None without a threshold, and whether the latter
      is by heads that never saw them (`unseen`).
    """
    run = pathlib.Path(config.extend)
    theirs, model = run_lib.read_run(run).results, predictor.open_run(run)
    same = theirs['data_sha256']['test'] == results['data_sha256']['test']
    found = {'run': str(run), 'before': _figures(theirs) if same else None}
    found |= {'after': _figures(results), 'new': {}}
    new = splits.take(split, _new(config, split))
    before = evaluate.scores_of(model, new, 'new')
    known = scores.of('train')
    places = {file: i for i, file in enumerate(known.file)}
    after = known.take(np.array([places[file] for file in new.files]))
    for kind in sorted(set(new.defects)):
        own = np.flatnonzero([defect == kind for defect in new.defects])
        found['new'][kind] = {
            'images': len(own),
            'before': _called(before.score[own], model.threshold),
            'after': _called(after.score[own], results['decision']['threshold']),
            'unseen': 'train' not in after.part,
        }
    return found


def _figures(results):
    figures = {name: results['metrics'][name] for name in METRICS}
    return figures | {
        f'test {x.upper()}': results['decision'].get(f'test_{x}') for x in ('tpr', 'fpr')
    }


def _called(scores, threshold) -> int | None:
    return None if threshold is None else int((scores >= threshold).sum())
