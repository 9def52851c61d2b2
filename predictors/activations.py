"""How many numbers a diffusion network keeps alive at its peak: one source for who plans memory and for who predicts it.

Counted by tracing the true architectures with fake tensors, every live storage at every operation: the peak grows in proportion to
rows, to pixels, and to the width of the first layer. The factor is a property of the family; tests trace the architectures anew.
Standard library only, since Pods read it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ATTENTION_AT_FULL_SIZE = 26.1
"""Live elements at the peak of a UNet's step, for each latent place, row and channel of its first block: SD 1.x and 2.x."""
CONVOLUTION_AT_FULL_SIZE = 15.9
"""The same where the first block has no attention: SDXL."""
TRAINING = {True: (366.0, 95.0), False: (683.0, 69.0)}
"""Live elements of a UNet's forward and backward pass, as above, by whether its first block attends: kept, and computed twice."""
JOINT_TRANSFORMER = 13.5
"""Live elements of a joint transformer's step, for each token, row and channel of its width: SD3."""
PACKED_TRANSFORMER = 20.0
"""The same for Flux, whose single blocks hold attention and feed-forward side by side."""
AUTOENCODER = 6.0
"""Live elements of a KL autoencoder's decoding, for each pixel and channel of its last block."""
TINY_AUTOENCODER = 2.1
TILE_PX = 512
"""Side of the tiles in which large pictures are decoded."""
HALF_BYTES = 2
"""Of a number in half precision, in which cards compute."""
SINGLE_BYTES = 4
TRAINED_BYTES = 16
"""Of a trained number: itself, its gradient and two moments, in single precision."""
TRAINING_ROWS = 8.0
"""Of a training's batch, prior rows included, where it says nothing."""


@dataclass(frozen=True, slots=True)
class Activations:
    """What one family keeps alive, in numbers. A latent place is `factor` x `factor` pixels."""

    step: float
    """Of one call of the network, for each row and place; a guided picture has two rows."""
    decode: float
    """Of the autoencoder, for each pixel of a picture."""
    factor: int = 8
    upcasts: bool = False
    """The autoencoder is computed in single precision where the rest is in half."""
    train: float = 0.0
    """Of a training's step, as `step`; 0 where the family is not trained."""
    frugal: float = 0.0
    """The same where activations are computed twice instead of kept."""

    def step_bytes(self, width: float, height: float, rows: float, item_bytes: int) -> int:
        """Return the peak of one call of the network."""
        return math.ceil(self.step * self._places(width, height) * rows * item_bytes)

    def train_bytes(self, width: float, height: float, rows: float, item_bytes: int, *, frugal: bool = False) -> int:
        """Return the peak of a training's step with all rows at once."""
        each = self.frugal if frugal else self.train
        return math.ceil(each * self._places(width, height) * rows * item_bytes)

    def decode_bytes(self, width: float, height: float, pictures: float, item_bytes: int, tiled: bool = False) -> int:
        """Return the peak of decoding so many pictures at once, or one after the other in tiles."""
        item_bytes = SINGLE_BYTES if self.upcasts else item_bytes
        pixels = width * height
        if tiled:
            shown = 3 * 3 * pixels * item_bytes  # Rows of finished tiles, joined twice.
            return math.ceil(self.decode * min(pixels, TILE_PX**2) * item_bytes + shown)
        return math.ceil(self.decode * pixels * pictures * item_bytes)

    def picture_bytes(self, width: float, height: float, item_bytes: int = HALF_BYTES) -> int:
        """Return what one guided picture takes in the larger of its two calls: a step, or its decoding."""
        return max(self.step_bytes(width, height, 2, item_bytes), self.decode_bytes(width, height, 1, item_bytes))

    def _places(self, width: float, height: float) -> int:
        return math.ceil(width / self.factor) * math.ceil(height / self.factor)
