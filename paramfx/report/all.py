"Everything of one wing, what a model costs, and pictures: `from paramfx.report.all import *`"
from .cost import *
from .plots import *
from .plan import *
