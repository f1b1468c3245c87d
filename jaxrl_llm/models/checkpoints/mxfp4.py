"""Tensors in MXFP4 (OCP Microscaling Formats 1.0, 2023), as GPT-OSS is published: read as the numbers they stand for.

A number has four bits, 1 of sign, 2 of exponent and 1 of mantissa, and 32 of them share a power of two.
"""

from __future__ import annotations

import numpy as np
from ml_dtypes import bfloat16

from jaxrl_llm.models.checkpoints.weights import Index, TensorSource

_BLOCKS, _SCALES = "_blocks", "_scales"
PACKED = (_BLOCKS, _SCALES)
"""How names of tensors of bytes end."""

_SHARING, _BIAS = 32, 127
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_POSITIVE, *(-number for number in _POSITIVE)], np.float32)
"""What four bits stand for."""


class Unpacked:
    """A checkpoint's tensors, `x` `[E, in, out]` in place of `x_blocks` `[E, out, in/32, 16]` and its `x_scales`.

    Every number is one of bfloat16, so that nothing is rounded.
    """

    def __init__(self, source: TensorSource):
        """Tensors that are not packed are those of `source`."""
        self._source, shapes = source, dict(source.shapes)
        self._packed = [
            name.removesuffix(_BLOCKS)
            for name, shape in shapes.items()
            if name.endswith(_BLOCKS)
            and (len(shape), shape[-1]) == (4, _SHARING // 2)
            and shapes.get(name.removesuffix(_BLOCKS) + _SCALES) == shape[:-1]
        ]
        for name in self._packed:
            experts, out, groups, _ = shapes.pop(name + _BLOCKS)
            del shapes[name + _SCALES]
            shapes[name] = (experts, groups * _SHARING, out)
        self.shapes = shapes

    def read(self, name: str, index: Index) -> np.ndarray:
        """As the tensors' source; of packed ones an expert at a time is unpacked."""
        if name not in self._packed:
            return self._source.read(name, index)
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shapes[name], strict=True)]
        sizes = [stop - start for start, stop in bounds]
        made = np.empty(sizes, bfloat16)
        (first, _), (start, stop), out = bounds
        groups = slice(start // _SHARING, -(-stop // _SHARING))
        within = slice(start - groups.start * _SHARING, stop - groups.start * _SHARING)
        for number in range(sizes[0]):
            at = (slice(first + number, first + number + 1), slice(*out), groups)
            blocks = self._source.read(name + _BLOCKS, (*at, slice(None)))[0]
            scales = self._source.read(name + _SCALES, at)[0]
            numbers = _NUMBERS[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*scales.shape, _SHARING)
            numbers = np.ldexp(numbers, scales[..., None].astype(np.int32) - _BIAS)
            made[number] = numbers.reshape(sizes[2], -1)[:, within].T
        return made
