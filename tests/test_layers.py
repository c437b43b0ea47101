"""Imports between modules point down only.

Layer 0 is for everyone; layer 1 holds tools that know no family; the families of layer 2 know the layers below and never
each other; layer 3 and the command line use them all. A new module gets its line in `LAYERS` in the change that brings it."""
import ast
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parent.parent/'paramfx'

LAYERS = {
    0: ['core', 'clock', 'state', 'effects', 'persist', 'forward'],
    1: ['flow', 'rules', 'rnn_rules', 'spaces', 'cuts', 'channels', 'dead', 'units', 'masks', 'csr', 'frozen', 'csr_infer', 'plain', 'report', 'dryrun', 'plots', 'loading', 'data', 'images', 'photos', 'text', 'nets', 'zoo', 'losses', 'rows'],
    2: ['split_terms', 'split_fast', 'split_plan', 'split_groups', 'split_model', 'split_branches', 'split_workers', 'splitnet', 'split_plots', 'split_tree', 'split_rows', 'ortho', 'basis_conv', 'basis_plan', 'basis_init', 'ortho_reg', 'bases', 'basis_join', 'bases_recipes', 'basis_plots', 'basis_rows', 'slice_states', 'slice_switch', 'sliced', 'slice_plan', 'slice_rates', 'slice_parts', 'slicing', 'slice_passes', 'slice_train', 'slice_tools', 'slice_search', 'slice_files', 'slice_serve', 'slice_plots', 'slice_rows', 'evolution', 'policies', 'forgetting', 'generations', 'evolve', 'knowledge_evolution', 'evolve_plots', 'evolve_rows', 'sparse', 'moves', 'exchange', 'rewirer', 'rewire', 'prune', 'copied', 'tied', 'csr_masks', 'sparse_recipes', 'sparse_plots', 'sparse_rows', 'mask_codes', 'sealed', 'stored', 'sparse_files'],
    3: ['deploy'],
    4: ['all'],
    5: ['experiments', 'cli'],
}
LAYER = {mod: layer for layer, mods in LAYERS.items() for mod in mods}
# modules of layer 2 that make one family; every other module there is a family of its own
FAMILY = dict.fromkeys(['sparse', 'moves', 'exchange', 'rewirer', 'rewire', 'prune', 'copied', 'tied', 'csr_masks', 'sparse_recipes', 'sparse_plots', 'sparse_rows', 'mask_codes', 'sealed', 'stored', 'sparse_files'], 'sparse')
FAMILY |= dict.fromkeys(['slice_states', 'slice_switch', 'sliced', 'slice_plan', 'slice_rates', 'slice_parts', 'slicing', 'slice_passes', 'slice_train', 'slice_tools', 'slice_search', 'slice_files', 'slice_serve', 'slice_plots', 'slice_rows'], 'slicing')
FAMILY |= dict.fromkeys(['ortho', 'basis_conv', 'basis_plan', 'basis_init', 'ortho_reg', 'bases', 'basis_join', 'bases_recipes', 'basis_plots', 'basis_rows'], 'bases')
FAMILY |= dict.fromkeys(['split_terms', 'split_fast', 'splitnet', 'split_plan', 'split_groups', 'split_model', 'split_branches', 'split_workers', 'split_plots', 'split_tree', 'split_rows'], 'splitnet')
FAMILY |= dict.fromkeys(['evolution', 'policies', 'forgetting', 'generations', 'evolve', 'knowledge_evolution', 'evolve_plots', 'evolve_rows'], 'evolution')
# imports allowed inside a layer, besides those inside a family; layer 0 is a chain, each module on those before it
WITHIN = {mod: set(LAYERS[0][:i]) for i, mod in enumerate(LAYERS[0])}
WITHIN |= {'rules': {'flow'}, 'rnn_rules': {'flow', 'rules'}, 'data': {'loading'}, 'images': {'data', 'loading'}, 'photos': {'images', 'loading'}, 'text': {'loading', 'nets'}, 'spaces': {'flow'}, 'channels': {'flow', 'rules', 'rnn_rules', 'spaces', 'cuts', 'plots'}, 'masks': {'units'}, 'frozen': {'csr'}, 'csr_infer': {'csr', 'frozen'}, 'dryrun': {'report'}, 'losses': {'units'}, 'cuts': {'spaces'}, 'dead': {'channels', 'spaces'}, 'plain': {'channels', 'cuts', 'spaces', 'dead', 'masks', 'units', 'dryrun', 'frozen', 'csr_infer'}, 'zoo': {'nets', 'data', 'images', 'photos', 'text', 'report'}, 'cli': {'experiments'}}
# `all` gathers layers 0 to 3; the command line comes after it
MAX_SEEN_BY_ALL = 3


