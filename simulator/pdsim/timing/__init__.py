"""How long things take on the GPU: a model fitted to measurements of real vLLM on H200."""

from pdsim.timing.model import Chunk, Profile, load_profile

__all__ = ["Chunk", "Profile", "load_profile"]
