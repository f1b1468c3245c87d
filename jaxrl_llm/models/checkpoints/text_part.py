"""The tensors of a text model among those of a model that also sees."""

from __future__ import annotations

import numpy as np

from jaxrl_llm.models.checkpoints.weights import Index, TensorSource
from jaxrl_llm.models.families.wrapped import text_tensor


class TextPart:
    """A checkpoint's tensors under the names that they have in the text model alone, without the others."""

    def __init__(self, source: TensorSource):
        """Of a whole model's `source`.

        Raises:
            ValueError: two tensors have the same name in the text model; names them.
        """
        self._source, self._whole = source, dict[str, str]()
        for whole in source.shapes:
            if (name := text_tensor(whole)) is None:
                continue
            if (other := self._whole.setdefault(name, whole)) != whole:
                raise ValueError(f"tensors {other!r} and {whole!r} are the same one of the text model, {name!r}")
        self.shapes = {name: source.shapes[whole] for name, whole in self._whole.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """As the whole's source."""
        return self._source.read(self._whole[name], index)
