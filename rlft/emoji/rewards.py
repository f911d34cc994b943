"""The rewards of the emoji world: three small trained networks, as in the paper.

A classifier of skin tones, a detector (OWL-ViT's architecture) and a model of preferences
(ImageReward's). The oracles, which measure the same things by rules, are never trained on.
"""

import dataclasses

from rlft.rewards import image_reward, owlvit, parity, sets
from rlft.types import JaxReward


def tone_parity(credit: sets.Credit = "set", shares: parity.Shares = "hard") -> JaxReward:
  """'emoji-tone-parity': minus the statistical parity of four skin tones, on sets of images.

  Args:
    credit: one of `rlft.rewards.sets.CREDITS`.
    shares: 'soft' has a gradient, see `parity.parity_reward`.
  """
  from rlft.emoji import tone

  return parity.parity_reward(
    tone.classify, "emoji-tone-parity", tone.load(), credit=credit, shares=shares
  )


def objects() -> JaxReward:
  """'emoji-objects': the detector's mean confidence in what the prompt names, in [0, 1].

  Needs `metadata['objects']`, one or two of the emoji world.
  """
  from rlft.emoji import detector
  from rlft.emoji import prompts as prompts_lib

  reward = owlvit.owlvit(
    str(detector.DIRECTORY),
    tokenizer=str(detector.TOKENIZER),
    template=detector.TEMPLATE,
    max_objects=prompts_lib.MAX_OBJECTS,
  )

  def prepare(prompts, metadata):
    prompts_lib.object_classes(prompts, metadata)  # Raises: a name that it was never taught.
    return reward.prepare(prompts, metadata)

  return dataclasses.replace(reward, name="emoji-objects", prepare=prepare)


def preference() -> JaxReward:
  """'emoji-preference': what raters would say of the picture and its prompt; unbounded."""
  from rlft.emoji import preference

  return image_reward.load("emoji-preference", str(preference.DIRECTORY))
