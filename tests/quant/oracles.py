"""Slow and obvious versions of what the quantizer does, in float64 and without torch."""

import math

import numpy as np
from scipy.linalg import hadamard


def hlwq(row, levels, *, block=128, codebook="lloyd-max", rotate=True):
    """Codes, float16 norms, decoded weights and the scaled values of one row; `levels` for N(0,1) or ±1."""
    padded = np.concatenate([row, np.zeros(-len(row) % block)]).astype(np.float64)
    matrix = hadamard(block) / math.sqrt(block) if rotate else np.eye(block)
    codes, norms, decoded, values = [], [], [], []
    for start in range(0, len(padded), block):
        b = padded[start : start + block] @ matrix
        size = np.abs(b).max() if codebook == "absmax" else math.sqrt((b * b).sum())
        norm = np.float16(size)
        unit = 1.0 if codebook == "absmax" else math.sqrt(block)
        z = unit * b / float(norm) if norm else np.zeros(block)
        code = np.array([np.argmin([abs(v - level) for level in levels]) for v in z])
        codes.append(code)
        norms.append(norm)
        values.append(z)
        decoded.append(float(norm) * (np.asarray(levels)[code] @ matrix) / unit)
    return (
        np.concatenate(codes),
        np.array(norms),
        np.concatenate(decoded)[: len(row)],
        np.concatenate(values),
    )


def bit_stream(codes, bits):
    """Codes as one little-endian bit stream, spelt out bit by bit."""
    stream = [(int(code) >> bit) & 1 for code in codes for bit in range(bits)]
    return [sum(stream[i + k] << k for k in range(8)) for i in range(0, len(stream), 8)]
