"""Another threshold for a finished run, without training: `ssn-jax decide`."""

import json
import pathlib

from absl import logging
import numpy as np

from ssn_jax import decision, files, predict_folder, predictor, run as run_lib
from ssn_jax.data import images as images_lib, layouts
from ssn_jax.errors import UserError


def decide(
    workdir: pathlib.Path,
    fpr: float | None = None,
    images: pathlib.Path | None = None,
    defects: pathlib.Path | None = None,
    misses: float = 1.0,
) -> dict:
    """Chooses a finished run's threshold anew, and writes it to its folder.

    Args:
      workdir: the run's folder; decision.json, results.json and, with `images`, scores.csv change.
      fpr: the rate of false alarms; None: that of the run's config.
      images: new normal images, which take the place of the training images: the threshold is
        chosen on them, and p-values are among them.
      defects: images of known defects: the threshold has the largest misses * TPR - FPR.
      misses: how many times as bad as a false alarm a missed defect is, both as rates.

    Returns:
      What decision.json holds.

    Raises:
      UserError: the run is not finished, or there is nothing to choose on.
    """
    model = predictor.open_run(workdir)
    scores = run_lib.read_scores(workdir)
    results = run_lib.read_json(workdir / 'results.json')
    if scores is None or not model.decision or not results:
        raise UserError(
            f'{workdir} has no scores to choose on: its own command, given again, makes them.'
        )
    if images:
        new = score_folder(model, images, layouts.GOOD)
        scores = scores.of('train') + scores.of('test') + new
    normal = scores.unseen().score if images else model.require_normal()
    new = len(scores.of('new').score)
    where = {'split': ('new' if new else 'out of part') + ' (normal)', 'images': len(normal)}
    try:
        if defects:
            known = score_folder(model, defects, 'defect').score
            where['split'] += f' and {len(known)} known defects'
            where['images'] += len(known)
            labels = np.repeat([0, 1], [len(normal), len(known)])
            found = decision.by_youden(np.concatenate([normal, known]), labels, misses)
        else:
            rate = model.config.decision.fpr if fpr is None else fpr
            found = decision.by_rate(normal, rate, of_parts=not new)
    except ValueError as e:
        raise UserError(f'{workdir}: {e}; scores.csv there has them.') from None
    chosen = decision.tested(found | where | {'precision': model.config.precision}, scores)
    with files.locked(workdir):
        results['decision'] = chosen
        results['recall'] = decision.recall_by_defect(scores.of('test'), chosen['threshold'])
        # The scores last: without them decision and results still tell the same.
        run_lib.write(workdir / 'results.json', json.dumps(results, indent=2) + '\n')
        run_lib.write(workdir / 'decision.json', json.dumps(chosen, indent=2) + '\n')
        if images:
            run_lib.write(workdir / 'scores.csv', scores.to_csv())
    return chosen


def score_folder(model: predictor.Predictor, folder: pathlib.Path, defect: str) -> decision.Scores:
    """The scores of all images below a folder; those that cannot be read are told, and left out.

    Args:
      model: a trained network.
      folder: of images, or one image.
      defect: what they show, `layouts.GOOD` or the defect's name.

    Raises:
      UserError: there is none that can be read.
    """
    named, scores, maxima = [], [], []
    for path in predict_folder.find(folder, warn=True):
        try:
            image = images_lib.decode(images_lib.read(path), path, white=model.white)
        except UserError as e:
            logging.warning('%s', e)
            continue
        score, maps = model.logits(model.fit(image)[None])
        named.append(path.relative_to(folder.parent).as_posix())
        scores.append(score[0])
        maxima.append(maps[0][predictor.View(model.config, image.shape[:2]).inside].max())
    if not named:
        raise UserError(f'{folder} holds no image that can be read: name a folder of images.')
    of, label = len(named), int(defect != layouts.GOOD)
    known = ['new'] * of, named, [defect] * of, np.full(of, label)
    return decision.Scores(*known, np.float32(scores), np.float32(maxima))
