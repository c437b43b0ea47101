"""The terms of a split against the golden vectors of SplitNet: values, gradients, networks of several layers, and the hard cut.

Where the published codes agree, with each other or with the paper's formulas, they are asked too."""
import numpy as np
import pytest
import torch

from paramfx.splitnet.terms import disjoint_term, merge_groups, split_penalties, split_totals

SINGLE = ['conv1x1_g2_blockdiag', 'conv1x3_g2_soft', 'conv3x3_g2_soft', 'conv3x3_g3_hard', 'fc_g2_soft', 'fc_g3_hard']
TERMS = dict(weight='RW', disjoint='RD', balance='RE')


@pytest.fixture(scope='module')
def files(golden): return lambda name: {k: torch.from_numpy(v) for k, v in np.load(golden/'splitnet'/f'{name}.npz').items()}


def close(got, want, dtype=torch.float64):
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-6)
    torch.testing.assert_close(got.detach().double(), want.double(), rtol=rtol, atol=atol)


def leaves(z, *names, dtype=torch.float64): return [z[n].to(dtype).requires_grad_() for n in names]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', SINGLE)
def test_single_layer_values_and_gradients(files, name, dtype):
    z = files(name)
    w, a, b = leaves(z, 'weight', 'p_logits', 'q_logits', dtype=dtype)
    p, q = a.softmax(0), b.softmax(0)
    close(p, z['p'], dtype), close(q, z['q'], dtype)
    got = split_penalties(w, p, q)
    for field, term in TERMS.items():
        value = getattr(got, field)
        close(value, z[f'ref_{term}'], dtype)
        for var, g in zip(('weight', 'p_logits', 'q_logits'), torch.autograd.grad(value, (w, a, b), retain_graph=True, allow_unused=True)):
            want = z.get(f'ref_d{term}_d{var}')
            if want is None: assert g is None, (term, var)  # no weight in the other two terms
            else: close(g, want, dtype)


@pytest.mark.parametrize('name', SINGLE)
def test_the_published_codes_say_the_same(files, name):
    z = files(name)
    got = split_penalties(z['weight'], z['p'], z['q'])
    factor = dict(seed=3**.5, tf=3**-.5) if name.startswith('conv1x3') else dict(seed=1, tf=1)  # their windows have to be square
    for src, f in factor.items():
        close(got.weight*f, z[f'{src}_RW'])
        close(got.disjoint, z[f'{src}_RD'])
        close(got.balance, z[f'{src}_RE'])


@pytest.mark.parametrize('name', SINGLE)
def test_the_papers_sums(files, name):
    "Normalised as the README says, term by term"
    z, g = files(name), int(files(name)['groups'])
    k, d = z['weight'].shape[:2]
    close(sum((1-p.square().sum(0)).sum()/2 for p in (z['p'], z['q'])), z['paper_RD'])
    close(disjoint_term(z['p'])*d*(g-1)/(2*g)+disjoint_term(z['q'])*k*(g-1)/(2*g), z['paper_RD'])
    close(z['p'].sum(1).square().sum()+z['q'].sum(1).square().sum(), z['paper_RE'])


def test_gradients_at_a_block_diagonal_weight(files):
    "Their square root gives NaN there"
    z = files('conv1x1_g2_blockdiag')
    assert all(z[f'{src}_dRW_d{v}'].isnan().all() for src in ('seed', 'tf') for v in ('weight', 'p_logits', 'q_logits'))
    w, a, b = leaves(z, 'weight', 'p_logits', 'q_logits')
    got = split_penalties(w, a.softmax(0), b.softmax(0))
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.weight, (w, a, b)))


FREE = ('p1', 'q1', 'p2', 'r21', 'r22')

def chain(z, logits):
    "The layers of the chain file, and the assignments that are learned"
    free = {k: l.softmax(0) for k, l in logits.items()}
    q2 = merge_groups(free['p1'], len(free['p2']))
    ends = dict(w_shortcut=(free['p2'], q2), w_conv1a=(free['p2'], free['r21']), w_conv2a=(free['r21'], q2),
                w_conv1b=(q2, free['r22']), w_conv2b=(free['r22'], q2), w_fc=(free['p1'], free['q1']))
    return ends, free


def test_chain(files):
    z = files('chain_g4to2')
    w = {k: z[k].clone().requires_grad_() for k in z if k.startswith('w_')}
    logits = {k: z[f'{k}_logits'].clone().requires_grad_() for k in FREE}
    ends, free = chain(z, logits)
    layers = [(w[k], *pq) for k, pq in ends.items()]
    one = [split_penalties(*l) for l in layers]
    asked = 0
    for field, term in TERMS.items():
        vec = z.get(f'ref_layer_{term}')
        if vec is not None: close(torch.stack([getattr(o, field) for o in one]), vec); asked += 1
    leaf = {**w, **{f'{k}_logits': v for k, v in logits.items()}}
    for how, name in (('weighted', 'RW_weighted'), ('mean', 'RW_mean')):
        got = split_totals(layers, free, how)
        for value, key in zip(got, (name, 'RD', 'RE')):
            close(value, z[f'ref_{key}'])
            if key == name: close(value, z[f'tf_{key}'])
            grads = dict(zip(leaf, torch.autograd.grad(value, list(leaf.values()), retain_graph=True, allow_unused=True)))
            for n, g in grads.items():
                want = z.get(f'ref_d{key}_d{n}')
                if want is not None: close(g, want); asked += 1
    assert asked == 1 + 2*(11+5+5)


def test_order_of_layers_means_nothing(files):
    z = files('chain_g4to2')
    ends, free = chain(z, {k: z[f'{k}_logits'] for k in FREE})
    layers = [(z[k], *pq) for k, pq in ends.items()]
    for a, b in zip(split_totals(layers, free), split_totals(layers[::-1], dict(reversed(free.items())))): close(a, b)


def test_hard_groups_of_the_split_file(files):
    z = files('split_g2')
    for n in 'pqc': assert torch.equal(z[f'{n}_logits'].argmax(0), z[f'{n}_group'].long())
    hot = {n: torch.nn.functional.one_hot(z[f'{n}_group'].long(), 2).T.double() for n in 'pqc'}
    got = split_totals([(z['w_conv']*z['conv_mask'][..., None, None], hot['p'], hot['q']), (z['w_fc']*z['fc_mask'], hot['q'], hot['c'])], hot)
    assert got.weight == 0 and got.disjoint == 0 and got.balance > 1  # uneven on purpose
