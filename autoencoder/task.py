"""The autoencoder stage as a task of the training loop."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from autoencoder import evaluation
from autoencoder.adversarial.game import Game
from autoencoder.adversarial.gradients import leave_uncompiled
from autoencoder.alarms import Subject
from autoencoder.beta import effective_beta
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.loader import Batch, TrainLoader, ValidationSet
from autoencoder.data.order import spread
from autoencoder.data.pixels import levels_of, to_images
from autoencoder.data.sources import Source
from autoencoder.data.steps import Steps
from autoencoder.elbo import bits_per_dim
from autoencoder.equivariance import Equivariance, Transformation, transform
from autoencoder.equivariance_config import check_equivariance
from autoencoder.experimental.encoder_steps import standing
from autoencoder.experimental.iwae import importance_weighted
from autoencoder.kl_control import KLControl
from autoencoder.likelihood import LIKELIHOODS, Likelihood, LocationScale
from autoencoder.model import Autoencoder, Output, decode, downsampling, encode
from autoencoder.monitor import Monitor
from autoencoder.objective import Objective, Terms
from autoencoder.own_distance import OwnDistance
from autoencoder.perceptual import build_perceptual
from autoencoder.pixel_recipe import PixelRecipe, recipe_of
from autoencoder.posterior import DiagonalGaussian
from autoencoder.preview import Preview
from autoencoder.report.pictures import grid
from autoencoder.runtime.alarms import AlarmNews
from autoencoder.runtime.checkpoint import HasTensors
from autoencoder.runtime.config import count
from autoencoder.runtime.errors import ConfigError, TrainingError, UsageError
from autoencoder.runtime.files import replace_text
from autoencoder.scale import AnalyticScale, learned_scale

# The first and last layers: their rows or columns are pixels and latents, not features.
EDGES = tuple(
    f"vae.{name}"
    for name in ("encoder.conv_in", "encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in", "decoder.conv_out")
)


class AutoencoderTask:
    """Images to a loss with named terms; the analytic scale and the KL's weight as controllers; validation with pictures."""

    # What the families train is small and starts at zero or near it: nothing for Muon's fixed step size.
    edges = (*EDGES, "experimental.")

    def __init__(
        self, config: TrainAutoencoderConfig, module: Autoencoder, train: Source, validation: Source, accelerator: Accelerator, folder: Path
    ) -> None:
        self.config, self.module, self.train_source, self.validation_source = config, module, train, validation
        self.accelerator, self.folder = accelerator, folder
        device = accelerator.device
        perceptual = build_perceptual(config.objective.perceptual, config.data.channels)
        self.objective = Objective(config.objective, None if perceptual is None else perceptual.to(device))
        self.scale = AnalyticScale(config.objective.likelihood, device)
        self.total_images = count(config.train.images, "train.images")
        self.bad: dict[str, str] = {}
        asked = recipe_of(config.data)
        self.levels = asked.steps if asked.ranged else asked.levels
        data, factor = config.data, downsampling(module.vae)
        if data.resolution % factor:
            raise UsageError(f"data.resolution: got {data.resolution}; give a multiple of {factor}, the network's downsampling factor")
        if module.vae.config["in_channels"] != data.channels:
            raise UsageError(
                f"data.channels: got {data.channels}, but the network takes {module.vae.config['in_channels']}; make them equal"
            )
        side = data.resolution // factor
        self.latent_shape = (int(module.vae.config["latent_channels"]), side, side)
        self.kl = KLControl(config.objective.kl, total=self.total_images, latent_shape=self.latent_shape, device=device)
        kl = config.objective.kl
        self.moving: tuple[str, ...] = () if kl.schedule == "constant" and kl.control == "none" else ("kl_weight",)
        self.monitor = Monitor(Subject.of(config, self.latent_shape))
        chosen = config.objective.equivariance
        check_equivariance(chosen, latent_side=side, factor=factor, least_image=config.objective.perceptual.least_side)
        self.equivariance = Equivariance(chosen, seed=config.train.seed, latent_side=side) if chosen.share else None
        if isinstance(self.objective.perceptual, OwnDistance):
            # Whole images, and the smallest transformed ones.
            for small in {data.resolution, *(s * factor for s in (chosen.sides(side)[:1] if chosen.share else ()))}:
                shape = (data.channels, small, small)
                self.objective.perceptual.check(shape, device, may_miss=asked.may_miss, autocast=accelerator.autocast)
        self.game = self._game() if config.objective.adversarial.on else None

    def _game(self) -> Game:
        """The adversarial term, its players' sizes and weighting checked against network and processes."""
        adversarial, train, data = self.config.objective.adversarial, self.config.train, self.config.data
        steps = Steps(
            images=self.total_images,
            batch_size=train.batch_size,
            microbatch=train.microbatch,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        if adversarial.weighting == "step" and steps.microbatches(0) > 1:
            raise UsageError(
                f"objective.adversarial.weighting: got 'step', but a step has {steps.microbatches(0)} microbatches here and its ratio is "
                f"known after the last; give `running`, or leave out train.microbatch={train.microbatch}"
            )
        if train.compile and adversarial.weighting != "fixed":
            leave_uncompiled(self.module.vae.decoder.conv_out)
        return Game(
            adversarial,
            layer=self.module.vae.decoder.conv_out.weight,
            shape=(data.channels, data.resolution, data.resolution),
            batch_size=train.batch_size,
            seed=train.seed,
            device=self.accelerator.device,
            precision=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None,
        )

    def loader(self, first_step: int) -> Iterable[tuple[int, list[Batch]]]:
        config = self.config
        samples = config.experimental.iwae_samples
        steps = TrainLoader(
            self.train_source,
            config.data,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            microbatch=config.train.microbatch,
            images=self.total_images,
            latent_shape=self.latent_shape if samples == 1 else (samples, *self.latent_shape),
            first_step=first_step,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for step, batches in steps:
            for batch in batches:
                self._note_bad(batch.bad)
                self._check_depth(batch)
                if self.equivariance is not None:
                    batch.transformed = self.equivariance.choose(batch.position.tolist())
            yield step, batches

    def _note_bad(self, bad: list[tuple[str, str]]) -> None:
        self._add_bad({name: reason for name, reason in bad if name not in self.bad})

    def _share(self) -> None:
        """Every process's bad images, and the levels of the images of all, in every process."""
        parts: list[tuple[dict[str, str], int]] = [({}, 0)] * self.accelerator.num_processes
        torch.distributed.all_gather_object(parts, (self.bad, self.levels))
        for _, levels in parts:
            self._note_levels(levels)
        self._add_bad({name: reason for part, _ in parts for name, reason in part.items() if name not in self.bad})

    def _add_bad(self, new: dict[str, str]) -> None:
        if not new:
            return
        self.bad |= new
        self._list_bad()
        if len(self.bad) > self.config.data.max_bad:
            name, reason = next(reversed(self.bad.items()))
            raise TrainingError(
                f"{len(self.bad)} images could not be read, more than data.max_bad={self.config.data.max_bad} (listed in bad_images.jsonl; "
                f"the last: {name}: {reason}). Mend or remove them, or raise data.max_bad"
            )

    def _list_bad(self) -> None:
        if self.accelerator.is_main_process and self.bad:
            lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in self.bad.items()]
            replace_text(self.folder / "bad_images.jsonl", "".join(lines))

    @property
    def recipe(self) -> PixelRecipe:
        """How the images become what the encoder sees, with the levels found in the files so far."""
        return recipe_of(self.config.data, self.levels)

    def _check_depth(self, batch: Batch) -> None:
        """A distribution over levels is one only over the levels that the files have."""
        if not batch.weight.any():
            return
        likelihood, found = self.config.objective.likelihood, levels_of(batch.pixels, self.recipe)
        if LIKELIHOODS[likelihood.name].discrete and not found:
            remedy = "the values of these images are continuous, or differ in number from band to band; give laplace or gaussian"
            raise ConfigError("objective.likelihood.name", likelihood.name, remedy)
        if LIKELIHOODS[likelihood.name].discrete and likelihood.levels != found:
            raise ConfigError("objective.likelihood.levels", likelihood.levels, f"these images have {found} levels; give {found}")
        self._note_levels(found)

    def _note_levels(self, found: int) -> None:
        # Of a stated range continuous values (0 levels) hold those of integers; at full range 16 bits hold those of 8.
        self.levels = min(self.levels, found) if self.recipe.ranged else max(self.levels, found)

    def likelihood(self, module: Autoencoder) -> Likelihood:
        """p(x|z) at the scale as it stands: learned by `module`, or the controller's."""
        config, log_scale = self.config.objective.likelihood, module.log_scale
        if config.scale == "fixed":
            return self.objective.likelihood(config.value)
        return self.objective.likelihood(self.scale.value if log_scale is None else learned_scale(log_scale.detach(), config))

    def losses(self, module: nn.Module, batch: Batch, images: int, *, probe: bool = False) -> Terms:
        valid = batch.valid
        pixels, transformation = to_images(batch.pixels, self.recipe, valid), None
        if self.equivariance is not None and batch.transformed is not None:
            # A run that was lengthened has an earlier last step that was not a whole one.
            step = -(-images // self.config.train.batch_size)
            transformation = self.equivariance.transformation(batch.transformed, step)
        output: Output = module(pixels, batch.noise, transformation)
        samples = self.config.experimental.iwae_samples
        if samples > 1:
            pixels = pixels.repeat_interleave(samples, 0)
            valid = None if valid is None else valid.repeat_interleave(samples, 0)
        scale = self.scale.value if output.log_scale is None else learned_scale(output.log_scale, self.config.objective.likelihood)
        posterior, weight = DiagonalGaussian(output.mean, output.logvar), self.kl.weight(images)
        opponent = None if self.game is None else self.game.opponent(batch.weight, images, probe=probe)
        terms = self.objective(
            pixels,
            posterior,
            output.decoded,
            scale=scale,
            kl_weight=weight,
            charged=self.kl.charged(),
            rate=output.rate,
            valid=valid,
            opponent=opponent,
        )
        if self.equivariance is not None:
            terms = self._with_equivariance(terms, pixels, output, transformation, scale.detach())
        return terms if samples == 1 else importance_weighted(terms, samples)

    def _with_equivariance(
        self, terms: Terms, pixels: Tensor, output: Output, transformation: Transformation | None, scale: Tensor
    ) -> Terms:
        """The terms with the distortion of transformed reconstructions added to the loss; no other term of the account changes."""
        config = self.config.objective.equivariance
        distortion, error = torch.zeros_like(terms.loss), torch.zeros_like(terms.loss)
        if transformation is not None and output.transformed is not None:
            factor = pixels.shape[-1] // output.mean.shape[-1]
            targets = transform(pixels, transformation, factor)
            charged = config.weight * self.objective.distortion(targets, output.transformed, scale=scale)
            distortion = distortion.index_add(0, transformation.rows, charged)
            made = self.objective.likelihood(scale).reconstruction(output.transformed.detach())
            error.index_add_(0, transformation.rows, (targets - made).abs().flatten(1).mean(1))
        # Of every n images in a row, share n are transformed but for one: the mean over all of them is one over those that are.
        named = {**terms.named, "equivariance": error / config.share}
        return Terms(terms.loss + distortion, named, terms.statistics, {**terms.parts, "equivariance": distortion})

    def standing(self, step: int, images: int) -> list[nn.Parameter]:
        return standing(self.config.experimental, self.module, step=step, images=images)

    def finish_gradients(self, images: int) -> dict[str, Tensor]:
        return {} if self.game is None else self.game.finish_gradients(images)

    def update(self, means: dict[str, Tensor], images: int, found_inf: Tensor, lr_factor: float) -> None:
        self.scale.update(means["scale_moment"], found_inf, means.get("valid_share"))
        self.kl.update(means, images, found_inf)
        if self.game is not None:
            self.game.update(means, images, found_inf, lr_factor)

    def scalars(self, means: dict[str, float], images: int) -> dict[str, float]:
        objective = self.config.objective
        shown = self.kl.scalars(images)
        likelihood = self.likelihood(self.module)
        if isinstance(likelihood, LocationScale):
            shown["likelihood_scale"] = float(likelihood.scale)
        elif "log_scale" in means:
            shown["geometric_mean_scale"] = math.exp(means["log_scale"])
        dims = self.config.data.channels * self.config.data.resolution**2
        if likelihood.discrete and "elbo_nats" in means:
            shown["bits_per_dim"] = bits_per_dim(means["elbo_nats"], dims * means.get("valid_share", 1))
        if means.get("mean_squared_error", 0) > 0:
            errors = {k: means[k] for k in ("mean_absolute_error", "mean_squared_error")}
            shown["effective_beta"] = effective_beta(objective, **errors, dims=dims, weight=shown["kl_weight"])
        if "kl_nats" in means:
            c, h, w = self.latent_shape
            shown["kl_nats_per_latent"] = means["kl_nats"] / (c * h * w)
        if self.game is not None:
            shown |= self.game.scalars()
        self.monitor.training(means | shown, images)
        if self.accelerator.num_processes > 1:
            self._share()
        if self.bad:
            shown["bad_images"] = len(self.bad)
        return shown

    def validation_batches(self) -> ValidationSet:
        """This process's share of the fixed validation crops."""
        share = -(-self.config.train.batch_size // self.accelerator.num_processes)
        return ValidationSet(
            self.validation_source,
            self.config.data,
            seed=self.config.train.seed,
            batch_size=min(share, self.config.train.microbatch or share),
            latent_shape=self.latent_shape,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def measure(self, module: Autoencoder) -> dict[str, float]:
        if self.accelerator.num_processes > 1:
            self._share()
        measured = evaluation.evaluate(
            module.vae,
            self.validation_batches(),
            device=self.accelerator.device,
            recipe=self.recipe,
            likelihood=self.likelihood(module),
            family=module.family(),
        )
        self._note_bad(list(measured.bad.items()))
        return measured.scalars()

    def held_out_loss(self, scalars: dict[str, float], images: int) -> float:
        """NLL + beta KL in nats an image, at the beta of the beta-VAE that has this objective's minimum; no auxiliary loss is in it."""
        errors = {k: scalars[k] for k in ("mean_absolute_error", "mean_squared_error")}
        dims = self.config.data.channels * self.config.data.resolution**2
        beta = effective_beta(self.config.objective, **errors, dims=dims, weight=self.kl.scalars(images)["kl_weight"])
        return scalars["nll_nats"] + beta * scalars["kl_nats"]

    def validated(self, module: Autoencoder, scalars: dict[str, float], step: int) -> None:
        if self.accelerator.is_main_process:
            self._draw(module, step)
        self.monitor.validation(scalars, min(step * self.config.train.batch_size, self.total_images))

    @torch.no_grad()
    def _draw(self, module: Autoencoder, step: int) -> None:
        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        wanted = self.config.log.grid_images
        crops = ValidationSet(
            self.validation_source, self.config.data, seed=self.config.train.seed, batch_size=wanted, latent_shape=self.latent_shape
        )
        # Spread over the set: crops of one photo follow each other.
        chosen = spread(len(crops), wanted).tolist()
        batch = crops.batch(chosen).to(self.accelerator.device)
        images = to_images(batch.pixels, self.recipe, batch.valid)
        posterior, family = encode(module.vae, images), module.family()
        reconstruction = decode(module.vae, posterior.mode() if family is None else family.mode(posterior))
        originals, reconstructions = Preview.of(self.config.data).pixels(images, reconstruction, valid=batch.valid)
        grid(originals, reconstructions, columns=8).save(folder / f"step-{step:08d}.png")

    def alarms(self) -> AlarmNews:
        return self.monitor.news()

    def held(self) -> dict[str, HasTensors]:
        return {"controllers": self.scale, "kl_control": self.kl, **({} if self.game is None else self.game.held())}

    def state(self) -> dict[str, Any]:
        return {"bad": self.bad, "levels": self.levels, "monitor": self.monitor.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.bad, self.levels = dict(state["bad"]), state["levels"]
        if "monitor" not in state:
            raise UsageError("this checkpoint is of an older version, without the state of the alarms; start anew, with init_from its run")
        self.monitor.load_state(state["monitor"])
        self._list_bad()
