"""Optimizers with 8-bit or 32-bit states, plain or paged.

An optimizer is a rule, its defaults and a way to store its states. Rules:
:mod:`bitsandbytes.ops.optim_rules`; storage and the step: :mod:`bitsandbytes.optim.base`.
"""

from bitsandbytes.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from bitsandbytes.optim.adam import Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit
from bitsandbytes.optim.adamw import AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from bitsandbytes.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from bitsandbytes.optim.came import CAME, CAME8bit, CAME32bit
from bitsandbytes.optim.lamb import LAMB, LAMB8bit, LAMB32bit
from bitsandbytes.optim.lars import LARS, LARS8bit, LARS32bit, PytorchLARS
from bitsandbytes.optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from bitsandbytes.optim.muon import Muon, Muon8bit, Muon32bit
from bitsandbytes.optim.optimizer import GlobalOptimManager
from bitsandbytes.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
from bitsandbytes.optim.schedulefree import ScheduleFreeAdamW, ScheduleFreeAdamW8bit, ScheduleFreeAdamW32bit
from bitsandbytes.optim.sgd import SGD, SGD8bit, SGD32bit

__all__ = [
    "CAME",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "CAME8bit",
    "CAME32bit",
    "GlobalOptimManager",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "Muon",
    "Muon8bit",
    "Muon32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PytorchLARS",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
    "ScheduleFreeAdamW",
    "ScheduleFreeAdamW8bit",
    "ScheduleFreeAdamW32bit",
]
