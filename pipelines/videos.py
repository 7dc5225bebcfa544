"""Videos as captioners read them: some of their frames, evenly over their length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.pictures import Clip, frames_of, open_picture

DECODERS = {"torchcodec": "torchcodec", "pyav": "av", "decord": "decord", "opencv": "cv2"}  # name -> package


@dataclass(frozen=True)
class Video:
    """Frames that were chosen from a video.

    numbers: of each of the frames among all `total`, which follow one another at `fps`.
    """

    frames: list[Image.Image]
    numbers: list[int]
    total: int
    fps: float


def evenly(total: int, count: int | None) -> list[int]:
    """The numbers of `count` frames in the middle of equal parts; of all frames where there are no more."""
    if count is None or count >= total:
        return list(range(total))
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def open_video(clip: Clip, count: int | None, choose: Callable[[int, int], list[int]] = evenly) -> Video:
    """`count` frames of a video, None: all of them; ValueError where it cannot be read.

    choose: the numbers of the frames, from how many there are and `count`. Only files need a decoder:
    torchcodec, av, decord or opencv, whichever there is.
    """
    names = frames_of(clip.place)
    if names is None:
        return _decoded(str(clip.place), count, choose)
    numbers = list(range(len(names))) if count is None else choose(len(names), count)
    frames = [open_picture(names[number]) for number in numbers]
    if len({frame.size for frame in frames}) > 1:
        raise ValueError(f"the frames of {clip.place} differ in size")
    return Video(frames, numbers, len(names), clip.fps)


def _decoded(file: str, count: int | None, choose: Callable[[int, int], list[int]]) -> Video:
    from transformers.video_utils import load_video

    if not Path(file).is_file():
        raise ValueError(f"there is no video {file}")
    if count is None:
        raise ValueError(f"{file} is a video file: policy.frames must say how many of its frames are read")
    decoder = next((name for name, package in DECODERS.items() if find_spec(package)), None)
    if decoder is None:
        raise ImportError(
            f"{file} needs a decoder: pip install 'mmalign[video]'; or name a folder of its frames"
        )

    def chosen(metadata: Any, **_: Any) -> list[int]:
        return choose(int(metadata.total_num_frames), count)

    try:
        pixels, about = load_video(file, backend=decoder, sample_indices_fn=chosen)
    except Exception as error:  # each decoder has faults of its own
        raise ValueError(f"{file} cannot be read as a video: {error}") from error
    if not len(pixels):
        raise ValueError(f"{file} cannot be read as a video: {decoder} finds no frames")
    frames = [Image.fromarray(frame) for frame in pixels]
    total = int(about.total_num_frames)
    return Video(frames, choose(total, count), total, float(about.fps))
