"A small network for benchmarks; the published ones come from `paramfx.zoo`."
from torch import nn


def small_cnn(width: int = 16, n_out: int = 10) -> nn.Module:
    "Three 3x3 convolutions of stride 2 with batch norm, one linear layer; for 32x32 pictures, 33,946 parameters"
    def stage(n_in, n): return [nn.Conv2d(n_in, n, 3, 2, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
    return nn.Sequential(*stage(3, width), *stage(width, 2*width), *stage(2*width, 4*width), nn.Flatten(), nn.Linear(64*width, n_out))
