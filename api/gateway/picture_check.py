"""Decodes one picture within hard limits: run as a script in a process of its own, so that a crafted file can only break that.

Usage: picture_check.py PATH MAX_PIXELS. Prints one JSON object: {"format", "width", "height", "transparent"} or {"error"}.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings


def main(path: str, max_pixels: int) -> dict[str, object]:
    """Decode the picture wholly; returns what it is, or why it is refused."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                return {"error": f"the picture has {width}x{height} pixels, more than the {max_pixels} allowed"}
            if getattr(picture, "n_frames", 1) != 1:
                return {"error": "the picture is animated; send a single frame"}
            picture.load()
            alpha = picture.convert("RGBA").getchannel("A").histogram() if picture.has_transparency_data else []
            transparent = any(alpha[:128])  # Soft edges alone say nothing.
            return {"format": picture.format, "width": width, "height": height, "transparent": transparent}
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return {"error": f"the picture has more than the {max_pixels} pixels allowed"}
    except Exception as error:
        return {"error": f"this is no sound PNG, JPEG or WebP picture ({type(error).__name__})"}


if __name__ == "__main__":
    limit = 1 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (15, 15))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
