"""firststage: the diffusion stage.

What may be relied on, imported from the module that holds it (importing this package imports no torch):

- `diffusion.fold`: `fold`, per-channel normalisation into an AutoencoderKL's 1x1 convolutions
- `diffusion.sampling`: `euler`, `heun`, `levels`, `guided`, `estimates`, `sample`
- `diffusion.frechet`: `features`, `frechet_distance`
- `diffusion.likelihood`: `bound`, `Latents`, `Estimate`
- `diffusion.pilot`: `plan`, `planned_bounds`
- `diffusion.ode_likelihood`: `ode_values`
"""

__all__ = ["fold", "frechet", "likelihood", "ode_likelihood", "pilot", "sampling"]
