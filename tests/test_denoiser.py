"""The network's traps: where it starts, what its blocks do with labels, how large it is, what stock diffusers makes of its folder."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoencoder.runtime.errors import ConfigError
from diffusion.config import DenoiserConfig
from diffusion.denoiser import EDGES, NULL_CLASS, Denoiser, build, null_labels, stock

from diffusers import DiTTransformer2DModel  # isort: skip  (after ours: denoiser.py)

TINY = DenoiserConfig(preset="tiny", layers=2, heads=2, head_dim=8)
SHAPE = (3, 4, 4)


def perturbed(config: DenoiserConfig = TINY, shape: tuple[int, int, int] = SHAPE) -> Denoiser:
    """A network whose weights are away from their start, so that everything in it has an effect."""
    torch.manual_seed(0)
    network = build(config, shape)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def inputs(count: int = 6, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 5, 999, NULL_CLASS, 5, 1])[:count]
    return torch.randn((count, *shape), generator=rng), torch.rand(count, generator=rng), labels


@pytest.mark.parametrize("training", [True, False])
def test_an_untrained_network_gives_exactly_nothing(training: bool) -> None:
    noisy, t, labels = inputs()
    output = build(TINY, SHAPE).train(training)(100 * noisy, t, labels)
    assert output.shape == noisy.shape
    assert torch.count_nonzero(output) == 0


def test_untrained_blocks_are_the_identity() -> None:
    dit = stock(build(TINY, SHAPE))
    hidden = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    for block in dit.transformer_blocks:
        out = block(hidden, timestep=torch.tensor([10.0, 900.0]), class_labels=torch.tensor([3, NULL_CLASS]))
        assert torch.equal(out, hidden)


def test_nothing_that_starts_at_zero_stays_there() -> None:
    # Zero gates and outputs may hold gradients back from what is behind them, yet only until the first step.
    network = build(TINY, SHAPE)
    noisy, t, labels = inputs()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (network(noisy, t, labels) - noisy.flip(1)).square().mean().backward()
        optimizer.step()
    still = [name for name, p in network.named_parameters() if p.grad is None or torch.count_nonzero(p.grad) == 0]
    # A key's bias moves all of a query's scores alike: softmax does not see it.
    assert [name for name in still if "to_k.bias" not in name] == []


def test_labels_are_not_dropped_inside_the_network() -> None:
    network = perturbed().train()
    assert [block.norm1.emb.class_embedder.dropout_prob for block in stock(network).transformer_blocks] == [0.0, 0.0]
    noisy, t, _ = inputs(1)
    # At the share of 0.1 that diffusers' blocks drop, 200 labels would all be kept once in a billion.
    many, labels = noisy.expand(200, *SHAPE), torch.full((200,), 5)
    out = network(many, t.expand(200), labels)
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-5)
    assert torch.equal(network(many, t.expand(200), labels), out)
    # A dropped label would have been seen.
    assert float((network(noisy, t, null_labels(1)) - out[:1]).detach().abs().max()) > 1e-3


def test_each_label_and_time_has_an_effect_and_each_sample_is_its_own() -> None:
    network = perturbed().eval()
    noisy, t, labels = inputs()
    with torch.no_grad():
        out = network(noisy, t, labels)
        assert float((network(noisy, t, labels.roll(1)) - out).abs().amax((1, 2, 3)).min()) > 1e-3
        assert float((network(noisy, (t + 0.3) % 1, labels) - out).abs().amax((1, 2, 3)).min()) > 1e-3
        torch.testing.assert_close(network(noisy[2:3], t[2:3], labels[2:3]), out[2:3], rtol=1e-4, atol=1e-5)


def test_times_are_counted_as_diffusers_schedulers_do() -> None:
    network = perturbed().eval()
    noisy, _, labels = inputs()
    with torch.no_grad():
        theirs = stock(network)(noisy, timestep=torch.full((6,), 874), class_labels=labels).sample
        torch.testing.assert_close(network(noisy, torch.full((6,), 0.874), labels), theirs, rtol=1e-4, atol=1e-5)


def test_the_null_class_is_number_1000_and_the_outputs_channels_are_set() -> None:
    for preset in ("tiny", "S"):
        dit = stock(build(DenoiserConfig(preset=preset, layers=1), (4, 8, 8)))
        assert dit.config["num_embeds_ada_norm"] == 1000
        assert {b.norm1.emb.class_embedder.embedding_table.num_embeddings for b in dit.transformer_blocks} == {1001}
        assert dit.config["out_channels"] == dit.config["in_channels"] == 4
        assert dit.config["sample_size"] == 8


def published(width: int, depth: int, *, patch: int, channels: int, out_channels: int) -> int:
    """Trained parameters of DiT (Peebles & Xie 2023) by its figure 3: one embedder of time and class for the whole network."""
    patches = patch**2 * channels * width + width
    embedder = 256 * width + width + width**2 + width + 1001 * width
    attention, feed_forward, modulation = 4 * (width**2 + width), 8 * width**2 + 5 * width, 6 * (width**2 + width)
    final = 2 * (width**2 + width) + patch**2 * out_channels * (width + 1)
    return patches + embedder + depth * (attention + feed_forward + modulation) + final


@pytest.mark.parametrize(
    ("preset", "width", "depth", "millions"), [("S", 384, 12, 33), ("B", 768, 12, 130), ("L", 1024, 24, 458), ("XL", 1152, 28, 675)]
)
def test_the_presets_have_the_published_parameters(preset: str, width: int, depth: int, millions: int) -> None:
    # Table 1, for patches of 2 on 32 x 32 x 4 latents; the paper's network also predicts a variance, hence 8 channels out.
    assert round(published(width, depth, patch=2, channels=4, out_channels=8) / 1e6) == millions
    with torch.device("meta"):
        network = build(DenoiserConfig(preset=preset), (4, 32, 32))  # type: ignore[arg-type]
    assert sum(p.numel() for p in network.parameters()) == published(width, depth, patch=2, channels=4, out_channels=4)


def test_overrides_replace_the_presets_widths() -> None:
    dit = build(DenoiserConfig(preset="S", layers=3, head_dim=32), (4, 8, 8)).dit
    assert (len(dit.transformer_blocks), dit.config["num_attention_heads"], dit.config["attention_head_dim"]) == (3, 6, 32)


def test_latents_that_the_stock_pipeline_cannot_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"latents: got '4 x 8'.*square"):
        build(TINY, (3, 4, 8))
    with pytest.raises(ConfigError, match=r"denoiser\.patch_size: got 2; give a divisor of 5"):
        build(TINY, (3, 5, 5))
    with pytest.raises(ConfigError, match=r"head_dim.*multiple of 4"):
        DenoiserConfig(heads=1, head_dim=6)


def test_edges_are_all_but_the_blocks_matrices() -> None:
    names = [name for name, _ in perturbed().named_parameters()]
    assert all(any(name.startswith(prefix) for name in names) for prefix in EDGES)
    inner = {name.split(".", 3)[3].rsplit(".", 1)[0] for name in names if not name.startswith(EDGES)}
    assert inner == {"norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"}


@torch.no_grad()
def test_stock_diffusers_loads_a_copy_that_gives_the_same(tmp_path: Path) -> None:
    network = perturbed().eval()
    noisy, t, labels = inputs()
    stock(network).save_pretrained(tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    with torch.device("meta"):
        plain = DiTTransformer2DModel(**{key: theirs.config[key] for key in theirs.config if not key.startswith("_")})
    assert theirs.state_dict().keys() == plain.state_dict().keys()
    own = network(noisy, t, labels)
    assert float(own.abs().max()) > 0.1
    torch.testing.assert_close(theirs(noisy, timestep=t * 1000, class_labels=labels).sample, own, rtol=1e-6, atol=1e-6)
    # The wrapper takes either: a network of our own, and a stock one, whose blocks may differ in their embedders.
    assert torch.equal(Denoiser(theirs)(noisy, t, labels), theirs(noisy, timestep=t * 1000, class_labels=labels).sample)
    for parameter in theirs.transformer_blocks[1].norm1.emb.parameters():
        parameter.zero_()
    assert float((Denoiser(theirs)(noisy, t, labels) - own).abs().max()) > 1e-3


@torch.no_grad()
def test_a_copy_shares_nothing_with_the_network_nor_its_blocks_with_one_another() -> None:
    network = perturbed()
    copied = stock(network)
    mine = {p.data_ptr() for p in network.parameters()}
    theirs = [p.data_ptr() for p in copied.parameters()]
    assert mine.isdisjoint(theirs)
    assert len(theirs) == len(set(theirs))


def test_gradients_are_those_of_the_stock_network_its_embedders_summed_over_blocks() -> None:
    network = perturbed()
    copied, (noisy, t, labels) = stock(network), inputs()
    (network(noisy, t, labels) - noisy).square().mean().backward()
    (copied(noisy, timestep=t * 1000, class_labels=labels).sample - noisy).square().mean().backward()
    theirs = dict(copied.named_parameters())
    for name, parameter in network.named_parameters():
        part, rest = name.split(".", 1)
        found = [theirs[rest]] if part == "dit" else [theirs[f"transformer_blocks.{block}.norm1.emb.{rest}"] for block in (0, 1)]
        expected = sum(p.grad for p in found if p.grad is not None)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_recomputed_activations_and_compiled_graphs_have_the_same_gradients(way: str) -> None:
    network = perturbed().train()
    other: torch.nn.Module = copy.deepcopy(network)
    inner, (noisy, t, labels) = other, inputs()
    calls: list[int] = []
    if way == "checkpointed":
        inner.dit.enable_gradient_checkpointing()
        inner.dit.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    else:
        # The frontend's graph, run as it is: what a back end makes of it is not ours.
        other = torch.compile(other, backend=lambda graph, _: calls.append(0) or graph.forward)
    for module in (network, other):
        (module(noisy, t, labels) - noisy).square().mean().backward()
    assert len(calls) == {"checkpointed": 2, "compiled": 1}[way]
    for (name, one), two in zip(network.named_parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_queries_keys_and_values_start_as_the_published_one_matrix() -> None:
    width = TINY.shape()["heads"] * TINY.shape()["head_dim"]
    fused = (6 / (width + 3 * width)) ** 0.5
    for block in build(TINY, SHAPE).dit.transformer_blocks:
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            assert 0.95 * fused < float(layer.weight.detach().abs().max()) <= fused


def test_the_embedder_starts_as_published() -> None:
    # Peebles & Xie's code: normal of 0.02 for the label table and both layers of the time's embedder, whose biases are 0.
    embedder = build(DenoiserConfig(preset="tiny"), SHAPE).embedder
    assert embedder is not None
    time = embedder.timestep_embedder
    for weight in (embedder.class_embedder.embedding_table.weight, time.linear_1.weight, time.linear_2.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert torch.count_nonzero(time.linear_1.bias) == torch.count_nonzero(time.linear_2.bias) == 0
