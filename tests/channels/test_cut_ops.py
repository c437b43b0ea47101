"""One awkward operator at a time: which channels belong together, and small network = masked one in float64, whatever units are kept."""
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastai.text.models.awdlstm import WeightDropout
from nets import Net, check_exact, fill, found, keep, numbers
from paramfx.channels.trace import trace_channels
from paramfx.channels.cuts import Cut


@dataclass
class Case:
    net: nn.Module
    xs: tuple
    want: str # space; space! reason; ...

CASES = {}
def case(name, want, run, /, *shapes, **layers):
    CASES[name] = Case(Net(run, layers), tuple(s if torch.is_tensor(s) else numbers(*s, seed=i) for i, s in enumerate(shapes or [(2, 3, 6, 6)])), want)

conv, lin, par = (lambda i, o, k=1, **kw: nn.Conv2d(i, o, k, **kw)), nn.Linear, (lambda *s: nn.Parameter(torch.zeros(s)))
TOKENS, ROWS, LINE = (4, 5, 3), (4, 3), (2, 3, 9)


def on(name, want, f, n=8, /, **layers):
    "conv a (3 -> 8), what `f` does to its output, conv o (n -> 2)"
    case(name, want, lambda s, x: s.o(f(s, s.a(x))), a=conv(3, 8), o=conv(n, 2), **layers)

def on_tokens(name, want, f, n=8, /, **layers):
    case(name, want, lambda s, x: s.o(f(s, s.a(x))), TOKENS, a=lin(3, 8), o=lin(n, 2), **layers)

def pair(name, want, f, n=8, m=8, /, **layers):
    "What `f` makes of the outputs of two convolutions"
    case(name, want, lambda s, x: s.o(f(s.a(x), s.b(x))), a=conv(3, 8), b=conv(3, m), o=conv(n, 2), **layers)

SAME, BOTH, ONE = 'a:8>o', 'a,b:8>o', 'a:1>o'

# -- element by element
pair('add', BOTH, lambda a, b: a+b)
pair('add with alpha', BOTH, lambda a, b: torch.add(input=a, other=b, alpha=2))
pair('multiply', BOTH, lambda a, b: a*b.sigmoid())
pair('in place', BOTH, lambda a, b: a.relu_().add_(b).mul_(2).clamp_(-1, 1))
pair('three terms', BOTH, lambda a, b: torch.addcmul(a, b, b).lerp(b, .3))
pair('maximum', BOTH, lambda a, b: torch.max(a, other=b).maximum(a*.5))
pair('where', BOTH, lambda a, b: torch.where(a > 0, a, b))
pair('copy_', BOTH, lambda a, b: torch.empty_like(a).copy_(b)+a)
pair('comparisons', BOTH, lambda a, b: a*((a > -.2) & ~(b > .5) | (a == b)))
pair('broadcast_tensors', BOTH, lambda a, b: torch.mul(*torch.broadcast_tensors(a, b.mean((2, 3), keepdim=True))))
on('augmented assignment', SAME, lambda s, h: s.aug(h), aug=Net(lambda s, h: exec('h += h*h; h *= .5; h -= .1; h /= 1.5; h **= 2; h %= .7') or h.mul(1.), {}))
on('powers and roots', SAME, lambda s, h: (2**h).sqrt()+(1-h)//.3+h.frac()+torch.exp2(h)+abs(h))
on('activations', SAME, lambda s, h: F.gelu(h)+F.silu(h, True)+F.hardswish(h)+F.mish(h)+F.elu(h)+F.leaky_relu(h, .2)+F.softplus(h)+F.relu6(h)+F.logsigmoid(h))
on('to the type of another', SAME, lambda s, h: h*s.p.view(2, 5).to(h).sum()+s.p[:1].type_as(h), p=par(10))
on('dropouts', SAME, lambda s, h: F.dropout2d(s.d(F.alpha_dropout(h)), training=False), d=nn.Sequential(nn.Dropout(), nn.FeatureAlphaDropout()))
on('in place on a view', 'a:4>o', lambda s, h: h.view(2, 2, -1, 6, 6).mul_(2.).view_as(h)+h)
on('masked_fill', SAME, lambda s, h: h.masked_fill(h.isnan(), 0.).masked_fill_((h > 0).logical_and(h < .2), .1))
on('raw map, one channel', SAME, lambda s, h: h*s.m+s.m, m=torch.zeros(1, 1, 6, 6))
on('scalar parameter', SAME, lambda s, h: h*s.g, g=par())
on('layer scale', 'a:8>o!the raw parameter g', lambda s, h: h*s.g, g=par(8, 1, 1))
on('layer scale, reshaped', 'a:8>o!stay whole', lambda s, h: h*s.g.view(1, -1, 1, 1), g=par(8))
on('constant per channel', 'a:8>o!the raw buffer g', lambda s, h: h+s.g, g=torch.zeros(1, 8, 1, 1))
on_tokens('position table', 'a:8>o!the raw parameter p', lambda s, h: h+s.p, p=par(1, 5, 8))
on_tokens('position table of one width', SAME, lambda s, h: h+s.t(h), t=Net(lambda s, h: s.p[:, :h.shape[1]], dict(p=torch.zeros(1, 9, 1))))
on_tokens('class token', 'a:8>!side by side', lambda s, h: torch.cat([s.t.expand(len(h), -1, -1), h], 1), t=par(1, 1, 8))
case('drop path', 'a,b:8>o', lambda s, x: s.o(s.a(x)+s.b(x)*torch.bernoulli(torch.ones(2, 1, 1, 1, dtype=x.dtype))), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2))
case('residual', 'a,b:8>c,o;c:6>b', lambda s, x: (lambda h: s.o(F.relu(h+s.b(F.relu(s.c(h))))))(s.a(x)),
    a=conv(3, 8, 3), c=conv(8, 6), b=conv(6, 8), o=conv(8, 2))
