"Networks that the benchmarks train: built from standard parts, with random weights."
from torch import nn


def lenet_300_100() -> nn.Module:
    "784-300-100-10 without biases, batch norm after every layer, the output included"
    def layer(n_in, n_out): return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out)]
    return nn.Sequential(*layer(784, 300), nn.ReLU(), *layer(300, 100), nn.ReLU(), *layer(100, 10))


def small_cnn(width: int = 16, n_out: int = 10) -> nn.Module:
    "Three 3x3 convolutions of stride 2 with batch norm, one linear layer; for 32x32 pictures, 33,946 parameters"
    def stage(n_in, n): return [nn.Conv2d(n_in, n, 3, 2, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
    return nn.Sequential(*stage(3, width), *stage(width, 2*width), *stage(2*width, 4*width), nn.Flatten(), nn.Linear(64*width, n_out))


def resnet(name: str, n_out: int = 1000) -> nn.Module:
    "A torchvision network"
    from torchvision import models
    return getattr(models, name)(weights=None, num_classes=n_out)


class WideBlock(nn.Module):
    "Pre-activation block of a wide residual network"
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if n_in != n_out else None

    def forward(self, x):
        h = self.norm1(x).relu()
        x = x if self.shortcut is None else self.shortcut(h)
        return x + self.conv2(self.norm2(self.conv1(h)).relu())


def wrn_28_2(n_out: int = 10) -> nn.Module:
    "Wide residual network of 28 layers, widen factor 2: 1,467,610 parameters with 10 classes"
    widths, blocks = (16, 32, 64, 128), []
    for n_in, n, stride in zip(widths, widths[1:], (1, 2, 2)):
        blocks += [WideBlock(n_in, n, stride), *(WideBlock(n, n, 1) for _ in range(3))]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, nn.BatchNorm2d(128), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_out))


WRN_DENSE = ('0', '*.shortcut', 'fc')  # what stays dense in it: the first convolution, 1x1 shortcuts, the classifier
