"""Imports point down only: families know the foundations and never each other, foundations know no family, and within a
package nothing runs in a circle. CONTRIBUTING.md has the picture."""
import ast
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parent.parent/'paramfx'

# each package may import those before it in this list, and those that stand beside each other may not know one another
FLOORS = [['core'], ['report'], ['channels', 'masks'], ['kernels', 'data', 'losses'], ['export', 'zoo'],
          ['splitnet', 'bases', 'slicing', 'sparse', 'evolution'], ['all'], ['experiments']]
FLOOR = {pack: i for i, packs in enumerate(FLOORS) for pack in packs}
FAMILIES = {'splitnet', 'bases', 'slicing', 'sparse', 'evolution'}


def modules():
    "Dotted names below `paramfx`: 'core.layers', 'losses', 'zoo'"
    for p in sorted(LIB.rglob('*.py')):
        if p.name[0] == '_' and (p.name != '__init__.py' or p.parent == LIB or not p.read_text().strip()): continue
        yield '.'.join(p.relative_to(LIB).with_suffix('').parts).removesuffix('.__init__')


MODULES = dict.fromkeys(modules())


def parse(mod):
    path = LIB.joinpath(*mod.split('.'))
    return ast.parse((path/'__init__.py' if path.is_dir() else path.with_suffix('.py')).read_text(encoding='utf8'))


def is_package(mod): return LIB.joinpath(*mod.split('.')).is_dir()


def named(path):
    "The module that a dotted path below `paramfx` lies in: a trailing name may be something that it defines"
    while path and '.'.join(path) not in MODULES and not is_package('.'.join(path)): path = path[:-1]
    return '.'.join(path)


def own_imports(tree, mod):
    "Modules of paramfx imported anywhere in `tree`, also inside functions"
    here = mod.split('.') if is_package(mod) else mod.split('.')[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith('paramfx.'): yield named(a.name.split('.')[1:])
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or '').split('.') if node.module else []
            if node.level: path = here[:len(here)-node.level+1]+path
            elif path[:1] == ['paramfx']: path = path[1:]
            else: continue
            for a in node.names:
                found = named([*path, a.name])
                if found: yield found


def allowed(src, dst):
    "May module `src` import module `dst`?"
    a, b = src.split('.')[0], dst.split('.')[0]
    if a == b: return True
    if 'all' in (src.split('.')[-1], dst.split('.')[-1]): return FLOOR[b] <= FLOOR[a] or src == 'all'
    return FLOOR[b] < FLOOR[a]


@pytest.mark.parametrize('mod', MODULES)
def test_imports_point_down(mod):
    assert mod.split('.')[0] in FLOOR, f'{mod} stands on no floor: add its package to FLOORS'
    dsts = set(own_imports(parse(mod), mod))
    wrong = sorted(d for d in dsts if not allowed(mod, d))
    assert not wrong, f'{mod} must not import {wrong}'


def test_no_circle_within_a_package():
    graph = {m: {d for d in own_imports(parse(m), m) if d.split('.')[0] == m.split('.')[0] and d != m} for m in MODULES}
    done = set()

    def visit(m, path):
        if m in path: raise AssertionError('a circle: '+' -> '.join([*path[path.index(m):], m]))
        if m in done: return
        for d in graph.get(m, ()): visit(d, [*path, m])
        done.add(m)
    for m in graph: visit(m, [])


def test_families_have_the_same_rooms():
    for family in FAMILIES:
        rooms = {m.split('.')[1] for m in MODULES if m.startswith(family+'.')}
        assert {'callback', 'plots', 'demo', 'all'} <= rooms, family


def test_modules_named_by_strings_are_there():
    "What is imported by its name stands in one table"
    from paramfx.core.registry import FAMILY_ROOMS, VERB_ROOMS
    for room in {*FAMILY_ROOMS.values(), *VERB_ROOMS.values()}: assert room in MODULES, room


@pytest.mark.parametrize('mod', MODULES)
def test_no_catch_all_of_fastai(mod):
    "`fastai.*.all` drags in every application and rebinds common names"
    bad = [n.module for n in ast.walk(parse(mod)) if isinstance(n, ast.ImportFrom)
           and (n.module or '').startswith('fastai.') and n.module.endswith('.all')]
    bad += [a.name for n in ast.walk(parse(mod)) if isinstance(n, ast.Import) for a in n.names
            if a.name.startswith('fastai.') and a.name.endswith('.all')]
    assert not bad, f'{mod} imports {bad}: name what it needs'


def test_all_is_star_imports_and_nothing_else():
    for mod in MODULES:
        if mod.split('.')[-1] != 'all': continue
        doc, *rest = parse(mod).body
        assert isinstance(doc, ast.Expr) and rest, mod
        for n in rest: assert isinstance(n, ast.ImportFrom) and (n.names[0].name == '*' or n.names[0].name == 'zoo'), mod


def test_package_imports_nothing():
    "`import paramfx` stays cheap"
    tree = ast.parse((LIB/'__init__.py').read_text(encoding='utf8'))
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_public_names():
    "Chosen, about as many as one can survey, and none shadows what fastai brings"
    import fastai.vision.all as fastai
    import paramfx.all as ours
    names = [n for n in vars(ours) if n[0] != '_']
    assert len(names) <= 149, len(names)
    assert not [n for n in names if hasattr(fastai, n)]


@pytest.mark.parametrize('src,dst,ok', [
    ('masks.store', 'core.layers', True), ('core.layers', 'masks.store', False), ('core.callback', 'core.state', True),
    ('export.materialize', 'masks.store', True), ('masks.store', 'export.materialize', False), ('report.cost', 'sparse.sparsify', False),
    ('sparse.methods', 'sparse.sparsify', True), ('slicing.slice', 'sparse.sparsify', False), ('sparse.sparsify', 'bases.share', False),
    ('experiments.cli', 'experiments.demo', True), ('all', 'sparse.all', True), ('sparse.demo', 'all', False), ('experiments.demo', 'all', True)])
def test_the_rule_itself(src, dst, ok): assert allowed(src, dst) == ok


def test_import_forms():
    src = '''
import paramfx.core.layers as c, os
from paramfx.masks.store import MaskStore
from ..report.cost import *
from ..report import plots
from . import moves
from .. import zoo
from paramfx import losses, __version__
from fastai.basics import *
def f():
    from paramfx.zoo import build
'''
    assert sorted(own_imports(ast.parse(src), 'sparse.sparsify')) == ['core.layers', 'losses', 'masks.store',
        'report.cost', 'report.plots', 'sparse.moves', 'zoo', 'zoo']
