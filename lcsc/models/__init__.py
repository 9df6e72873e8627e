"""Networks, and how a network becomes a denoiser."""