case('raw input added', 'a:3>o!channels that stay whole', lambda s, x: s.o(s.a(x)+x), a=conv(3, 3), o=conv(3, 2))

# -- gates
on('SE', 'a,g:8>f,o;f:4>g', lambda s, h: h*s.g(F.relu(s.f(F.adaptive_avg_pool2d(h, 1)))).sigmoid(), f=conv(8, 4), g=conv(4, 8))
on('SE of linear layers', 'a,g:8>f,o;f:4>g', lambda s, h: h*s.g(F.relu(s.f(h.mean((2, 3))))).sigmoid()[..., None, None], f=lin(8, 4), g=lin(4, 8))
on('spatial gate', 'a:8>g,o;g:1>!over other channels', lambda s, h: h*s.g(h).sigmoid(), g=conv(8, 1))
on('gate of means over channels', 'a:1>g,o!takes the mean;g:1>!over other channels',
    lambda s, h: h*s.g(torch.cat([h.mean(1, keepdim=True), h.amax(1, True)], 1)).sigmoid(), g=conv(2, 1, 3, padding=1))
on('convolution over channels', 'a,g:1>g,o!reads them as positions',
    lambda s, h: h*s.g(h.mean((2, 3)).unsqueeze(1)).sigmoid().view(len(h), -1, 1, 1), g=nn.Conv1d(1, 1, 3, padding=1))
case('FiLM', 'a,g:8>o', lambda s, x: (lambda h, g: s.o(h*(1+g[0])+g[1]))(s.a(x),
    s.g(x.mean((2, 3)))[..., None, None].chunk(2, 1)), a=conv(3, 8), g=lin(3, 16), o=conv(8, 2))

# -- side by side
pair('cat', 'a:8>o;b:4>o', lambda a, b: torch.cat([a, b], 1), 12, 4)
pair('cat by keyword', 'a:8>o;b:4>o', lambda a, b: torch.cat(tensors=(a, b), axis=-3), 12, 4)
pair('nested cat', 'a:8>o;b:4>o', lambda a, b: torch.cat([torch.cat([a, b], 1), a.relu()], 1), 20, 4)
pair('hstack', 'a:8>o;b:4>o', lambda a, b: torch.hstack([a, b]), 12, 4)
pair('cat of places', BOTH, lambda a, b: torch.cat([a, b], 2))
pair('dstack', BOTH, lambda a, b: torch.dstack([a, b]))
pair('stack', BOTH, lambda a, b: torch.stack([a, b], 1).amax(1))
pair('stack, dealt', BOTH, lambda a, b: torch.stack([a, b], 2).flatten(1, 2), 16)
case('cat with the input', 'a:8>o', lambda s, x: s.o(torch.cat([x, s.a(x)], 1)), a=conv(3, 8), o=conv(11, 2))
case('dense', 'a:8>b,c,o;b:6>c,o;c:4>o', lambda s, x: (
    lambda h: (lambda h: s.o(F.relu(torch.cat([h, s.c(h)], 1))))(torch.cat([h, s.b(h)], 1)))(s.a(x)), a=conv(3, 8), b=conv(8, 6), c=conv(14, 4), o=conv(18, 2))
case('max and mean side by side', SAME,
    lambda s, x: (lambda h: s.o(torch.cat([F.adaptive_max_pool2d(h, 1), F.adaptive_avg_pool2d(h, 1)], 1).flatten(1)))(s.a(x)), a=conv(3, 8), o=lin(16, 2))
case('shortcut with new zeros', 'a,b:8>b,o;b:4>o!channels that stay whole',
    lambda s, x: (lambda h: s.o(s.b(h)+torch.cat([h, h.new_zeros(2, 4, 6, 6)], 1)))(s.a(x)), a=conv(3, 8), b=conv(8, 12), o=conv(12, 2))
