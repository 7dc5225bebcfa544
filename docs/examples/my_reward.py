"""A reward of one's own is one file. Start training where it lies and name it in the configuration:

rewards:
  my_reward:Brightness: {weight: 1.0, wanted: 0.7}
"""

from dataclasses import dataclass

from mmalign.records import Outcome, RewardSignal


@dataclass
class Brightness:
    """How close the mean brightness of a picture is to the wanted one; 0 is best."""

    wanted: float = 0.5  # from 0 (black) to 1 (white)
    name = "brightness"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        brightness = outcome.media.flatten(1).mean(1, keepdim=True)  # [B, 1]: one verdict a sample
        return RewardSignal(
            self.name,
            -(brightness - self.wanted).abs(),
            details=[{"brightness": round(value, 3)} for value in brightness[:, 0].tolist()],
        )