def parse(mod): return ast.parse((LIB/f'{mod}.py').read_text(encoding='utf8'))


def own_imports(tree):
    "Names of paramfx modules imported anywhere in `tree`, also inside functions"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith('paramfx.'): yield a.name.split('.')[1]
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or '').split('.')
            if node.level == 0:
                if path[0] != 'paramfx': continue
                path = path[1:]
            path = [p for p in path if p]
            # `from paramfx import x`: x is a module, or a name of __init__ such as __version__
            yield from path[:1] if path else [a.name for a in node.names if not a.name.startswith('__')]


def allowed(src, dst):
    "May module `src` import module `dst`?"
    if src == dst: return True
    a, b = LAYER[src], LAYER[dst]
    if src == 'all': return b <= MAX_SEEN_BY_ALL
    if src == 'plots': return False  # takes arrays, no object of ours
    if a == b: return dst in WITHIN.get(src, ()) or (a == 2 and FAMILY.get(src, src) == FAMILY.get(dst, dst))
    return b < a


def modules():
    return [p.relative_to(LIB).with_suffix('').as_posix() for p in sorted(LIB.rglob('*.py')) if p.name[0] != '_']


@pytest.mark.parametrize('mod', modules())
def test_imports_point_down(mod):
    assert mod in LAYER, f'{mod} has no layer: add it to LAYERS'
    dsts = set(own_imports(parse(mod)))
    unknown = sorted(dsts - LAYER.keys())
    assert not unknown, f'{mod} imports {unknown}, which have no layer: add them to LAYERS'
    wrong = sorted(d for d in dsts if not allowed(mod, d))
    assert not wrong, f'{mod} (layer {LAYER[mod]}) must not import {wrong}'


@pytest.mark.parametrize('mod', modules())
def test_no_catch_all_of_fastai(mod):
    "`fastai.*.all` drags in every application and rebinds common names"
    bad = [n.module for n in ast.walk(parse(mod)) if isinstance(n, ast.ImportFrom)
           and (n.module or '').startswith('fastai.') and n.module.endswith('.all')]
    bad += [a.name for n in ast.walk(parse(mod)) if isinstance(n, ast.Import) for a in n.names
            if a.name.startswith('fastai.') and a.name.endswith('.all')]
    assert not bad, f'{mod} imports {bad}: name what it needs'


def test_package_imports_nothing():
    "`import paramfx` stays cheap"
    tree = ast.parse((LIB/'__init__.py').read_text(encoding='utf8'))
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize('src,dst,ok', [
    ('masks', 'core', True), ('core', 'masks', False), ('effects', 'core', True), ('core', 'effects', False),
    ('persist', 'effects', True), ('effects', 'persist', False), ('plain', 'masks', True), ('masks', 'plain', False),
    ('report', 'masks', False), ('report', 'sparse', False), ('plots', 'core', False), ('rewire', 'sparse', True),
    ('rewire', 'report', True), ('slicing', 'sparse', False), ('sparse', 'bases', False), ('bases', 'basis_conv', True), ('deploy', 'csr', True),
    ('sparse', 'deploy', False), ('cli', 'experiments', True), ('experiments', 'cli', False), ('all', 'deploy', True),
    ('all', 'cli', False), ('experiments', 'all', True)])
def test_the_rule_itself(src, dst, ok): assert allowed(src, dst) == ok


def test_import_forms():
    src = '''
import paramfx.core.optimizers as c, os
from paramfx.masks.store import MaskStore
from .report import *
from . import plots
from paramfx import __version__
from paramfx.data import memory as data
from fastai.basics import *
def f():
    from paramfx.zoo import build
'''
    assert sorted(own_imports(ast.parse(src))) == ['core', 'data', 'masks', 'plots', 'report', 'zoo']
