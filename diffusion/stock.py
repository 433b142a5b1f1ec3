"""Load and sample a pipeline with stock diffusers alone: `python -P stock.py OPERATORS PIPELINE OUT REQUEST`, without our packages.

OPERATORS is the file that mends an installation whose torchvision does not fit its torch, where diffusers itself could not be
imported. REQUEST is JSON: class_labels, guidance_scale, steps, seed, and where wanted `precision` (`fp16` or `bf16`, the variant of that
name) and `activations`. OUT gets `latents` and `images` as safetensors, and in its metadata the pipeline's class table and the largest
activations by layer, where they are wanted. The multistep solver is set to first order, which an Euler step on the same grid equals.
"""

import json
import runpy
import sys
from typing import Any


def main(operators: str, pipeline: str, out: str, request: str) -> None:
    """See above."""
    # Wherever our packages are installed, what is shown here is that the folder does without them.
    sys.modules["autoencoder"] = sys.modules["diffusion"] = None  # type: ignore[assignment]
    mended = runpy.run_path(operators)  # kept: what it declares goes away with it
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    asked = json.loads(request)
    precision = asked.get("precision")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    pipe = DiffusionPipeline.from_pretrained(pipeline, **({} if half is None else {"variant": precision, "torch_dtype": half}))
    pipe.set_progress_bar_config(disable=True)
    # The class that the folder names: a scheduler that DiTPipeline runs wrongly shall show.
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, solver_order=1)
    seen = []
    decode = pipe.vae.decode

    def noted(latents: torch.Tensor, *arguments: object, **options: object) -> object:
        seen.append(latents)
        return decode(latents, *arguments, **options)

    pipe.vae.decode = noted
    largest: dict[str, float] = {}
    if asked.get("activations"):
        note_largest(pipe, largest)
    if half == torch.float16:
        imitate_fp16(pipe)
    generator = torch.Generator().manual_seed(asked["seed"])
    result = pipe(
        class_labels=asked["class_labels"],
        guidance_scale=asked["guidance_scale"],
        num_inference_steps=asked["steps"],
        generator=generator,
        output_type="pt",
    )
    tensors = {"latents": seen[0].float().contiguous(), "images": result.images.float().contiguous()}
    save_file(tensors, out, metadata={"labels": json.dumps(pipe.labels), "activations": json.dumps(largest)})
    del mended


def note_largest(pipe: Any, largest: dict[str, float]) -> None:
    """Have every layer of both networks note its largest |value| by its dotted name; NaN counts as infinite."""
    import torch

    def note(name: str, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                most = float(value.abs().max().nan_to_num(nan=torch.inf))
                largest[name] = max(most, largest.get(name, 0.0))

    for part in ("transformer", "vae"):
        for name, module in getattr(pipe, part).named_modules():
            if name:
                module.register_forward_hook(lambda module, given, output, name=f"{part}.{name}": note(name, output))


def imitate_fp16(pipe: Any) -> None:
    """Compute in fp32 with fp16 weights, and round what each layer and the scheduler give to fp16: GPUs add up in fp32, and CPUs take
    a hundred times as long for fp16."""
    import torch

    def rounded(output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(rounded(value) for value in output)
        is_float = isinstance(output, torch.Tensor) and output.is_floating_point()
        return output.to(torch.float16).float() if is_float else output

    pipe.to(torch.float32)
    for part in (pipe.transformer, pipe.vae):
        for module in part.modules():
            module.register_forward_hook(lambda module, given, output: rounded(output))
    step = pipe.scheduler.step

    def stepped(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        result.prev_sample = rounded(result.prev_sample)
        return result

    pipe.scheduler.step = stepped


if __name__ == "__main__":
    main(*sys.argv[1:])
