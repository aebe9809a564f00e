"""Stores of made-up experts."""

import numpy as np
import torch

from evalsuite.experts.layout import Field, RecordLayout
from evalsuite.experts.store import DiskStore, Identity, PinnedStore

CPU = torch.device("cpu")
LAYOUT = RecordLayout((Field("codes", "int32", (6, 5)), Field("scale", "bfloat16", (6, 3))))
IDENTITY = Identity("f" * 64, "made-up", "/nowhere")


class MadeUp:
    """Experts whose bytes are all different; counts how often a layer is read."""

    layout = LAYOUT

    def __init__(self, layers=(1, 3, 4), experts=7, seed=0):
        self.layers, self.experts, self.reads = layers, experts, 0
        shape = (len(layers), experts, LAYOUT.record_bytes)
        values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        self.records = dict(zip(layers, torch.from_numpy(values), strict=True))

    def read_layer(self, layer, out):
        self.reads += 1
        out.copy_(self.records[layer])


def disk(source, folder, identity=IDENTITY):
    return DiskStore(source, identity, CPU, folder)


def pinned(source, folder):
    return PinnedStore(source, CPU)


def filled(store, layer, experts):
    """Slots that hold `experts` in that order."""
    slots = torch.zeros(len(experts), LAYOUT.record_bytes, dtype=torch.uint8)
    store.fill(layer, [(expert, slot) for slot, expert in enumerate(experts)], slots)
    return slots
