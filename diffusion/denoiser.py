"""The network: a diffusers DiTTransformer2DModel with its traps handled, and the wrapper that trains it."""

import torch
from torch import Tensor, nn

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before diffusers)
from autoencoder.runtime.errors import ConfigError
from diffusion.config import MOST_CLASSES, DenoiserConfig
from diffusion.process import TIMESTEPS

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # isort: skip

NULL_CLASS = MOST_CLASSES
"""The label that stands for no class: stock pipelines have it built in."""


class Denoiser(nn.Module):
    """What is trained and averaged: `forward` gives the velocity at a time in [0, 1]."""

    def __init__(self, dit: DiTTransformer2DModel) -> None:
        super().__init__()
        self.dit = dit

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noisy latents (B, c, h, w), t (B,) and labels (B,), `NULL_CLASS` for none, to the velocity (B, c, h, w)."""
        velocity: Tensor = self.dit(noisy, timestep=t * TIMESTEPS, class_labels=labels, return_dict=False)[0]
        return velocity


def build(config: DenoiserConfig, shape: tuple[int, int, int]) -> DiTTransformer2DModel:
    """A network for latents of `shape` (c, h, w), initialised as published.

    Raises:
        ConfigError: latents that are not square, or a side that the patches do not divide.
    """
    channels, height, width = shape
    if height != width:
        raise ConfigError(
            "latents", f"{height} x {width}", "DiT's stock pipeline takes square latents only; encode the images as square crops"
        )
    if height % config.patch_size:
        raise ConfigError("denoiser.patch_size", config.patch_size, f"give a divisor of {height}, the latents' side")
    widths = config.shape()
    dit = DiTTransformer2DModel(
        num_attention_heads=widths["heads"],
        attention_head_dim=widths["head_dim"],
        num_layers=widths["layers"],
        in_channels=channels,
        out_channels=channels,
        sample_size=height,
        patch_size=config.patch_size,
        num_embeds_ada_norm=NULL_CLASS,
    )
    initialize(dit)
    return dit


def initialize(dit: DiTTransformer2DModel) -> None:
    """The published start (Peebles & Xie 2023, sec. 3.2), which diffusers leaves out: the network gives 0, each block is the identity.

    Also switches off the label dropout of diffusers' blocks, which would drop each label in one block and not in the next: labels
    are dropped once in the batch.
    """
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(dit.pos_embed.proj.weight.view(dit.pos_embed.proj.weight.shape[0], -1))
    nn.init.zeros_(dit.pos_embed.proj.bias)
    for block in dit.transformer_blocks:
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            # Published as one matrix of three times the rows, whose fan-out is in Xavier's bound.
            nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)
        embedder = block.norm1.emb
        embedder.class_embedder.dropout_prob = 0.0
        nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
        for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(layer.weight)


def edges(dit: DiTTransformer2DModel) -> tuple[str, ...]:
    """Prefixes, within `Denoiser`, of first and last layers and of embedders: their rows and columns are not features."""
    embedders = tuple(f"dit.transformer_blocks.{i}.norm1.emb" for i in range(len(dit.transformer_blocks)))
    return ("dit.pos_embed", "dit.proj_out_1", "dit.proj_out_2", *embedders)


def null_labels(count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` times no class, (count,) int64."""
    return torch.full((count,), NULL_CLASS, dtype=torch.int64, device=device)
