"""Judges of outcomes: the table of rewards by name, and how one of them, or a user's own, is made."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module, invalidate_caches
from typing import Any

from mmalign.contracts import PairwiseReward, Reward

REWARDS = {
    "adversarial": "mmalign.rewardmodels.adversarial:Adversarial",
    "aesthetic": "mmalign.rewardmodels.clip:Aesthetic",
    "artifact": "mmalign.rewardmodels.artifact:Artifact",
    "artifact_question": "mmalign.rewardmodels.vlm_score:ArtifactQuestion",
    "capture": "mmalign.rewardmodels.caption_graph:Capture",
    "caprl": "mmalign.rewardmodels.caprl:CapRL",
    "caption_facts": "mmalign.rewardmodels.lab_captions:CaptionFacts",
    "caption_length": "mmalign.rewardmodels.claimdiff:CaptionLength",
    "choices": "mmalign.rewardmodels.choices:Choices",
    "claimdiff": "mmalign.rewardmodels.claimdiff:ClaimDiff",
    "clip_score": "mmalign.rewardmodels.clip:ClipScore",
    "colorfulness": "mmalign.rewardmodels.statistics:Colorfulness",
    "conse": "mmalign.rewardmodels.conse:ConSE",
    "contrast": "mmalign.rewardmodels.statistics:Contrast",
    "dcscore": "mmalign.rewardmodels.caption_units:DCScore",
    "descore": "mmalign.rewardmodels.descore:DeScore",
    "dino_similarity": "mmalign.rewardmodels.dino:DinoSimilarity",
    "edit_consistency": "mmalign.rewardmodels.edit_consistency:EditConsistency",
    "edit_harness": "mmalign.rewardmodels.edit_harness:EditHarness",
    "face_identity": "mmalign.rewardmodels.face_identity:FaceIdentity",
    "framewise": "mmalign.rewardmodels.framewise:Framewise",
    "holistic": "mmalign.rewardmodels.claimdiff:Holistic",
    "identity": "mmalign.rewardmodels.identity:Identity",
    "jpeg_compressibility": "mmalign.rewardmodels.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "mmalign.rewardmodels.jpeg:JpegIncompressibility",
    "lab": "mmalign.rewardmodels.lab:LabVerifier",
    "hpsv2": "mmalign.rewardmodels.clip:HPSv2",
    "hpsv3": "mmalign.rewardmodels.vlm_head:HPSv3",
    "videoalign": "mmalign.rewardmodels.vlm_head:VideoAlign",
    "image_reward": "mmalign.rewardmodels.image_reward:ImageReward",
    "caption_clip_score": "mmalign.rewardmodels.caption_clip:CaptionClipScore",
    "caption_overlap": "mmalign.rewardmodels.caption_overlap:CaptionOverlap",
    "geneval": "mmalign.rewardmodels.geneval:GenEval",
    "lab_style": "mmalign.rewardmodels.lab_style:LabStyle",
    "lab_edit": "mmalign.rewardmodels.lab_edit:LabEdit",
    "lab_colors": "mmalign.rewardmodels.lab_colors:LabColors",
    "lab_pairwise": "mmalign.rewardmodels.lab_pairwise:LabPairwise",
    "lab_video": "mmalign.rewardmodels.lab_video:LabVideo",
    "latent_identity": "mmalign.rewardmodels.latent_identity:LatentIdentity",
    "likelihood": "mmalign.rewardmodels.likelihood:Likelihood",
    "motion": "mmalign.rewardmodels.motion:Motion",
    "ocr": "mmalign.rewardmodels.ocr:OcrAccuracy",
    "pickscore": "mmalign.rewardmodels.clip:PickScore",
    "preference": "mmalign.rewardmodels.preference:Preference",
    "remote": "mmalign.rewardmodels.remote:Remote",
    "sharpness": "mmalign.rewardmodels.statistics:Sharpness",
    "siglip": "mmalign.rewardmodels.clip:SigLip",
    "temporal_consistency": "mmalign.rewardmodels.framewise:TemporalConsistency",
    "vlm_preference": "mmalign.rewardmodels.vlm_score:VlmPreference",
    "vlm_score": "mmalign.rewardmodels.vlm_score:VlmScore",
    "vqa_score": "mmalign.rewardmodels.vlm_score:VqaScore",
}


def load(name: str, /, **settings: Any) -> Reward:
    """The reward of that name, made with these settings.

    name: one of `REWARDS`, or the path of a class, `my_pkg.my_reward:MyReward`. Its module is looked for
    where Python looks, and then in the working directory. What stands behind a slash tells several of one
    kind apart, `remote/lab`, and is not looked at.
    """
    if (kind_of := name.partition("/")[0]) in REWARDS:
        name = kind_of
    if name not in REWARDS and ":" not in name:
        raise ValueError(
            f"there is no reward {name!r}{_nearest(name, REWARDS)}; a reward of your own is named by the "
            "path of its class, my_pkg.my_reward:MyReward"
        )
    kind = find(REWARDS.get(name, name))
    _check_settings(name, kind, settings)
    reward = kind(**settings)
    pairwise = isinstance(reward, PairwiseReward)
    if not (pairwise or callable(reward)) or not isinstance(getattr(reward, "name", None), str):
        raise TypeError(
            f"{name}: a reward has a name (str) and is called with an outcome, "
            f"def __call__(self, outcome: Outcome) -> RewardSignal; {type(reward).__name__} is not like that"
        )
    return reward  # type: ignore[no-any-return]  # it was checked by hand, a protocol of calls cannot be


def find(path: str) -> Any:
    """The class named `module:Class`; ValueError where there is none."""
    module, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(
            f"{path!r} is no path of a class; write my_pkg.my_reward:MyReward for the class MyReward in the "
            "file my_pkg/my_reward.py"
        )
    found = _import(module)
    if not hasattr(found, attribute):
        classes = [key for key, value in vars(found).items() if isinstance(value, type)]
        raise ValueError(
            f"{path}: {getattr(found, '__file__', module)} has no {attribute!r}{_nearest(attribute, classes)}"
        )
    kind = getattr(found, attribute)
    if not callable(kind):
        raise TypeError(f"{path}: expected the class of a reward, got a {type(kind).__name__}")
    return kind


def _import(module: str) -> Any:
    """The module, which may also lie in the working directory; what it lacks itself is its own error."""
    here = os.getcwd()
    if not module.startswith("mmalign.") and here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # a reward may import its neighbors later, so the path stays
        invalidate_caches()
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"there is no module {error.name!r} for the reward {module!r}, neither installed nor in {here}; "
            "start where its package lies, or install it"
        ) from error


def _check_settings(name: str, kind: Any, settings: dict[str, Any]) -> None:
    """Every setting is known, and none that has no default is missing."""
    parameters = inspect.signature(kind).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for setting in settings:
        if setting not in known and not open_ended:
            raise ValueError(f"{name} has no setting {setting!r}{_nearest(setting, known)}")
    required = [p.name for p in parameters if p.name in known and p.default is p.empty]
    if missing := [setting for setting in required if setting not in settings]:
        raise ValueError(f"{name} needs the setting {', '.join(map(repr, missing))}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, and all of them."""
    names = sorted(known)
    if not names:
        return "; there is none"
    close = get_close_matches(name, names, 1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(names)})"
