"""Import this before anything that imports torchvision (lpips, diffusers).

A torchvision built for CUDA cannot load its compiled operators beside a CPU build of torch; its Python
part then fails on `operator torchvision::nms does not exist` and takes its importers down with it,
though none of them calls the operator. Declaring the two schemas that it registers fakes for lets the
import through. Where the plain import works, or torchvision is absent, this module does nothing.
"""

import importlib
import sys

import torch

_library = None

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
