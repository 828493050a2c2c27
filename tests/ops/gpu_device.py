"""Where tests of the Triton kernels run: on the GPU if there is one, else interpreted on the CPU.

Import this before anything that imports triton.
"""

from __future__ import annotations

import os

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
