"""The emoji world: art, scenes with captions, prompts, and measures that are never trained on."""
