"""Experimental families, off by default: posteriors, priors and objectives that a stock AutoencoderKL knows nothing of.

What they train beside the network is saved as `vae/experimental.safetensors`; stock code loads the folder, but not that part.
"""
