"""Reference implementations of how others store keys and values, to compare our caches with.

They compute what a reader of such a cache would decode, in float32 and without packing; the real model runs around them
(attention.py). Each file names its source, follows its settings, and says where it has to differ.
"""

import torch

from .exllama import Exl3
from .gear import Gear
from .ggml import Q8, Refitted, Rotated, SignedScale
from .kivi import Kivi
from .kvarn import Kvarn
from .kvquant import KvQuant
from .microscaling import mxfp4, mxint8, nvfp4, nvint4
from .oscar import Oscar
from .outlier_suppression import OutlierSuppression
from .qaq import Qaq
from .saw_int4 import SawInt4
from .scheme import Exact, Scheme
from .squat import Squat
from .turboquant import TurboQuant, TurboQuantVllm

_Q4, _Q5 = SignedScale("q4_0", 4), SignedScale("q5_0", 5)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _Q4, Rotated(_Q4), _Q5, Rotated(_Q5), Q8(), Rotated(Q8()),
        mxint8(), mxfp4(), nvfp4(), nvint4(), nvint4(with_hadamard=True),
        Kivi(2), Kivi(4), KvQuant(2), KvQuant(3), KvQuant(4), Gear(2), Gear(4), Qaq(), OutlierSuppression(),
        TurboQuant(3), TurboQuant(4), TurboQuantVllm(3), TurboQuantVllm(4), SawInt4(), Kvarn(4), Kvarn(2),
        Rotated(Refitted("ik_q4_0", 4), whole_values=True), Exl3(), Oscar(), Squat(),
    )
}  # fmt: skip
FLOATS: dict[str, Scheme] = {
    "f32": Exact("f32", torch.float32),
    "f16": Exact("f16", torch.float16),
    "bf16": Exact("bf16", torch.bfloat16),
}
