"""Stable Diffusion 1.x and 2.x in Flax Linen: UNet, VAE, CLIP text encoder, loading and saving."""
