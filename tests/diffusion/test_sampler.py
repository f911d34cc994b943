"""Images of many prompts, drawn a batch at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import train_cases

from rlft.diffusion.policy import make_policy
from rlft.diffusion.sampler import Sampler
from rlft.models import lora
from rlft.parallel import sharding


def test_each_image_has_its_own_noise_and_prompt_in_every_batch():
  model = train_cases.tiny_model()
  policy = make_policy(model, sampling_steps=1, guidance_scale=train_cases.GUIDANCE)
  sampler = Sampler(model, policy, batch_size=8)
  prompts = [*["a dog", "dogs"] * 5, "two cats"]  # The second batch is not full.
  images = sampler(prompts, 5)
  assert images.shape == (11, 4, 4, 3)
  # The same prompt, other noise: in a batch and from one to the next.
  dogs = images[:10:2].reshape(5, -1)
  assert np.abs(dogs[:, None] - dogs[None]).max(-1)[~np.eye(5, dtype=bool)].min() > 1e-2
  # Image i is that of its prompt and of the seed with i folded in, wherever it stands.
  places = [10, 9, 8, 0, 1, 2, 3, 4]
  keys = jnp.stack([jax.random.fold_in(jax.random.key(5), i) for i in places])
  ids, _ = model.tokenize([prompts[i] for i in places])
  weights = lora.Weights(sharding.place(sharding.make_mesh(), model.params["unet"]))
  drawn = sampler.draw(weights, ids, keys)
  np.testing.assert_allclose(sharding.fetch(drawn.images), images[places], atol=1e-5)
