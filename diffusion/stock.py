"""Load and sample a pipeline with stock diffusers alone: `python -P stock.py OPERATORS PIPELINE OUT REQUEST`, without our packages.

OPERATORS is the file that mends an installation whose torchvision does not fit its torch, where diffusers itself could not be
imported. REQUEST is JSON: class_labels, guidance_scale, steps, seed. OUT gets `latents` and `images` as safetensors, and the
pipeline's class table in its metadata. The multistep solver is set to first order, which an Euler step on the same grid equals.
"""

import json
import runpy
import sys


def main(operators: str, pipeline: str, out: str, request: str) -> None:
    """See above."""
    # Wherever our packages are installed, what is shown here is that the folder does without them.
    sys.modules["autoencoder"] = sys.modules["diffusion"] = None  # type: ignore[assignment]
    mended = runpy.run_path(operators)  # kept: what it declares goes away with it
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    asked = json.loads(request)
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    # The class that the folder names: a scheduler that DiTPipeline runs wrongly shall show.
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, solver_order=1)
    seen = []
    decode = pipe.vae.decode

    def noted(latents: torch.Tensor, *arguments: object, **options: object) -> object:
        seen.append(latents)
        return decode(latents, *arguments, **options)

    pipe.vae.decode = noted
    generator = torch.Generator().manual_seed(asked["seed"])
    result = pipe(
        class_labels=asked["class_labels"],
        guidance_scale=asked["guidance_scale"],
        num_inference_steps=asked["steps"],
        generator=generator,
        output_type="pt",
    )
    tensors = {"latents": seen[0].contiguous(), "images": result.images.contiguous()}
    save_file(tensors, out, metadata={"labels": json.dumps(pipe.labels)})
    del mended


if __name__ == "__main__":
    main(*sys.argv[1:])
