"The worked example of CONTRIBUTING.md runs, as it is printed; its picture names packages that are there."
import re
from itertools import product
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf8')


@pytest.fixture
def methods():
    "The registry of methods, without what a test has added"
    from paramfx.sparse.methods import METHODS
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_a_method_in_an_hour(methods):
    "A method that is registered by name, with settings of its own"
    from fastai.basics import Learner
    section = TEXT.partition('## A method in an hour')[2].partition('\n## ')[0]
    blocks = re.findall(r'```python\n(.*?)```', section, re.S)
    assert len(blocks) == 2
    torch.manual_seed(0)
    ns = dict(Learner=Learner, torch=torch, __name__='example')
    for b in blocks: exec(b, ns)
    assert methods['shuffle'] is ns['Shuffle'] and ns['DynamicSparse'](.5, method='shuffle').method == ns['Shuffle']()
    with pytest.raises(ValueError, match='drop_frac=2'): ns['Shuffle'](drop_frac=2)


def test_the_house_is_as_drawn():
    "Packages of the picture, and every module and notebook that is named by its path"
    drawn = {*re.findall(r'(\w+)\[', TEXT.partition('```mermaid')[2].partition('```')[0])} - {'families'}
    drawn |= {'sparse', 'slicing', 'splitnet', 'bases', 'evolution'}
    lib = ROOT/'paramfx'
    there = {p.name for p in lib.iterdir() if p.is_dir() and p.name[0] != '_'} | {'losses'}
    assert drawn == there
    families = drawn & {'sparse', 'slicing', 'splitnet', 'bases', 'evolution'}
    text = re.sub(r'\[.*?\]', '', TEXT.partition('```mermaid')[2].partition('```')[0])
    for srcs, dsts in re.findall(r'([\w &]+) --> ([\w &]+)', text): # each arrow is an import
        for src, dst in product(*([n.strip() for n in side.split('&')] for side in (srcs, dsts))):
            files = [f for f in lib.rglob('*.py') if f.relative_to(lib).parts[0].removesuffix('.py') in (families if src == 'families' else {src})]
            names = '|'.join(families if dst == 'families' else {dst})
            code = ''.join(f.read_text(encoding='utf8') for f in files)
            assert re.search(rf'from \.+({names})\b|from \.+ import ({names})\b|paramfx\.({names})\b', code), (src, dst)
    for path in re.findall(r'`((?:nbs|tests|paramfx)/[\w/]+\.\w+)`', TEXT): assert (ROOT/path).exists(), path
    for path in re.findall(r'\]\((paramfx/[\w/]+\.py)\)', TEXT): assert (ROOT/path).exists(), path
