"""The main job: `train_and_evaluate(config, workdir)`, from records to results."""

import contextlib
import functools
import json
import pathlib

from absl import logging
import jax
import ml_collections
import numpy as np

from ssn_jax import (
    config as config_lib,
    data,
    decision,
    devices,
    evaluate,
    metrics,
    run as run_lib,
    supervision,
)
from ssn_jax.models import systems, weights
from ssn_jax.training import loop


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    events: bool = False,
    quiet: bool = False,
) -> dict:
    """Trains a config to its last epoch, or resumes it, and measures it there.

    Args:
      config: as `config.default_config` describes it.
      workdir: receives config.json, train.csv, checkpoints/, results.json and figures/; with
        several seeds (`config.seeds`) a folder seed-N for each that does, and summary.json.
      events: whether to write TensorBoard event files to tensorboard/ too.
      quiet: shows no progress bar.

    Returns:
      What results.json holds; of several seeds, what summary.json does.

    Raises:
      UserError: the config, the data, the weights or the workdir are of no use, or something
        became NaN or infinite.
    """
    config_lib.validate(config)
    if data.is_embedded(config.data):
        config = weights.with_trained_backbone(config)
    runs = run_lib.runs_of(config, workdir)
    for run in runs:
        run_lib.check_workdir(*run)
    if events:
        run_lib.require_tensorboard()
    dataset = data.load(config.data, config.image_size, config.resize)
    rest, held_out = supervision.hold_out(config, dataset.train)
    split = supervision.training_split(config, rest)
    if config.supervision.kind != 'none':
        logging.info(
            'Supervision: %d defective training images, %d of them with their mask',
            split.labels.sum(),
            len(supervision.masked_files(split)),
        )
    if dataset.embedded:
        logging.warning(
            'No --config.data.root: this run uses the embedded, procedurally drawn %s images. '
            'Its figures say nothing about a real data set.',
            dataset.category,
        )
    backbone_variables, origin = weights.load_backbone(
        config.backbone.name, config.backbone.weights, allow_random=dataset.embedded
    )
    logging.info('Backbone %s, weights: %s', config.backbone.name, origin)

    devices.wait_for_all('workdir checked')  # Before the first one writes there.
    network = systems.build_network(config)
    with contextlib.ExitStack() as locks:
        for run in runs:
            run_lib.begin_workdir(*run, split, locks)
        jobs = [
            loop.Job(*one, functools.partial(run_lib.open_log, one[1], events=events))
            for one in runs
        ]
        trained = loop.train(jobs, split, network, backbone_variables, quiet)
        predict = evaluate.make_predictor(network, config.eval_batch_size, config.precision)

        def measure_run(run, state, log):
            variables = backbone_variables, state.variables()
            return measure(*run, dataset, split, held_out, predict, variables, origin, log)

        results = [measure_run(run, *after) for run, after in zip(runs, trained, strict=True)]
        if config.seeds == 1:
            return results[0]
        summary = run_lib.summarise(results + run_lib.other_results(runs, workdir))
        run_lib.write(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary


def measure(config, workdir, dataset, split, held_out, predict, variables, origin, log) -> dict:
    """Evaluates a trained run, chooses its threshold and writes both with figures; its results."""
    maps, scores = predict(*variables, dataset.test.images)
    values, reasons = evaluate.evaluate(maps, scores, dataset.test)
    log.close(config.epochs, values)

    def scores_of(images):
        return evaluate.predict_scores(predict, *variables, images=images)

    chosen = decision.decide(config, scores_of, split, held_out)
    if chosen['threshold'] is not None:
        on_test = decision.rates(scores, dataset.test.labels, chosen['threshold'])
        chosen |= {f'test_{name}': value for name, value in on_test.items()}

    history = log.history()
    seconds = history.get('seconds')  # An imported checkpoint was not trained here.
    results = {
        'config': config.name,
        'data': dataset.name,
        'category': dataset.category,
        'embedded': dataset.embedded,
        'seed': config.seed,
        'epochs': config.epochs,
        'backbone': config.backbone.name,
        'weights': origin,
        'metrics': values,
        'undefined': reasons,
        'decision': chosen,
        'supervision': config.supervision.kind,
        'train_images': len(split.labels),
        'train_defects': int(split.labels.sum()),
        'train_masks': len(supervision.masked_files(split)),
        'test_images': len(dataset.test.labels),
        'parameters': sum(count(v['params']) for v in variables),
        'train_seconds': round(sum(seconds), 1) if seconds else None,
        'loss_grew': loss_grew(history),
        # The first epoch after a start compiles: the median leaves it out.
        'seconds_per_epoch': round(float(np.median(seconds)), 2) if seconds else None,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    }
    if values['I-AUROC'] is not None:
        # As the publication chose it: on the images that it is then measured on.
        results['youden_on_test'] = metrics.youden(scores, dataset.test.labels)
    if devices.is_first():
        draw_figures(workdir / 'figures', results, dataset.test, maps, scores, log)
    run_lib.write(workdir / 'decision.json', json.dumps(chosen, indent=2) + '\n')
    run_lib.write(workdir / 'results.json', json.dumps(results, indent=2) + '\n')
    return results


def loss_grew(history: dict[str, list[float]]) -> bool | None:
    """Tells whether the loss ended at more than twice what it began at; None without a history."""
    if not history.get('loss'):
        return None
    first, last = history['loss'][0], history['loss'][-1]
    if last > 2 * first:
        logging.warning(
            'The loss grew from %.4g to %.4g: the training may have diverged.', first, last
        )
    return last > 2 * first


def count(params: dict) -> int:
    """The number of scalars in a tree of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def draw_figures(folder, results, split, maps, scores, log) -> None:
    """Overlays of the best and worst test images, loss curves, ROC, PR and histogram."""
    from ssn_jax.report import (
        figures,  # Matplotlib takes a second to import; only here is it needed.
    )

    data_name = 'embedded data' if results['embedded'] else results['data']
    title = f'{results["config"]} · {results["category"]} ({data_name})'
    masks = np.where(split.has_mask[:, None, None], split.masks, 0)
    figures.overlays(
        folder / 'overlays.png',
        split.images,
        masks,
        decision.sigmoid(maps),
        decision.sigmoid(scores),
        split.labels,
        split.files,
        title,
    )
    curves = {name: column for name, column in log.history().items() if name != 'seconds'}
    if curves:
        figures.loss_curves(folder / 'losses.png', curves, title)
    if results['metrics']['I-AUROC'] is not None:
        figures.roc_curve(folder / 'roc.png', scores, split.labels, f'{title} · test split')
    if results['metrics']['AP-loc'] is not None:
        known = split.has_mask
        figures.pr_curve(folder / 'pixel_pr.png', maps[known], split.masks[known], title)
    threshold = results['decision']['threshold']
    figures.score_histogram(folder / 'scores.png', scores, split.labels, title, threshold)
