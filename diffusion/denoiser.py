"""The network: a diffusers DiTTransformer2DModel with its traps handled, and the wrapper that trains it.

diffusers gives each block an embedder of time and class of its own (13% more parameters in DiT-B); published is one for the whole network.
`build` makes that one, and `stock` copies it into each block.
"""

import copy

import torch
from torch import Tensor, nn

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before diffusers)
from autoencoder.runtime.errors import ConfigError
from diffusion.config import MOST_CLASSES, DenoiserConfig
from diffusion.process import TIMESTEPS

from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings  # isort: skip
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # isort: skip

NULL_CLASS = MOST_CLASSES
"""The label that stands for no class: stock pipelines have it built in."""


class Denoiser(nn.Module):
    """What is trained and averaged: `forward` gives the process's output (velocity, v or noise) at a time in [0, 1]."""

    def __init__(self, dit: DiTTransformer2DModel, embedder: CombinedTimestepLabelEmbeddings | None = None) -> None:
        """`embedder` is the one of all blocks, which then hand on what it gave; None: each has its own, as stock networks do."""
        super().__init__()
        self.embedder, self.dit = embedder, dit

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noisy latents (B, c, h, w), t (B,) and labels (B,), `NULL_CLASS` for none, to the output (B, c, h, w)."""
        told = t * TIMESTEPS
        if self.embedder is not None:
            told = self.embedder(told, labels, hidden_dtype=noisy.dtype)
        output: Tensor = self.dit(noisy, timestep=told, class_labels=labels, return_dict=False)[0]
        return output


class HandedOn(nn.Module):
    """Stands for a block's embedder where the network has one for all: what the block is given as time is embedded already."""

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return timestep


def build(config: DenoiserConfig, shape: tuple[int, int, int]) -> Denoiser:
    """A network for latents of `shape` (c, h, w), with one embedder, initialised as published.

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
    embedder = dit.transformer_blocks[0].norm1.emb
    for block in dit.transformer_blocks:
        block.norm1.emb = HandedOn()
    initialize(dit, embedder)
    return Denoiser(dit, embedder)


def stock(denoiser: Denoiser) -> DiTTransformer2DModel:
    """The same network as diffusers has it, a copy: the embedder in every block."""
    dit = copy.deepcopy(denoiser.dit)
    if denoiser.embedder is not None:
        for block in dit.transformer_blocks:
            block.norm1.emb = copy.deepcopy(denoiser.embedder)
    return dit


def initialize(dit: DiTTransformer2DModel, embedder: CombinedTimestepLabelEmbeddings) -> None:
    """The published start (Peebles & Xie 2023, sec. 3.2), which diffusers leaves out: the network gives 0, each block is the identity.

    Also switches off the label dropout of diffusers' embedders, which blocks of a stock network would make each for itself: labels are
    dropped once in the batch.
    """
    for module in [*dit.modules(), *embedder.modules()]:
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
        nn.init.zeros_(block.norm1.linear.weight)
    embedder.class_embedder.dropout_prob = 0.0
    nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(layer.weight)


EDGES: tuple[str, ...] = ("embedder", "dit.pos_embed", "dit.proj_out_1", "dit.proj_out_2")
"""Prefixes, within `Denoiser`, of the embedder and of first and last layers: their rows and columns are not features."""


def null_labels(count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` times no class, (count,) int64."""
    return torch.full((count,), NULL_CLASS, dtype=torch.int64, device=device)
