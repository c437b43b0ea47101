"The timing helpers, on callables whose cost is known."
import json

import pytest
import torch

from benchmarks.timing import machine, paired, quartiles, ratios, table, write_table


def test_paired_interleaves_in_rotating_order():
    calls = []
    times = paired({k: (lambda k=k: calls.append(k)) for k in 'abc'}, rounds=3, warmup=1)
    assert {k: len(v) for k, v in times.items()} == dict(a=3, b=3, c=3)
    assert calls == list('cab' 'abc' 'bca' 'cab')


def test_paired_uses_one_thread_and_restores():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        paired({'a': lambda: seen.append(torch.get_num_threads())}, rounds=1, warmup=0)
        assert seen == [1] and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError): paired({'a': lambda: 1/0})
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_ratios_see_the_longer_work():
    work = lambda n: lambda: sum(range(n))
    r = ratios(paired({'one': work(20_000), 'four': work(80_000)}, rounds=9), 'one')
    assert set(r) == {'four'} and 2.5 < r['four']['median'] < 6


def test_ratios_are_taken_within_rounds():
    # a machine that slows down tenfold does not change them
    r = ratios(dict(base=[1., 10., 100.], twice=[2., 20., 200.]), 'base')
    assert r == dict(twice=dict(q1=2., median=2., q3=2.))


def test_bad_input():
    with pytest.raises(ValueError, match='at least one'): paired({})
    with pytest.raises(ValueError, match="no callable 'x'"): ratios(dict(a=[1.]), 'x')
    with pytest.raises(ValueError, match='no measurable time'): ratios(dict(a=[0.], b=[1.]), 'a')
    with pytest.raises(ValueError, match='no rows'): write_table('t', [])


def test_quartiles():
    assert quartiles([4., 1., 2., 3., 5.]) == dict(q1=2., median=3., q3=4.)
    assert quartiles([7.]) == dict(q1=7., median=7., q3=7.)


def test_write_table(tmp_path):
    rows = [dict(net='a|b', ratio=1.03456), dict(net='c', ratio=2., extra=3)]
    assert table(rows).splitlines() == [
        '| net | ratio | extra |', '| --- | --- | --- |', r'| a\|b | 1.035 |  |', '| c | 2 | 3 |']
    path = write_table('steps', rows, note='A note.', folder=tmp_path/'results')
    text = path.read_text()
    assert text.startswith('# steps\n\nA note.\n\n| net |') and f'torch {torch.__version__.split("+")[0]}' in text
    data = json.loads(path.with_suffix('.json').read_text())
    assert data['rows'] == rows and data['machine'] == machine()
    write_table('steps', rows[1:], folder=tmp_path/'results')  # a second run replaces the first
    assert len(json.loads(path.with_suffix('.json').read_text())['rows']) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ['steps.json', 'steps.md']


def test_machine_names_no_host():
    import platform
    about = machine()
    assert set(about) == {'cpu', 'cores', 'system', 'python', 'torch', 'fastai'}
    node = platform.node()
    assert len(node) < 4 or node not in ' '.join(map(str, about.values()))


def test_a_table_may_carry_its_runs(tmp_path):
    file = write_table('t', [dict(mean=1.5)], folder=tmp_path, runs=[dict(x=1), dict(x=2)])
    assert json.loads(file.with_suffix('.json').read_text())['runs'] == [dict(x=1), dict(x=2)] and 'runs' not in file.read_text()
