"""Results in words, for the terminal."""

import pathlib

from ssn_jax import metrics


def format_table(results: dict) -> str:
    """The seven metrics, or several seeds' summary of them, as a table for the terminal."""
    if 'seeds' in results:
        return format_summary(results)
    embedded = ', embedded data' if results['embedded'] else ''
    head = f'{results["config"]} on {results["data"]} {results["category"]}{embedded}'
    return '\n'.join(
        [
            f'{head}, {results["epochs"]} epochs, seed {results["seed"]}',
            *metric_lines(results['metrics'], results['undefined']),
            f'  {decision_line(results["decision"])}',
            *(extended_lines(results['extended']) if 'extended' in results else ()),
        ]
    )


def summary(workdir: pathlib.Path) -> str:
    """Where everything of a run is, in one line."""
    parts = {
        'results.json': 'metrics',
        'summary.json': 'mean and deviation of the metrics over the runs seed-*/',
        'decision.json': 'threshold',
        'scores.csv': 'what it was chosen on',
        'train.csv': 'losses',
        'figures': 'pictures',
        'model.safetensors': 'the trained network',
        'checkpoints': 'what training goes on from',
        'tensorboard': 'event files',
    }
    there = [
        f'{name}{"/" * (workdir / name).is_dir()} ({what})'
        for name, what in parts.items()
        if (workdir / name).exists()
    ]
    return f'Everything is in {workdir}: {", ".join(there)}.'


def metric_lines(values: dict, undefined: dict) -> list[str]:
    """A line for each metric, in percent, or why it is undefined; one if all are, alike."""
    if len(undefined) == len(metrics.METRICS) and len(set(undefined.values())) == 1:
        return [f'  nothing is measured: {next(iter(undefined.values()))}']
    shown = {name: undefined.get(name) for name in metrics.METRICS}
    for name, value in values.items():
        if value is not None:
            shown[name] = f'{100 * value:6.2f} %'
    return [f'  {name:12s} {text}' for name, text in shown.items()]


def decision_line(chosen: dict) -> str:
    """The decision and what it does on the test split, in words."""
    if chosen['threshold'] is None:
        return f'no threshold: {chosen["undefined"]}'
    text = f'defective from score {chosen["threshold"]:.4g} on ({chosen["method"]}, chosen on '
    text += f'{chosen["images"]} images: {chosen["split"]}'
    if 'promised' in chosen:
        low, high = (f'{100 * rate:.1f}' for rate in chosen['interval'])
        text += f'; of new normal images {low} to {high} % will be called defective'
    text += ')'
    for name in ('tpr', 'fpr'):
        value = chosen.get(f'test_{name}')
        text += f', test {name.upper()} {"unknown" if value is None else f"{100 * value:.1f} %"}'
    return text


def extended_lines(extended: dict) -> list[str]:
    """What a run has gained and lost against the one that it went on from, as a table.

    Args:
      extended: as `extend.compare` returns it.
    """
    before = extended['before'] or {}
    lines = [f'Against {extended["run"]}, which it went on from:', f'  {"before":>24} {"after":>9}']
    for name, value in extended['after'].items():
        shown = ('-' if x is None else f'{100 * x:.2f} %' for x in (before.get(name), value))
        lines.append('  {:14} {:>9} {:>9}'.format(name, *shown))
    if not before:
        lines.append('  (before: not known on these test images, which are other ones)')
    seen = {of['unseen'] for of in extended['new'].values()}
    how = 'heads that never saw them' if seen == {True} else 'a network that was trained on them'
    lines.append(f'  new images that are called defective, after by {how}:')
    for kind, of in extended['new'].items():
        shown = (
            '-' if of[x] is None else f'{of[x]} of {of["images"]}' for x in ('before', 'after')
        )
        lines.append('  {:14} {:>9} {:>9}'.format(kind, *shown))
    return lines


def format_summary(summary: dict) -> str:
    """Mean and standard deviation of the seven metrics as a table for the terminal."""
    embedded = ', embedded data' if summary['embedded'] else ''
    seeds = summary['seeds']
    last = seeds[-1]
    shown = f'{seeds[0]} to {last}' if last - seeds[0] < len(seeds) else ', '.join(map(str, seeds))
    lines = [
        f'{summary["config"]} on {summary["data"]} {summary["category"]}{embedded}, '
        f'{summary["epochs"]} epochs, seeds {shown}, mean ± standard deviation'
    ]
    for name, value in summary['metrics'].items():
        text = summary['undefined'].get(name)
        if value is not None:
            text = f'{100 * value["mean"]:6.2f} ± {100 * value["std"]:.2f} %'
        lines.append(f'  {name:12s} {text}')
    return '\n'.join(lines)
