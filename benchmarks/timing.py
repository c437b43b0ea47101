"Paired timings, and result tables with the machine they come from."
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Callable

import torch

RESULTS = Path(__file__).resolve().parent/'results'


def paired(
    fns: dict[str, Callable[[], object]],  # what to compare, by name
    rounds: int = 20,  # times each callable is measured
    warmup: int = 3,  # unmeasured rounds before
) -> dict[str, list[float]]:  # CPU seconds of every round, by name
    """Process CPU times of `fns`, one after another in every round, on one thread.

    Slow spells of a shared machine hit all callables of a round alike, so ratios within a round hold still where separate
    runs would not. The order rotates, because whoever runs after a heavy neighbour finds colder caches."""
    if not fns or rounds < 1: raise ValueError(f'need at least one callable and one round, got {len(fns)} and {rounds}')
    names, times = list(fns), {name: [] for name in fns}
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    try:
        for r in range(-warmup, rounds):
            gc.collect()
            gc.disable()  # a collection would be charged to whoever happens to trigger it
            k = r % len(names)
            for name in names[k:] + names[:k]:
                start = time.process_time()
                fns[name]()
                took = time.process_time() - start
                if r >= 0: times[name].append(took)
            if collecting: gc.enable()
    finally:
        torch.set_num_threads(threads)
        if collecting: gc.enable()
    return times


def quartiles(xs: list[float]) -> dict[str, float]:
    "First quartile, median and third quartile"
    if len(xs) == 1: return dict.fromkeys(('q1', 'median', 'q3'), xs[0])
    return dict(zip(('q1', 'median', 'q3'), statistics.quantiles(xs, n=4, method='inclusive')))


def ratios(
    times: dict[str, list[float]],  # from `paired`
    base: str,  # name of the callable to divide by
) -> dict[str, dict[str, float]]:  # quartiles of the per-round ratios, by name
    "How long each callable takes relative to `base`, round by round"
    if base not in times: raise ValueError(f'no callable {base!r}; there are {sorted(times)}')
    if min(times[base]) <= 0: raise ValueError(f'{base!r} took no measurable time: let one call repeat the work')
    return {name: quartiles([t/b for t, b in zip(ts, times[base])]) for name, ts in times.items() if name != base}


def _cpu_model() -> str:
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: lines = []
    found = next((line.split(':', 1)[1].strip() for line in lines if line.startswith(('model name', 'Model'))), '')
    return found or platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    "What the numbers depend on: processor, cores, versions; nothing that names the host"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    res = dict(cpu=_cpu_model(), cores=cores, system=platform.system(), python=platform.python_version())
    return res | {name: metadata.version(name) for name in ('torch', 'fastai')}


def _cell(x: object) -> str: return f'{x:.4g}' if isinstance(x, float) else str(x).replace('|', '\\|')


def table(rows: list[dict[str, object]]) -> str:
    "`rows` as a markdown table; the columns are the keys in order of appearance"
    cols = list(dict.fromkeys(k for row in rows for k in row))
    lines = [cols, ['---']*len(cols), *([_cell(row.get(c, '')) for c in cols] for row in rows)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def _write(path: Path, text: str) -> None:
    "Write at once: an interrupted benchmark leaves the old table, not half a new one"
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(fd, 'w', encoding='utf8') as f: f.write(text)
        os.chmod(tmp, 0o644)  # mkstemp makes it private
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


def write_table(
    name: str,  # file name without suffix
    rows: list[dict[str, object]],  # one dict per line of the table
    note: str = '',  # what was measured and how to read it
    folder: Path = RESULTS,  # where the files go
    **more: object,  # further keys of the JSON, such as the runs that the rows sum up
) -> Path:  # the markdown file
    "Write `rows` with `machine()` to NAME.md and NAME.json"
    if not rows: raise ValueError(f'{name}: no rows to write')
    folder, about = Path(folder), machine()
    folder.mkdir(parents=True, exist_ok=True)
    made_on = ', '.join(f'{k} {v}' for k, v in about.items())
    text = '\n\n'.join(filter(None, [f'# {name}', note.strip(), table(rows).strip(), f'Measured on: {made_on}.']))
    _write(folder/f'{name}.json', json.dumps(dict(name=name, note=note, machine=about, rows=rows, **more), indent=1) + '\n')
    _write(folder/f'{name}.md', text + '\n')
    return folder/f'{name}.md'