case('shortcut with padded channels', 'a:8>b!pads channels;b:12>o!stay whole',
    lambda s, x: (lambda h: s.o(s.b(h)+F.pad(h, (0, 0, 0, 0, 2, 2))))(s.a(x)), a=conv(3, 8), b=conv(8, 12), o=conv(12, 2))

# -- moved
case('flatten', SAME, lambda s, x: s.o(s.a(x).flatten(1)), a=conv(3, 8), o=lin(8*36, 2))
case('flatten, channels last', SAME, lambda s, x: s.o(s.a(x).permute(0, 2, 3, 1).reshape(len(x), -1)), a=conv(3, 8), o=lin(8*36, 2))
case('tokens', SAME, lambda s, x: s.o(s.a(x).flatten(2).transpose(1, 2)), a=conv(3, 8), o=lin(8, 2))
case('token mixing', 'a:1>m!as positions;m:1>o!as positions', lambda s, x: s.o(s.m(s.a(x).mT).mT), TOKENS, a=lin(3, 8), m=lin(5, 5), o=lin(8, 2))
on('there and back', SAME, lambda s, h: h.movedim(1, -1).unsqueeze(0).squeeze().swapaxes(-1, 1).transpose(2, 3).permute(0, 1, 3, 2))
on('transposed in place', SAME, lambda s, h: h.transpose_(1, 2).unsqueeze_(-1).squeeze_(-1).transpose(1, 2))
on('batch and channels merged', SAME, lambda s, h: F.avg_pool2d(h.reshape(-1, 1, 6, 6), 2).view(2, -1, 3, 3))
on('chunk', 'a:4>o', lambda s, h: (lambda a, b: a*b.sigmoid())(*h.chunk(2, axis=1)), 4)
on('GLU', 'a:4>o', lambda s, h: F.glu(h, 1), 4)
on('unpacked', 'a:4>o', lambda s, h: (lambda a, b: a*b)(*h.unflatten(1, (2, -1)).transpose(0, 1)), 4)
on('split of fixed sizes', 'a:4>o!fixed positions', lambda s, h: (lambda a, b: a*b)(*h.split([4, 4], 1)), 4)
on('slice', 'a:8>o!fixed positions', lambda s, h: h[:, :4], 4)
on('slice of everything', SAME, lambda s, h: h[:, :, 1:][:, :64, ..., None][..., 0][:])
on('fixed places', SAME, lambda s, h: h.narrow(2, 1, 3).index_select(3, torch.tensor([0, 2])))
on('chosen channels', 'a:8>o!fixed positions', lambda s, h: h[:, [0, 2, 4]], 3)
on('shuffle by view', 'a:4>o', lambda s, h: h.view(2, 2, h.shape[1]//2, 6, 6).transpose(1, 2).reshape(2, -1, 6, 6))
on('shuffle', 'a:2>o', lambda s, h: s.m(h), m=nn.ChannelShuffle(4))
on('maxout', 'a:4>o', lambda s, h: h.unflatten(1, (-1, 2)).amax(2), 4)
on('maxout by keyword', 'a:4>o', lambda s, h: torch.reshape(h, shape=(2, -1, 2, 6, 6)).amax(2), 4)
case('pixel shuffle', 'a:4>o', lambda s, x: s.o(F.pixel_shuffle(s.a(x), 2)), a=conv(3, 16), o=conv(4, 2))
on('pixel unshuffle', SAME, lambda s, h: F.pixel_unshuffle(h, 2), 32)
on('repeat', SAME, lambda s, h: h.repeat(1, 2, 1, 1), 16)
on('tile', SAME, lambda s, h: h.tile(2, 1, 1), 16)
on('repeat_interleave', SAME, lambda s, h: h.repeat_interleave(2, 1), 16)
on('repeated unequally', 'a:8>o!of its own', lambda s, h: h.repeat_interleave(torch.tensor([1, 2]*4), 1), 12)
on('expand', SAME, lambda s, h: h.mean((2, 3), keepdim=True).expand_as(h)-h.amax((2, 3))[..., None, None].expand(-1, -1, 6, 6))
on('flip', SAME, lambda s, h: h.flip(1))
on('fliplr', SAME, lambda s, h: h.fliplr())
on('flipped and added', 'a:4>o', lambda s, h: h+h.flip((1,)))
on('roll of places', SAME, lambda s, h: h.roll((1, 2), (2, 3)).flip(2).rot90(1, (2, 3)))
on('roll of channels', 'a:8>o!fixed distance', lambda s, h: h.roll(1, 1))
on('roll of everything', 'a:8>o!fixed distance', lambda s, h: torch.roll(h, 36))
on('shift by padding', 'a:8>!pads channels', lambda s, h: F.pad(h, (0, 0, 0, 0, 1, -1)))
on('unbind', 'a:1>o!unbind', lambda s, h: sum(h.unbind(1)).unsqueeze(1), 1)
case('windows', SAME, lambda s, x: s.o(s.a(x).unfold(dimension=2, size=3, step=1).mean(-1)), LINE, a=nn.Conv1d(3, 8, 1), o=nn.Conv1d(8, 2, 1))
case('im2col', SAME, lambda s, x: s.o(F.unfold(s.a(x), 3)), a=conv(3, 8), o=nn.Conv1d(72, 2, 1))
on('fold', 'a:8>!fold', lambda s, h: F.fold(F.unfold(h, 2), (6, 6), 2))
case('filled piece by piece', 'b:4>!__setitem__;a:4>!__setitem__',
    lambda s, x: (lambda z: z.__setitem__((slice(None), slice(0, 4)), s.b(x))
    or z.__setitem__((slice(None), slice(4, 8)), s.a(x)) or s.o(z))(x.new_zeros(2, 8, 6, 6)), a=conv(3, 4), b=conv(3, 4), o=conv(8, 2))

# -- pools and sizes, in one to three dimensions
for k in (1, 2, 3):
    C, T, size = (getattr(nn, f'Conv{k}d'), getattr(nn, f'ConvTranspose{k}d'), (2, 3, *[6]*k))
    f = lambda name: getattr(F, f'{name}{k}d')
    layers = lambda *shape, **kw: dict(a=C(3, 8, 1), o=C(8, 2, 1))
    for name, pool in dict(max=lambda h, k=k, p=f('max_pool'): p(h, 2),
        avg=lambda h, p=f('avg_pool'): p(h, 2, 1), lp=lambda h, p=f('lp_pool'): p(h.abs()+.1, 2, 2),
                           adaptive_max=lambda h, p=f('adaptive_max_pool'): p(h, 2), adaptive_avg=lambda h, p=f('adaptive_avg_pool'): p(h, 3),
                           indices=lambda h, p=f('max_pool'), u=f('max_unpool'): u(*p(h, 2, return_indices=True), 2),
                           interpolate=lambda h: F.interpolate(h, scale_factor=2), pad=lambda h, k=k: F.pad(h, [1, 2]*k, mode='reflect')).items():
        case(f'{name} {k}d', SAME, lambda s, x, pool=pool: s.o(pool(s.a(x))), size, **layers())
    for name, kw, want, n in [('conv', {}, 'a:8>d;d:12>o', 12), ('grouped', dict(groups=4), 'a,d:4>o', 12),
        ('depthwise', dict(groups=8), SAME, 8), ('multiplied', dict(groups=8), SAME, 16)]:
        for kind, make in (('', C), (' transposed', T)):
            bias = (k+len(kind))%2 == 0
            case(f'{name}{kind} {k}d', want, lambda s, x: s.o(F.relu(s.d(F.relu(s.a(x))))), size,
                a=C(3, 8, 1, bias=not bias), d=make(8, n, 3, bias=bias, padding=1, **kw), o=C(n, 2, 1))
    case(f'norms {k}d', SAME, lambda s, x: s.o(s.j(s.i(s.d(s.c(s.b(s.a(x))))))), size, a=C(3, 8, 1),
        b=getattr(nn, f'BatchNorm{k}d')(8), c=getattr(nn, f'BatchNorm{k}d')(8, affine=False),
         d=getattr(nn, f'BatchNorm{k}d')(8, affine=False, track_running_stats=False),
         i=getattr(nn, f'InstanceNorm{k}d')(8, affine=True, track_running_stats=True), j=getattr(nn, f'InstanceNorm{k}d')(8), o=C(8, 2, 1))
on('upsample', SAME, lambda s, h: s.u(h), u=nn.Upsample(scale_factor=2, mode='bilinear'))
on('other paddings', 'a:8>b;b:6>c;c:8>o', lambda s, h: s.c(s.b(h)),
    b=conv(8, 6, 3, padding=1, padding_mode='reflect'), c=conv(6, 8, 3, padding=1, padding_mode='circular'))
on('one channel', 'a:8>b;b:1>c!single channel;c:8>o', lambda s, h: s.c(s.b(h)), b=conv(8, 1), c=conv(1, 8))
case('unbatched', 'a:8>d;d:6>o', lambda s, x: s.o(F.max_pool2d(s.d(F.relu(s.a(x))), 2)), (3, 6, 6), a=conv(3, 8), d=nn.ConvTranspose2d(8, 6, 2), o=conv(6, 2))
case('batch of one, squeezed', SAME, lambda s, x: s.o(s.a(x).mean((2, 3), keepdim=True).squeeze()), (1, 3, 6, 6), a=conv(3, 8), o=lin(8, 2))
on('grid_sample', 'a:8>!grid_sample', lambda s, h: F.grid_sample(h, h.new_zeros(2, 4, 4, 2)+.3, align_corners=False))

# -- norms
norm = lambda n, g, **kw: nn.GroupNorm(g, n, **kw)
on('group norm', 'a:4>o', lambda s, h: s.n(h), n=norm(8, 4))
on('group norm without affine', 'a:4>o', lambda s, h: s.n(h), n=norm(8, 4, affine=False))
on('group norm of single channels', SAME, lambda s, h: s.n(h), n=norm(8, 8))
on('group norm over everything', 'a:1>o!over all channels', lambda s, h: s.n(h), n=norm(8, 1))
on('group norm by function', 'a:4>o!fixed number of groups', lambda s, h: F.group_norm(h, 4))
case('group norm twice', 'a,b:4>b,o', lambda s, x: s.o(s.n(s.b(s.n(s.a(x))))), a=conv(3, 8), b=conv(8, 8), n=norm(8, 4, affine=False), o=conv(8, 2))
case('group norm over a cat', 'a:2>o;b:2>o', lambda s, x: s.o(s.n(torch.cat([s.a(x), s.b(x)], 1))), a=conv(3, 8), b=conv(3, 8), n=norm(16, 4), o=conv(16, 2))
case('group norm across a cat', 'a:2>o;a,b:1>o!of a group together;b:1>o!of a group together',
    lambda s, x: s.o(s.n(torch.cat([s.a(x), s.b(x)], 1))), a=conv(3, 8), b=conv(3, 4), n=norm(12, 4), o=conv(12, 2))
case('group norm beside raw channels', 'a:3>o', lambda s, x: s.o(s.n(torch.cat([x, s.a(x)], 1))), (2, 4, 5, 5), a=conv(4, 12), n=norm(16, 4), o=conv(16, 2))
on_tokens('layer norm', r'a:8>o!over all channels \(layer_norm', lambda s, h: s.n(h), n=nn.LayerNorm(8))
on('layer norm of maps', 'a:8>o!over all channels', lambda s, h: s.n(h), n=nn.LayerNorm([8, 6, 6]))
on('layer norm of places', SAME, lambda s, h: s.n(h), n=nn.LayerNorm([6, 6]))
on_tokens('RMS norm', 'a:8>o!rms_norm', lambda s, h: s.n(h), n=nn.RMSNorm(8))
on('local response norm', 'a:8>!local_response_norm', lambda s, h: F.local_response_norm(h, 3))
on('PReLU', SAME, lambda s, h: s.n(h), n=nn.PReLU(8))
on('PReLU of one slope', SAME, lambda s, h: s.n(h), n=nn.PReLU())
on('unit length', 'a:1>o!normalize', lambda s, h: F.normalize(h))
on('unit length over places', SAME, lambda s, h: F.normalize(h.flatten(2), dim=-1).view_as(h)/torch.linalg.vector_norm(h, dim=(2, 3), keepdim=True))
on('standardised by hand', SAME, lambda s, h: (h-h.mean((2, 3), keepdim=True))/h.std((2, 3), keepdims=True))
on('mean over everything', 'a:1>o!takes the mean', lambda s, h: h/h.mean())
on('softmax', 'a:1>o!softmax', lambda s, h: h.softmax(1))
on('softmax over places', SAME, lambda s, h: h.flatten(2).softmax(-1).view_as(h).cumsum(2))
case('softmax, dimension left out', 'a:1>o!softmax', lambda s, x: s.o(F.softmax(s.a(x), _stacklevel=5)), ROWS, a=lin(3, 8), o=lin(8, 2))

# -- weights
case('shared layer', 'a,b:8>b,o', lambda s, x: s.o(F.relu(s.b(F.relu(s.b(s.a(x)))))), a=conv(3, 8), b=conv(8, 8), o=conv(8, 2))
case('shared grouped layer', 'a,b:4>o', lambda s, x: s.o(s.b(F.relu(s.b(s.a(x))))), a=conv(3, 8), b=conv(8, 8, 3, groups=4), o=conv(8, 2))
for name, layer in dict(norm=nn.BatchNorm2d(3), slopes=nn.PReLU(3), depthwise=conv(3, 3, 3, groups=3, padding=1)).items():
    case(f'shared with raw channels: {name}', 'a:3>o!stay whole|raw channels', lambda s, x: s.o(s.d(s.a(s.d(x)))), a=conv(3, 3), d=layer, o=conv(3, 2))
case('layer on a query', 'a:6>f!stay whole;f:8>o', lambda s, x: s.o(s.f(s.a(x))+s.f(s.q)), ROWS, a=lin(3, 6), f=lin(6, 8), q=par(1, 6), o=lin(8, 2))
case('autoencoder of one weight', 'a:8>w!computes with w.weight;w:6>!computes with w.weight',
    lambda s, x: s.o(F.linear(F.relu(s.w(F.relu(s.a(x)))), s.w.weight.t())), ROWS, a=lin(3, 8), w=lin(8, 6), o=lin(8, 2))
case('convolutional autoencoder of one weight', 'a,w:8>w,o;w:6>w',
    lambda s, x: s.o(F.conv_transpose2d(F.relu(s.w(F.relu(s.a(x)))), s.w.weight)), a=conv(3, 8), w=conv(8, 6, 3), o=conv(8, 2))
case('standardised weight', 'a:8>!computes its weight',
    lambda s, x: s.o(F.conv2d(s.a(x), s.w.weight-s.w.weight.mean((1, 2, 3), keepdim=True), s.w.bias)), a=conv(3, 8), w=conv(8, 6), o=conv(6, 2))
case('weight made by a layer', 'a:5>!computes its weight;g:5>!computes its weight',
    lambda s, x: s.o(F.linear(s.a(x), s.g(x).mean(0).view(8, 5))), ROWS, a=lin(3, 5), g=lin(3, 40), o=lin(8, 2))
case('bias made by a layer', 'g:8>!computes its weight;w:8>o!computes its weight',
    lambda s, x: s.o(F.linear(x, s.w.weight, s.g(x).mean(0))), ROWS, w=lin(3, 8), g=lin(3, 8), o=lin(8, 2))
case('two weights in a module', 'f.w:16>f;f.v:8>o', lambda s, x: s.o(s.f(x)), ROWS,
    f=Net(lambda s, x: F.linear(F.relu(F.linear(x, s.w)), s.v), dict(w=par(16, 3), v=par(8, 16))), o=lin(8, 2))
on('filters in a buffer', SAME, lambda s, h: F.conv2d(h, s.k, groups=h.shape[1]), k=torch.zeros(8, 1, 3, 3))
on('one filter for all', 'a:8>!computes its weight', lambda s, h: F.conv2d(h, s.k.expand(8, -1, -1, -1), groups=8), k=torch.zeros(1, 1, 3, 3))
on('filters made by a layer', 'a:8>b!computes its weight;b:8>!computes its weight',
    lambda s, h: F.conv2d(h.reshape(1, 16, 6, 6), s.b(h)[..., :3, :3].reshape(16, 1, 3, 3), groups=16).view(2, 8, 4, 4), b=conv(8, 8))

# -- networks within
case('bilinear', 'a:8>!bilinear;b:6>!bilinear', lambda s, x: s.o(s.m(s.a(x), s.b(x))), ROWS, a=lin(3, 8), b=lin(3, 6), m=nn.Bilinear(8, 6, 5), o=lin(5, 2))
on_tokens('attention by einsum', 'a:8>v!einsum;v:6>!einsum',
    lambda s, h: torch.einsum('bij,bjc->bic', torch.einsum('bic,bjc->bij', h, h).softmax(-1), s.v(h)), 6, v=lin(8, 6))
on_tokens('attention by matmul', 'a:8>!matmul', lambda s, h: (h @ h.mT).softmax(-1) @ h)
on_tokens('attention by function', 'a:8>!scaled_dot_product', lambda s, h: F.scaled_dot_product_attention(h, h, h))
on_tokens('multi-head attention', r'a:8>!m \(MultiheadAttention\) mixes', lambda s, h: s.m(h, h, h)[0], m=nn.MultiheadAttention(8, 2, batch_first=True))
on_tokens('encoder layer', 'a,m.linear2:8>m.linear1,o!mixes;m.linear1:16>m.linear2', lambda s, h: s.m(h),
    m=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))

# -- recurrent layers: one space per module, which it reads itself
pack,unpack = nn.utils.rnn.pack_padded_sequence, lambda p: nn.utils.rnn.pad_packed_sequence(p)[0]
for kind,cls in dict(LSTM=nn.LSTM, GRU=nn.GRU, RNN=nn.RNN, ReLU=lambda *a, **kw: nn.RNN(*a, nonlinearity='relu', **kw)).items():
    on_tokens(kind, 'a:8>m;m:6>m,o', lambda s, h: s.m(h)[0], 6, m=cls(8, 6))
    on_tokens(f'{kind} of two layers', 'a:8>m;m:6>m,o', lambda s, h: s.m(h)[0], 6, m=cls(8, 6, 2, batch_first=True, bias=False))
    on_tokens(f'{kind} both ways', 'a:8>m;m:6>m,o', lambda s, h: s.m(h)[0], 12, m=cls(8, 6, 2, bidirectional=True, batch_first=True))
for kind,cls in dict(LSTMCell=nn.LSTMCell, GRUCell=nn.GRUCell, RNNCell=nn.RNNCell).items():
    def steps(s, h, two=kind == 'LSTMCell'):
        y,out = None,[]
        for t in h.unbind(1):
            y = s.m(t, y)
            out.append(y[0] if two else y)
        return torch.stack(out, 1)
    on_tokens(kind, 'a:8>m;m:6>m,o', steps, 6, m=cls(8, 6))
on_tokens('LSTM, last state', 'a:8>m;m:6>m,o', lambda s, h: (lambda h, c: torch.cat([h[-1], c[0]], 1))(*s.m(h)[1]), 12, m=nn.LSTM(8, 6, 2))
on_tokens('GRU, states of both ways', 'a:8>m;m:6>m,o', lambda s, h: s.m(h)[1].transpose(0, 1).flatten(1),
    12, m=nn.GRU(8, 6, bidirectional=True, batch_first=True))
on_tokens('LSTM, packed', 'a:8>m;m:6>m,o', lambda s, h: unpack(s.m(pack(h, [4, 4, 3, 2, 1]))[0]), 6, m=nn.LSTM(8, 6))
on_tokens('LSTM, packed and unsorted', 'a:8>m;m:6>m,o', lambda s, h: unpack(s.m(pack(h, [4, 1, 3, 2, 4], enforce_sorted=False))[0]), 6, m=nn.LSTM(8, 6))
on_tokens('LSTM, one sequence', 'a:8>m;m:6>m,o', lambda s, h: s.m(h[0])[0], 6, m=nn.LSTM(8, 6))
on_tokens('encoder and decoder', 'a:8>e,d;e,d:6>e,d,o', lambda s, h: s.d(h, s.e(h)[1])[0], 6, e=nn.LSTM(8, 6), d=nn.LSTM(8, 6))
on_tokens('state from a layer', 'a:8>f,m;f,m:6>m,o', lambda s, h: s.m(h, s.f(h.mean(0))[None].tanh())[0], 6, f=lin(8, 6), m=nn.GRU(8, 6))
on_tokens('learned first state', 'a:8>m;m:6>m,o', lambda s, h: s.m(h, s.p)[0], 6, p=par(1, 5, 6), m=nn.GRU(8, 6))
on_tokens('first state, spread', 'a:8>m;m:6>m,o!given, and not zero',
    lambda s, h: s.m(h, s.p.expand(-1, 5, -1).contiguous())[0], 6, p=par(1, 1, 6), m=nn.GRU(8, 6))
on_tokens('projected states', 'a:8>!projects its states', lambda s, h: s.m(h)[0], 3, m=nn.LSTM(8, 6, proj_size=3))
on_tokens('computed recurrent weights', 'a:8>!computes its weights', lambda s, h: s.w(h), 6,
    w=Net(lambda s, h: torch._VF.gru(h, h.new_zeros(1, 5, 6), [w*2 for w in s.m._flat_weights], True, 1, 0., False, False, False)[0], dict(m=nn.GRU(8, 6))))
on_tokens('weights dropped', 'a:8>m.module;m.module:6>m,o', lambda s, h: s.m(h)[0], 6, m=WeightDropout(nn.LSTM(8, 6), .5))
on_tokens('one LSTM twice', 'a,m:8>m,o', lambda s, h: s.m(s.m(h)[0])[0], 8, m=nn.LSTM(8, 8))
case('words', 'm:6>m,o', lambda s, i, x: s.o(s.m(s.e(i)+x)[0]), torch.tensor([[0, 1, 2], [3, 4, 5]]),
    (2, 3, 4), e=nn.Embedding(6, 4), m=nn.LSTM(4, 6), o=lin(6, 2))
on_tokens('graph', 'a:8>!matmul', lambda s, h: torch.matmul(s.m, h), m=torch.zeros(5, 5))
case('embedding', 'a:8>o', lambda s, i, x: s.o(F.relu(s.a(torch.cat([s.e(i), x], 1)))),
    torch.tensor([0, 1, 2, 3]), ROWS, e=nn.Embedding(5, 4), a=lin(7, 8), o=lin(8, 2))
case('checkpointed', SAME, lambda s, x: s.o(checkpoint(s.a, x, use_reentrant=False).relu()), a=conv(3, 8), o=conv(8, 2))
case('several inputs and outputs', 'a:8>o,p', lambda s, x, y: dict(a=s.o(s.a(x)), b=(s.p(s.a(y)), [x], None)),
    (2, 3, 6, 6), (2, 3, 6, 6), a=conv(3, 8), o=conv(8, 2), p=conv(8, 3))
case('output beside a constant', SAME, lambda s, x: (s.o(s.a(x)), torch.zeros(())), a=conv(3, 8), o=conv(8, 2))
case('input changed in place', SAME, lambda s, x: s.o(s.a(x.mul_(2).relu_())), a=conv(3, 8), o=conv(8, 2))
case('buffer written', 'a:8>o!the raw buffer m',
    lambda s, x: (lambda h: s.o(h-s.m.copy_(h.mean((0, 2, 3))).view(1, -1, 1, 1)))(s.a(x)), a=conv(3, 8), m=torch.zeros(8), o=conv(8, 2))

class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x*x.sigmoid()
    @staticmethod
    def backward(ctx, g): return g

on('function of its own', SAME, lambda s, h: Swish.apply(h))


@pytest.mark.parametrize('name', CASES)
def test_spaces_and_exact_cuts(name):
    c = CASES[name]
    model = fill(c.net)
    cmap = trace_channels(model, c.xs)
    got, want = found(cmap), [w.partition('!')[::2] for w in c.want.split(';')]
    assert [g[0] for g in got] == [w[0] for w in want], cmap
    for (text, why), (_, reason) in zip(got, want):
        single = why and text.split(':')[1][:2] == '1>' and not reason # one unit: nothing to cut, whatever the reason
        assert single or (re.search(reason, why) if reason else not why), f'{text}: {why}'
    if cmap.cuttable: check_exact(model, c.xs, cmap)
    else:
        with pytest.raises(ValueError, match=want[0][1] or 'single'): cmap.cut(.5)


def test_what_a_network_without_layers_says():
    for net in (nn.ReLU(), nn.Sequential(nn.Flatten())):
        cmap = trace_channels(net, numbers(2, 3))
        assert not len(cmap) and '0 of 0 spaces' in repr(cmap)
        with pytest.raises(ValueError, match='Nothing to cut'): cmap.cut(.5)


@pytest.mark.parametrize('make', [lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    lambda: nn.InstanceNorm2d(8), lambda: nn.GroupNorm(4, 8, affine=False),
                                  lambda: nn.GroupNorm(8, 8), lambda: nn.PReLU(8),
                                  lambda: nn.Conv2d(8, 8, 3, groups=8), lambda: nn.ConvTranspose2d(8, 8, 3, groups=2)])
def test_attributes_say_the_new_size(make):
    "Those of layers without a tensor, too: `InstanceNorm2d` warns in each forward where they do not"
    model = fill(nn.Sequential(nn.Conv2d(3, 8, 1), make(), nn.Conv2d(8, 2, 1)))
    small = trace_channels(model, numbers(2, 3, 6, 6)).cut(.5).apply(model)
    fresh = make()
    for a in 'num_features num_channels num_parameters in_channels out_channels num_groups groups'.split():
        if hasattr(fresh, a): assert getattr(small[1], a) == getattr(fresh, a)//(2 if getattr(fresh, a) > 1 else 1), a
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small(numbers(2, 3, 6, 6))


def test_tied_layers_keep_one_weight():
    model = Net(lambda s, x: s.o(s.c(F.relu(s.b(F.relu(s.a(x)))))), dict(a=lin(3, 8), b=lin(8, 8), c=lin(8, 8, bias=False), o=lin(8, 2)))
    model.c.weight = model.b.weight
    fill(model)
    cmap = trace_channels(model, numbers(4, 3))
    check_exact(model, (numbers(4, 3),), cmap)
    small = cmap.cut(.5).apply(model)
    assert small.c.weight is small.b.weight and (small.c.in_features, small.c.out_features) == (4, 4)


# what the tracer cannot see; the comparison with the masked twin finds it and says what to do

FIXED = {
    'width in a view': Net(lambda s, x: s.o(s.a(x).mean((2, 3)).view(-1, 8)), dict(a=conv(3, 8), o=lin(8, 2))),
    'number of groups': Net(lambda s, x: s.o(F.conv2d(s.a(x), s.k, groups=8)), dict(a=conv(3, 8), k=torch.zeros(8, 1, 3, 3), o=conv(8, 2))),
    'size of groups': Net(lambda s, x: (
    lambda h: s.o(h.view(2, h.shape[1]//4, 4, 6, 6).transpose(1, 2).reshape(2, -1, 6, 6)))(s.a(x)), dict(a=conv(3, 8), o=conv(8, 2))),
    'tensor under another name': Net(lambda s, x: (lambda h: (setattr(h, 'data', s.b(x)), s.o(h))[1])(s.a(x)), dict(a=conv(3, 8), b=conv(3, 8), o=conv(8, 2))),
}

@pytest.mark.parametrize('name', FIXED)
def test_what_is_written_as_a_number_is_found_out(name):
    model = fill(FIXED[name])
    cmap = trace_channels(model, numbers(2, 3, 6, 6))
    with pytest.raises(ValueError, match=r'(?s): the smaller network.*pin=\[\.\.\.\]'): Cut(cmap, keep(cmap, 'shuffled')).apply(model)
